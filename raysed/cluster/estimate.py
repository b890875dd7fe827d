"""`--dry-run`: what would run where, how long it would take and what it would cost, without running it."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import ray
import torch

from raysed.cluster.checks import device_of
from raysed.cluster.connect import autoscaling, connect
from raysed.cluster.launch import arms_of, store_of, uses_scorers
from raysed.cluster.nodes import offers
from raysed.cluster.preflight import check_data, check_run_paths
from raysed.cluster.room import candidates, check_sum, placed, scorer_count
from raysed.cluster.scorekeeping import scored_side
from raysed.config import ClusterConfig, Experiment
from raysed.core import memory, networks
from raysed.core.acquisition import strategy_of
from raysed.core.cost import Speed, Work
from raysed.core.splits import training_rows, validation_rows
from raysed.errors import ResourcesError
from raysed.io.ledger import Ledger, Manifest
from raysed.io.storage import Storage
from raysed.io.store import Store

MEASURED = 3
"""Optimiser steps and forward passes that are timed, after one that is not."""


def dry_run(
    experiment: Experiment, *, tiles_per_second: float | None, price: float | None, say: Callable[[str], None]
) -> None:
    """Say what an experiment would do; nothing is written.

    Args:
        experiment: with `run` and `data.uri` set.
        tiles_per_second: training speed of the whole cluster; None takes the run's own past cycles, or measures.
        price: of the whole cluster an hour, in any currency.
        say: prints a line.

    Raises:
        RaysedError: what would also end the real run before it starts.
    """
    store = store_of(experiment, say)
    check_data(experiment, store, say)
    connect()
    check_run_paths(experiment)
    device = _device(experiment.cluster, say)
    arms = arms_of(experiment)
    scoring = any(uses_scorers(e) for _, e in arms)
    scorers = scorer_count(experiment.cluster, device) if scoring else 0
    if not autoscaling():
        check_sum(experiment.cluster, device, scorers)
    multiple = _say_where(experiment, store, device, scorers, say)
    work, past = [], []
    for name, arm in arms:
        manifests = Ledger(Storage(str(arm.run))).manifests()
        past += manifests[-5:]
        work.append(_work(arm, store, len(manifests), multiple))
        _say_work(name, arm, store, work[-1], say)
    speed = _speed(experiment, store, device, tiles_per_second, past)
    seconds = sum(w.seconds(speed) for w in work)
    cost = "" if price is None else f", {seconds / 3600 * price:.2f} at {price:g} an hour"
    say(
        f"time     {speed.train:.1f} tiles/s training, {speed.forward:.1f} forward ({speed.source}): {seconds / 3600:.2f} h"
        f"{cost}; start and cold first cycle not counted"
    )


def _device(cluster: ClusterConfig, say: Callable[[str], None]) -> str:
    """What `secure` would choose, without starting the nodes of the whole run.

    The launcher's file says what may be started; another autoscaler is asked for the room of one worker.

    Raises:
        ResourcesError: the autoscaler promised a node, and none came in time.
    """
    first, *others = candidates(cluster)
    if not others:
        return first
    found, most = offers()
    if most is not None:
        return device_of(cluster, found)
    remedy = "say --cluster.device, or raise --cluster.wait-nodes"
    patience = cluster.patience(autoscaling=True)
    return first if placed([cluster.worker(first)], patience, say, remedy) else others[0]


def _say_where(
    experiment: Experiment, store: Store, device: str, scorers: int, say: Callable[[str], None]
) -> int:
    """Three lines; what the network's input must be a multiple of."""
    cluster, dataset = experiment.cluster, store.dataset
    have = ray.cluster_resources()
    nodes = sum(n["Alive"] for n in ray.nodes())
    say(f"cluster  {nodes} nodes, {have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU")
    say(
        f"workers  {cluster.workers} on {device}, {scorers} scorers, read tasks of {cluster.reader_cpus:g} CPU"
    )
    net = networks.build(experiment.model.arch, len(dataset.classes), experiment.seed)
    parameters = sum(p.numel() for p in net.parameters())
    half = device == "cuda" and experiment.optim.precision != "fp32"
    dtype = torch.bfloat16 if half else torch.float32
    need = memory.step_bytes(net, experiment.optim.micro_batch, dataset.tile_size, dtype)
    say(
        f"network  {experiment.model.arch}, {parameters / 1e6:.1f} million parameters, about {need / 2**30:.1f} GiB of GPU "
        f"memory a worker (estimate) at micro-batch {experiment.optim.micro_batch}"
    )
    return net.multiple


def _work(arm: Experiment, store: Store, committed: int, multiple: int) -> Work:
    side = store.dataset.tile_size
    cost = (scored_side(arm.select.side, arm.select.scores, side, multiple) / side) ** 2
    pool = len(training_rows(store.index, arm.data.held_out, unlabelled=arm.asks_people))
    return Work(
        cycles=max(0, arm.cycles - committed),
        train=arm.select.budget(pool),
        score=_scored(arm, pool, committed, cost),
        validate=len(validation_rows(store.index, arm.data.validation, arm.data.held_out)),
    )


def _scored(arm: Experiment, pool: int, committed: int, cost: float) -> float:
    """Full-size forward passes of scorers a cycle, mean over the cycles that are left.

    Args:
        arm: one run.
        pool: its training tiles.
        committed: its cycles that are done.
        cost: of a scorer's pass over a tile, in those at full size.
    """
    strategy = strategy_of(arm.select.strategy, arm.select.options)
    left = range(committed, arm.cycles)
    passes = 1.0 if "irreducible" in strategy.needs and 0 in left else 0.0
    if strategy.needs_scores:
        chosen = arm.select.budget(pool)

        def is_read(cycle: int) -> bool:
            if strategy.reads is None or arm.buys_labels:
                return arm.scores_before(cycle)
            return strategy.reads(arm.progress(cycle), lambda times: cycle * chosen >= times * pool)

        share = [
            arm.select.refresh if arm.select.scores == "byproduct" and cycle else 1.0
            for cycle in left
            if is_read(cycle)
        ]
        passes += cost * sum(share)
    return pool * passes / max(1, len(left))


def _say_work(name: str, arm: Experiment, store: Store, work: Work, say: Callable[[str], None]) -> None:
    """A line: passes, and bytes.

    A tile is read whole, whatever side it is scored at, and kept decoded: bytes follow from distinct tiles, not from passes.
    """
    lengths = [pc.sum(store.index[f"{kind}_length"]).as_py() or 0 for kind in ("image", "label")]
    tile = sum(lengths) / max(1, store.index.num_rows)
    pool = len(training_rows(store.index, arm.data.held_out, unlabelled=arm.asks_people))
    kept = work.validate + (pool if work.score else 0)
    done = f" ({arm.cycles - work.cycles} are committed)" if work.cycles < arm.cycles else ""
    say(
        f"{name:<8} {work.cycles} cycles{done}: each trains {work.train} tiles in {-(-work.train // arm.optim.batch)} steps, scores "
        f"{work.score:.0f}, validates {work.validate} (in forward passes of a full tile, mean over the cycles); trains on "
        f"{work.train * tile / 1e6:.1f} MB a cycle, scores and validates {kept * tile / 1e6:.1f} MB, read once if "
        "--cluster.cache-gib holds them"
    )


def _speed(
    experiment: Experiment, store: Store, device: str, stated: float | None, past: list[Manifest]
) -> Speed:
    if stated is None and past:
        seconds = [m.record["seconds"] for m in past]
        train = sum(m.record["tiles"] for m in past) / sum(s["train"] + s["stall"] for s in seconds)
        forward = sum(m.record["val"]["tiles"] for m in past) / sum(s["evaluate"] for s in seconds)
        return Speed(train, forward, f"its last {len(past)} cycles")
    if stated is not None:
        return Speed(stated, 3 * stated, "as stated, a forward pass a third of a training step")
    cluster = experiment.cluster
    task: Any = ray.remote(measure).options(
        num_cpus=cluster.worker_cpus, num_gpus=cluster.worker(device).get("GPU", 0)
    )
    patience = cluster.patience(autoscaling=autoscaling())
    try:
        train, forward = ray.get(task.remote(experiment, len(store.dataset.classes), store.dataset.tile_size, device), timeout=patience)  # fmt: skip
    except ray.exceptions.GetTimeoutError as error:
        raise ResourcesError(
            f"no worker measured its speed within {patience:.0f} s: give --tiles-per-second"
        ) from error
    text = f"{MEASURED} steps measured on one {device} worker"
    return Speed(train * cluster.workers, forward * cluster.workers, f"{text}, times {cluster.workers}")


def local_workers(
    cluster: ClusterConfig, device: str, here: Mapping[str, float], nodes: Sequence[Mapping[str, float]]
) -> int:
    """How many of the workers would be on a node: on GPUs Ray packs them, on CPUs it spreads them.

    Args:
        cluster: asks for the workers.
        device: cpu or cuda.
        here: resources of the node.
        nodes: resources of all nodes that are up; more are not foreseen.
    """

    def fit(node: Mapping[str, float]) -> int:
        return int(min(node.get(k, 0) / v for k, v in cluster.worker(device).items()) + 1e-9)

    over = 1 if device == "cuda" else sum(fit(node) > 0 for node in nodes)
    return max(1, min(fit(here), math.ceil(cluster.workers / max(1, over))))


def measure(experiment: Experiment, classes: int, side: int, device: str) -> tuple[float, float]:
    """Tiles a second of training steps and of forward passes of one worker, on random tiles in memory.

    Args:
        experiment: with all its workers; one of them is measured, with the threads that it would have beside the others.
        classes: C.
        side: of a tile, pixels.
        device: cpu or cuda.
    """
    from raysed.cluster.cycles import node_cpus, node_id
    from raysed.core.step import Learner, MicroBatch, resolve_precision, to_device

    alive = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}
    here = local_workers(experiment.cluster, device, alive[node_id()], list(alive.values()))
    torch.set_num_threads(experiment.cluster.threads or max(1, node_cpus() // here))
    place = torch.device(device)
    net = networks.build(experiment.model.arch, classes, experiment.seed).to(place)
    learner = Learner(
        net,
        alpha=np.ones(classes, np.float32),
        gamma=experiment.loss.gamma,
        batch=experiment.optim.batch,
        precision=resolve_precision(experiment.optim.precision, place),
        ordered_sums=False,
    )
    rng, size = np.random.default_rng(0), experiment.optim.micro_batch
    images = rng.integers(0, 256, (size, side, side, 3), np.uint8)
    labels = rng.integers(1, classes + 1, (size, side, side), np.uint8)
    micro = [MicroBatch(k, *to_device(images, labels, place)) for k in range(experiment.optim.micro_batches)]

    def step() -> None:
        learner.step(micro, lr=1e-6, key=("measure",), total=len(micro)).cpu()

    def forward() -> None:
        for batch in micro:
            learner.predict(batch.images)

    speeds = []
    for action in (step, forward):
        action()
        began = time.perf_counter()
        for _ in range(MEASURED):
            action()
        speeds.append(MEASURED * experiment.optim.batch / (time.perf_counter() - began))
    return speeds[0], speeds[1]
