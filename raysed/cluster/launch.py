"""Starting a run: checks, lease, actors, one `TorchTrainer.fit()`, and the driver's watch over it."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysed import errors
from raysed.cluster.arms import Arm, Setup
from raysed.cluster.connect import autoscaling, connect
from raysed.cluster.preflight import check_data, check_labels, check_run_paths
from raysed.cluster.room import secure
from raysed.cluster.scoring import Network, ScorerPool
from raysed.cluster.telemetry import Monitor, Progress, TensorBoard
from raysed.config import Experiment
from raysed.core.acquisition import STRATEGIES
from raysed.errors import RaysedError, ResourcesError, UsageError, rebuilt
from raysed.io.ledger import Lease, Ledger, Manifest
from raysed.io.provenance import environment
from raysed.io.storage import Storage
from raysed.io.store import Store

TRAIN_SETTINGS = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train view
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon an end or a death is seen; 2 s of every start and end otherwise
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # a worker that says nothing for so long is given up; ten minutes otherwise
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # a group that shrinks waits so long for a node that is gone; 60 s otherwise
}
"""Ray Train reads these where `fit` is called; what the user has set stands."""
RESIZE_SECONDS = 15.0
"""Seconds between two looks for nodes that could take more workers."""
COLLECTIVE_SECONDS = 300
"""After which a rank that waits for another one gives up, and the workers are started again: the other one may hang."""
STARTING_SECONDS = 60.0
"""How long processes of workers may take to begin once they have a place, at least."""
ENDING_SECONDS = 60.0
"""How long the workers of a run that has failed may take to give the cluster back."""


def arms_of(experiment: Experiment) -> list[tuple[str, Experiment]]:
    """The runs of an experiment, passive first: the baseline lives below the run directory."""
    own = (experiment.select.strategy, replace(experiment, baseline=False))
    if not experiment.baseline or experiment.select.strategy == "uniform":
        return [own]
    select = replace(experiment.select, strategy="uniform", options="")
    passive = replace(experiment, select=select, run=f"{experiment.run}/baseline", baseline=False)
    return [("uniform", passive), own]


def launch(experiment: Experiment, *, say: Callable[[str], None], hold: str | None = None) -> int:
    """Run an experiment to its end, or continue it.

    Args:
        experiment: with `run` and `data.uri` set.
        say: prints a line.
        hold: `point@cycle` at which rank 0 waits, for tests that kill a run there.

    Returns:
        0 when all cycles are committed, 130 or 143 when a signal ended the run after a commit.

    Raises:
        RaysedError: with its exit code.
    """
    return carry_out(experiment, Stopper(), say=say, hold=hold)


def carry_out(
    experiment: Experiment,
    stopper: "Stopper | Stepper",
    *,
    say: Callable[[str], None],
    hold: str | None = None,
) -> int:
    """`launch` under a stopper: signals for a job, a stepper for a trial of a sweep."""
    arms = arms_of(experiment)
    store = store_of(experiment, say)
    check_data(experiment, store, say)
    with ExitStack() as stack:
        stack.enter_context(stopper)
        held = []
        for name, arm in arms:
            lease = stack.enter_context(Lease(Storage(str(arm.run))))
            Ledger(Storage(str(arm.run)), lease.epoch).open(arm, store.dataset.content_hash)
            held.append(Arm(name, arm, lease.epoch, store.dataset.content_hash))
        for _, arm in arms:
            check_labels(arm, store)
        if _complete(arms):
            say("all cycles are committed already")
            return 0
        _run(experiment, store, tuple(held), say=say, hold=hold, stopper=stopper)
        for _, arm in arms:
            ledger = Ledger(Storage(str(arm.run)))
            ledger.write_lines(ledger.manifests())
    return 0 if not stopper.caught or _complete(arms) else errors.EXIT_INTERRUPTED[stopper.caught]


def store_of(experiment: Experiment, say: Callable[[str], None]) -> Store:
    """The tile store of a run: the version that it began with, the newest if it begins or was told to change."""
    newest = Store.open(str(experiment.data.uri))
    runs = [Storage(str(arm.run)) for _, arm in arms_of(experiment)]
    begun = [Ledger(run).config()[1] for run in runs if run.exists("config.json")]
    if not begun or begun[0] == newest.dataset.content_hash or experiment.allow_config_change:
        return newest
    try:
        store = Store.open(newest.storage.uri, begun[0])
    except UsageError:
        return newest  # another store: the ledger says what differs
    say(
        f"note: the run goes on with version {store.dataset.version} of the store, {len(store.index)} tiles; tiles were appended since, "
        f"version {newest.dataset.version} has {len(newest.index)}: a new --run takes them"
    )
    return store


def _complete(arms: list[tuple[str, Experiment]]) -> bool:
    return all(len(Ledger(Storage(str(e.run))).manifests()) >= e.cycles for _, e in arms)


def _run(
    experiment: Experiment,
    store: Store,
    held: tuple[Arm, ...],
    *,
    say: Callable[[str], None],
    hold: str | None,
    stopper: "Stopper | Stepper",
) -> None:
    """Start the actors and the trainer, watch until they end."""
    connect()
    stopper.arm()
    check_run_paths(experiment)
    scoring = any(uses_scorers(a.experiment) for a in held)
    device, scorers = secure(experiment.cluster, scoring=scoring, say=say)
    patience = experiment.cluster.patience(autoscaling=autoscaling())
    watcher: Any = ray.remote(Monitor).options(num_cpus=0, max_concurrency=8, scheduling_strategy=_here())
    monitor = watcher.remote(stopper.allowed)
    pool = _scorers(experiment, store, device, scorers)
    pool.start()
    setup = Setup(held, pool, monitor, device, environment(), patience, hold, autoscaling())
    boards, committed = {}, {}
    for arm in held:
        run = Storage(str(arm.experiment.run))
        manifests = Ledger(run).manifests()
        boards[arm.name], committed[arm.name] = TensorBoard(run, manifests), len(manifests)
    progress = Progress([(a.name, a.experiment) for a in held], committed, say)
    stopper.take(monitor)
    try:
        Watch(monitor, progress, boards, say, stopper.cycle).over(_trainer(experiment, setup), patience)
    finally:
        for board in boards.values():
            board.close()
        pool.kill()
        ray.kill(monitor)


def uses_scorers(experiment: Experiment) -> bool:
    """Whether a run has scorers."""
    strategy = STRATEGIES[experiment.select.strategy]
    return strategy.needs_scores or "irreducible" in strategy.needs


def _here() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _scorers(experiment: Experiment, store: Store, device: str, count: int) -> ScorerPool:
    cluster = experiment.cluster
    network = Network(experiment.model.arch, len(store.dataset.classes), device)
    make = network, store.storage.uri, store.dataset.tile_size, int(cluster.cache_gib * 2**30)
    asked = cluster.scorer(device)
    options = {"num_cpus": asked["CPU"], "num_gpus": asked.get("GPU", 0)}
    return ScorerPool(count, make, options, threads=cluster.threads)


def _trainer(experiment: Experiment, setup: Setup) -> TorchTrainer:
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    cluster = experiment.cluster
    gpu = setup.device == "cuda"

    def work() -> None:
        from raysed.cluster import cycles

        cycles.run(setup)

    workers: Any = (cluster.fewest, cluster.workers) if cluster.min_workers else cluster.workers
    return TorchTrainer(
        work,  # holds the setup: Ray's controller would open a `train_loop_config`, and import the networks' libraries
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # Ray's hints are those of its old Train
            num_workers=workers,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=gpu,
            resources_per_worker=cluster.worker(setup.device),
            placement_strategy="PACK" if gpu else "SPREAD",
        ),
        torch_config=TorchConfig(timeout_s=COLLECTIVE_SECONDS),
        run_config=ray.train.RunConfig(
            name=f"raysed-{os.getpid()}-{int(time.time())}",
            storage_path=tempfile.mkdtemp(prefix="raysed-train-"),
            failure_config=ray.train.FailureConfig(max_failures=-1),  # the monitor counts instead
        ),
    )


@dataclass
class Watch:
    """The driver's eyes: fits in a thread, prints and logs what happens, finds out how it ends."""

    monitor: ActorHandle
    progress: Progress
    boards: dict[str, TensorBoard]
    say: Callable[[str], None]
    on_cycle: Callable[[Manifest], None]
    failed: RaysedError | None = None
    failed_at: float = 0.0

    def over(self, trainer: TorchTrainer, patience: float) -> None:
        """Watch a trainer until it ends.

        Raises:
            RaysedError: the error that a rank has reported.
            ResourcesError: for `patience` seconds, or as long as Ray Train may take to replace one, there was no worker; or the
                cluster was lost.
        """
        ended: list[BaseException | None] = []

        def fit() -> None:
            try:
                trainer.fit()
                ended.append(None)
            except BaseException as error:  # handed to the main thread below
                ended.append(error)

        _answer(self.monitor.expect.remote())
        threading.Thread(target=fit, daemon=True, name="raysed-fit").start()
        seen = 0
        while True:
            over = bool(ended)
            events: list[dict[str, Any]] = _answer(self.monitor.wait.remote(seen, 0.5))
            seen += len(events)
            for event in events:
                self._handle(event)
            if over and not events:
                break
            if self.failed and time.monotonic() - self.failed_at > ENDING_SECONDS:
                break
            silent, begun = _answer(self.monitor.silent.remote()) if not over and not events else (0.0, False)
            if silent > (limit := max(patience, replacing_seconds() if begun else STARTING_SECONDS)):
                free = ", ".join(
                    f"{v:g} {k}" for k, v in ray.available_resources().items() if k in ("CPU", "GPU")
                )
                raise ResourcesError(
                    f"there has been no training worker for {limit:.0f} s, the cluster has {free or 'no CPU'} free: add nodes, "
                    "wait until other jobs have ended, or raise --cluster.wait-nodes; the same command continues"
                )
        if self.failed:
            raise self.failed
        if ended[0] is not None:
            raise ended[0]

    def _handle(self, event: dict[str, Any]) -> None:
        if event["kind"] == "say":
            self.say(event["text"])
        elif event["kind"] == "phase" and event["holding"]:
            self.say(f"holding at {event['phase']} of cycle {event['cycle']}")
        elif event["kind"] == "cycle":
            self.progress.cycle(event["arm"], event["manifest"])
            self.boards[event["arm"]].cycle(event["manifest"])
            self.on_cycle(event["manifest"])
        elif event["kind"] == "failed" and not self.failed:
            self.failed = rebuilt(event["error"], event["text"])
            self.failed_at = time.monotonic()


def replacing_seconds() -> float:
    """How long rank 0 may be silent before a group without it trains: Ray Train waits for its answer, then for the new group."""
    waits = ("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S")
    return sum(float(os.environ[name]) for name in waits) + STARTING_SECONDS


def _answer(asked: Any) -> Any:
    """What an actor beside the driver says; it ends with the cluster only.

    Raises:
        ResourcesError: it has ended.
    """
    try:
        return ray.get(asked)
    except ray.exceptions.OutOfMemoryError as error:
        raise ResourcesError(
            "the driver's node ran out of memory, and Ray ended the run there: free some or take a larger head, and the same "
            "command continues"
        ) from error
    except ray.exceptions.RayError as error:
        raise ResourcesError(
            f"the Ray cluster was lost ({type(error).__name__}): start it again, and the same command continues"
        ) from error


class Stopper:
    """Ctrl-C and SIGTERM: while cycles run, the first one lets the cycle end and commit; before, or a second time, the job ends
    at once, and what is committed stands.
    """

    allowed: int | None = None
    """Cycles that may run before somebody allows more; None is all."""

    def __init__(self) -> None:
        self.caught = 0
        """The first signal, 0 if none."""
        self.monitor: ActorHandle | None = None
        """Of the cycles, once they run."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopper":
        self._before = {n: signal.getsignal(n) for n in errors.EXIT_INTERRUPTED}
        self.arm()
        return self

    def arm(self) -> None:
        """Take the signals, again after Ray has started: its own handler of SIGTERM aborts the process."""
        for number in errors.EXIT_INTERRUPTED:
            signal.signal(number, self._stop)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self, monitor: ActorHandle) -> None:
        """The cycles are about to run."""
        self.monitor = monitor

    def cycle(self, manifest: Manifest) -> None:
        """A cycle is committed."""

    def _stop(self, number: int, _: Any) -> None:
        if self.caught or self.monitor is None:
            raise SystemExit(errors.EXIT_INTERRUPTED[number])
        self.caught = number
        self.monitor.allow.remote(None, stop=True)


@contextmanager
def signals_noted(caught: list[int]) -> Iterator[None]:
    """While this is open, the first Ctrl-C or SIGTERM is appended, and the next one ends the job at once."""

    def note(number: int, _: Any) -> None:
        if caught:
            raise SystemExit(errors.EXIT_INTERRUPTED[number])
        caught.append(number)

    before = {n: signal.signal(n, note) for n in errors.EXIT_INTERRUPTED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stepper:
    """Runs an experiment in a thread and hands out its cycles one by one: no cycle begins before it is asked for, so that a run
    that is stopped between two cycles has done nothing in vain and gives the cluster back at once.

    Args:
        experiment: with `run` and `data.uri` set.
        cycle: the first one that will be asked for; None lets all of them run.
        say: prints a line.
        hold: as for `launch`.
    """

    caught = 0

    def __init__(
        self,
        experiment: Experiment,
        cycle: int | None,
        say: Callable[[str], None],
        hold: str | None = None,
    ) -> None:
        self.allowed: int | None = cycle
        self._monitor: ActorHandle | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._last: Manifest | None = None
        self._ended: list[BaseException | None] = []

        def work() -> None:
            try:
                carry_out(experiment, self, say=say, hold=hold)
                error = None
            except BaseException as raised:  # handed to whoever asks for the next cycle
                error = raised
            with self._changed:
                self._ended.append(error)
                self._changed.notify_all()

        self._thread = threading.Thread(target=work, daemon=True, name="raysed-steps")
        self._thread.start()

    def __enter__(self) -> "Stepper":
        return self

    def arm(self) -> None:
        """Signals belong to whoever has several runs."""

    def __exit__(self, *_: object) -> None:
        pass

    def take(self, monitor: ActorHandle) -> None:
        """The cycles are about to run."""
        with self._changed:
            self._monitor = monitor
            self._tell()

    def cycle(self, manifest: Manifest) -> None:
        """A cycle is committed."""
        with self._changed:
            self._last = manifest
            self._changed.notify_all()

    def step(self, cycle: int) -> Manifest:
        """Let a cycle run and wait until it is committed.

        Raises:
            RaysedError: what ended the run instead.
        """
        with self._changed:
            self.allowed = cycle + 1
            self._tell()
            self._changed.wait_for(lambda: self._ended or (self._last and self._last.cycle >= cycle))
            if self._last and self._last.cycle >= cycle:
                return self._last
        raise self._ended[0] or RaysedError(f"{cycle} cycles are committed and the run has ended")

    def end(self) -> None:
        """Let the run end after the cycle that is running, if one is."""
        with self._changed:
            if not self._stopping:
                self._stopping = True
                self._tell()

    def stop(self) -> None:
        """`end`, and wait until its actors are gone."""
        self.end()
        self._thread.join()

    def over(self) -> bool:
        """Whether the run has ended and its actors are gone."""
        return not self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What ended the run, if not its last cycle or `end`."""
        return self._ended[0] if self._ended else None

    def _tell(self) -> None:
        if self._monitor and not self._ended:
            with suppress(ray.exceptions.RayActorError):  # killed: the run is ending by itself
                ray.get(self._monitor.allow.remote(self.allowed, stop=self._stopping))
