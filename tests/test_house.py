"""The house: imports go down only, only `cluster` knows Ray, nothing is unpickled; make takes a Python that works."""

import ast
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "raysed"
ALLOWED = {
    "core": {"core", "errors"},
    "io": {"core", "io", "errors", "config"},
    "cluster": {"core", "io", "cluster", "errors", "config"},
    "report": {"core", "io", "report", "errors", "config"},
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE)


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    floor = path.parent.name
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "raysed":
            assert parts[1] in ALLOWED[floor], f"{floor} must not import {name}"
        assert floor == "cluster" or parts[0] != "ray", f"{floor} must not import ray"


def test_nothing_is_unpickled():
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "jobs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in (
                "pickle.load",
                "pickle.loads",
                "torch.export.load",
                "yaml.load",
                "np.load",
            ), path
            if called == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), path


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("code", "taken"), [(0, "python3.11"), (127, "python3")])
def test_make_takes_python_3_11_only_if_it_can_make_an_environment(tmp_path, code, taken):
    """A shim of a version manager is there and fails, when none of its versions is 3.11."""
    for name, status in (("python3.11", code), ("python3", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    make = ["make", "--no-print-directory", "-f", str(PACKAGE.parent / "Makefile")]
    make += ["--eval", "base: ; @echo $(BASE)", "base"]
    done = subprocess.run(make, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / taken)
