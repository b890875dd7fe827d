import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from raysed.config import ClusterConfig, Experiment, OptimConfig, SelectConfig
from raysed.core import metrics
from raysed.core.acquisition import STRATEGIES, Selection, Strategy
from raysed.errors import DataError, RunHeldError, StorageError, UsageError
from raysed.experiments import PRESETS
from raysed.io import ledger as module
from raysed.io.ledger import (
    Lease,
    Ledger,
    choose,
    config_hash,
    difference,
    folder,
    kept,
    selection_table,
    table_bytes,
    verify,
)
from raysed.io.storage import Storage, digest

IDS = [f"t{i:02d}" for i in range(20)]
INDEX = pa.table({"tile_id": IDS, "label_offset": pa.array([1] * 20, pa.int64())})
EXP = Experiment(cycles=4, select=SelectConfig(strategy="entropy"))


def commit(ledger: Ledger, cycle: int, exp: Experiment = EXP) -> None:
    entropy = np.random.default_rng(cycle).random(20)
    scores = pa.table({"tile_id": IDS, "entropy": entropy})
    selection = choose(exp, cycle, scores=scores, index=INDEX, state={}, excluded={"t03"})
    files = {
        "model.safetensors": b"m%d" % cycle,
        "optimizer.safetensors": b"o%d" % cycle,
        "scores.parquet": table_bytes(scores),
        "selected.parquet": table_bytes(selection_table(selection)),
        "state.json": json.dumps({"strategy": {}, "excluded": ["t03"], "quarantine": []}).encode(),
    }
    counts = np.array([[8, 1], [cycle, 5]])
    record = {
        "config_hash": config_hash(exp),
        "scoring_weights": digest(b"m%d" % (cycle - 1)),
        "tiles": len(selection.tile_ids),
        "nodes": {"visit": {"one": len(selection.tile_ids)}},
        "train": {"loss": 1.0 / (cycle + 1)},
        "val": {**metrics.scores(counts, ["field", "road"]), "counts": counts.tolist()},
    }
    ledger.commit(cycle, files, lambda: record)
    ledger.prune(cycle)


@pytest.fixture
def run(tmp_path):
    ledger = Ledger(Storage(str(tmp_path / "run")), epoch=1)
    ledger.open(EXP, "data")
    for cycle in range(4):
        commit(ledger, cycle)
    return ledger


def test_an_honest_run_verifies_and_equals_itself(run):
    assert verify(run, INDEX) == []
    assert difference(run, run) == []


def test_what_dead_attempts_have_left_is_collected_and_nothing_else(run):
    kept = set(run.storage.list())
    open_cycle = {f"{folder(4, 2)}/manifest.json", f"{folder(4)}/by_9_scores.parquet"}
    left = {f"{folder(c)}/by_9_{n}" for c in (0, 1, 3) for n in ("model.safetensors", "scores.parquet")}
    for path in open_cycle | left:
        run.storage.write(path, b"left")
    assert run.resume_point(lambda _: None).cycle == 3
    assert set(run.storage.list()) == kept | open_cycle
    assert verify(run, INDEX) == []


def test_a_cycle_without_manifest_does_not_count_and_can_be_committed_again(run):
    run.storage.remove(f"{folder(3)}/manifest.json")
    assert [m.cycle for m in run.manifests()] == [0, 1, 2]
    commit(run, 3)
    assert [m.cycle for m in run.manifests()] == [0, 1, 2, 3]


def test_a_committed_cycle_is_not_committed_twice(run):
    with pytest.raises(RunHeldError, match="committed by another driver"):
        commit(run, 3)


def test_verify_finds_a_flipped_byte_and_a_selection_that_does_not_follow(run, tmp_path):
    path = f"{run.storage.uri}/{folder(1)}/scores.parquet"
    with open(path, "r+b") as file:
        file.seek(30)
        file.write(b"\xff")
    assert any("cycle 1" in line and "sha256" in line for line in verify(run, INDEX))
    other = Ledger(Storage(str(tmp_path / "cheat")), epoch=1)
    other.open(EXP, "data")
    commit(other, 0)
    manifest = json.loads(other.storage.read(f"{folder(0)}/manifest.json"))
    forged = table_bytes(selection_table(module.Selection(["t01"], [1.0], ["entropy 9"])))
    manifest["files"]["selected.parquet"] = {"bytes": len(forged), "sha256": module.digest(forged)}
    other.storage.write(f"{folder(0)}/selected.parquet", forged)
    other.storage.write(f"{folder(0)}/manifest.json", json.dumps(manifest).encode())
    assert any("replayed selection differs" in line for line in verify(other, INDEX))


def test_quarantined_tiles_are_never_selected(run):
    for manifest in run.manifests():
        assert "t03" not in run.table(manifest, "selected.parquet")["tile_id"].to_pylist()


def test_resume_falls_back_to_the_last_good_cycle_and_says_so(run):
    said = []
    assert run.resume_point(said.append).cycle == 3
    run.storage.write(f"{folder(3)}/model.safetensors", b"rotten")
    assert run.resume_point(said.append).cycle == 2
    assert "cycle 3 is not used" in said[0]
    assert len(run.manifests()) == 3


def test_a_run_without_any_good_cycle_is_refused_and_left_alone(run):
    for cycle in range(4):
        run.storage.write(f"{folder(cycle)}/model.safetensors", b"rotten")
    with pytest.raises(DataError, match="none of its 4 committed cycles"):
        run.resume_point(lambda _: None)
    assert len(run.manifests()) == 4


def test_a_driver_overtaken_twice_writes_nothing(run):
    before = run.storage.read(f"{folder(3)}/model.safetensors")
    run.storage.write(
        "leases/000004.json", b'{"pid": 7, "host": "there"}'
    )  # epochs 2 and 3 have come and gone
    with pytest.raises(RunHeldError, match="taken this run over"):
        run.commit(3, {"model.safetensors": b"zombie"}, dict)
    assert run.storage.read(f"{folder(3)}/model.safetensors") == before


@pytest.mark.parametrize(("epoch", "start"), [(2, 1), (1, 2)])
def test_a_writer_that_slept_over_a_takeover_leaves_the_committed_files_alone(run, monkeypatch, epoch, start):
    """It was paused after it had looked for a newer lease, and wakes when another has committed the same cycle."""
    run.storage.remove(f"{folder(3)}/manifest.json")
    other, write = Ledger(run.storage, epoch, start), Storage.write

    def wake(self: Storage, path: str, data: bytes) -> None:
        monkeypatch.setattr(Storage, "write", write)
        if epoch > 1:
            write(self, "leases/000002.json", b'{"pid": 7, "host": "there"}')
        commit(other, 3)
        write(self, path, data)

    monkeypatch.setattr(Storage, "write", wake)
    with pytest.raises(RunHeldError):
        run.commit(3, dict.fromkeys(run.manifests()[2].files, b"zombie"), dict)
    assert run.storage.read(f"{folder(3)}/model.safetensors") == b"zombie"
    assert verify(run, INDEX) == []
    assert run.read(run.manifests()[3], "model.safetensors") == b"m3"
    for cycle in range(4, 8):
        commit(other, cycle)
    assert not [p for p in run.storage.list(folder(3)) if p.endswith("model.safetensors")]


def test_retention_keeps_the_newest_and_every_tenth(tmp_path):
    ledger = Ledger(Storage(str(tmp_path)), epoch=1)
    ledger.open(EXP, "data")
    for cycle in range(24):
        commit(ledger, cycle)
    paths = ledger.storage.list()
    for name in ("model.safetensors", "optimizer.safetensors"):
        there = {c for c in range(24) if f"{folder(c)}/{name}" in paths}
        assert there == {c for c in range(24) if kept(name, c, 23)}
    assert {c for c in range(24) if f"{folder(c)}/model.safetensors" in paths} == {0, 10, 20, 21, 22, 23}
    assert {c for c in range(24) if f"{folder(c)}/optimizer.safetensors" in paths} == {22, 23}
    assert verify(ledger, INDEX) == []


def test_another_configuration_is_refused_with_the_difference(run):
    changed = replace(EXP, optim=OptimConfig(lr=0.1))
    with pytest.raises(UsageError, match=r"optim\.lr: 5e-05 there, 0\.1 now"):
        run.open(changed, "data")
    with pytest.raises(UsageError, match="data set: data there, other now"):
        run.open(EXP, "other")
    run.open(replace(EXP, cluster=ClusterConfig(workers=2)), "data")
    assert verify(run, INDEX) == []


def test_a_run_that_goes_on_with_another_configuration_remembers_both(run):
    changed = replace(EXP, select=SelectConfig(strategy="entropy", tiles=7), allow_config_change=True)
    run.open(changed, "data")
    commit(run, 4, changed)
    assert run.config(3)[0].select.tiles is None
    assert run.config(4)[0].select.tiles == 7
    assert verify(run, INDEX) == []
    with pytest.raises(UsageError, match=r"select\.tiles: 7 there, None now"):
        run.open(EXP, "data")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"config_hash": "0"}, "not that of config.json"),
        ({"scoring_weights": "0"}, "not those of the cycle 1 before"),
        (
            {"val": {"miou": 0.9, "iou": {"field": 1, "road": 1}, "counts": [[8, 1], [2, 5]]}},
            "val.miou is 0.9, its counts say",
        ),
    ],
)
def test_verify_finds_a_record_that_contradicts_itself(run, change, text):
    path = f"{folder(2)}/manifest.json"
    fields = json.loads(run.storage.read(path))
    fields["record"] |= change
    run.storage.write(path, json.dumps(fields).encode())
    assert any("cycle 2" in line and text in line for line in verify(run, INDEX))


def test_a_torn_manifest_and_a_gap_are_named(run):
    run.storage.remove(f"{folder(1)}/manifest.json")
    assert [line.split()[0] for line in verify(run, INDEX)[-2:]] == [
        f"{folder(c)}/manifest.json" for c in (2, 3)
    ]
    run.storage.write(f"{folder(1)}/manifest.json", b'{"cycle": 1, "fi')
    with pytest.raises(DataError, match=r"cycle_0001/manifest\.json is damaged"):
        run.manifests()


def test_a_run_that_has_committed_nothing_may_begin_anew(tmp_path):
    ledger = Ledger(Storage(str(tmp_path)), epoch=1)
    ledger.open(EXP, "data")
    changed = replace(EXP, optim=OptimConfig(lr=0.1))
    ledger.open(changed, "data")
    assert ledger.config()[0].optim.lr == 0.1


def test_difference_names_what_differs(run, tmp_path):
    other = Ledger(Storage(str(tmp_path / "other")), epoch=1)
    exp = replace(EXP, select=SelectConfig(strategy="entropy", tiles=5))
    other.open(exp, "data")
    for cycle in range(3):
        commit(other, cycle, exp)
    lines = difference(run, other)
    assert any("config select.tiles" in line for line in lines)
    assert "cycles: 4 and 3" in lines
    assert "cycle 0: selected.parquet differs: 3 and 5 rows" in lines
    assert not any("scores.parquet" in line for line in lines)


def test_a_living_holder_keeps_others_out_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    storage = Storage(str(tmp_path))
    with Lease(storage) as held:
        assert held.epoch == 1
        with pytest.raises(RunHeldError, match=f"held by process {os.getpid()} on"), Lease(storage):
            pass
    with Lease(storage) as again:  # a released lease is free at once
        assert again.epoch == 2


def test_a_silent_holder_elsewhere_is_taken_over_and_fenced(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DEAD_AFTER", 1.0)
    storage = Storage(str(tmp_path))
    body = {"host": "elsewhere", "boot": "x", "pid": 1, "token": "y", "beat": 7}
    storage.write("leases/000001.json", json.dumps(body).encode())
    stale = Ledger(storage, epoch=1)
    with Lease(storage) as lease:
        assert lease.epoch == 2
        with pytest.raises(RunHeldError, match="taken this run over"):
            commit(stale, 0)
        commit(Ledger(storage, lease.epoch), 0)


def test_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path):
    code = (
        "import os, sys; from raysed.io.ledger import Lease; from raysed.io.storage import Storage;"
        f"Lease(Storage({str(tmp_path)!r})).__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    import time

    began = time.monotonic()
    with Lease(Storage(str(tmp_path))) as lease:
        assert lease.epoch == 2
    assert time.monotonic() - began < module.DEAD_AFTER / 2


def test_a_storage_that_loses_the_conditional_put_is_refused(tmp_path, monkeypatch):
    """A mock: the buckets at hand all honour it."""

    def overwrite(self: Storage, path: str, data: bytes) -> bool:
        self.write(path, data)
        return True

    monkeypatch.setattr(Storage, "create", overwrite)
    with (
        pytest.raises(StorageError, match="overwrites what a conditional put"),
        Lease(Storage(str(tmp_path))),
    ):
        pass


def test_a_selection_knows_the_progress_of_its_run_and_the_state_before(monkeypatch):
    seen = []

    def spy(scores, index, state, budget, rng):
        seen.append(state)
        return Selection(["t01"], [1.0], ["spy"])

    monkeypatch.setitem(STRATEGIES, "spy", Strategy(spy))
    for cycles, cycle in ((5, 0), (5, 1), (5, 4), (1, 0)):
        exp = Experiment(cycles=cycles, select=SelectConfig(strategy="spy"))
        choose(exp, cycle, scores=None, index=INDEX, state={"kept": 7}, excluded=set())
    assert seen == [{"kept": 7, "protocol": "reselect", "progress": p} for p in (0.0, 0.25, 1.0, 0.0)]


def test_a_strategy_whose_scores_are_not_there_is_refused():
    exp = Experiment(cycles=4, select=SelectConfig(strategy="reducible-loss"))
    scores = pa.table({"tile_id": IDS, "loss": np.ones(20)})
    with pytest.raises(UsageError, match="reducible-loss needs the scores irreducible"):
        choose(exp, 0, scores=scores, index=INDEX, state={}, excluded=set())
    with pytest.raises(UsageError, match="irreducible, loss"):
        choose(exp, 0, scores=None, index=INDEX, state={}, excluded=set())


def test_a_commit_inside_a_cycle_is_found_again_until_the_cycle_is_committed(run):
    files = {"model.safetensors": b"half", "state.json": b"{}"}
    record = {"config_hash": config_hash(EXP)}
    for step in (2, 4, 6):
        run.commit(4, files, lambda: record, step)
    with pytest.raises(RunHeldError, match="step_000006 was committed by another driver"):
        run.commit(4, files, lambda: record, 6)
    assert len(run.manifests()) == 4
    assert run.beyond_gap() == []
    found = run.begun(4, config_hash(EXP), pytest.fail)
    assert (found.cycle, found.step, run.read(found, "model.safetensors")) == (4, 6, b"half")
    run.prune_steps(4, before=4)
    assert sorted(run.storage.list(folder(4))) == [
        f"{folder(4, s)}/{n}" for s in (4, 6) for n in ("manifest.json", *files)
    ]
    run.prune_steps(4)
    assert not run.storage.list(folder(4))


def test_a_damaged_or_foreign_commit_inside_a_cycle_is_not_used(run):
    for step, config in ((2, config_hash(EXP)), (4, "of another"), (6, config_hash(EXP))):
        record = {"config_hash": config}
        run.commit(4, {"model.safetensors": b"half"}, lambda r=record: r, step)
    run.storage.write(f"{folder(4, 6)}/model.safetensors", b"rotten")
    said = []
    assert run.begun(4, config_hash(EXP), said.append).step == 2
    assert "step 6 of cycle 4 is not used" in said[0]
    assert "another configuration" in said[1]
    assert run.begun(4, config_hash(EXP), pytest.fail).step == 2


def test_a_cycle_with_a_tile_too_few_or_too_many_does_not_verify(run):
    path = f"{folder(2)}/manifest.json"
    manifest = json.loads(run.storage.read(path))
    manifest["record"] |= {"tiles": 4, "nodes": {"visit": {"one": 2, "two": 3}}}
    run.storage.write(path, json.dumps(manifest).encode())
    assert verify(run, INDEX) == ["cycle 2: 5 visits of 4 selected tiles"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_hash_of_a_configuration_survives_its_file(name):
    written = json.loads(json.dumps(PRESETS[name].to_dict()))
    assert config_hash(Experiment.from_dict(written)) == config_hash(PRESETS[name])
