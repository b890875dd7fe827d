"""The jobs as a user runs them: processes, exit codes, one line an error; killed and continued."""

import json
import os
import re
import shutil
import signal
import time
import urllib.request

import pyarrow.parquet as pq
import pytest
from processes import FAST, STABLE, error_line, kill_at, run, run_here, start
from safetensors.torch import load, save

from raysed.cluster.local import terminated
from raysed.io.ledger import Ledger, difference, verify
from raysed.io.storage import Storage, digest
from raysed.io.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_head")]
ONE_MORE = str(len(os.sched_getaffinity(0)) + 1)
"""Workers than CPUs."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_killed_at_five_points_ends_equal_to_an_undisturbed_one(small_store, tmp_path):
    flags = ["--data", small_store, "--cycles", "5", "--select", "entropy", *FAST]
    calm, torn = str(tmp_path / "calm"), str(tmp_path / "torn")
    run("active", *flags, "--run", calm)
    for cycle, point in enumerate(("score", "select", "train", "evaluate", "commit")):
        kill_at(f"{point}@{cycle}", "active", *flags, "--run", torn)
        assert len(Ledger(Storage(torn)).manifests()) == cycle
    done = run("active", *flags, "--run", torn)
    assert "continues after cycle 4 of 5" in done.stdout
    assert difference(Ledger(Storage(calm)), Ledger(Storage(torn))) == []
    assert verify(Ledger(Storage(torn)), Store.open(small_store).split("train")) == []
    assert run("report", "--diff", calm, torn).stdout.strip().endswith("equal")
    run("report", torn, "--verify")
    again = run("active", *flags, "--run", torn)
    assert "all cycles are committed already" in again.stdout
    assert "mean of the last 5 cycles" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("point", "more"), [("evaluate@2", []), ("train@1", ["--workers", "2", *STABLE])])
def test_a_run_killed_inside_a_cycle_continues_after_its_last_step(small_store, tmp_path, point, more):
    """With overlapped scores: what the next selection needs is in the ledger, weights of two cycles ago; by-product ones are with those
    in a bucket.
    """
    flags = ["--data", small_store, "--cycles", "3", "--select", "entropy", "--select.scores", "overlapped"]
    flags += ["--cluster.commit-every-steps", "1", *FAST, *more]
    calm, torn = str(tmp_path / "calm"), str(tmp_path / "torn")
    run("active", *flags, "--run", calm)
    kill_at(point, "active", *flags, "--run", torn)
    cycle = int(point[-1])
    steps = [p for p in Storage(torn).list(f"cycle_{cycle:04d}") if p.endswith("manifest.json")]
    assert steps == [f"cycle_{cycle:04d}/step_000001/manifest.json"]
    done = run("active", *flags, "--run", torn)
    assert f"continues after cycle {cycle} of 3 and step 1 of cycle {cycle + 1}" in done.stdout
    assert not [p for p in Storage(torn).list() if "step_" in p]
    assert difference(Ledger(Storage(calm)), Ledger(Storage(torn))) == []
    assert verify(Ledger(Storage(torn)), Store.open(small_store).split("train")) == []
    scored = [m.record["scores"]["tiles"] for m in Ledger(Storage(torn)).manifests()]
    assert scored == [128] * 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_where_it_first_looks_at_scores_ends_equal_to_an_undisturbed_one(small_store, tmp_path):
    """The pass over the pool that ran beside the cycle before is lost; the weights that it was made with are in the ledger."""
    flags = ["--data", small_store, "--cycles", "4", *FAST, "--select.tiles", "64"]
    flags += ["--select.scores", "overlapped", "--select.options", "tail=1"]
    calm, torn = str(tmp_path / "calm"), str(tmp_path / "torn")
    run("active", *flags, "--run", calm)
    kill_at("train@2", "active", *flags, "--run", torn)
    run("active", *flags, "--run", torn)
    ledger = Ledger(Storage(torn))
    assert difference(Ledger(Storage(calm)), ledger) == []
    assert verify(ledger, Store.open(small_store).split("train")) == []
    assert [m.record["scores"] and m.record["scores"]["tiles"] for m in ledger.manifests()] == [
        None,
        None,
        128,
        128,
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_lets_the_cycle_commit_and_releases_the_run(small_store, tmp_path, ray_head, number, code):
    out = tmp_path / "run"
    process = start("train", "--data", small_store, "--cycles", "200", "--run", str(out), *FAST)
    with terminated(process):
        assert process.stdout
        next(line for line in process.stdout if "/200 " in line)
        seen = gauges(ray_head.metrics_ports[0])
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(60) == code
    assert "summary" in rest
    ledger = Ledger(Storage(str(out)))
    manifests = ledger.manifests()
    assert 0 < len(manifests) < 200
    shown = manifests[int(seen["raysed_cycle"]) - 1].record
    assert seen["raysed_val_miou"] == pytest.approx(shown["val"]["miou"])
    assert seen["raysed_train_loss"] == pytest.approx(shown["train"]["loss"])
    assert b'"beat": -1' in ledger.storage.read(max(ledger.storage.list("leases")))
    assert verify(ledger, Store.open(small_store).split("train")) == []


@pytest.mark.slow
def test_a_signal_in_a_long_cycle_commits_inside_it(small_store, tmp_path):
    """Two workers: both must agree where to stop."""
    out = tmp_path / "run"
    flags = ["--data", small_store, "--run", str(out), *FAST, "--arch", "unet", "--select.tiles", "120"]
    flags += ["--optim.batch", "2", "--optim.micro-batch", "1", "--workers", "2", "--cycles"]
    process = start("train", *flags, "2")
    with terminated(process):
        assert process.stdout
        next(line for line in process.stdout if "1/2 " in line)
        time.sleep(5)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(60) == 143
    assert time.monotonic() - began < 45
    assert re.search(r"stopping: committing after step \d+ of 60", rest)
    assert len(Ledger(Storage(str(out))).manifests()) == 1
    assert re.search(
        r"continues after cycle 1 of 2 and step \d+ of cycle 2", run("train", *flags, "2").stdout
    )
    assert verify(Ledger(Storage(str(out))), Store.open(small_store).split("train")) == []


def gauges(port: int) -> dict[str, float]:
    """What a run shows on the metrics port while it runs, as soon as Ray has passed it on."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            lines = [x for x in page.read().decode().splitlines() if x.startswith("ray_raysed_")]
        if found := {
            x.split("{")[0].removeprefix("ray_"): float(x.split()[-1]) for x in lines if 'arm="uniform"' in x and 'phase=""' in x
        }:  # fmt: skip
            return found
        time.sleep(1)
    pytest.fail("no gauge of the run was shown")


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_two_arms_make_a_summary_and_a_report(small_store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = ["--data", small_store, "--run", str(out), "--cycles", "2", "--workers", "2"]
    flags += [*FAST, "--arch", "efficientunet-b0"]
    done = run_here(monkeypatch, capsys, "active", *flags, "--baseline", code=0)
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["arms"]) == ["uniform", "defensive-entropy"]
    for arm in summary["arms"].values():
        assert arm["cycles"] == 2
        assert arm["tiles_per_cycle"] == 24
    assert summary["ratios"]["active/passive seconds"] > 0
    lines = [line for line in done.stdout.splitlines() if "ETA" in line]
    assert [line.split()[:2] for line in lines] == [
        ["uniform", "1/2"],
        ["uniform", "2/2"],
        ["defensive-entropy", "1/2"],
        ["defensive-entropy", "2/2"],
    ]
    first_round = [m.record["scores"] for m in Ledger(Storage(str(out))).manifests()]
    assert first_round == [None, None]  # which looks at none
    assert (out / "report.html").stat().st_size > 10_000
    assert len((out / "cycles.jsonl").read_text().splitlines()) == 2

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0})  # all of them
    events.Reload()
    assert [e.step for e in events.Scalars("val/miou")] == [0, 1]
    assert [e.step for e in events.Images("examples")] == [0, 1]
    committed = Ledger(Storage(str(out))).manifests()
    for name in ("water", "building"):
        curve = [e.value for e in events.Scalars(f"val_iou/{name}")]
        assert curve == pytest.approx([m.record["val"]["iou"][name] for m in committed], rel=1e-6)
    assert (events.Images("examples")[1].width, events.Images("examples")[1].height) == (3 * 64, 4 * 64)
    refused = run_here(monkeypatch, capsys, "train", *flags, code=2)
    assert "select.strategy: 'defensive-entropy' there, 'uniform' now" in error_line(refused)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_arms_start_from_an_exported_model_and_only_from_that_one(small_store, tmp_path):
    flags = ["--data", small_store, *FAST, "--cycles", "1"]
    run("train", *flags, "--run", str(tmp_path / "first"))
    models = [str(tmp_path / name) for name in ("model", "other")]
    run("export", str(tmp_path / "first"), "--target", models[0])
    shutil.copytree(models[0], models[1])
    fields = json.loads((tmp_path / "other/config.json").read_text())
    weights = load((tmp_path / "other/model.safetensors").read_bytes())
    (tmp_path / "other/model.safetensors").write_bytes(save({n: t + 1 for n, t in weights.items()}))
    fields["_raysed"]["sha256"] = digest((tmp_path / "other/model.safetensors").read_bytes())
    (tmp_path / "other/config.json").write_text(json.dumps(fields))
    tuned = [*("--data", small_store, "--run", str(tmp_path / "tuned"), "--cycles", "2"), *FAST[2:]]
    kill_at("train@1", "active", *tuned, "--baseline", "--init", models[0])
    refused = run("active", *tuned, "--baseline", "--init", models[1], code=2)
    assert "model.sha256: " in error_line(refused)
    moved = str(tmp_path / "moved")
    shutil.move(models[0], moved)
    run("active", *tuned, "--baseline", "--init", moved)
    before = Ledger(Storage(str(tmp_path / "first")))
    firsts = [Ledger(Storage(str(tmp_path / p))) for p in ("tuned", "tuned/baseline")]
    sha = json.loads((tmp_path / "moved/config.json").read_text())["_raysed"]["sha256"]
    for ledger in firsts:
        experiment, _ = ledger.config()
        assert (experiment.model.sha256, experiment.model.arch) == (sha, "unet:tu-test_resnet")
        losses = [m.record["train"]["loss"] for m in (ledger.manifests()[0], before.manifests()[0])]
        assert losses[0] < losses[1]  # it knows something already
        assert verify(ledger, Store.open(small_store).split("train")) == []


@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "arch", ["unet", pytest.param("efficientunet-b4", marks=pytest.mark.slow)]
)  # b0 commits two in the test above
def test_every_architecture_commits_a_cycle(poor_store, tmp_path, monkeypatch, capsys, arch):
    """Of tiles that lack a class, too: it is named and does not count in the loss."""
    flags = ["--data", poor_store, "--run", str(tmp_path / "r"), "--cycles", "1", "--arch", arch]
    flags += ["--select.tiles", "4", "--optim.batch", "2", "--optim.micro-batch", "2"]
    done = run_here(monkeypatch, capsys, "train", *flags, code=0)
    manifest = Ledger(Storage(str(tmp_path / "r"))).manifests()[0]
    assert manifest.record["steps"] == 2
    assert manifest.record["val"]["counts"]
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: class ")]
    assert notes == [
        "note: class water has no pixel in the training tiles and counts in validation; its loss weight is 0"
    ]


@pytest.mark.usefixtures("ray_session")
def test_bad_tiles_beyond_the_budget_end_the_run_with_code_4(damaged_store, tmp_path, monkeypatch, capsys):
    uri, victim = damaged_store
    flags = ["--data", uri, "--cycles", "1", "--select", "entropy", *FAST, "--run", str(tmp_path / "r")]
    done = run_here(monkeypatch, capsys, "active", *flags, code=4)
    assert victim in error_line(done)
    check_quarantine(tmp_path / "r", uri, victim)


def check_quarantine(run_directory, uri, victim):
    """It lists the one bad tile, with the hash it should have had."""
    [row] = pq.read_table(run_directory / "quarantine.parquet").to_pylist()
    [at] = Store.open(uri).locations([victim])
    assert (row["tile_id"], row["expected"]) == (victim, at["sha256"])
    assert f"bytes have sha256 {row['sha256'][:12]}" in row["reason"]


@pytest.mark.slow
def test_bad_tiles_within_the_budget_are_quarantined(damaged_store, tmp_path):
    uri, victim = damaged_store
    flags = ["--data", uri, "--cycles", "1", "--select", "entropy", *FAST, "--data.bad-tile-budget", "0.01"]
    done = run("active", *flags, "--run", str(tmp_path / "r"))
    assert f"tile {victim} is quarantined" in done.stdout
    check_quarantine(tmp_path / "r", uri, victim)


def test_divergence_ends_with_code_5(small_store, tmp_path):
    flags = [
        "--data",
        small_store,
        "--run",
        str(tmp_path / "r"),
        "--cycles",
        "2",
        *FAST,
        "--optim.lr",
        "1e30",
    ]
    done = run("train", *flags, code=5, RAY_ADDRESS="")  # and a Ray that the job starts itself
    assert "training diverged in cycle 0" in error_line(done)
    assert "going back to the last commit, at half the learning rate" in done.stdout
    assert not Ledger(Storage(str(tmp_path / "r"))).manifests()


def test_an_unknown_flag_is_one_line_and_a_code(small_store, tmp_path):
    done = run("train", "--run", str(tmp_path / "r"), "--cycels", "3", code=2, timeout=90)
    assert "did you mean '--cycles'?" in error_line(done)


@pytest.fixture
def stores(small_store, unlabelled_store):
    return {"STORE": small_store, "POOL": unlabelled_store}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--data", "/nowhere"], 2, "no finished tile store at /nowhere"),
        (["--data", "STORE", "--select.tiles", "1000"], 2, "asks for 1000 tiles a cycle, the pool has 128"),
        (["--data", "POOL"], 2, "the pool is empty: the store has no labelled tile in split train"),
        (["--data", "STORE", "--arch", "unett"], 2, "did you mean 'unet'?"),
        (["--data", "STORE", "--select", "reducible-loss"], 2, "give its run, --select.reference"),
        (
            ["--data", "STORE", "--select", "entropi"],
            2,
            "select.strategy must be one of uniform, epoch-queue",
        ),
        (
            ["--data", "STORE", "--workers", ONE_MORE, "--optim.batch", ONE_MORE, "--optim.micro-batch", "1"],
            7,
            "and a CPU for each worker",
        ),
        (["--data", "STORE", "--model.encoder-weights", "/nowhere.pth", *FAST], 2, "no file /nowhere.pth"),
        (["--data", "STORE", "--init", "/nowhere"], 2, "/nowhere is no model folder"),
        (["--data", "s3://key:secret@bucket/x"], 2, "must hold no credentials"),
    ],
)
def test_bad_input_is_one_line_and_a_code(stores, tmp_path, monkeypatch, capsys, argv, code, text):  # noqa: PLR0917
    argv = ["--run", str(tmp_path / "r"), *(stores.get(a, a) for a in argv)]
    assert text in error_line(run_here(monkeypatch, capsys, "train", *argv, code=code))
    assert not (tmp_path / "r" / "cycle_0000").exists()
