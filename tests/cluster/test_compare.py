"""The paper's comparison as a user runs it: killed, continued, and told from its result files that nothing is left."""

import json
import shutil

import pytest
from processes import error_line, kill_at, run

from raysed.compare import compare
from raysed.errors import UsageError
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_head")
@pytest.mark.timeout(600)
def test_a_killed_comparison_continues_and_repeats_nothing(small_store, tmp_path):
    root, kept = tmp_path / "runs", tmp_path / "kept"
    flags = ["--data", small_store, "--run", str(root), "--results", str(kept), "--cycles", "2", "--select.tiles", "8",
             "--optim.batch", "4", "--optim.micro-batch", "4", "--cluster.threads", "1"]  # fmt: skip
    kill_at("evaluate@1", "compare", *flags, "--only", "b0")
    assert len(Ledger(Storage(str(root / "b0-seed0"))).manifests()) == 1
    done = run("compare", *flags, "--only", "b0,b0-active")
    assert "2 runs, 2 at once" in done.stdout
    assert "b0, seed 0: uniform: continues after cycle 1 of 2" in done.stdout
    assert done.stdout.count("ETA") == 3
    initial = [Ledger(Storage(str(root / f"{n}-seed0"))).config()[0] for n in ("b0", "b0-active")]
    assert [e.select.strategy for e in initial] == ["uniform", "entropy"]
    assert not any(e.baseline for e in initial)
    assert {p.name for p in kept.iterdir()} >= {"b0-seed0.jsonl", "b0-active-seed0.jsonl", "tables.md"}
    before = json.loads((kept / "summary.json").read_text())
    shutil.rmtree(root)
    again = run("compare", *flags, "--only", "b0,b0-active")
    assert again.stdout.count(": finished") == 2
    assert "ETA" not in again.stdout
    assert not root.exists()
    assert json.loads((kept / "summary.json").read_text()) == before
    refused = run("compare", *flags, "--only", "b0", "--optim.lr", "1e-3", code=2)
    assert "optim.lr: 5e-05 there, 0.001 now" in error_line(refused)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--only", "b1"], "--only takes unet-plain, unet, b0, b4, b0-active, got 'b1'"),
        (["--seeds", "x"], "--seeds must be whole numbers"),
        (["--dry-run", "--tiles-per-second", "9"], "--tiles-per-second holds for one architecture"),
        (["--arch", "unet"], "model.arch is what the runs differ in"),
    ],
)
def test_bad_flags_of_a_comparison_are_one_line(small_store, argv, text):
    with pytest.raises(UsageError, match=text):
        compare(None, ["--data", small_store, *argv])
