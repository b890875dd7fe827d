"""`jobs/report.py --ranking`: the scores a run selected by against fresh ones."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from tiny_run import ARCH, write_arm

from raysed.config import DataConfig, Experiment, ModelConfig, SelectConfig
from raysed.core.networks import build
from raysed.errors import UsageError
from raysed.io.checkpoint import unpack
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage
from raysed.io.store import Store
from raysed.report import ranking


def test_chance_scores_rank_as_chance_does_and_fresh_ones_perfectly(
    tiny_store, tiny_run, tmp_path, monkeypatch
):
    store, ledger = Store.open(tiny_store), Ledger(Storage(tiny_run))
    manifests = ledger.manifests()
    found = ranking.rankings(ledger, manifests, store)
    assert [(r["cycle"], r["tiles"]) for r in found] == [(1, 20), (2, 20)]
    net = build(ARCH, 3, 0).eval()
    net.load_state_dict(unpack(ledger.read(manifests[0], "model.safetensors"), "model.safetensors"))
    scores = ledger.table(manifests[1], "scores.parquet")
    fresh = ranking.entropies(net, store, scores["tile_id"].to_pylist())
    assert found[0]["spearman"] == pytest.approx(
        pd.DataFrame({"used": scores["entropy"].to_numpy(), "fresh": fresh})
        .corr("spearman")
        .loc["used", "fresh"]
    )
    own = set(np.argsort(-scores["entropy"].to_numpy())[:6]) & set(np.argsort(-fresh)[:6])
    assert found[0]["overlap"] == len(own) / 6
    honest = pa.table({"tile_id": scores["tile_id"], "entropy": fresh, "age": np.full(20, 3)})
    monkeypatch.setattr(Ledger, "table", lambda *_: honest)
    again = ranking.rankings(ledger, manifests, store)
    assert [(r["spearman"], r["overlap"], r["age"]) for r in again] == [(pytest.approx(1), 1, 3)] * 2
    assert ranking.as_table(again).splitlines()[1].split() == ["2", "20", "1.000", "1.000", "3.0"]


def test_equal_values_share_their_rank():
    assert ranking._ranks(np.array([3.0, 1, 3, 2])).tolist() == [2.5, 0, 2.5, 1]


def test_the_job_says_so_if_there_is_nothing_to_compare(report_job, tiny_run, tiny_store, tmp_path, capsys):
    assert report_job([tiny_run, "--ranking"]) == 0
    assert capsys.readouterr().out.startswith("entropy, scores fresh\ncycle  tiles  spearman")
    passive = Experiment(
        run=str(tmp_path), cycles=1, data=DataConfig(uri=tiny_store), model=ModelConfig(arch=ARCH)
    )
    passive = replace(passive, select=SelectConfig(strategy="uniform", tiles=6))
    write_arm(Storage(str(tmp_path)), passive, Store.open(tiny_store), cycles=1)
    with pytest.raises(UsageError, match="no cycle that selected by entropies"):
        report_job([str(tmp_path), "--ranking"])
