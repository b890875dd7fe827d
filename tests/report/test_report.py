import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from raysed.config import DataConfig, Experiment, SelectConfig
from raysed.core.acquisition import Selection
from raysed.core.metrics import scores
from raysed.io.ledger import Ledger, selection_table, table_bytes
from raysed.io.storage import Storage
from raysed.report import html
from raysed.report.figures import moving_average
from raysed.report.summary import summarise, table

NAMES = ["road", "<script>alert(1)</script>", "never"]
EXP = Experiment(cycles=12, data=DataConfig(uri="/nowhere"), select=SelectConfig(strategy="entropy"))


def record(strategy: str, cycle: int) -> dict:
    rng = np.random.default_rng(cycle + (strategy == "entropy") * 100)
    counts = np.zeros((3, 3), int)
    counts[:2, :2] = rng.integers(1, 50, (2, 2))
    return {
        "strategy": strategy,
        "tiles": 20,
        "quarantined": 0,
        "train": {"loss": 1 / (cycle + 1), "lr": 1e-3},
        "val": {"loss": 0.5, "soft_iou": 0.1, "tiles": 8, **scores(counts, NAMES), "counts": counts.tolist()},
        "scores": {"tiles": 100, "entropy_mean": 1.0} if strategy == "entropy" else None,
        "seconds": {"train": 2.0, "score": 3.0 * (strategy == "entropy"), "total": 4.0 + 4.0 * (strategy == "entropy") + 10 * (cycle == 0)},
        "workers": 1,
        "threads": 1,
        "precision": "fp32",
        "device": "cpu",
        "environment": {"commit": "abc", "command": "python x", "cpu": "some", "cores": 2, "torch": "2"},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    for strategy, where in (("entropy", tmp_path), ("uniform", tmp_path / "baseline")):
        ledger = Ledger(Storage(str(where)), epoch=1)
        ledger.open(replace(EXP, select=SelectConfig(strategy=strategy)), "data")
        for cycle in range(12):
            selected = table_bytes(selection_table(Selection([f"t{cycle}"], [1.0], ["why"])))
            ledger.commit(cycle, {"selected.parquet": selected}, lambda s=strategy, c=cycle: record(s, c))
    return Storage(str(tmp_path))


def test_the_headline_is_the_mean_of_the_last_ten_cycles(run):
    arms = summarise(run)["arms"]
    assert list(arms) == ["uniform", "entropy"]
    for name, arm in arms.items():
        miou = [record(name, c)["val"]["miou"] for c in range(12)]
        assert arm["metrics"]["miou"] == pytest.approx(np.mean(miou[2:]))
        assert arm["final"]["miou"] == miou[-1]
        assert arm["fluctuation"] == pytest.approx(np.std(np.diff(miou)))
        assert arm["iou"]["never"] is None
        assert arm["first_correct_cycle"]["road"] == 0
        assert arm["seconds"]["train"] == 24


def test_ratios_compare_warm_cycles_and_sums(run):
    ratios = summarise(run)["ratios"]
    assert ratios["active/passive seconds a cycle"] == pytest.approx(8 / 4)
    assert ratios["active/passive seconds"] == pytest.approx((8 * 12 + 10) / (4 * 12 + 10))


def test_the_table_shows_both_arms_and_their_difference(run):
    line = next(row for row in table(summarise(run)).splitlines() if row.startswith("miou"))
    _, passive, active, difference = line.split()
    assert float(active) - float(passive) == pytest.approx(float(difference), abs=2e-4)


class Addresses(HTMLParser):
    """Collects whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [
            v for k, v in attrs if k in ("src", "href", "action") and v and not v.startswith(("data:", "#"))
        ]


def test_the_page_asks_no_network_and_escapes_names(run):
    text = html.page(run)
    parser = Addresses()
    parser.feed(text)
    assert parser.found == []
    assert "script" not in parser.tags
    assert "&lt;script&gt;alert(1)" in text
    assert "cannot be read" in text  # the store of this run is gone, and that is said
    assert len(text) < 10_000_000
    assert parser.tags.count("svg") >= 3


def test_a_run_without_cycles_has_a_page_too(tmp_path):
    Ledger(Storage(str(tmp_path)), epoch=1).open(EXP, "data")
    assert "No cycle is committed yet" in html.page(Storage(str(tmp_path)))
    assert table(summarise(Storage(str(tmp_path)))) == "no cycle is committed yet"


def test_moving_average_is_over_what_there_is():
    assert moving_average([1, 2, 3, 4], 2).tolist() == [1, 1.5, 2.5, 3.5]


def test_summary_is_plain_json(run):
    assert json.loads(json.dumps(summarise(run)))["config"]["cycles"] == 12
