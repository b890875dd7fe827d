"""The paper's comparison, reported from small recorded runs: every number can be followed back to a manifest."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny_run import ARCH, CYCLES, NAMES, write_arm, write_store

from raysed.compare import run_all
from raysed.config import DataConfig, Experiment, ModelConfig, SelectConfig
from raysed.core.metrics import class_iou
from raysed.errors import DataError, UsageError
from raysed.experiments import COMPARED
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage, digest
from raysed.io.store import Store
from raysed.report import comparison, runfile

RUNS = (("unet-plain", 0), ("unet", 0), ("b0", 0), ("b0", 1), ("b0-active", 0))


@pytest.fixture(scope="module")
def compared(tiny_store, tmp_path_factory):
    """The root of a comparison of four experiments, b0 with two seeds."""
    root = tmp_path_factory.mktemp("compared")
    for name, seed in RUNS:
        experiment = Experiment(
            run=f"{root}/{name}-seed{seed}",
            seed=seed,
            cycles=CYCLES,
            data=DataConfig(uri=tiny_store),
            model=ModelConfig(arch=ARCH),
            select=SelectConfig(strategy="entropy" if name == "b0-active" else "uniform", tiles=6),
        )
        write_arm(Storage(str(experiment.run)), experiment, Store.open(tiny_store))
    return root


@pytest.fixture(scope="module")
def reported(compared, report_job):
    assert report_job(["--compare", str(compared)]) == 0
    return compared / "results"


def rows(results: Path) -> list[dict]:
    return json.loads((results / "summary.json").read_text())["rows"]


def value(results: Path, experiment: str, metric: str, seed: int = 0) -> float:
    found = [
        r["value"]
        for r in rows(results)
        if (r["experiment"], r["metric"], r["seed"]) == (experiment, metric, seed)
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("name", "seed"), RUNS)
def test_numbers_follow_from_the_counts_in_the_manifests(compared, reported, name, seed):
    run = Storage(f"{compared}/{name}-seed{seed}")
    manifests = Ledger(run).manifests()
    iou = np.array([class_iou(np.array(m.record["val"]["counts"])) for m in manifests])
    assert value(reported, name, "miou", seed) == pytest.approx(iou.mean())
    assert value(reported, name, "class_iou_variance", seed) == pytest.approx(iou.mean(0).var() * 1e4)
    assert value(reported, name, "class_iou_cv", seed) == pytest.approx(iou.mean(0).std() / iou.mean())
    assert value(reported, name, f"iou/{NAMES[2]}", seed) == pytest.approx(iou[:, 2].mean())
    assert value(reported, name, f"first_correct_cycle/{NAMES[0]}", seed) == int(np.argmax(iou[:, 0] > 0.01))
    assert value(reported, name, "fluctuation", seed) == pytest.approx(np.diff(iou.mean(1)).std())
    assert value(reported, name, "seconds/total", seed) == pytest.approx(
        sum(m.record["seconds"]["total"] for m in manifests)
    )
    file = runfile.read(Storage(str(reported)), runfile.file_of(name, seed))
    hashes = [digest(run.read(f"cycle_{c:04d}/manifest.json")) for c in range(CYCLES)]
    assert [m.files["manifest.json"]["sha256"] for m in file.cycles] == hashes


def test_rows_have_their_keys_and_the_papers_numbers(reported):
    found = rows(reported)
    assert all(
        list(r) == ["data", "experiment", "seed", "metric", "value", "paper", "seconds"] for r in found
    )
    headline = {r["experiment"]: r["paper"] for r in found if r["metric"] == "headline"}
    assert headline == {"unet-plain": 0.36, "unet": 0.387, "b0": 0.446, "b0-active": 0.365}
    assert all(
        r["paper"] is None for r in found if r["metric"].startswith("iou/")
    )  # other classes than the paper's
    ratio = next(r for r in found if r["experiment"] == "b0-active/b0")
    assert (ratio["value"], ratio["paper"]) == (pytest.approx(5.5 / 2.5), pytest.approx(12))


def test_the_papers_table_has_its_means_and_variances():
    """The headline 44.6 and the mean 36.68 of table 2 are two numbers; the variances are those printed there."""
    for name, mean, variance, cv in (("b0", 0.3668, 143.29, 0.326), ("b0-active", 0.2920, 106.60, 0.354)):
        spread = comparison._spread(list(COMPARED[name].iou.values()))
        assert spread["mean"] == pytest.approx(mean, abs=1e-4)
        assert spread["variance"] == pytest.approx(variance, abs=0.01)
        assert spread["cv"] == pytest.approx(cv, abs=1e-3)


def test_tables_and_figures_name_every_run_and_metric(reported):
    text = (reported / "tables.md").read_text()
    for word in (
        "seen of the pool",
        "iou_micro",
        "iou_frequency_weighted",
        "soft_iou",
        "b0-active/b0",
        "noise and colour",
        "parameters",
    ):
        assert word in text
    assert "| b0 | 0, 1 | 3 | 0.4460 |" in text
    disturbed = text[text.index("## Validation under disturbance") :]
    line = next(row for row in disturbed.splitlines() if row.startswith("| b0 |"))
    assert line.count(" to ") == 4  # the range over seeds, whose weights differ
    assert "<script>" not in text
    for name in ("iou.svg", "train-loss.svg", "val-loss.svg", "classes.svg"):
        assert ElementTree.fromstring((reported / name).read_text()).tag.endswith("svg")
    json.loads((reported / "summary.json").read_text(), parse_constant=pytest.fail)


def test_result_files_are_enough_when_the_runs_are_gone(reported, report_job, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in reported.glob("*.jsonl"):
        shutil.copy(path, kept)
    assert report_job(["--compare", str(kept)]) == 0
    for path in reported.iterdir():
        assert (kept / path.name).read_bytes() == path.read_bytes()


def test_a_result_file_says_whether_its_run_is_finished(reported, tiny_store):
    file = runfile.read(Storage(str(reported)), "b0-seed1.jsonl")
    own = Experiment(seed=1, cycles=CYCLES, model=ModelConfig(arch=ARCH), select=SelectConfig(tiles=6))
    assert file.is_finished(own)
    assert not replace(file, cycles=file.cycles[:-1]).is_finished(own)
    with pytest.raises(UsageError, match="cycles: 3 there, 9 now"):
        file.is_finished(replace(own, cycles=9))


def test_seconds_of_several_kinds_of_machines_are_said_to_be_that(reported, report_job, tmp_path):
    kept = Path(shutil.copytree(reported, tmp_path / "kept"))
    assert "kinds of machines" not in (kept / "tables.md").read_text()
    lines = (kept / "b0-seed1.jsonl").read_text().splitlines()
    other = json.loads(lines[0]) | {"machines": ["64 cores of another: 1 workers on cpu, 1 threads"]}
    (kept / "b0-seed1.jsonl").write_text("\n".join([json.dumps(other), *lines[1:]]) + "\n")
    assert report_job(["--compare", str(kept)]) == 0
    assert "## Seconds; made on 2 kinds of machines" in (kept / "tables.md").read_text()


def test_a_finished_run_that_was_never_measured_is_measured_and_not_trained_again(
    compared, reported, tiny_store, tmp_path, capsys
):
    """Whatever ended the series before its last step; with its directory gone it stays as it is."""
    results, root = (
        Storage(str(tmp_path / "kept")),
        Storage(str(shutil.copytree(compared, tmp_path / "runs"))),
    )
    file = runfile.read(Storage(str(reported)), "b0-seed1.jsonl")
    del file.facts["robustness"], file.facts["network"]
    results.write(file.path, file.to_bytes())
    own = Experiment(seed=1, cycles=CYCLES, model=ModelConfig(arch=ARCH), select=SelectConfig(tiles=6))
    runs = [("b0", replace(own, run=root.at("b0-seed1").uri))]
    asked = Namespace(dry_run=False, tiles_per_second=None, price=None)
    assert run_all(runs, asked, results, Store.open(tiny_store)) == 0
    assert "robustness" in runfile.read(results, file.path).facts
    results.write(file.path, file.to_bytes())
    shutil.rmtree(tmp_path / "runs")
    assert run_all(runs, asked, results, Store.open(tiny_store)) == 0
    assert "never measured under noise, and its directory is gone" in capsys.readouterr().out
    assert results.read(file.path) == file.to_bytes()
    assert not (tmp_path / "runs").exists()


def test_unfinished_and_diverged_runs_are_named_and_not_averaged(reported, report_job, tmp_path):
    kept = Path(shutil.copytree(reported, tmp_path / "kept"))
    lines = (kept / "b0-seed1.jsonl").read_text().splitlines()
    (kept / "b0-seed1.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    facts = json.loads((kept / "unet-seed0.jsonl").read_text().splitlines()[0])
    (kept / "unet-seed0.jsonl").write_text(json.dumps(facts | {"diverged": {"cycle": 0}}) + "\n")
    assert report_job(["--compare", str(kept)]) == 0
    text = (kept / "tables.md").read_text()
    assert "| b0 | 0 | 3 | 0.4460 |" in text
    assert "| b0 | 1 | 2 of 3 | not finished |" in text
    assert "| unet | 0 | 0 of 3 | diverged |" in text
    assert not [r for r in rows(kept) if (r["experiment"], r["seed"]) in (("b0", 1), ("unet", 0))]


def test_runs_of_another_configuration_are_refused(reported, report_job, tmp_path):
    kept = Path(shutil.copytree(reported, tmp_path / "kept"))
    head, *lines = (kept / "b0-active-seed0.jsonl").read_text().splitlines()
    facts = json.loads(head)
    facts["config"]["optim"]["lr"] = 1e-3
    (kept / "b0-active-seed0.jsonl").write_text("\n".join([json.dumps(facts), *lines]) + "\n")
    with pytest.raises(UsageError, match=r"ran with optim\.lr"):
        report_job(["--compare", str(kept)])


def test_mixed_or_damaged_folders_are_refused(reported, report_job, tmp_path):
    with pytest.raises(UsageError, match="no finished run"):
        report_job(["--compare", str(tmp_path)])
    write_store(str(tmp_path / "other"), first=100)
    (tmp_path / "mixed").mkdir()
    shutil.copy(reported / "b0-seed0.jsonl", tmp_path / "mixed")
    text = (reported / "unet-seed0.jsonl").read_text()
    own = json.loads(text.splitlines()[0])["data"]["hash"]
    (tmp_path / "mixed" / "unet-seed0.jsonl").write_text(text.replace(own, "0" * 64))
    with pytest.raises(UsageError, match="mixes data sets"):
        report_job(["--compare", str(tmp_path / "mixed")])
    (tmp_path / "mixed" / "unet-seed0.jsonl").write_text("{")
    with pytest.raises(DataError, match="not a result file"):
        report_job(["--compare", str(tmp_path / "mixed")])
