"""What a figure was measured with: recorded beside every result."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions, commit (with + if files were changed; a hash of the code where there is no repository), processor, cores, command line of this process."""
    return {
        **{
            name: version(name)
            for name in ("raysed", "torch", "ray", "numpy", "pyarrow", "segmentation-models-pytorch")
        },
        "commit": _commit(),
        "python": platform.python_version(),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "command": " ".join(["python", *sys.argv]),
    }


def is_committed(path: Path) -> bool:
    """Whether a file stands in the newest commit of its git repository just as it is on disk."""
    git = ["git", "-C", str(path.resolve().parent)]
    try:
        tree = subprocess.run(
            [*git, "rev-parse", f"HEAD:./{path.name}"], capture_output=True, text=True, timeout=10, check=True
        )
        here = subprocess.run(
            [*git, "hash-object", path.name], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return tree.stdout == here.stdout


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return f"code {_code_hash()}"  # a submitted job has no .git
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _code_hash() -> str:
    """The first digits of a sha256 over the sources of this package."""
    package, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
