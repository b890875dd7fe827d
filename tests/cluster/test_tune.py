"""A sweep as a user runs it: a trial that diverges, a kill in the middle, the resources it gives back."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from processes import FAST, ROOT, command, environment, run

from raysed.cluster.sweep import TRIAL_CPUS, Halving, Trial, training_groups
from raysed.config import Experiment, load_config, with_overrides
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_head")]


def cycles_of(root, number: int) -> int:
    return len(Ledger(Storage(str(root / f"trial-{number:04d}"))).manifests())


def kill_when(reached, argv: list[str]) -> None:
    """Start a job and SIGKILL its process group as soon as something is so."""
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )  # fmt: skip
    children = []
    try:
        until = time.monotonic() + 240
        while not reached():
            assert process.poll() is None, "the job ended before"
            assert time.monotonic() < until, "the job did not come so far"
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        psutil.wait_procs(children, timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sweep_runs_what_is_unfinished_and_survives_a_trial_that_diverges(small_store, tmp_path):
    root = tmp_path / "sweep"
    flags = [
        "--data",
        small_store,
        "--run",
        str(root),
        "--cycles",
        "2",
        "--trials",
        "3",
        *FAST,
        "--optim.lr",
        "1e30",
    ]
    kill_when(lambda: any(cycles_of(root, k) for k in range(3)), command("tune", *flags))
    before = [cycles_of(root, k) for k in range(3)]
    done = run("tune", *flags, timeout=400)
    why = json.loads((root / "trial-0000" / "outcome.json").read_text())  # by the first job or by the second
    assert why["outcome"] == "failed"
    assert "training diverged in cycle 0" in why["text"]
    assert "all resources are free" in done.stdout
    assert "loss.alpha_power" in done.stdout  # Tune's table
    trained = [cycles_of(root, k) for k in range(3)]
    assert trained[0] == 0
    assert sorted(trained)[-1] == 2
    results = root / "results"
    lines = [json.loads(line) for line in (results / "trials.jsonl").read_text().splitlines()]
    assert lines[0]["outcome"] == "failed"
    assert {line["outcome"] for line in lines[1:]} <= {"finished", "stopped"}
    assert all(line["returned_after"] < 60 for line in lines if line["cycles"] > before[line["trial"]])
    best = load_config((results / "best.json").read_text(), "best.json")
    assert best.optim.lr in [line["optim.lr"] for line in lines if line["outcome"] == "finished"]
    for number in (1, 2):
        assert list((root / f"trial-{number:04d}" / "tensorboard").iterdir())
    again = run("tune", *flags, timeout=60)
    assert "all 3 trials have ended already" in again.stdout
    assert [cycles_of(root, k) for k in range(3)] == trained


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_that_halving_stops_make_room_for_the_next_and_leave_nothing(small_store, tmp_path):
    """Six trials where two find room: the later ones begin on what the earlier ones have given back."""
    flags = ["--data", small_store, "--run", str(tmp_path / "sweep"), "--cycles", "6", "--trials", "6"]
    done = run("tune", *flags, *FAST, timeout=800)
    lines = [json.loads(x) for x in (tmp_path / "sweep/results/trials.jsonl").read_text().splitlines()]
    stopped = [line for line in lines if line["outcome"] == "stopped"]
    assert stopped
    assert all(0 < line["cycles"] < 6 for line in stopped)
    assert done.stdout.count("is stopped after") == len(stopped)
    assert {line["outcome"] for line in lines} == {"finished", "stopped"}
    assert all(line["returned_after"] < 60 for line in lines)
    assert "all resources are free" in done.stdout


@pytest.mark.timeout(300)
def test_a_trial_that_is_stopped_gives_all_back_and_has_trained_nothing_in_vain(
    ray_session, small_store, tmp_path
):
    import ray
    from ray import tune

    fields = {"run": str(tmp_path), "data.uri": small_store, "cycles": 4, "model.arch": "unet:tu-test_resnet",
              "select.tiles": 16, "cluster.threads": 1}  # fmt: skip
    base = with_overrides(Experiment(), fields, "test")
    trainable = tune.with_parameters(Trial, base=base.to_dict(), command=sys.argv)
    actor = ray.remote(num_cpus=TRIAL_CPUS)(trainable).remote(config={"trial": 1})
    result = ray.get(actor.train.remote())
    assert 0 <= result["miou"] <= 1
    assert not result["done"]
    assert training_groups() == 1
    began = time.monotonic()
    ray.get(actor.stop.remote())
    ray.kill(actor)
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    assert training_groups() == 0
    assert cycles_of(tmp_path, 1) == 1


def test_halving_stops_the_worse_half_but_never_trial_0():
    halving = Halving(metric="miou", mode="max", max_t=8, grace_period=2, reduction_factor=2)

    def decisions(number: int, miou: float) -> list[str]:
        trial = SimpleNamespace(trial_id=str(number), config={"trial": number})
        halving.on_trial_add(None, trial)
        return [
            halving.on_trial_result(None, trial, {"training_iteration": t, "miou": miou}) for t in (1, 2, 8)
        ]

    go, stop = Halving.CONTINUE, Halving.STOP
    assert decisions(1, 0.5) == [go, go, stop]
    assert decisions(0, 0.1) == [go, go, stop]
    assert decisions(2, 0.1)[:2] == [go, stop]
