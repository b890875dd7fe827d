"""Starting a run: checks, lease, actors, one `TorchTrainer.fit()`, and the driver's watch over it."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysed import errors
from raysed.cluster import cycles
from raysed.cluster.connect import NodeType, check_paths, connect, node_types
from raysed.cluster.cycles import Arm, Setup
from raysed.cluster.scorekeeping import RECORDED
from raysed.cluster.scoring import Network, Scorer
from raysed.cluster.telemetry import Monitor, Progress, TensorBoard
from raysed.config import ClusterConfig, Experiment
from raysed.core import networks
from raysed.core.acquisition import STRATEGIES
from raysed.core.splits import training_rows, validation_rows
from raysed.errors import RaysedError, ResourcesError, UsageError, rebuilt
from raysed.io import people
from raysed.io.ledger import Lease, Ledger, Manifest
from raysed.io.model import weights_of_run
from raysed.io.provenance import environment
from raysed.io.storage import Storage
from raysed.io.store import Store

TRAIN_SETTINGS = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train view
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon an end or a death is seen; 2 s of every start and end otherwise
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # a group that shrinks waits so long for a node that is gone; 60 s otherwise
}
"""Ray Train reads these where `fit` is called; what the user has set stands."""
RESIZE_SECONDS = 15.0
"""Seconds between two looks for nodes that could take more workers."""
COLLECTIVE_SECONDS = 300
"""After which a rank that waits for another one gives up, and the workers are started again: the other one may hang."""
ENDING_SECONDS = 60.0
"""How long the workers of a run that has failed may take to give the cluster back."""


def arms_of(experiment: Experiment) -> list[tuple[str, Experiment]]:
    """The runs of an experiment, passive first: the baseline lives below the run directory."""
    own = (experiment.select.strategy, replace(experiment, baseline=False))
    if not experiment.baseline or experiment.select.strategy == "uniform":
        return [own]
    select = replace(experiment.select, strategy="uniform")
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
    store = Store.open(str(experiment.data.uri))
    check_data(experiment, store, say)
    with ExitStack() as stack:
        stack.enter_context(stopper)
        held = []
        for name, arm in arms:
            lease = stack.enter_context(Lease(Storage(str(arm.run))))
            Ledger(Storage(str(arm.run)), lease.epoch).open(arm, store.dataset.content_hash)
            held.append(Arm(name, arm, lease.epoch))
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
    device = device_of(experiment)
    scorers = scorer_count(experiment, device) if any(_scores(a.experiment) for a in held) else 0
    check_resources(experiment, device, scorers)
    watcher: Any = ray.remote(Monitor).options(num_cpus=0, max_concurrency=8, scheduling_strategy=_here())
    monitor = watcher.remote(scorers, stopper.allowed)
    pool = _start_scorers(experiment, store, device, scorers)
    setup = Setup(held, pool, monitor, device, environment(), patience(experiment), hold)
    boards, committed = {}, {}
    for arm in held:
        run = Storage(str(arm.experiment.run))
        manifests = Ledger(run).manifests()
        boards[arm.name], committed[arm.name] = TensorBoard(run, manifests), len(manifests)
    progress = Progress([(a.name, a.experiment) for a in held], committed, say)
    stopper.take(monitor)
    try:
        Watch(monitor, progress, boards, say, stopper.cycle).over(
            _trainer(experiment, setup), patience(experiment)
        )
    finally:
        for board in boards.values():
            board.close()
        for actor in (*pool, monitor):
            ray.kill(actor)


def _scores(experiment: Experiment) -> bool:
    strategy = STRATEGIES[experiment.select.strategy]
    return strategy.needs_scores or "irreducible" in strategy.needs


def check_data(experiment: Experiment, store: Store, say: Callable[[str], None]) -> None:
    """Prove that the experiment fits its tile store; absent classes are said."""
    dataset = store.dataset
    if experiment.select.strategy not in STRATEGIES:
        raise UsageError(
            f"select.strategy must be one of {', '.join(STRATEGIES)}, got {experiment.select.strategy!r}"
        )
    if missing := STRATEGIES[experiment.select.strategy].needs - RECORDED:
        raise UsageError(
            f"strategy {experiment.select.strategy} needs the scores {', '.join(sorted(missing))}, which no run records: "
            "choose another --select"
        )
    if "irreducible" in STRATEGIES[experiment.select.strategy].needs:
        check_reference(experiment)
    if "features" in STRATEGIES[experiment.select.strategy].needs and experiment.select.scores == "byproduct":
        raise UsageError(
            f"strategy {experiment.select.strategy} compares features of one network: select.scores must be fresh or overlapped"
        )
    if experiment.buys_labels and STRATEGIES[experiment.select.strategy].needs_labels:
        raise UsageError(
            f"strategy {experiment.select.strategy} looks at labels, which select.protocol pool has yet to buy: choose another --select"
        )
    data = experiment.data
    regions = set(store.index["region"].to_pylist())
    if unknown := [r for r in (data.held_out or "").split(",") if r and r not in regions]:
        raise UsageError(
            f"data.held_out: the store has no region {unknown[0]!r}, but {', '.join(sorted(regions)[:12])}"
        )
    pool = training_rows(store.index, data.held_out, unlabelled=experiment.asks_people)
    experiment.select.budget(len(pool))
    if not len(validation_rows(store.index, data.validation, data.held_out)):
        raise UsageError(
            f"{store.storage.uri} has no labelled tile in split val (data.validation {data.validation}, data.held_out "
            f"{data.held_out or 'none'}): nothing to evaluate on"
        )
    net = networks.build(experiment.model.arch, len(dataset.classes), experiment.seed)
    if dataset.tile_size % net.multiple or dataset.tile_size < 2 * net.multiple:
        raise UsageError(
            f"{experiment.model.arch} needs tiles of 2, 3, ... x {net.multiple} px, the store's have {dataset.tile_size}: "
            "prepare it with another --store"
        )
    if experiment.asks_people:
        return  # what the training tiles hold is not known yet
    for land_class, train, val in zip(
        dataset.classes, dataset.pixels["train"][1:], dataset.pixels["val"][1:], strict=True
    ):
        if not train:
            where = "and counts in validation" if val else "nor in validation"
            say(
                f"note: class {land_class.name} has no pixel in the training tiles {where}; its loss weight is 0"
            )


def check_reference(experiment: Experiment) -> None:
    """Prove that there is a run whose weights say what loss is irreducible."""
    uri = experiment.select.reference
    if uri is None:
        raise UsageError(
            f"strategy {experiment.select.strategy} compares with a network trained before: give its run, --select.reference"
        )
    ledger = Ledger(Storage(uri))
    other = ledger.config()[0].model.arch
    if other != experiment.model.arch:
        raise UsageError(
            f"--select.reference {uri} is of {other}, this run of {experiment.model.arch}: they must be alike"
        )
    weights_of_run(ledger, None)


def check_labels(experiment: Experiment, store: Store) -> None:
    """Refuse to start a cluster for a run whose picks are still with people.

    Raises:
        WaitingForLabels: with how many are missing, and where they are to go.
    """
    if not experiment.asks_people:
        return
    run = Storage(str(experiment.run))
    cycle = len(Ledger(run).manifests())
    if cycle >= experiment.cycles or not experiment.pool.begins(cycle):
        return
    number = cycle // experiment.pool.cycles
    if request := people.asked(run, number):
        people.require(run, number, request[0].tile_ids, str(experiment.pool.labels), store.dataset)


def check_run_paths(experiment: Experiment) -> None:
    """Refuse local data or run paths on a cluster of several nodes."""
    places = {f"--data {experiment.data.uri}": experiment.data.uri, f"--run {experiment.run}": experiment.run}
    if experiment.asks_people:
        places[f"--pool.labels {experiment.pool.labels}"] = experiment.pool.labels
    check_paths(
        {shown: str(uri) for shown, uri in places.items()},
        shared=experiment.cluster.shared_filesystem,
        remedy="give an s3:// URI (or set RAYSED_DATA and RAYSED_RUN), or --cluster.shared-filesystem if all nodes see the same files",
    )


def device_of(experiment: Experiment) -> str:
    """cpu or cuda; GPUs that an autoscaler may still start count."""
    to_come = sum(t.most * t.resources.get("GPU", 0) for t in node_types() if t.resources.get("GPU"))
    return experiment.cluster.device_with(max(ray.cluster_resources().get("GPU", 0), to_come))


def patience(experiment: Experiment) -> float:
    """Seconds to wait for nodes of this cluster."""
    return experiment.cluster.patience(autoscaling=bool(node_types()))


def scorer_count(experiment: Experiment, device: str) -> int:
    """Scoring actors, if there is anything to score."""
    resources, workers = ray.cluster_resources(), experiment.cluster.workers
    units = (
        max(resources.get("GPU", 0), workers)
        if device == "cuda"
        else min(resources.get("CPU", 1), 2 * workers)
    )
    return experiment.cluster.scorers or max(1, int(units))


def check_resources(experiment: Experiment, device: str, scorers: int) -> None:
    """Prove that workers, scorers and at least one read task fit at once: Ray would wait for ever without an error.

    Where an autoscaler can start nodes for them it is enough that it may; their demand starts them.
    """
    cluster = experiment.cluster
    wanted = cluster.demand(device, scorers)
    if types := node_types():
        _check_types(cluster, device, scorers, types)
        return
    until = time.monotonic() + (cluster.patience(autoscaling=False) if len(ray.nodes()) > 1 else 0)
    while True:
        have = ray.cluster_resources()
        short = {k: v for k, v in wanted.items() if v > have.get(k, 0)}
        crowded = device == "cpu" and cluster.fewest > have.get("CPU", 0)
        if not short and not crowded:
            return
        if time.monotonic() >= until:
            break
        time.sleep(1)
    offered = ", ".join(f"{have.get(k, 0):g} {k}" for k in wanted)
    asked = ", ".join(f"{v:g} {k}" for k, v in wanted.items())
    raise ResourcesError(
        f"{cluster.fewest} workers, {scorers} scorers and a read task ask for {asked}"
        + (" and a CPU for each worker" if crowded else "")
        + f", the cluster has {offered}: lower --workers or --scorers, or add nodes"
    )


def _check_types(cluster: ClusterConfig, device: str, scorers: int, types: list[NodeType]) -> None:
    """Prove that the nodes there are and those that may be started can hold what is asked for."""
    there = [NodeType("now", n["Resources"], 1) for n in ray.nodes() if n["Alive"]]
    offered = "; ".join(f"{t.most:g} x {t.name} ({', '.join(f'{v:g} {k}' for k, v in t.resources.items() if k in ('CPU', 'GPU'))})" for t in types)  # fmt: skip
    for what, count, bundle in (
        ("worker", cluster.fewest, cluster.worker(device)),
        ("scorer", scorers, cluster.scorer(device)),
        ("read task", 1, {"CPU": cluster.reader_cpus}),
    ):
        room = sum(
            t.most * min(t.resources[k] // v for k, v in bundle.items())
            for t in (*there, *types)
            if t.holds(bundle)
        )
        if room < count:
            asked = ", ".join(f"{v:g} {k}" for k, v in bundle.items())
            raise ResourcesError(
                f"{count} x {what} of {asked} will never find room: the autoscaler may start {offered}; lower --workers or "
                "--scorers, ask for less a piece (--cluster.*), or allow more or larger nodes in the cluster's configuration"
            )


def _here() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _start_scorers(experiment: Experiment, store: Store, device: str, count: int) -> tuple[ActorHandle, ...]:
    cluster = experiment.cluster
    network = Network(experiment.model.arch, len(store.dataset.classes), experiment.optim.precision, device)
    actor: Any = ray.remote(Scorer).options(
        num_cpus=cluster.scorer(device)["CPU"],
        num_gpus=cluster.scorer(device).get("GPU", 0),
        max_restarts=-1,
        scheduling_strategy="SPREAD",
    )
    side, room = store.dataset.tile_size, int(cluster.cache_gib * 2**30)
    return tuple(actor.remote(network, store.storage.uri, side, room) for _ in range(count))


def _trainer(experiment: Experiment, setup: Setup) -> TorchTrainer:
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    cluster = experiment.cluster
    gpu = setup.device == "cuda"
    workers: Any = (cluster.fewest, cluster.workers) if cluster.min_workers else cluster.workers
    return TorchTrainer(
        cycles.run,
        train_loop_config={"setup": setup},
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
            ResourcesError: for `patience` seconds there was no worker.
        """
        ended: list[BaseException | None] = []

        def fit() -> None:
            try:
                trainer.fit()
                ended.append(None)
            except BaseException as error:  # handed to the main thread below
                ended.append(error)

        threading.Thread(target=fit, daemon=True, name="raysed-fit").start()
        seen = 0
        while True:
            over = bool(ended)
            events: list[dict[str, Any]] = ray.get(self.monitor.wait.remote(seen, 0.5))
            seen += len(events)
            for event in events:
                self._handle(event)
            if over and not events:
                break
            if self.failed and time.monotonic() - self.failed_at > ENDING_SECONDS:
                break
            if not over and not events and ray.get(self.monitor.silent.remote()) > patience:
                free = ", ".join(
                    f"{v:g} {k}" for k, v in ray.available_resources().items() if k in ("CPU", "GPU")
                )
                raise ResourcesError(
                    f"there has been no training worker for {patience:.0f} s, the cluster has {free or 'no CPU'} free: add nodes, "
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


class Stepper:
    """Runs an experiment in a thread and hands out its cycles one by one: no cycle begins before it is asked for, so that a run
    that is stopped between two cycles has done nothing in vain and gives the cluster back at once.

    Args:
        experiment: with `run` and `data.uri` set.
        cycle: the first one that will be asked for.
        say: prints a line.
    """

    caught = 0

    def __init__(self, experiment: Experiment, cycle: int, say: Callable[[str], None]) -> None:
        self.allowed: int | None = cycle
        self._monitor: ActorHandle | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._last: Manifest | None = None
        self._ended: list[BaseException | None] = []

        def work() -> None:
            try:
                carry_out(experiment, self, say=say)
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
        """Signals belong to the sweep."""

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

    def stop(self) -> None:
        """End the run after the cycle that is running, if one is, and wait until its actors are gone."""
        with self._changed:
            self._stopping = True
            self._tell()
        self._thread.join()

    def _tell(self) -> None:
        if self._monitor and not self._ended:
            with suppress(ray.exceptions.RayActorError):  # killed: the run is ending by itself
                ray.get(self._monitor.allow.remote(self.allowed, stop=self._stopping))
