"""Secrets stay where they are, paths below their root, and nothing goes through a shell."""

import ast
import json
import logging
import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysed.config import Experiment
from raysed.core.tiles import check_id
from raysed.errors import UsageError
from raysed.io.provenance import environment
from raysed.io.storage import Storage

ROOT = Path(__file__).resolve().parents[1]
CODE = [*(ROOT / "raysed").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
CANARY = "canary0123456789"


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://key:{CANARY}@bucket/tiles",
        f"s3://bucket/tiles?secret_key={CANARY}",
        f"https://user:{CANARY}@host/tiles",
        f"gs://bucket/tiles?token={CANARY}",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri):
    with pytest.raises(UsageError) as caught:
        Storage(uri)
    assert CANARY not in str(caught.value)


def test_what_is_recorded_of_a_run_holds_nothing_of_the_environment(monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    assert CANARY not in json.dumps(environment())
    assert CANARY not in json.dumps(Experiment(run="s3://bucket/run").to_dict())


NASTY = st.sampled_from(
    ["..", ".", "", "a", "a b", "\0", "\\", "\n", "%2e%2e", "~", "ａ", "..\\", "s3:", "x" * 300]
)


@given(st.one_of(st.text(max_size=40), st.lists(NASTY, max_size=6).map("/".join)))
def test_a_path_stays_below_its_root_or_is_refused(path):
    for storage, root in ((Storage("/data/run"), "/data/run"), (Storage("s3://bucket/run"), "bucket/run")):
        try:
            full = storage._full(path)
        except UsageError:
            continue
        assert full.startswith(root + "/")
        assert os.path.normpath(full) == full.rstrip("/")


@given(st.one_of(st.text(max_size=40), st.lists(NASTY, max_size=4).map("/".join)))
def test_an_id_is_one_plain_name_or_refused(name):
    try:
        check_id(name)
    except ValueError:
        return
    assert name.isascii()
    assert os.path.basename(name) == name
    assert name not in ("", ".", "..")
    assert not set(name) & set("/\\\0\n%")


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_goes_through_a_shell_or_is_evaluated(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in (
                "os.system",
                "os.popen",
                "eval",
                "exec",
                "subprocess.getoutput",
            )
            assert not any(k.arg == "shell" for k in node.keywords)


def test_the_package_of_a_job_holds_code_and_neither_data_nor_keys(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    tree, kept, left = tmp_path / "tree", ["jobs/active.py", "raysed/cli.py"], []
    for name in (".gitignore", ".rayignore"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text((ROOT / name).read_text())
    left += [
        "data/t.parquet",
        "runs/a/config.json",
        ".git/config",
        "key.pem",
        "server.key",
        ".env",
        ".env.local",
    ]
    left += [
        ".aws/credentials",
        ".ssh/id_ed25519",
        ".netrc",
        "auth_token",
        "client.p12",
        "credentials.json",
        "venv/bin/python",
        ".venv/bin/python",
        "jobs/sub/.env",
    ]
    for name in kept + left:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    package = tmp_path / "package.zip"
    # what `ray job submit --working-dir .` uploads
    create_package(
        str(tree), package, include_gitignore=True, excludes=[".git"], logger=logging.getLogger("quiet")
    )
    held = {n for n in zipfile.ZipFile(package).namelist() if not n.endswith("/")}
    assert {n for n in held if n.split("/")[0] not in (".gitignore", ".rayignore")} == set(kept)
