"""Figures and the table, on numbers small enough to check by hand."""

import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest

from raysed.io.ledger import Manifest
from raysed.io.storage import Storage
from raysed.report import figures
from raysed.report.summary import summarise, table


def manifests(values: list[float | None]) -> list[Manifest]:
    return [
        Manifest(c, {}, {"val": {"iou": {"x": v}, "miou": v}, "seconds": {"train": 1.0, "total": 1.0}})
        for c, v in enumerate(values)
    ]


def colors_of(svg: str) -> set[str]:
    return set(re.findall(r"#[0-9a-f]{6}", svg.lower()))


def test_an_arm_keeps_its_colour_in_every_figure():
    arms = {"uniform": manifests([0.1, 0.2]), "entropy": manifests([0.2, 0.1])}
    shares = {"uniform": [0.1, 0.2], "entropy": [0.3, 0.1]}
    bars = {"uniform": {"x": 0.4}, "entropy": {"x": 0.2}}
    expected = {figures.color_of(arms, a).lower() for a in arms}
    assert len(expected) == 2
    for svg in (
        figures.metric_curves(arms, [("val", "miou")]),
        figures.class_curves(arms, ["x"]),
        figures.share_curves(shares, "t", first=1),
        figures.share_bars({"x": 0.5}, bars, "t"),
    ):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert expected <= colors_of(svg)
    assert not expected & {c.lower() for c in figures.PHASES.values()}


def test_an_arm_that_a_panel_lacks_takes_no_colour_of_the_others():
    cost, values = np.array([[1.0, 2.0]]), np.array([[0.1, 0.2]])
    arms = dict.fromkeys(("ceiling", "uniform", "defensive"), (cost, values))
    svg = figures.band_curves({"tiles": arms, "labels bought": {"defensive": arms["defensive"]}})
    drawn = {
        c: svg.lower().count(f"stroke: {figures.color_of(arms, a).lower()}")
        for c, a in zip("cud", arms, strict=True)
    }
    assert drawn["d"] == drawn["c"] + 1 == drawn["u"] + 1


def test_colours_that_come_again_have_another_style():
    arms = [f"arm{k}" for k in range(7)]
    assert len({(figures.color_of(arms, a), figures.style_of(arms, a)) for a in arms}) == 7
    bars = figures.share_bars({"x": 0.5}, {a: {"x": 0.1} for a in arms}, "t")
    assert all(a in bars for a in arms)


def test_a_class_without_truth_leaves_a_gap():
    arms = {"uniform": manifests([None, None, None])}
    assert ElementTree.fromstring(figures.class_curves(arms, ["x"])).tag.endswith("svg")
    assert figures.moving_average([np.nan, 1.0, np.nan, 3.0], 2).tolist()[1:] == [1.0, 1.0, 3.0]


def test_seconds_of_all_arms_share_a_scale():
    fast, slow = manifests([0.1, 0.1]), manifests([0.1, 0.1])
    for m in slow:
        m.record["seconds"] = {"train": 80.0, "total": 80.0}
    svg = figures.seconds_bars({"uniform": fast, "entropy": slow}, ["uniform"])
    assert ">80<" in re.sub(r"\s", "", svg)


def test_a_long_run_makes_a_small_figure():
    rng = np.random.default_rng(0)
    arms = {a: manifests(rng.random(100).tolist()) for a in ("uniform", "entropy")}
    assert len(figures.metric_curves(arms, [("val", "miou")])) < 40_000
    assert len(figures.seconds_bars(arms, list(arms))) < 120_000


def test_ratios_compare_only_cycles_that_both_arms_have(run_copy):
    shutil.rmtree(run_copy / "cycle_0002")
    path = run_copy / "baseline" / "cycle_0002" / "manifest.json"
    path.write_text(path.read_text().replace('"total": 2.5', '"total": 900'))
    ratios = summarise(Storage(str(run_copy)))["ratios"]
    assert ratios["active/passive seconds"] == pytest.approx(5.5 / 2.5)
    assert ratios["active/passive seconds a cycle"] == pytest.approx(5.5 / 2.5)


def test_a_run_continued_under_another_commit_or_on_other_machines_says_so(run_copy):
    path = run_copy / "cycle_0000" / "manifest.json"
    path.write_text(path.read_text().replace("abc123", "older0").replace('"workers": 1', '"workers": 2'))
    summary = summarise(Storage(str(run_copy)))
    assert summary["commits"] == ["older0", "abc123"]
    assert summary["commit"] == "abc123"
    machines = ["2 cores of c: 1 workers on cpu, 1 threads", "2 cores of c: 2 workers on cpu, 1 threads"]
    assert sorted(summary["machines"]) == machines
    json.dumps(summary, allow_nan=False)


def test_the_table_keeps_to_100_columns_and_its_columns_apart(tiny_run):
    summary = summarise(Storage(tiny_run))
    for arm in summary["arms"].values():
        arm["iou"]["a class whose name is far too long for any table"] = 0.25
    lines = table(summary).splitlines()
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if "a class whose" in line)
    assert row.split()[-3:] == ["0.2500", "0.2500", "+0.0000"]
