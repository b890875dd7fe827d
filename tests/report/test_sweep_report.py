"""What a sweep reports, from recorded trials."""

import json
from xml.etree import ElementTree

import pytest

from raysed.config import DataConfig, Experiment, LossConfig, ModelConfig, OptimConfig, load_config
from raysed.errors import DivergedError
from raysed.io.ledger import Manifest
from raysed.report.sweep import TrialResult, best_of, sweep_files, table


def trial(number, outcome, miou, lr=1e-3):
    experiment = Experiment(
        run=f"/runs/trial-{number:04d}",
        cycles=4,
        data=DataConfig(uri="/tiles"),
        model=ModelConfig(arch="unet"),
        optim=OptimConfig(lr=lr),
        loss=LossConfig(gamma=0.0),
    )
    values = {"optim.lr": lr, "loss.gamma": 0.0, "loss.alpha_power": 0.5}
    manifests = [
        Manifest(c, {}, {"val": {"miou": v, "loss": 0.1}, "seconds": {"total": 2.0}, "dataset_hash": "abc"})
        for c, v in enumerate(miou)
    ]
    return TrialResult(number, experiment, values, outcome, 1.5 if miou else None, manifests)


TRIALS = [
    trial(0, "finished", [0.1, 0.2, 0.2, 0.2], lr=5e-5),
    trial(1, "stopped", [0.9]),
    trial(2, "finished", [0.1, 0.2, 0.3, 0.4], lr=2e-3),
    trial(3, "failed", []),
]


def test_the_best_is_a_finished_trial_and_its_file_is_a_config():
    assert best_of(TRIALS).number == 2
    files = sweep_files(TRIALS)
    best = load_config(files["best.json"], "best.json")
    assert (best.optim.lr, best.loss.gamma, best.loss.alpha_power) == (2e-3, 0.0, 0.5)
    assert best.model.arch == "unet"
    assert (best.run, best.data.uri, best.cycles) == (None, None, 100)
    assert json.loads(files["best.json"])["loss"] == {"gamma": 0.0, "alpha_power": 0.5}
    with pytest.raises(DivergedError, match="none of 1 trials"):
        best_of(TRIALS[3:])


def test_the_table_has_every_trial_and_the_picture_a_line_for_each_that_ran():
    text = table(TRIALS)
    lines = text.splitlines()
    assert lines[2].startswith("| 2 | 0.002 | 0 | 0.5 | finished | 4 | 0.3000 | 0.4000 | 8 | 1.5 s |")
    assert lines[3].startswith("| 0, as it stands |")
    assert "| 3 | 0.001 | 0 | 0.5 | failed | 0 |" in text
    assert "trial 0) reaches 0.2000 in the same 4 cycles: +0.1000" in text
    files = sweep_files(TRIALS)
    svg = ElementTree.fromstring(files["parallel.svg"])
    assert svg.tag.endswith("svg")
    assert "optim.lr" in files["parallel.svg"]
    scores = [json.loads(line)["score"] for line in files["trials.jsonl"].splitlines()]
    assert scores == pytest.approx([0.2, 0.9, 0.3, None])
    assert [r["value"] for r in json.loads(files["summary.json"])["rows"]] == pytest.approx(scores)
