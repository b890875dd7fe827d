"""A sweep: Ray Tune over short runs of the one loop, Ray Train inside each trial.

A trial is a run directory `trial-0003`; its ledger is the truth, and Tune's own state is thrown away.  A sweep that is started
again hands the committed cycles of all trials to Tune once more, which costs nothing and gives ASHA its memory back, and trains
only what is missing.

A trial never begins a cycle that Tune has not asked for, and ends its Train run itself before its process goes.  So a stopped
trial gives its resources back at once; were its process killed instead, they would be free only when Ray's cleaner finds out.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.util import placement_group_table

from raysed import errors
from raysed.cluster.connect import connect
from raysed.cluster.launch import Stepper, signals_noted
from raysed.cluster.preflight import check_data, check_run_paths
from raysed.cluster.room import secure
from raysed.config import Experiment, with_overrides
from raysed.core.acquisition import STRATEGIES
from raysed.core.sweep import HIGHEST_GAMMA, HIGHEST_LR, LOWEST_LR, SWEPT, Demand, at_once, point
from raysed.errors import DivergedError, RaysedError
from raysed.io.ledger import Ledger, Manifest
from raysed.io.storage import Storage
from raysed.io.store import Store

TRIAL_CPUS = 0.01
"""CPUs of a trial's own process, which waits for its workers."""
REPORT_SECONDS = 30
"""Between two of Tune's tables."""
ENDING_SECONDS = 600.0
"""How long the cycles that run when a sweep is interrupted may take to end."""
RETURN_SECONDS = 60.0
"""After the sweep all resources must be free within this."""
SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the table that shows the parameters
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial's run has its own TensorBoard files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would kill trials five seconds later, in the middle of a cycle
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
"""Ray Tune reads these; what the user has set stands."""


@dataclass(frozen=True)
class TrialState:
    """A trial as its run directory has it."""

    number: int
    values: dict[str, float]
    """Of the swept fields."""
    outcome: str | None
    """finished, stopped (by ASHA), failed, or None: not at its end yet."""
    text: str
    """Why it failed."""
    returned: float | None
    """Seconds it took to give its resources back."""
    manifests: list[Manifest]


def trial_of(base: Experiment, number: int) -> Experiment:
    """Trial 0 is the experiment as it stands, the others draw the swept fields."""
    values = {} if number == 0 else point(base.seed, number)
    return with_overrides(base, {**values, "run": f"{base.run}/trial-{number:04d}"}, "sweep")


def values_of(experiment: Experiment) -> dict[str, float]:
    """The swept fields."""
    return dict(
        zip(SWEPT, (experiment.optim.lr, experiment.loss.gamma, experiment.loss.alpha_power), strict=True)
    )


def state_of(base: Experiment, number: int) -> TrialState:
    """What a trial has done so far."""
    experiment = trial_of(base, number)
    run = Storage(str(experiment.run))
    manifests = Ledger(run).manifests()
    ended = _json(run, "outcome.json")
    outcome = "finished" if len(manifests) >= base.cycles else ended.get("outcome")
    returned = _json(run, "returned.json").get("seconds")
    return TrialState(number, values_of(experiment), outcome, ended.get("text", ""), returned, manifests)


def _json(run: Storage, path: str) -> dict[str, Any]:
    return json.loads(run.read(path)) if run.exists(path) else {}


def _write(run: Storage, path: str, fields: dict[str, Any]) -> None:
    run.write(path, (json.dumps(fields) + "\n").encode())


class Trial(tune.Trainable):
    """One run, a cycle a step.  Committed cycles are told from the ledger; training begins with the first that is missing."""

    def setup(  # type: ignore[override]  # `tune.with_parameters` adds the others
        self, config: dict[str, Any], base: dict[str, Any], command: list[str]
    ) -> None:
        sys.argv = command  # the run records the command that it belongs to
        fields = Experiment.from_dict(base)
        state = state_of(fields, config["trial"])
        self.experiment = trial_of(fields, config["trial"])
        self.run_storage = Storage(str(self.experiment.run))
        self.recorded, self.outcome = state.manifests, state.outcome
        self.stepper: Stepper | None = None

    def step(self) -> dict[str, Any]:
        """The next cycle."""
        cycle = self.iteration
        manifest = self.recorded[cycle] if cycle < len(self.recorded) else self._train(cycle)
        at_end = self.outcome is not None and cycle + 1 == len(self.recorded)
        done = at_end or cycle + 1 >= self.experiment.cycles
        if done:
            self.cleanup()
        record = manifest.record
        return {
            "miou": record["val"]["miou"],
            "val_loss": record["val"]["loss"],
            "seconds": record["seconds"]["total"],
            "done": done,
        }

    def _train(self, cycle: int) -> Manifest:
        if self.stepper is None:
            self.stepper = Stepper(self.experiment, cycle, print)
        try:
            return self.stepper.step(cycle)
        except DivergedError as error:
            self.cleanup()
            _write(self.run_storage, "outcome.json", {"outcome": "failed", "text": str(error)})
            raise
        except RaysedError:
            self.cleanup()
            raise

    def cleanup(self) -> None:
        """Give everything back; Tune calls it when the trial is stopped."""
        if self.stepper is None:
            return
        began = time.monotonic()
        self.stepper.stop()
        self.stepper = None
        _write(self.run_storage, "returned.json", {"seconds": round(time.monotonic() - began, 2)})


class Halving(ASHAScheduler):
    """ASHA that never stops trial 0, so that the best trial and the experiment as it stands can be compared at equal cycles."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        spared = trial.config["trial"] == 0 and result["training_iteration"] < self._max_t
        return self.CONTINUE if spared else decision


class Signals(tune.Stopper):
    """Ctrl-C and SIGTERM: the first lets every running cycle end and commit, a second ends the job at once."""

    caught: ClassVar[list[int]] = []
    """The first signal.  Of the class, since Tune may copy the object."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(Signals.caught)


class Book(tune.Callback):
    """Notes which trials ASHA has stopped, and lets Tune go only when all trials have given back what they held."""

    def __init__(self, base: Experiment, say: Callable[[str], None]) -> None:
        self.base, self.say = base, say

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        state = state_of(self.base, number)
        if state.outcome is None:
            _write(Storage(str(trial_of(self.base, number).run)), "outcome.json", {"outcome": "stopped"})
            self.say(f"trial {number} is stopped after {len(state.manifests)} of {self.base.cycles} cycles")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        state = state_of(self.base, number)
        why = state.text or "its process ended; the same command tries it again"
        self.say(f"trial {number} failed after {len(state.manifests)} of {self.base.cycles} cycles: {why}")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        # Tune kills what has not ended five seconds after its last step; a cycle that is running takes longer
        until = time.monotonic() + ENDING_SECONDS
        while trials and all(t.is_finished() for t in trials) and training_groups():
            if time.monotonic() > until:
                return
            time.sleep(0.2)


def training_groups() -> int:
    """Placement groups that hold more than a trial's own process does."""
    return sum(
        group["state"] != "REMOVED"
        and any(b.get("CPU", 0) > TRIAL_CPUS or b.get("GPU", 0) for b in group["bundles"].values())
        for group in placement_group_table().values()
    )


def sweep(base: Experiment, trials: int, *, say: Callable[[str], None]) -> int:
    """Run a sweep to its end, or continue it.

    Args:
        base: with `run` and `data.uri` set, and the cycles of a full trial.
        trials: number of them, with trial 0, the experiment as it stands.
        say: prints a line.

    Returns:
        0, or 130 or 143 when a signal ended the sweep.

    Raises:
        RaysedError: with its exit code.
    """
    store = Store.open(str(base.data.uri))
    check_data(base, store, say)
    base = replace(base, optim=replace(base.optim, rollbacks=0))  # half a learning rate is another trial
    for number in range(trials):
        experiment = trial_of(base, number)
        run = Storage(str(experiment.run))
        if run.exists("config.json"):
            Ledger(run, epoch=0).open(experiment, store.dataset.content_hash)
    states = [state_of(base, number) for number in range(trials)]
    left = [s for s in states if s.outcome is None]
    if not left:
        say(f"all {trials} trials have ended already")
        return 0
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    connect()
    check_run_paths(base)
    base, together = _shared(base, trials, say)
    say(f"{len(left)} of {trials} trials are left, {together} at once, of at most {base.cycles} cycles each")
    Signals.caught.clear()
    with signals_noted(Signals.caught), tempfile.TemporaryDirectory(prefix="raysed-tune-") as folder:
        _tuner(base, [s for s in states if s.outcome != "failed"], together, folder, say).fit()
    _say_returned(say)
    return errors.EXIT_INTERRUPTED[Signals.caught[0]] if Signals.caught else 0


def _shared(base: Experiment, trials: int, say: Callable[[str], None]) -> tuple[Experiment, int]:
    """The experiment with the scorers and threads that leave room for the other trials, and the trials at once."""
    scoring = STRATEGIES[base.select.strategy].needs_scores
    cluster = replace(base.cluster, scorers=base.cluster.scorers or base.cluster.workers)
    device, scorers = secure(cluster, scoring=scoring, say=say)
    have = ray.cluster_resources()
    demand = cluster.demand(device, scorers)
    together = at_once(
        Demand(cluster.workers, demand["CPU"] + TRIAL_CPUS, demand.get("GPU", 0)), have, trials
    )
    threads = cluster.threads or max(1, int(have.get("CPU", 1) // (together * cluster.workers)))
    return replace(base, cluster=replace(cluster, threads=threads)), together


def _tuner(
    base: Experiment, states: list[TrialState], together: int, folder: str, say: Callable[[str], None]
) -> tune.Tuner:
    points = [{"trial": s.number, **s.values} for s in states]
    space = {
        "trial": tune.randint(0, 1 << 30),
        "optim.lr": tune.loguniform(LOWEST_LR, HIGHEST_LR),
        "loss.gamma": tune.uniform(0, HIGHEST_GAMMA),
        "loss.alpha_power": tune.uniform(0, 1),
    }
    trainable = tune.with_parameters(Trial, base=base.to_dict(), command=list(sys.argv))
    return tune.Tuner(
        tune.with_resources(trainable, {"CPU": TRIAL_CPUS}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="miou",
            mode="max",
            num_samples=len(points),
            search_alg=BasicVariantGenerator(points_to_evaluate=points, max_concurrent=together),
            scheduler=Halving(max_t=base.cycles, grace_period=max(1, base.cycles // 4), reduction_factor=2),
            trial_name_creator=lambda trial: f"trial-{trial.config['trial']:04d}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial']:04d}",
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=folder,
            stop=Signals(),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_at_end=False
            ),  # a trial's ledger is its checkpoint
            callbacks=[Book(base, say)],
            verbose=1,
            progress_reporter=tune.CLIReporter(
                parameter_columns=["trial", *SWEPT],
                metric_columns={
                    "training_iteration": "cycle",
                    "miou": "miou",
                    "val_loss": "val loss",
                    "seconds": "s a cycle",
                },
                sort_by_metric=True,
                max_report_frequency=REPORT_SECONDS,
            ),
        ),
    )


def _say_returned(say: Callable[[str], None]) -> None:
    """Say how soon the cluster is free again."""
    began = time.monotonic()
    while True:
        all_of, free = ray.cluster_resources(), ray.available_resources()
        held = {
            k: all_of[k] - free.get(k, 0) for k in ("CPU", "GPU") if all_of.get(k, 0) - free.get(k, 0) > 1e-6
        }
        took = time.monotonic() - began
        if not held and not training_groups():
            say(f"all resources are free {took:.1f} s after the sweep")
            return
        if took > RETURN_SECONDS:
            still = ", ".join(f"{v:g} {k}" for k, v in held.items()) or "placement groups"
            say(
                f"note: {still} still held {took:.0f} s after the sweep; another job on this cluster, or a leak of Ray's (`ray list placement-groups`)"
            )
            return
        time.sleep(0.2)
