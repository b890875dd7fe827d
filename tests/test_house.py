"""The house: imports go down only, only `cluster` knows Ray, nothing is unpickled."""

import ast
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
