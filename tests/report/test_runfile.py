"""What the result file of a run says of it, from its run directory."""

import json
from dataclasses import replace

import pytest
from tiny_run import ARCH, CYCLES, write_arm

from raysed.config import DataConfig, Experiment, ModelConfig, PoolConfig, SelectConfig
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage
from raysed.io.store import Store
from raysed.report import runfile
from raysed.report.runfile import picks_of


@pytest.fixture
def experiment(tiny_store, tmp_path):
    return Experiment(
        run=str(tmp_path),
        cycles=CYCLES,
        data=DataConfig(uri=tiny_store),
        model=ModelConfig(arch=ARCH),
        select=SelectConfig(tiles=6),
    )


def test_a_run_that_buys_labels_picks_what_it_buys_not_what_its_cycles_visit(experiment, tiny_store):
    pool = replace(
        experiment,
        cycles=6,
        select=SelectConfig(tiles=6, protocol="pool"),
        pool=PoolConfig(start=0.2, buy=0.1, cycles=2),
    )
    store = Store.open(tiny_store)
    ledger = write_arm(Storage(str(pool.run)), pool, store, cycles=6)
    picks = picks_of(ledger, ledger.manifests(), store, pool)
    assert picks["coverage"] == [0.2, 0.3, 0.4]  # of 20 tiles; a cycle visits up to 6
    assert picks["repeats"] == [0, 0]
    later = [
        t
        for m in ledger.manifests()[1:]
        if "bought.parquet" in m.files
        for t in ledger.table(m, "bought.parquet")["tile_id"].to_pylist()
    ]
    assert len(later) == 4
    shares = picks["regions"]
    assert shares["north"] == pytest.approx(sum(t.startswith("north") for t in later) / 4)


@pytest.mark.parametrize(("cycles", "ended"), [(2, True), (3, False)])
def test_a_run_that_diverged_is_told_from_one_that_went_back_and_came_through(
    experiment, tiny_store, cycles, ended
):
    run, store = Storage(str(experiment.run)), Store.open(tiny_store)
    write_arm(run, replace(experiment, cycles=4), store, cycles=cycles)
    assert Ledger(run).diverged() is None
    told = {"cycle": 2, "steps": [0, 4], "rollbacks": 0, "config_hash": "h"}
    run.write("diverged.json", json.dumps({**told, "tile_ids": ["t"]}).encode())
    found = runfile.collect(run, "uniform", 0, store, evidence=True)
    assert found.facts["diverged"] == told
    assert found.ended_diverged is ended
    run.write(found.path, found.to_bytes())
    assert runfile.read(run, found.path).ended_diverged is ended
