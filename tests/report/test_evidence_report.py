"""Evidence from result files alone: no run directory, and no Ray is started."""

import argparse
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from raysed import compare as series
from raysed import evidence as job
from raysed.config import Experiment
from raysed.core.metrics import scores
from raysed.errors import DivergedError, UsageError
from raysed.io.ledger import Manifest
from raysed.io.storage import Storage
from raysed.io.store import Store
from raysed.report import runfile
from raysed.report.evidence import read_arms as read
from raysed.report.evidence import renew_combined, write_evidence
from raysed.report.judging import METRICS, by_labels, curve, goal, summary_rows, verdict
from raysed.report.runfile import RunFile

CYCLES, SOURCES, NAMES = 12, 6, ["road", "tree", "water"]
KINDS = {"ceiling": "ceiling", "uniform": "passive", "epoch-queue": "passive", "defensive": "active"}
GAIN = {"ceiling": 12, "uniform": 0, "epoch-queue": 2, "defensive": 7}
FILES = {name: name for name in KINDS}
OWN = dict.fromkeys(KINDS, ("select.strategy", "select.protocol"))


def counts_of(arm: str, seed: int, cycle: int) -> np.ndarray:
    """(M, C, C): the hits grow with the cycle and by the arm's gain; what a seed and an image add is the same for all arms."""
    rng = np.random.default_rng([seed, cycle])
    hits = 40 + cycle + GAIN[arm] + rng.integers(0, 6, (SOURCES, 3))
    counts = np.zeros((SOURCES, 3, 3), int)
    for c in range(3):
        counts[:, c, c] = hits[:, c]
        counts[:, c, (c + 1) % 3] = 100 - hits[:, c]
    return counts


def run_file(arm: str, seed: int, cycles: int = CYCLES) -> RunFile:
    full = [counts_of(arm, seed, t) for t in range(cycles)]
    tiles = 100 if arm == "ceiling" else 20
    manifests = []
    for t, counts in enumerate(full):
        record = {
            "strategy": arm,
            "tiles": tiles,
            "estimated": 16,
            "labelled": 100,
            "train": {"loss": 1.0},
            "val": {"loss": 1.0, "soft_iou": 0.1, **scores(counts.sum(0), NAMES)},
            "scores": {"tiles": 10, "side": 32, "entropy_mean": 1.0} if arm == "defensive" else None,
            "seconds": {"total": tiles / 10 + (0.09 if arm == "defensive" else 0)},
        }
        manifests.append(Manifest(t, {"manifest.json": {"sha256": f"{t:064d}", "bytes": 0}}, record))
    picks = {
        "coverage": [0.2, 0.4],
        "repeats": [0.1],
        **{k: dict.fromkeys(NAMES, 1 / 3) for k in ("classes", "pool_classes", "regions", "pool_regions")},
    }
    facts = {
        "config": Experiment(seed=seed, cycles=CYCLES).to_dict(),
        "data": {"name": "made up", "hash": "ab" * 32, "tile_size": 64, "train": 100, "val": 30},
        "environment": {"commit": "c", "command": "python jobs/evidence.py", "cpu": "x", "cores": 2},
        "device": "cpu",
        "precision": "fp32",
        "workers": 1,
        "threads": 1,
        "replay": [],
        "picks": picks,
        "sources": {"names": [f"s{m}" for m in range(SOURCES)], "counts": [c.tolist() for c in full[-10:]]},
    }
    return RunFile(arm, seed, facts, manifests)


@pytest.fixture
def results(tmp_path):
    storage = Storage(str(tmp_path))
    for arm in KINDS:
        for seed in (0, 1, 2):
            found = run_file(arm, seed)
            storage.write(found.path, found.to_bytes())
    return storage


def test_a_clear_win_is_one_against_the_best_passive_arm(results):
    text = write_evidence(results, KINDS, FILES, "dev", own=OWN)
    rows = json.loads(results.read("summary.json"))
    assert len(rows) == len(KINDS) * len(METRICS)
    found = {(r["arm"], r["metric"]): r for r in rows}
    ours = found["defensive", "miou"]
    assert ours["best_passive"] == "epoch-queue"
    assert ours["kind"] == "active"
    assert ours["seeds"] == [0, 1, 2]
    last = [
        [scores(counts_of(a, s, t).sum(0), NAMES)["miou"] for t in range(2, 12)]
        for a in ("defensive", "epoch-queue")
        for s in range(3)
    ]
    assert ours["mean"] == pytest.approx(np.mean(last[:3]))
    assert ours["minus_best_passive"] == pytest.approx(np.mean(last[:3]) - np.mean(last[3:]))
    assert 0 < ours["ci_low"] < ours["minus_best_passive"] < ours["ci_high"]
    assert ours["interval"] == "seeds and sources"
    assert found["defensive", "aulc_compute"]["interval"] == "seeds"
    assert verdict(ours) == "better"
    assert verdict(found["uniform", "miou"]) == "worse"
    assert (
        verdict({**found["defensive", "cv"], "ci_low": -0.2, "ci_high": -0.1}) == "better"
    )  # less is better
    assert found["epoch-queue", "miou"]["minus_best_passive"] is None
    assert found["ceiling", "time_ratio"]["mean"] == pytest.approx(5)
    assert all(goal(rows, "defensive").values())
    assert next(iter(goal(rows, "defensive"))) == "miou better"
    assert "| defensive | better |" in text
    assert not next(iter(goal(rows, "uniform").values()))
    assert results.read("curves.svg").startswith(b"<svg")
    assert write_evidence(results, KINDS, FILES, "dev", own=OWN) == text


def test_the_ambiguous_share_stands_beside_the_pool_s_where_it_is_known(tmp_path):
    storage = Storage(str(tmp_path))
    for seed, share in ((0, 0.5), (1, 0.3)):
        for arm in ("uniform", "defensive"):
            found = run_file(arm, seed)
            if arm == "defensive":
                found.facts["picks"] |= {"ambiguous": share, "pool_ambiguous": 0.13}
            storage.write(found.path, found.to_bytes())
    lines = write_evidence(storage, KINDS, FILES, "dev", own=OWN).splitlines()
    assert "| defensive | 0.400 | 0.100 | 0.400 / 0.130 | yes |" in lines
    assert "| uniform | 0.400 | 0.100 | not known | yes |" in lines


def test_compute_counts_passes_backward_and_scoring_at_its_side():
    assert curve(run_file("uniform", 0))["compute"][:2].tolist() == [76, 152]
    assert curve(run_file("defensive", 0))["compute"][0] == 76 + 10 / 4
    assert curve(run_file("ceiling", 0))["tiles"][-1] == 1200


def test_curves_are_compared_where_all_competing_arms_have_values(results):
    rows = {(r["arm"], r["metric"]): r["mean"] for r in summary_rows(read(results, KINDS, FILES), "dev")}
    assert rows["defensive", "aulc_tiles"] > rows["uniform", "aulc_tiles"]
    assert rows["ceiling", "aulc_tiles"] is None  # its first cycle is five of the others
    assert rows["ceiling", "miou"] > rows["defensive", "miou"]
    longer = [replace(run_file("uniform", s, 2 * CYCLES), name="epoch-queue") for s in range(3)]
    for found in longer:
        results.write(found.path, found.to_bytes())
    again = {(r["arm"], r["metric"]): r["mean"] for r in summary_rows(read(results, KINDS, FILES), "dev")}
    assert again["epoch-queue", "aulc_tiles"] == pytest.approx(rows["uniform", "aulc_tiles"])


def test_the_ceiling_moves_no_other_number(results):
    rows = summary_rows(read(results, KINDS, FILES), "dev")
    others = {k: v for k, v in KINDS.items() if k != "ceiling"}
    assert summary_rows(read(results, others, FILES), "dev") == [r for r in rows if r["kind"] != "ceiling"]


def test_one_seed_has_no_deviation_but_an_interval_over_images(tmp_path):
    storage = Storage(str(tmp_path))
    for arm in ("uniform", "defensive"):
        found = run_file(arm, 0)
        storage.write(found.path, found.to_bytes())
    write_evidence(storage, KINDS, FILES, "dev", own=OWN)
    rows = {(r["arm"], r["metric"]): r for r in json.loads(storage.read("summary.json"))}
    assert rows["defensive", "miou"]["sd"] is None
    assert rows["defensive", "miou"]["ci_low"] is not None
    assert rows["defensive", "miou"]["interval"] == "sources"
    assert rows["defensive", "aulc_tiles"]["ci_low"] is None
    assert rows["defensive", "aulc_tiles"]["p"] is None
    assert math.isfinite(rows["defensive", "aulc_tiles"]["minus_best_passive"])


def test_the_best_passive_arm_is_that_of_the_seeds_that_all_have(tmp_path):
    storage = Storage(str(tmp_path))
    for seed in range(6):
        found = replace(run_file("defensive" if seed == 0 else "uniform", seed), name="uniform")
        storage.write(found.path, found.to_bytes())
    found = run_file(
        "epoch-queue", 0
    )  # better than most of uniform's seeds, worse than the one it can be compared with
    storage.write(found.path, found.to_bytes())
    assert {r["best_passive"] for r in summary_rows(read(storage, KINDS, FILES), "dev")} == {"uniform"}


def test_arms_of_two_protocols_stand_in_one_table(tmp_path):
    storage = Storage(str(tmp_path))
    for arm in ("uniform", "defensive"):
        found = run_file(arm, 0)
        if arm == "defensive":
            for m in found.cycles:
                m.record["labelled"] = 10 * (1 + m.cycle // 3)
            found.facts["config"]["select"]["protocol"] = "pool"
        storage.write(found.path, found.to_bytes())
    write_evidence(storage, KINDS, FILES, "dev", own=OWN)
    rows = {(r["arm"], r["metric"]): r for r in json.loads(storage.read("summary.json"))}
    assert rows["defensive", "aulc_labels"]["mean"] > 0
    assert [rows[arm, "miou"]["protocol"] for arm in ("uniform", "defensive")] == ["reselect", "pool"]
    assert rows["defensive", "aulc_labels"]["minus_best_passive"] is None
    assert rows["defensive", "miou"]["minus_best_passive"] > 0


def test_runs_judged_by_other_images_are_not_compared(results):
    found = run_file_of(results, "defensive")
    found.facts["sources"]["names"][0] = "elsewhere"
    results.write(found.path, found.to_bytes())
    with pytest.raises(UsageError, match=r"defensive-seed0\.jsonl is of other validation images than"):
        read(results, KINDS, FILES)


def test_runs_of_another_configuration_are_not_compared(results):
    found = run_file_of(results, "defensive")
    found.facts["config"]["optim"]["lr"] = 1e-3
    results.write(found.path, found.to_bytes())
    with pytest.raises(UsageError, match=r"defensive-seed0\.jsonl ran with optim\.lr 0\.001, .* with 5e-05"):
        write_evidence(results, KINDS, FILES, "dev", own=OWN)


def test_a_run_continued_on_another_machine_has_been_on_both(results):
    found = run_file_of(results, "defensive")
    found.facts["machines"] = [runfile.machine_of(found.facts), "16 cores of y: 1 workers on cpu, 1 threads"]
    results.write(found.path, found.to_bytes())
    assert "Seconds are not compared" in write_evidence(results, KINDS, FILES, "dev", own=OWN)


def test_a_win_is_corrected_for_the_number_of_active_arms_tested_or_not(results):
    kinds = {**KINDS, "margin": "active", "entropy": "active"}  # these two have no result files
    rows = summary_rows(read(results, kinds, {n: n for n in kinds}), "dev")
    for metric in ("miou", "aulc_compute", "aulc_tiles", "fluctuation"):
        found = {r["arm"]: r for r in rows if r["metric"] == metric}
        assert [found[a]["p_holm"] for a in ("uniform", "ceiling", "entropy")] == [None] * 3
        assert found["uniform"]["p"] is not None  # passive arms do not compete
        assert found["entropy"]["p"] is None
        assert found["defensive"]["p_holm"] == pytest.approx(min(1, 3 * found["defensive"]["p"]))
        assert verdict(found["entropy"]) == "not tested"
    ours = next(r for r in rows if (r["arm"], r["metric"]) == ("defensive", "miou"))
    assert verdict({**ours, "p_holm": 0.051}) == "better alone"
    assert verdict({**ours, "p_holm": 0.049}) == "better"
    assert verdict({**ours, "interval": "sources"}) == "better, on one seed"


def section(text: str, title: str) -> list[str]:
    """Lines of the section whose heading begins so."""
    return text.split(f"## {title}", 1)[1].split("\n## ", 1)[0].splitlines()


def test_the_registered_metric_alone_gives_the_verdict(results):
    """Worse by the worst class, which is registered, whatever the arm wins by other metrics."""
    for seed in (0, 1, 2):
        found = run_file("defensive", seed)
        for m in found.cycles:
            m.record["val"]["iou_worst"] /= 2
        counts = np.array(found.facts["sources"]["counts"])
        counts[..., 0, 1] += 60 * counts[..., 0, 0]
        found.facts["sources"]["counts"] = counts.tolist()
        results.write(found.path, found.to_bytes())
    text = write_evidence(results, KINDS, FILES, "report", primary="worst_class", own=OWN)
    rows = json.loads(results.read("summary.json"))
    assert {r["role"] for r in rows if r["metric"] == "worst_class"} == {"primary"}
    assert {r["role"] for r in rows if r["metric"] != "worst_class"} == {"secondary"}
    lines = section(text, "Verdict on worst_class, the primary metric as registered: 1 competing arms")
    verdicts = [line for line in lines if line.startswith("| defensive")]
    assert len(verdicts) == 1
    assert verdicts[0].endswith("| worse |")
    assert not [line for line in lines if line.startswith(("| uniform", "| ceiling"))]
    assert goal(rows, "defensive")["worst_class better"] is False
    assert "aulc_tiles (secondary)" in text
    assert "## Exploratory" not in text


def test_without_a_registered_metric_all_is_exploratory(results):
    text = write_evidence(results, KINDS, FILES, "dev", own=OWN)
    assert {r["role"] for r in json.loads(results.read("summary.json"))} == {"exploratory"}
    assert "## Exploratory" in text
    assert "## Verdict" not in text


def test_only_the_registered_seeds_count(results):
    write_evidence(results, KINDS, FILES, "report", primary="miou", seeds=[0, 2], own=OWN)
    rows = json.loads(results.read("summary.json"))
    assert {tuple(r["seeds"]) for r in rows if r["metric"] == "miou"} == {(0, 2)}


def test_time_counts_every_cycle_and_the_first_with_its_scoring(results):
    for seed in (0, 1, 2):
        found = run_file("defensive", seed)
        found.cycles[0].record["seconds"]["total"] += 12
        results.write(found.path, found.to_bytes())
    rows = summary_rows(read(results, KINDS, FILES), "dev")
    found = {r["metric"]: r["mean"] for r in rows if r["arm"] == "defensive"}
    assert found["time_ratio_warm"] == pytest.approx(2.09 / 2)
    assert found["time_ratio"] == pytest.approx((2.09 * CYCLES + 12) / (2 * CYCLES))
    assert goal(rows, "defensive")["time at most 1.05 times"] is False


def test_seconds_of_several_machines_are_not_compared(results):
    found = run_file("defensive", 0)
    found.facts["environment"]["cpu"] = "another"
    results.write(found.path, found.to_bytes())
    text = write_evidence(results, KINDS, FILES, "dev", own=OWN)
    rows = json.loads(results.read("summary.json"))
    assert {r["mean"] for r in rows if "time" in r["metric"] or r["metric"] == "aulc_seconds"} == {None}
    assert all(r["mean"] is not None for r in rows if r["metric"] == "miou")
    assert "Seconds are not compared: the runs were made on several kinds of machines" in text
    assert (
        "2 cores of x: 1 workers on cpu, 1 threads; 2 cores of another: 1 workers on cpu, 1 threads" in text
    )


def diverge(results: Storage, arm: str, seed: int, cycle: int) -> None:
    """Make a run one that ended in a cycle, diverged."""
    found = run_file("defensive", seed, cycle)
    facts = {k: v for k, v in found.facts.items() if k not in ("picks", "sources", "replay")}
    found = replace(found, name=arm, facts={**facts, "diverged": {"cycle": cycle, "steps": [0, 4]}})
    results.write(found.path, found.to_bytes())


def test_an_arm_of_which_a_seed_diverged_says_so_and_is_not_tested(results):
    diverge(results, "defensive", 1, 4)
    text = write_evidence(results, KINDS, FILES, "report", primary="miou", seeds=[0, 1, 2], own=OWN)
    rows = {(r["arm"], r["metric"]): r for r in json.loads(results.read("summary.json"))}
    ours = rows["defensive", "miou"]
    assert (ours["seeds"], ours["diverged"]) == ([0, 2], [1])
    assert (ours["ci_low"], ours["ci_high"], ours["p"]) == (None, None, None)
    assert rows["uniform", "miou"]["diverged"] == []
    for title in ("Result", "Difference", "Wins", "Verdict", "IoU by class", "Selections"):
        assert "defensive (diverged: seed 1)" in "\n".join(section(text, title))
    assert "| active | 2 of 3 |" in text
    assert "| defensive (diverged: seed 1) | +" in text
    assert "| not tested, diverged |" in "\n".join(section(text, "Verdict"))
    assert "| defensive | 1 | 5 | ended there |" in section(text, "Runs whose training diverged")
    told = [r for r in json.loads(results.read("runs.json")) if "diverged" in r]
    assert [(r["arm"], r["seed"], r["diverged"]["cycle"], r["cycles"]) for r in told] == [
        ("defensive", 1, 4, 4)
    ]


def test_an_arm_of_which_every_seed_diverged_still_counts_as_one(results):
    kinds = {**KINDS, "margin": "active"}
    for seed in (0, 1, 2):
        diverge(results, "margin", seed, 2)
    write_evidence(results, kinds, {n: n for n in kinds}, "dev", own=dict.fromkeys(kinds, OWN["uniform"]))
    rows = {(r["arm"], r["metric"]): r for r in json.loads(results.read("summary.json"))}
    assert rows["margin", "miou"]["mean"] is None
    assert verdict(rows["margin", "miou"]) == "not tested, diverged"
    ours = rows["defensive", "miou"]
    assert ours["p_holm"] == pytest.approx(2 * ours["p"])


def test_a_run_that_went_back_and_came_through_is_listed_and_counts(results):
    found = run_file("defensive", 2)
    found.facts["diverged"] = {"cycle": 3, "steps": [0, 4]}
    results.write(found.path, found.to_bytes())
    text = write_evidence(results, KINDS, FILES, "dev", own=OWN)
    assert "went back to the last commit" in "\n".join(section(text, "Runs whose training diverged"))
    rows = {(r["arm"], r["metric"]): r for r in json.loads(results.read("summary.json"))}
    assert rows["defensive", "miou"]["seeds"] == [0, 1, 2]
    assert rows["defensive", "miou"]["p"] is not None


def test_a_passive_arm_of_which_a_seed_diverged_is_nothing_to_judge_by(results):
    diverge(results, "epoch-queue", 0, 4)
    rows = summary_rows(read(results, KINDS, FILES), "dev")
    assert {r["best_passive"] for r in rows} == {"uniform"}
    diverge(results, "uniform", 2, 4)
    with pytest.raises(
        UsageError, match=r"no passive arm to judge by that came through: uniform \(diverged: seed 2\)"
    ):
        read(results, KINDS, FILES)


def test_a_diverged_run_ends_the_report_half_too(tiny_store, tmp_path, monkeypatch):
    """The job with its runs replaced by result files: it reads them, though one has diverged, judges by the registered metric, says
    what became of the run and combines the summaries.
    """
    folder = Storage(str(tmp_path / "evidence" / "made-up-report"))

    def all_run(*_: object, **__: object) -> int:
        for arm, seed in itertools.product(("uniform", "defensive"), (0, 1, 2)):
            found = run_file(arm, seed)
            folder.write(found.path, found.to_bytes())
        diverge(folder, "defensive", 1, 4)
        return DivergedError.exit_code

    monkeypatch.setattr(job, "run_all", all_run)
    monkeypatch.setattr(job, "is_committed", lambda path: True)
    plan = tmp_path / "plan.json"
    argv = ["--data", tiny_store, "--arms", "uniform,defensive", "--seeds", "0,1", "--cycles", "12", "--split", "report",
            "--results", folder.uri, "--run", str(tmp_path / "runs"), "--preregistration", str(plan)]  # fmt: skip
    with pytest.raises(UsageError, match="to register what is asked for") as refusal:
        job.evidence(None, argv)
    plan.write_text(str(refusal.value).partition("is read: ")[2].replace('"miou"', '"aulc_tiles"'))
    assert job.evidence(None, argv) == DivergedError.exit_code
    rows = json.loads((tmp_path / "evidence" / "summary.json").read_text())
    ours = next(r for r in rows if r["arm"] == "defensive" and r["role"] == "primary")
    assert (ours["metric"], ours["seeds"], ours["diverged"], ours["p"]) == ("aulc_tiles", [0], [1], None)
    assert "ended there" in folder.read("tables.md").decode()


def test_a_diverged_run_is_not_tried_again_and_the_job_still_says_so(
    tiny_store, tmp_path, monkeypatch, capsys
):
    """The runs that are left are looked at, and not done."""
    folder, left = Storage(str(tmp_path / "results")), []
    monkeypatch.setattr(series, "carry_out_all", lambda runs, **_: left.extend(n for n, _ in runs) or 0)
    monkeypatch.setattr(series.runfile, "collect", lambda run, name, seed, store, **_: run_file(name, seed))
    own = Store.open(tiny_store).dataset.content_hash
    diverge(folder, "defensive", 0, 4)
    found = runfile.read(folder, "defensive-seed0.jsonl")
    base = Experiment(run=str(tmp_path / "r"), cycles=CYCLES)
    for hash_, told in ((own, None), ("ab" * 32, "all runs of a series have one data set")):
        found.facts["data"]["hash"] = hash_
        found.facts["config"] = base.to_dict()
        folder.write(found.path, found.to_bytes())
        args = argparse.Namespace(dry_run=False)
        if told:
            with pytest.raises(UsageError, match=told):
                series.run_all([("defensive", base)], args, folder, Store.open(tiny_store), evidence=True)
        else:
            code = series.run_all([("defensive", base)], args, folder, Store.open(tiny_store), evidence=True)
            assert (code, left) == (DivergedError.exit_code, [])
            assert "diverged in cycle 5, not tried again" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--seeds", "0,0"], ["--only", "b0,b0"]])
def test_the_same_run_twice_is_refused(tiny_store, argv):
    with pytest.raises(UsageError, match="twice"):
        series.compare(None, ["--data", tiny_store, *argv])


def test_the_summaries_of_all_folders_are_one(tmp_path):
    folders = [Storage(str(tmp_path / "evidence" / n)) for n in ("made-up-dev", "made-up-report", "deep/er")]
    for number, storage in enumerate(folders):
        for arm in ("uniform", "defensive"):
            found = run_file(arm, number)
            storage.write(found.path, found.to_bytes())
        write_evidence(storage, KINDS, FILES, "dev" if number else "report", own=OWN)
    above = Storage(str(tmp_path / "evidence"))
    above.write("other/summary.json", b'{"arms": {}}')
    assert renew_combined(folders[0]) == f"{above.uri}/summary.json"
    rows = json.loads(above.read("summary.json"))
    assert list(dict.fromkeys(r["folder"] for r in rows)) == ["deep/er", "made-up-dev", "made-up-report"]
    keys = [
        "protocol",
        "data",
        "split",
        "arm",
        "kind",
        "metric",
        "mean",
        "sd",
        "seeds",
        "minus_best_passive",
        "ci_low",
        "ci_high",
    ]
    assert all(set(keys) <= set(r) for r in rows)
    before = above.read("summary.json")
    renew_combined(folders[1])
    assert above.read("summary.json") == before
    assert renew_combined(Storage(str(tmp_path / "elsewhere"))) is None


def test_without_a_passive_arm_there_is_nothing_to_judge_by(tmp_path):
    storage = Storage(str(tmp_path))
    found = run_file("defensive", 0)
    storage.write(found.path, found.to_bytes())
    with pytest.raises(UsageError, match="no finished run of a passive arm"):
        write_evidence(storage, KINDS, FILES, "dev", own=OWN)


def test_labels_count_at_the_end_of_each_round(tmp_path):
    storage = Storage(str(tmp_path))
    for arm in ("ceiling", "uniform", "defensive"):
        found = run_file(arm, 0)
        if arm != "ceiling":  # it has all labels
            for m in found.cycles:
                m.record["labelled"] = 10 * (1 + m.cycle // 3)
            found.facts["config"]["select"]["protocol"] = "pool"
        storage.write(found.path, found.to_bytes())
    labels, miou = by_labels(curve(run_file_of(storage, "uniform")))
    assert labels.tolist() == [10, 20, 30, 40]
    assert miou.tolist() == curve(run_file("uniform", 0))["miou"][2::3].tolist()
    write_evidence(storage, KINDS, FILES, "dev", own=OWN)
    rows = {(r["arm"], r["metric"]): r for r in json.loads(storage.read("summary.json"))}
    protocols = {r["arm"]: r["protocol"] for r in rows.values()}
    assert protocols["ceiling"] == "reselect"
    assert protocols["uniform"] == protocols["defensive"] == "pool"
    assert rows["ceiling", "aulc_labels"]["mean"] is None
    assert rows["uniform", "aulc_labels"]["mean"] == pytest.approx(np.trapezoid(miou, labels) / 30)
    assert "labels bought" in storage.read("curves.svg").decode()
    assert "miou@40" in "\n".join(
        section(storage.read("tables.md").decode(), "miou at the end of each round")
    )


def test_miou_at_each_budget_is_that_of_the_end_of_its_round(tmp_path):
    storage = Storage(str(tmp_path))
    for arm in ("ceiling", "uniform", "defensive"):
        for seed in (0, 1):
            found = run_file(arm, seed)
            if arm != "ceiling":
                for m in found.cycles:
                    m.record["labelled"] = 10 * (1 + m.cycle // 3)
                found.facts["config"]["select"]["protocol"] = "pool"
            storage.write(found.path, found.to_bytes())
    rows = summary_rows(read(storage, KINDS, FILES), "dev")
    found = {(r["arm"], r["metric"]): r for r in rows if r["metric"].startswith("miou@")}
    assert {m for _, m in found} == {"miou@10", "miou@20", "miou@30", "miou@40"}
    assert {a for a, _ in found} == {"uniform", "defensive"}
    at = [scores(counts_of("defensive", s, 5).sum(0), NAMES)["miou"] for s in (0, 1)]
    assert found["defensive", "miou@20"]["mean"] == pytest.approx(np.mean(at))
    assert found["defensive", "miou@20"]["sd"] == pytest.approx(np.std(at, ddof=1))
    assert found["defensive", "miou@20"]["p"] is not None


def run_file_of(storage: Storage, arm: str) -> RunFile:
    return runfile.read(storage, runfile.file_of(arm, 0))
