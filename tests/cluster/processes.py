"""Jobs as a user starts them: processes with exit codes, killed and interrupted at named points."""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from raysed import cli

ROOT = Path(__file__).resolve().parents[2]
FAST = [
    *("--arch", "unet:tu-test_resnet", "--select.tiles", "24", "--optim.lr", "1e-3", "--optim.micro-batch", "4"),
    *("--cluster.chunk", "16", "--scorers", "1", "--cluster.reader-cpus", "0.6"),
]  # fmt: skip
"""A small network on few tiles."""
STABLE = [
    *("--optim.ema", "0.99", "--optim.norm-tiles", "32", "--optim.clip", "1", "--optim.weight-decay", "0.01"),
]
"""All stabilisers."""


def command(job: str, *argv: str) -> list[str]:
    return [sys.executable, f"jobs/{job}.py", *argv]


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAYSED_")}
    return {
        **clean,
        "RAYSED_REAL_DATA": os.environ.get("RAYSED_REAL_DATA", ""),
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",  # two actors less to start; test_twin has them
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        **extra,
    }


def run(
    job: str, *argv: str, code: int = 0, timeout: float = 400, **extra: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(job, *argv),
        cwd=ROOT,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one error line; there must be no traceback beside it."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def start(job: str, *argv: str, **extra: str) -> subprocess.Popen[str]:
    """A job that runs on, its output to be read."""
    return subprocess.Popen(
        command(job, *argv), cwd=ROOT, env=environment(**extra), stdout=subprocess.PIPE, text=True
    )


def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], job: str, *argv: str, code: int
) -> subprocess.CompletedProcess[str]:
    """A job in this process, on the Ray that it is connected to: what its start takes is no part of what is tested."""
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [job, *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main(runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["job"])
    assert ended.value.code == code
    said = capsys.readouterr()
    return subprocess.CompletedProcess([job, *argv], code, said.out, said.err)


def kill_at(point: str, job: str, *argv: str, **extra: str) -> None:
    """Start a job that waits at a named point and SIGKILL its process group there."""
    process = subprocess.Popen(
        command(job, *argv), cwd=ROOT, env=environment(RAYSED_HOLD=point, **extra), stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    children = []
    try:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("holding at"):
                phase, _, cycle = point.partition("@")
                assert line.split() == ["holding", "at", phase, "of", "cycle", cycle]
                break
        else:
            pytest.fail(f"the job ended before {point}")
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        psutil.wait_procs(children, timeout=30)
