"""Benchmarks: every figure a ratio measured in one run on the same cores, the two sides alternating.

A row measures both sides in turn and keeps the ratio of each repetition; the value is their median with an interval of 95 %
by order statistics, and a goal counts as met only by the interval's worse end.  Runs of the system that are compared stand on the
cluster side by side and take two cycles in turn, so that a machine whose speed drifts slows both; the second counts, beside which
the first is committed.  The rivals are the tuned plain PyTorch a user would write, and Ray stands still while they run.
"""

import io
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.multiprocessing.spawn import ProcessException
from torch.utils.flop_counter import FlopCounterMode

from raysed.cluster.connect import connect
from raysed.cluster.launch import Stepper
from raysed.cluster.local import ObjectServer
from raysed.cluster.mapper import BATCH, Settings
from raysed.cluster.predict import predict
from raysed.cluster.scorekeeping import Scorekeeper
from raysed.cluster.scoring import Answers, Network, ScorerPool, Scores, Work, score_pool
from raysed.cluster.stream import BLOCK, Stream
from raysed.config import AugmentConfig, ClusterConfig, Experiment, OptimConfig, SelectConfig
from raysed.core import networks
from raysed.core.augment import augment, to_uint8
from raysed.core.losses import class_weights, focal_loss_sum
from raysed.core.plan import plan
from raysed.core.pool import sorted_names, without
from raysed.core.randomness import keyed_rng
from raysed.core.splits import training_rows
from raysed.core.step import (
    DTYPES,
    Learner,
    MicroBatch,
    Precision,
    resolve_precision,
    to_device,
    train_grouped_in_fp32,
)
from raysed.core.tiles import LandClass
from raysed.core.uncertainty import log_probabilities, tile_scores
from raysed.core.windows import axis
from raysed.errors import RaysedError
from raysed.io.imagery import find_images
from raysed.io.ledger import Ledger, choose, selection_table, table_bytes
from raysed.io.model import of_run
from raysed.io.storage import Storage
from raysed.io.store import INDEX, LOCATION, POOL, TRAINING, Dataset, Store, Tile, packed, read_tiles

CPU = torch.device("cpu")
ARCH = "efficientunet-b0"
ARCHS = ("unet", ARCH, "efficientunet-b4")
TILES = 96
"""A cycle, in rows that train: a fifth of the pool, six steps."""
SHAPE = 8, 128
"""Classes, and side of a tile in pixels, of the synthetic store."""
MISHAPS = (RaysedError, subprocess.SubprocessError, ProcessException)
"""After which a row is not measured, and others are."""
CONFIDENCE = 0.95
"""With which an interval holds the median."""
TURNS = 10
"""Of a group that takes turns, at most; the first is cold and left out."""
FEWEST = 3
"""Samples that a row has at least."""
GROUP_SECONDS, ROW_SECONDS = 240.0, 60.0
"""After which a group that takes turns, or what a row measures in turn, is not measured once more: on slow cores rows have fewer
samples, and their range as interval.
"""
HAS_AMX = torch.cpu._is_amx_tile_supported()
"""Whether this CPU multiplies matrices of bf16 in units of their own."""


@dataclass(frozen=True)
class Goal:
    """What a row is held to."""

    unit: str
    limit: float | None
    """None: the row only reports."""
    at_least: bool = True
    how: str = ""

    def met(self, low: float, high: float) -> bool | None:
        """By the worse end of the interval."""
        if self.limit is None:
            return None
        return bool(low >= self.limit if self.at_least else high <= self.limit)


GOALS = {
    "active / passive": Goal("x the bare costs' ratio", 1.03, False, "a warm cycle with fresh scores of the whole pool over a passive one, over the ratio that the bare costs of step, scoring and validation on the same cores predict; bare scoring is that of one process with all cores or of a process on every core at once, whichever is faster, without Ray"),
    "by-product / passive": Goal("x", 1.05, False, "cycles with by-product scores (first full scoring spread over 30 cycles) over passive cycles of the same tiles"),
    "overlapped / passive": Goal("x", 1.03, False, "cycles scored with weights one cycle old, at half the side, while training runs, trainer and scorer on a core each, over passive cycles with the trainer on one core; at the full side one core scores the pool in more time than the other trains a fifth of it"),
    "training / plain loop": Goal("x", 0.97, True, "training tiles/s of the system, stall included, over a plain PyTorch loop fed by the best of several DataLoader settings that does the same reading, decoding and augmenting"),
    "stall": Goal("% of the step time", 3, False, "time the trainer waited for tiles over the time it trained, warm passive cycles"),
    "precision": Goal("x", 1.5 if HAS_AMX else None, True, "one training step of efficientunet-b0 in our precision and layout against fp32 NCHW; only CPUs with AMX have a goal"),
    "precision unet": Goal("x", 3.0 if HAS_AMX else None, True, "the same of the classic U-Net"),
    "scoring / bare forward": Goal("x a core", 0.95, True, "tiles/s a core of the whole pool through the scorers over a bare forward pass with scores of one thread, same precision, inference mode"),
    "two scorers / one": Goal("x", 1.8, True, "tiles/s of two scorers of one thread over one"),
    "predict / bare forward": Goal("x", 0.9, True, "windows/s of jobs/predict.py on GeoTIFFs, reading, blending and writing included, over a bare forward pass of as many windows in memory by the same cores; a long image minus a short one, so that the start of the actors is left out"),
    "stream / DataLoader": Goal("x", 1.0, True, "tiles/s of the tile stream alone from a bucket, warm, over the best of several DataLoader settings with the same functions, which read a batch at once, of 8 to 64 tiles; both hand over stacked batches"),
    "first batch / DataLoader": Goal("x", 1.5, False, "seconds until the first eight tiles of a warm cycle are there, from a bucket, over those of the best of several warm DataLoaders"),
    "augmentation": Goal("% of a step", 3, False, "augmenting a tile over a training step a tile of efficientunet-b0, both on one thread"),
    "bytes fetched": Goal("x", 1.1, False, "bytes of the ranged reads that a random fifth is fetched by, read task by read task, over the bytes of those tiles"),
    "fixed seconds": Goal("s a cycle", 1.5, False, "a warm passive cycle without steps and validation, the way to the next cycle included"),
    "two workers / one": Goal("x", 1.7, True, "tiles/s of two workers of one thread over one of one thread, same global batch"),
    "two processes, steps": Goal("x", None, True, "training steps/s of two processes of one thread that share nothing but the machine over one such process: the most that two workers can do here, and how far a trainer slows beside a busy scorer"),
    "two processes, scores": Goal("x", None, True, "the same of forward passes with scores: the most that two scorers can do here"),
    "plain loop beside Ray": Goal("x", None, False, "the rival of training / plain loop beside the idle processes of a local Ray and of a run, over the same without them: what Ray takes of these cores; the rest of the row above is the system's own"),
    "two beside Ray, steps": Goal("x", None, True, "two processes, steps, both sides beside the idle processes of a local Ray and of a run"),
    "two beside Ray, scores": Goal("x", None, True, "the same of forward passes with scores"),
    "controller 1e5": Goal("s a cycle", 60, False, "scores in, selection, plan and ledger tables of 10^5 tiles, strategy entropy, a fifth selected"),
    "controller 1e6": Goal("s a cycle", 60, False, "the same of 10^6 tiles"),
    "controller 1e7": Goal("s a cycle", 60, False, "the same of 10^7 tiles"),
    "controller memory": Goal("GiB", 4, False, "the most that a process holds that does this for 10^7 tiles, every column of their index, torch and Ray included"),
    "commit": Goal("% of the step time", 1, False, "time a warm cycle of six steps is blocked by its commit over the time it trains"),
    "parameters": Goal("million", None, True, "parameters of unet; efficientunet-b0 and -b4 stand in the samples"),
    "latency": Goal("ms", None, False, "forward pass of one 256 px tile by efficientunet-b0; unet and -b4, and the operations that each takes, stand in the samples"),
    "step memory": Goal("GiB", None, False, "what a process grows by at most in a training step of four 256 px tiles by efficientunet-b0; unet and -b4 stand in the samples"),
}  # fmt: skip
"""Every row with its goal."""


@dataclass(frozen=True)
class Row:
    """One measured row."""

    row: str
    value: float
    low: float
    high: float
    unit: str
    goal: float | None
    met: bool | None
    how: str
    samples: list[Any]


def row(name: str, samples: Sequence[float], note: Sequence[Any] = ()) -> Row:
    """A row of its samples: median, interval of the median, verdict."""
    values, goal = sorted(map(float, samples)), GOALS[name]
    low, high = interval(values)
    value, worst, best, *kept = (float(f"{v:.4g}") for v in (np.median(values), low, high, *samples))
    return Row(name, value, worst, best, goal.unit, goal.limit, goal.met(low, high), goal.how, [*kept, *note])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with a chance of 95 %, whatever the distribution.

    Of fewer than six values it is their range, whose chance is less: 94 % of five, 75 % of three, none of one.

    Args:
        values: in order.
    """
    n, left_out = len(values), 0
    while 1 - 2 * sum(math.comb(n, k) for k in range(left_out + 2)) / 2**n >= CONFIDENCE:
        left_out += 1
    return values[left_out], values[n - 1 - left_out]


@dataclass
class Bench:
    """What the rows share: the store and the results of the runs, each made once.

    Args:
        store: the synthetic store.
        folder: for run directories.
        server: runs only while a row needs a bucket; Ray has its credentials from the start.
        together: see `together`, measured before Ray starts.
    """

    store: Store
    folder: Path
    server: ObjectServer
    together: dict[tuple[str, int], list[tuple[float, float]]]

    def __post_init__(self) -> None:
        self.turns: dict[str, list[Any]] = {}
        """What is measured in turn, by name, and what it gave in each turn."""
        self.rival: tuple[Callable[[Any, int], None], Rival] | None = None
        """The plain training loop and its best setting."""
        self.controller_gib = 0.0
        """Peak of the controller row of most tiles."""
        self.ids = sorted(self.store.split("train")["tile_id"].to_pylist())
        self.classes = len(self.store.dataset.classes)
        self.side = self.store.dataset.tile_size
        self.alpha = class_weights(np.array(self.store.dataset.pixels["train"][1:]), 0.5)

    def take_turns(self, group: Sequence[str]) -> None:
        """Measure each of a group once a turn; runs of the system take two cycles, and the first turn does not count."""
        runs = {
            name: Stepper(self._experiment(name), 1, say=lambda _: None) for name in group if name in RUNS
        }
        try:
            for turn in repeats(TURNS, GROUP_SECONDS, cold=1):
                for name in group:
                    found = self._cycle(name, runs[name], turn) if name in runs else RIVALS[name](self)
                    if turn:
                        self.turns.setdefault(name, []).append(found)
        finally:
            for run in runs.values():
                run.stop()

    def _cycle(self, name: str, run: Stepper, turn: int) -> dict[str, Any]:
        """Record of the second of two cycles; its seconds hold the way there from the first."""
        record = run.step(2 * turn + 1).record
        before = Ledger(Storage(str(self.run(name)))).manifests()[2 * turn].record
        began, ended = (datetime.fromisoformat(r["started"]).timestamp() for r in (record, before))
        way = began - ended - before["seconds"]["total"]
        seconds = record["seconds"]
        return {**record, "seconds": {**seconds, "total": seconds["total"] + way}}

    def run(self, name: str) -> Path:
        """Run directory of a run of the system."""
        return self.folder / name.replace(" ", "-")

    def _experiment(self, name: str) -> Experiment:
        fields = dict(RUNS[name])
        select = fields.pop("select", SelectConfig())
        base = Experiment(
            run=str(self.run(name)), cycles=2 * TURNS, optim=OptimConfig(lr=1e-3, micro_batch=8)
        )
        return replace(
            base,
            data=replace(base.data, uri=self.store.storage.uri),
            select=replace(select, tiles=TILES),
            cluster=ClusterConfig(device="cpu", worker_cpus=SHARE, **fields),
        )

    def beside_ray(self, act: str) -> list[tuple[float, float]]:
        """`together` of two, beside the processes of Ray and of a run that has made a cycle and waits."""
        run = Stepper(self._experiment("idle"), 1, say=lambda _: None)
        try:
            run.step(len(Ledger(Storage(str(self.run("idle")))).manifests()))
            return together(act, 2, SHAPE)
        finally:
            run.stop()

    @contextmanager
    def in_bucket(self) -> Iterator[Store]:
        """A copy of the store in a bucket of a real SeaweedFS."""
        with self.server:
            bucket = f"bench-{uuid.uuid4().hex[:8]}"
            self.server.bucket(bucket)
            here, there = self.store.storage, Storage(f"s3://{bucket}/tiles")
            for path in here.list():
                there.write(path, here.read(path))
            yield Store.open(there.uri)

    def tiles(self, count: int) -> list[Tile]:
        """Decoded tiles."""
        found = read_tiles(self.store.storage, self.store.locations(self.ids[:count]), self.side)
        return [t for t in found if isinstance(t, Tile)]

    def learner(self) -> Learner:
        """A fresh network in training, the default precision."""
        net = networks.build(ARCH, self.classes, 0)
        return Learner(net, alpha=self.alpha, gamma=2, batch=16, precision=self.precision)

    @cached_property
    def precision(self) -> Precision:
        """In which this machine is fastest for `ARCH`."""
        return resolve_precision("auto", CPU)


def timed(action: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@contextmanager
def without_ray() -> Iterator[None]:
    """The processes of the local Ray that this process has started stand still, for seconds: a rival's user has none of them."""
    stopped = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if command.startswith("ray::") or "site-packages/ray/" in command:
                process.suspend()
                stopped.append(process)
    try:
        yield
    finally:
        for process in stopped:
            with suppress(psutil.Error):
                process.resume()


def alone(action: Callable[[], Any]) -> float:
    """Seconds of a call, without Ray."""
    with without_ray():
        return timed(action)


def repeats(most: int, seconds: float = ROW_SECONDS, cold: int = 0) -> Iterator[int]:
    """0, 1, ... up to so many, or until so many seconds have passed; at least the cold ones, which do not count, and `FEWEST`."""
    until = time.monotonic() + seconds
    for k in range(most):
        if k >= FEWEST + cold and time.monotonic() > until:
            return
        yield k


def alternating(one: Callable[[], Any], other: Callable[[], Any], times: int) -> list[tuple[float, float]]:
    """Seconds of both, in turn, after a turn that does not count."""
    one(), other()
    return [(timed(one), timed(other)) for _ in repeats(times)]


def bare_costs(bench: Bench, threads: int, acts: Sequence[str]) -> list[float]:
    """Seconds a tile of acts (step, score, validate) on tiles in memory, by this process."""
    torch.set_num_threads(threads)
    learner = bench.learner()
    tiles = bench.tiles(16)
    micro = _halves(
        np.stack([t.image for t in tiles]), np.stack([t.label for t in tiles if t.label is not None])
    )
    whole = (
        torch.cat([m.images for m in micro]).contiguous(memory_format=torch.channels_last),
        torch.cat([m.target for m in micro]),
    )

    def validate() -> None:
        learner.evaluate([(*whole, torch.zeros(len(whole[0]), dtype=torch.int64))], 1)

    how: dict[str, Callable[[], Any]] = {
        "step": lambda: learner.step(micro, lr=1e-6, key=("bench",), total=2),
        "score": lambda: scored(learner.net, whole[0], learner.precision),
        "validate": validate,
    }
    found = []
    for act in acts:
        how[act]()
        found.append(float(np.median([timed(how[act]) for _ in range(5)])) / 16)
    return found


def _halves(images: np.ndarray, labels: np.ndarray) -> list[MicroBatch]:
    """A step of 16 tiles as two micro-batches."""
    return [
        MicroBatch(k, *to_device(images[8 * k : 8 * k + 8], labels[8 * k : 8 * k + 8], CPU)) for k in range(2)
    ]


APART_SECONDS = 4.0
"""For which processes that share nothing are measured."""


def together(act: str, count: int, shape: tuple[int, int]) -> list[tuple[float, float]]:
    """Batches of 16 tiles a second of so many processes that share nothing but the machine, and of one, in turn.

    Args:
        act: steps or scores.
        count: of the processes.
        shape: classes, and side of a tile.
    """

    def rate(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_apart, (folder, count, act, shape), nprocs=count)
            return sum(float(path.read_text()) for path in Path(folder).glob("rate-*"))

    return [(rate(count), rate(1)) for _ in repeats(6)]


def apart(name: str, pairs: list[tuple[float, float]]) -> Row:
    """Work of two processes over that of one."""
    return row(
        name, [two / one for two, one in pairs], [f"one does {np.median(pairs, 0)[1]:.2f} batches of 16/s"]
    )


def _apart(rank: int, folder: str, count: int, act: str, shape: tuple[int, int]) -> None:
    """Batches of 16 tiles a second of one of so many processes, written to a file."""
    torch.set_num_threads(1)
    classes, side = shape
    net = networks.build(ARCH, classes, 0)
    precision = resolve_precision("auto", CPU)
    learner = Learner(net, alpha=np.ones(classes, np.float32), gamma=2, batch=16, precision=precision)
    rng = np.random.default_rng(rank)
    images = rng.integers(0, 256, (16, side, side, 3), np.uint8)
    labels = rng.integers(1, classes + 1, (16, side, side)).astype(np.uint8)
    whole = to_device(images, labels, CPU)[0]
    micro = _halves(images, labels)

    def once() -> None:
        if act == "scores":
            scored(learner.net, whole, precision)
        else:
            learner.step(micro, lr=1e-6, key=("bench",), total=2)

    once()
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < APART_SECONDS:
        once()
        done += 1
    (Path(folder) / f"rate-{rank}").write_text(str(done / (time.perf_counter() - began)))


@torch.inference_mode()
def scored(net: torch.nn.Module, x: torch.Tensor, precision: Any) -> torch.Tensor:
    """Scores by a bare forward pass."""
    return tile_scores(log_probabilities(logits(net, x, precision)))


@torch.inference_mode()
def logits(net: torch.nn.Module, x: torch.Tensor, precision: Any) -> torch.Tensor:
    """A bare forward pass."""
    net.eval()
    dtype = DTYPES[precision]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return net(x)


class Loaded(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The rival: a map-style dataset that reads, decodes and augments the tiles of a batch."""

    def __init__(self, uri: str, locations: list[dict[str, Any]], side: int) -> None:
        self.uri, self.locations, self.side = uri, locations, side
        self.storage: Storage | None = None

    def __len__(self) -> int:
        return len(self.locations)

    def __getitems__(self, numbers: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        self.storage = self.storage or Storage(self.uri)
        made = []
        for tile in read_tiles(self.storage, [self.locations[i] for i in numbers], self.side):
            assert isinstance(tile, Tile)
            assert tile.label is not None
            pixels, label = augment(tile.image, tile.label, keyed_rng("augment", 0, 0, tile.tile_id))
            made.append((to_uint8(pixels), label))
        return made


@dataclass
class Rival:
    """A DataLoader, warm, and the torch threads of the process that it feeds."""

    loader: Any
    threads: int
    name: str

    @classmethod
    def of(cls, data: Loaded, *, threads: int, workers: int, prefetch: int | None, batch: int) -> "Rival":
        # forked workers would hang in the threads of this process's S3 client
        started: dict[str, Any] = (
            {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
        )
        loader = torch.utils.data.DataLoader(
            data, batch_size=batch, num_workers=workers, prefetch_factor=prefetch, **started
        )  # type: ignore[arg-type]
        return cls(
            loader, threads, f"{workers} workers, prefetch {prefetch}, batch {batch}, {threads} threads"
        )


def best_of(rivals: Sequence[Rival], use: Callable[[Rival], Any]) -> Rival:
    """The one with which `use` is fastest, warm, by the median of three times."""
    seconds = []
    for rival in rivals:
        use(rival)
        seconds.append(float(np.median([alone(lambda rival=rival: use(rival)) for _ in range(3)])))  # type: ignore[misc]
    return rivals[int(np.argmin(seconds))]


def loaded(store: Store, ids: list[str]) -> Loaded:
    """The rival's data set."""
    return Loaded(store.storage.uri, store.locations(ids), store.dataset.tile_size)


def plain_loop(bench: Bench) -> Callable[[Any, int], None]:
    """The training loop a user would write: channels last, Adam, the same loss; a step of two micro-batches of 8."""
    net = networks.build(ARCH, bench.classes, 0).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    adam = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-3, fused=True)
    alpha = torch.from_numpy(bench.alpha)
    dtype = DTYPES[bench.precision]
    if bench.precision == "bf16":
        train_grouped_in_fp32(net)  # what our step gains by it is the row of precision's

    def loop(loader: Any, threads: int) -> None:
        torch.set_num_threads(threads)
        for k, (images, labels) in enumerate(loader):
            x, y = to_device(images.numpy(), labels.numpy(), CPU)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                logits = net(x)
            (focal_loss_sum(log_probabilities(logits), y, alpha) / (16 * y[0].numel())).backward()
            if k % 2:
                adam.step()
                adam.zero_grad(set_to_none=True)

    return loop


def plain_turn(bench: Bench, measure: Callable[[Callable[[], Any]], float] = alone) -> float:
    """Seconds of the rival for the tiles of a cycle."""
    cores = len(os.sched_getaffinity(0))
    if bench.rival is None:
        loop, data = plain_loop(bench), loaded(bench.store, bench.ids[:TILES])
        settings = ((cores, 0, None), (cores, 1, 4), (cores, 2, 4), (max(1, cores - 1), 1, 4))
        rivals = [Rival.of(data, threads=t, workers=w, prefetch=p, batch=8) for t, w, p in settings]
        bench.rival = loop, best_of(rivals, lambda r: loop(r.loader, r.threads))
    loop, best = bench.rival
    return measure(lambda: loop(best.loader, best.threads))


def training_over_plain(bench: Bench) -> Row:
    both = zip(bench.turns["passive"], bench.turns["plain loop"], strict=True)
    assert bench.rival is not None
    return row(
        "training / plain loop", [s / _training(r) for r, s in both], [f"rival: {bench.rival[1].name}"]
    )


def plain_beside(bench: Bench) -> Row:
    both = zip(bench.turns["plain loop beside Ray"], bench.turns["plain loop"], strict=True)
    return row("plain loop beside Ray", [slow / fast for slow, fast in both])


def _training(record: dict[str, Any]) -> float:
    """Seconds of a cycle's steps and of waiting for their tiles."""
    return float(record["seconds"]["train"] + record["seconds"]["stall"])


def stall(bench: Bench) -> Row:
    return row("stall", [100 * r["seconds"]["stall"] / r["seconds"]["train"] for r in bench.turns["passive"]])


def fixed_seconds(bench: Bench) -> Row:
    return row(
        "fixed seconds",
        [
            r["seconds"]["total"] - r["seconds"]["train"] - r["seconds"]["evaluate"]
            for r in bench.turns["passive"]
        ],
    )


def commit(bench: Bench) -> Row:
    return row(
        "commit", [100 * r["seconds"]["commit"] / r["seconds"]["train"] for r in bench.turns["passive"]]
    )


def bare_turn(bench: Bench) -> float:
    """Ratio of an active cycle to a passive one by the bare costs of a tile."""
    cores = len(os.sched_getaffinity(0))
    gain = float(np.median([every / one for every, one in bench.together["scores", cores]]))
    with without_ray():
        step, score, validate = bare_costs(bench, cores, ("step", "score", "validate"))
        [of_one] = bare_costs(bench, 1, ("score",))
    scoring = min(score, of_one / gain)
    passive = TILES * step + bench.store.split("val").num_rows * validate
    return (passive + len(bench.ids) * scoring) / passive


def active_over_passive(bench: Bench) -> Row:
    predicted, ratios = bench.turns["bare costs"], _totals(bench, "active", "passive beside")
    told = f"predicted {np.median(predicted):.3f}, measured {np.median(ratios):.3f}"
    return row("active / passive", [r / p for r, p in zip(ratios, predicted, strict=True)], [told])


def _totals(bench: Bench, one: str, other: str, more: float = 0.0) -> list[float]:
    """Seconds of the cycles of one run, and some more, over those of another."""
    both = zip(bench.turns[one], bench.turns[other], strict=True)
    return [(a["seconds"]["total"] + more) / b["seconds"]["total"] for a, b in both]


SPREAD = 30
"""Cycles over which the first scoring of the whole pool is spread, in the row of by-product scores."""


def byproduct_over_passive(bench: Bench) -> Row:
    ledger = Ledger(Storage(str(bench.run("by-product"))))
    first = ledger.manifests()[0].record["seconds"]["score"]
    ratios = _totals(bench, "by-product", "passive beside", first / SPREAD)
    return row("by-product / passive", ratios, [f"first scoring {first:.1f} s"])


def overlapped_over_passive(bench: Bench) -> Row:
    return row("overlapped / passive", _totals(bench, "overlapped", "passive, one thread"))


def two_workers(bench: Bench) -> Row:
    both = list(zip(bench.turns["one worker"], bench.turns["two workers"], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        size = sum(p.numel() for p in bench.learner().parameters.values())
        torch.multiprocessing.spawn(all_reduce, (folder, size), nprocs=2)
        seconds = json.loads((Path(folder) / "seconds").read_text())
    share = float(np.median([seconds * two["steps"] / two["seconds"]["train"] for _, two in both]))
    told = f"all-reduce of the gradient alone {1e3 * seconds:.0f} ms, {100 * share:.0f} % of a step"
    return row("two workers / one", [_training(one) / _training(two) for one, two in both], [told])


def all_reduce(rank: int, folder: str, size: int) -> None:
    """Median seconds in which two processes add up so many numbers, written to a file."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    values = torch.zeros(size)
    times = [timed(lambda: torch.distributed.all_reduce(values)) for _ in range(9)]
    if rank == 0:
        (Path(folder) / "seconds").write_text(json.dumps(float(np.median(times[2:]))))
    torch.distributed.destroy_process_group()


def precision(bench: Bench, name: str, arch: str) -> Row:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    net = networks.build(arch, bench.classes, 0)
    found = resolve_precision("auto", CPU)
    ours = Learner(net, alpha=bench.alpha, gamma=2, batch=8, precision=found)
    net = networks.build(arch, bench.classes, 0)
    plain = Learner(net, alpha=bench.alpha, gamma=2, batch=8, precision="fp32")
    plain.net = net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    plain.wrapped = plain.net
    tiles = bench.tiles(8)
    x, y = to_device(
        np.stack([t.image for t in tiles]), np.stack([t.label for t in tiles if t.label is not None]), CPU
    )
    nchw = x.contiguous()

    def fast() -> None:
        ours.step([MicroBatch(0, x, y)], lr=1e-6, key=("p",), total=1)

    def slow() -> None:
        plain.step([MicroBatch(0, nchw, y)], lr=1e-6, key=("p",), total=1)

    pairs = alternating(fast, slow, 9 if arch == ARCH else 6)  # a step of the U-Net takes seconds
    return row(name, [b / a for a, b in pairs], [f"{found}, channels last"])


MAPPED_BLOCK = 1440
"""Side of a block, pixels, in the row of predict."""


def predict_over_bare(bench: Bench) -> Row:
    model = of_run(str(bench.run("passive")))
    settings = Settings(block=MAPPED_BLOCK**2)
    cores = len(os.sched_getaffinity(0))
    short, long = (_scene(bench, cores * n) for n in (2, 6))
    more = _windows(long, model.record.tile_size, settings) - _windows(
        short, model.record.tile_size, settings
    )
    net = model.network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = resolve_precision("auto", CPU)
    images = np.stack([t.image for t in bench.tiles(BATCH)])
    targets = itertools.count()

    def mapped(path: Path) -> float:
        target = str(bench.folder / f"maps-{next(targets)}")
        return timed(lambda: predict(model, find_images(str(path)), target, settings, say=lambda _: None))

    def bare(threads: int) -> float:
        """Seconds a window, were every core as fast as these threads."""
        torch.set_num_threads(threads)
        x = to_device(images, np.zeros(0, np.uint8), CPU)[0]
        times = [timed(lambda: logits(net, x, precision)) for _ in range(9)]
        return float(np.median(times[1:])) / BATCH * threads / cores

    mapped(short)
    ratios = []
    for _ in repeats(6):
        with without_ray():
            forward = min(bare(1), bare(cores))
        ratios.append(more * forward / (mapped(long) - mapped(short)))
    return row("predict / bare forward", ratios, [f"{more} windows of {model.record.tile_size} px"])


def _scene(bench: Bench, blocks: int) -> Path:
    """A GeoTIFF of so many blocks side by side, made of training tiles."""
    import rasterio

    side, path = MAPPED_BLOCK, bench.folder / f"scene-{blocks}.tif"
    row = np.concatenate([t.image for t in bench.tiles(16)], 1)
    repeats = -(-side // bench.side), -(-blocks * side // row.shape[1]), 1
    pixels = np.tile(row, repeats)[:side, : blocks * side]
    shape = {"height": side, "width": blocks * side, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", tiled=True, compress="DEFLATE", **shape) as file:
        file.write(pixels.transpose(2, 0, 1))
    return path


def _windows(path: Path, side: int, settings: Settings) -> int:
    """Windows that cover an image."""
    import rasterio

    with rasterio.open(path) as file:
        axes = (axis(size, 1.0, side, settings.overlap) for size in (file.height, file.width))
        return math.prod(len(a.starts) for a in axes)


def _scorers(bench: Bench, count: int) -> ScorerPool:
    network = Network(ARCH, bench.classes, "cpu")
    made = ScorerPool(count, (network, bench.store.storage.uri, bench.side, 1 << 30), {"num_cpus": 0.1})
    made.ready(120, 120)
    return made


def _pool_seconds(bench: Bench, pool: ScorerPool, weights: dict[str, np.ndarray]) -> float:
    locations, scorers = bench.store.located(bench.ids), [s for s in pool.scorers if s]
    threads = [1] * len(scorers)
    how: dict[str, Any] = {"side": bench.side, "precision": bench.precision, "renew": pool.renew}
    return timed(lambda: score_pool(scorers, threads, weights, "bench", locations, **how))


def _weights(bench: Bench) -> dict[str, np.ndarray]:
    return {n: t.numpy() for n, t in bench.learner().weights().items()}


def scoring_over_bare(bench: Bench) -> Row:
    torch.set_num_threads(1)
    weights, scorers = _weights(bench), _scorers(bench, 1)
    net = bench.learner().net
    tiles = bench.tiles(len(bench.ids))
    batches = [np.stack([t.image for t in tiles[i : i + 16]]) for i in range(0, len(tiles), 16)]

    def bare() -> None:
        for batch in batches:
            scored(net, to_device(batch, np.zeros(0, np.uint8), CPU)[0], bench.precision)

    pairs = alternating(lambda: _pool_seconds(bench, scorers, weights), bare, 6)
    scorers.kill()
    return row("scoring / bare forward", [b / a for a, b in pairs])


def two_scorers(bench: Bench) -> Row:
    weights, one, two = _weights(bench), _scorers(bench, 1), _scorers(bench, 2)
    pairs = alternating(
        lambda: _pool_seconds(bench, one, weights), lambda: _pool_seconds(bench, two, weights), 6
    )
    one.kill()
    two.kill()
    return row("two scorers / one", [a / b for a, b in pairs])


def stream_over_loader(bench: Bench) -> Row:
    ids = bench.ids[:STREAMED]
    with bench.in_bucket() as store:

        def drained(rival: Rival) -> None:
            for _ in rival.loader:
                pass

        data = loaded(store, ids)
        settings = ((0, None, 8), (0, None, 64), (2, 2, 8), (2, 4, 32), (2, 2, 64), (4, 2, 32))
        best = best_of(
            [Rival.of(data, threads=1, workers=w, prefetch=p, batch=b) for w, p, b in settings], drained
        )

        def ours() -> None:
            stream = _stream(store, ids)
            for i in range(0, len(ids), 8):
                rows = stream.take(range(i, min(i + 8, len(ids))))
                np.stack([r.image for r in rows]), np.stack([r.label for r in rows])
            stream.close()

        ours()
        pairs = [(timed(ours), alone(lambda: drained(best))) for _ in repeats(9)]
    return row("stream / DataLoader", [b / a for a, b in pairs], [f"rival: {best.name}"])


def first_batch(bench: Bench) -> Row:
    ids, size = bench.ids[:STREAMED], 8
    with bench.in_bucket() as store:

        def theirs(rival: Rival) -> float:
            with without_ray():
                began = time.perf_counter()
                batches = iter(rival.loader)
                next(batches)
                seconds = time.perf_counter() - began
                for _ in batches if rival.loader.num_workers else ():  # what it has fetched ahead
                    pass
            return seconds

        data = loaded(store, ids)
        settings = ((0, None), (1, 4), (2, 2))
        rivals = [Rival.of(data, threads=1, workers=w, prefetch=p, batch=size) for w, p in settings]
        best = min(rivals, key=lambda rival: np.median([theirs(rival) for _ in range(4)][1:]))

        def ours() -> float:
            began = time.perf_counter()
            stream = _stream(store, ids)
            rows = stream.take(range(size))
            np.stack([r.image for r in rows]), np.stack([r.label for r in rows])
            seconds = time.perf_counter() - began
            stream.close()
            return seconds

        ours()
        pairs = [(ours(), theirs(best)) for _ in range(15)]
    return row(
        "first batch / DataLoader",
        [a / b for a, b in pairs],
        [f"rival: {best.name}", f"{np.median(pairs, 0)[0]:.3f} s"],
    )


STREAMED = 512
"""Tiles of a stream alone."""


def _stream(store: Store, ids: list[str]) -> Stream:
    return Stream(
        store, list(enumerate(ids)), name="bench", chunk=ClusterConfig().chunk, reader_cpus=ClusterConfig().reader_cpus, keys=(0, 0),
        limits=AugmentConfig(),
    )  # fmt: skip


def augmentation(bench: Bench) -> Row:
    import cv2

    cv2.setNumThreads(1)
    tiles = [t for t in bench.tiles(64) if t.label is not None]

    def all_of_them() -> None:
        for t in tiles:
            assert t.label is not None
            to_uint8(augment(t.image, t.label, keyed_rng("augment", 0, 0, t.tile_id))[0])

    def share() -> float:
        return 100 * timed(all_of_them) / len(tiles) / bare_costs(bench, 1, ("step",))[0]

    all_of_them()
    return row("augmentation", [share() for _ in repeats(6)])


def bytes_fetched(bench: Bench) -> Row:
    from raysed.io import storage

    ratios = []
    for seed in range(6):
        chosen = np.random.default_rng(seed).choice(bench.ids, len(bench.ids) // 5, replace=False).tolist()
        wanted = fetched = 0
        for i in range(0, len(chosen), BLOCK):
            spans: dict[str, list[tuple[int, int]]] = {}
            for at in bench.store.locations(chosen[i : i + BLOCK]):
                for kind in ("image", "label"):
                    spans.setdefault(at["shard"], []).append((at[f"{kind}_offset"], at[f"{kind}_length"]))
            fetched += sum(n for s in spans.values() for _, n in storage.coalesce(s, storage.GAP))
            wanted += sum(n for s in spans.values() for _, n in s)
        ratios.append(fetched / wanted)
    return row("bytes fetched", ratios)


class Told(Scorekeeper):
    """Rank 0's keeper of scores; the scorers' answers are made up, all that is done with them is not."""

    def _passed(self, ids: pa.StringArray, *_: Any, **__: Any) -> Scores:
        rng, width = np.random.default_rng(0), 2 + self.classes
        work = Work(self.store.located(ids), 8)
        answers = Answers(work)
        for k in range(work.whole):
            tiles = work.tiles(k)
            assert packed(tiles)
            names, n = tiles["tile_id"].to_pylist(), len(tiles)
            found = {"scores": rng.random((n, width), np.float32), "features": np.zeros((n, 0), np.float16)}
            told = {"ids": names, "loss": np.zeros(n, np.float32), "bad": [], "node": "one"}
            answers.take(k, {**found, **told})
        return answers.scores()


def controller_costs(uri: str) -> tuple[list[float], float]:
    """Seconds of what rank 0 does in a cycle for the tiles of a store, and the most GiB that this process has held, opening it included."""
    store = Store.open(uri, None, TRAINING)
    pool, store = training_rows(store.only(POOL).index, None), store.only(LOCATION)
    candidates = sorted_names(pool["tile_id"])
    select = SelectConfig(strategy="entropy")
    pool_of = ScorerPool(0, (Network(ARCH, SHAPE[0], "cpu"), uri, SHAPE[1], 0), {})
    keeper = Told(pool_of, 1.0, store, select, multiple=32, taken={}, precision="fp32")
    experiment = Experiment(select=select)

    def cycle() -> None:
        scored = keeper.scores(without(candidates, ()), lambda: ({}, "now"), lambda: ({}, "before"))
        assert scored is not None
        selection = choose(experiment, 1, scores=scored.table, index=pool, state={}, excluded=set())
        files = {
            "selected.parquet": table_bytes(selection_table(selection)),
            "scores.parquet": table_bytes(scored.table),
        }
        plan(selection.tile_ids, 0, 1, 16, 8)
        assert files

    seconds = [timed(cycle) for _ in range(FEWEST)]
    return seconds, most_held()


def write_index(uri: str, exponent: int) -> None:
    """A store of 10^exponent tiles of eight classes without their pixels: every column of its index."""
    n = 10**exponent
    numbers = pc.utf8_lpad(pa.array(np.arange(n)).cast(pa.string()), 8, "0")
    sources = pc.utf8_slice_codeunits(numbers, 0, 6)
    rng = np.random.default_rng(0)
    ends = pa.py_buffer(np.arange(n + 1, dtype=np.int32) * 64)

    def lists(width: int, kind: pa.DataType) -> pa.Array:
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * width)
        return pa.ListArray.from_arrays(offsets, pa.array(np.ones(n * width)).cast(kind))

    made = {
        "tile_id": pc.binary_join_element_wise("region_", numbers, "-r000c000", ""),
        "sha256": pa.StringArray.from_buffers(n, ends, pa.py_buffer(rng.bytes(32 * n).hex().encode())),
        "shard": pc.binary_join_element_wise("part-", pc.utf8_slice_codeunits(numbers, 0, 5), ""),
        "region": pc.binary_join_element_wise("region_", pc.utf8_slice_codeunits(numbers, 0, 3), ""),
        "source": pc.binary_join_element_wise("region_", sources, ""),
        "split": pa.array(["train"]).take(pa.array(np.zeros(n, np.int8))),
        "pixels": lists(9, pa.int64()),
        "transform": lists(6, pa.float64()),
        "scale": lists(2, pa.float64()),
        "crs": pa.array(["EPSG:32633"]).take(pa.array(np.zeros(n, np.int8))),
    }
    number = pa.array(np.arange(n, dtype=np.int32))
    columns = [made[f.name] if f.name in made else number.cast(f.type) for f in INDEX]
    storage = Storage(uri)
    storage.write("index.parquet", table_bytes(pa.table(columns, schema=INDEX)))
    classes = tuple(LandClass(f"class {k}", "#000000", k) for k in range(1, 9))
    counts = {"train": n, "val": 0}
    storage.write(
        "dataset.json",
        Dataset("bench", classes, (), 256, counts, {"train": [n] * 9, "val": [0] * 9}, "").to_json(),
    )


PROCESS_SECONDS = 1200
"""After which a process of its own is given up."""


def controller_turn(exponent: int) -> tuple[list[float], float]:
    """`controller_costs` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        _printed(f"from raysed.cluster.bench import write_index; write_index({folder!r}, {exponent})")
        code = f"import json; from raysed.cluster.bench import controller_costs; print(json.dumps(controller_costs({folder!r})))"
        seconds, peak = json.loads(_printed(code))
    return seconds, peak


def _printed(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PROCESS_SECONDS
    )
    return done.stdout


def controller(bench: Bench, exponent: int) -> Row:
    seconds, peak = controller_turn(exponent)
    bench.controller_gib = peak
    return row(f"controller 1e{exponent}", seconds, [f"peak {peak:.1f} GiB"])


def controller_memory(bench: Bench) -> Row:
    peak = bench.controller_gib or controller_turn(7)[1]
    return row("controller memory", [peak])


def parameters(bench: Bench) -> Row:
    counts = {
        a: sum(p.numel() for p in networks.build(a, bench.classes, 0).parameters()) / 1e6 for a in ARCHS
    }
    return row("parameters", [counts["unet"]], [{k: round(v, 2) for k, v in counts.items()}])


def latency(bench: Bench) -> Row:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    x = torch.rand(1, 3, 256, 256).contiguous(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {}
    told = {}
    for arch in ARCHS:
        net = networks.build(arch, bench.classes, 0).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x)
        forward = partial(scored, net, x, resolve_precision("auto", CPU))
        forward()
        times[arch] = [1e3 * timed(forward) for _ in range(7)]
        told[arch] = {"ms": float(np.median(times[arch])), "GFLOP": counter.get_total_flops() / 1e9}
    rounded = {arch: {k: round(v, 1) for k, v in found.items()} for arch, found in told.items()}
    return row("latency", times[ARCH], [rounded])


def step_growth(arch: str, classes: int) -> float:
    """GiB by which this process grows at most while it makes a network and takes a training step."""
    before = psutil.Process().memory_info().rss / 2**30
    net = networks.build(arch, classes, 0)
    precision = resolve_precision("auto", CPU)
    learner = Learner(net, alpha=np.ones(classes, np.float32), gamma=2, batch=4, precision=precision)
    tiles = np.zeros((4, 256, 256, 3), np.uint8), np.ones((4, 256, 256), np.uint8)
    learner.step([MicroBatch(0, *to_device(*tiles, CPU))], lr=1e-6, key=("bench",), total=1)
    return most_held() - before


def most_held() -> float:
    """GiB that this process has held at most; what `getrusage` tells counts the process that it was forked from."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def step_memory(bench: Bench) -> Row:
    grown = {}
    for arch in ARCHS:
        code = f"from raysed.cluster.bench import step_growth; print(step_growth({arch!r}, {bench.classes}))"
        grown[arch] = float(_printed(code))
    return row("step memory", [grown[ARCH]], [{k: round(v, 2) for k, v in grown.items()}])


SHARE = 0.2
"""CPUs that Ray reserves for a training worker, so that runs can stand side by side."""
RUNS: dict[str, dict[str, Any]] = {
    "passive": {},
    "passive beside": {},
    "idle": {},
    "active": {"select": SelectConfig(strategy="entropy")},
    "by-product": {"select": SelectConfig(strategy="entropy", scores="byproduct")},
    "passive, one thread": {"threads": 1},
    "one worker": {"threads": 1},
    "overlapped": {
        "select": SelectConfig(strategy="entropy", scores="overlapped", side="half"),
        "threads": 1,
        "scorers": 1,
    },
    "two workers": {"threads": 1, "workers": 2},
}
"""Runs of the system: how they differ from a passive one with all cores."""
RIVALS: dict[str, Callable[[Bench], float]] = {
    "plain loop": plain_turn,
    "plain loop beside Ray": partial(plain_turn, measure=timed),
    "bare costs": bare_turn,
}
"""What else takes turns with them."""
GROUPS = (
    ("passive", "plain loop", "plain loop beside Ray"),
    ("passive beside", "active", "by-product", "bare costs"),
    ("passive, one thread", "overlapped"),
    ("one worker", "two workers"),
)
"""What takes turns with what; idle runs take a few per cent of a core each, so no more stand side by side than are compared."""

NEEDS = {
    "training / plain loop": {"passive", "plain loop"},
    "plain loop beside Ray": {"passive", "plain loop", "plain loop beside Ray"},
    "stall": {"passive"},
    "fixed seconds": {"passive"},
    "commit": {"passive"},
    "active / passive": {"passive beside", "active", "bare costs"},
    "by-product / passive": {"passive beside", "by-product"},
    "overlapped / passive": {"passive, one thread", "overlapped"},
    "two workers / one": {"one worker", "two workers"},
    "predict / bare forward": {"passive"},
}
"""The turns that a row compares."""

APART: dict[str, Sequence[tuple[str, int]]] = {
    "active / passive": [("scores", len(os.sched_getaffinity(0)))],
    "two processes, steps": [("steps", 2)],
    "two processes, scores": [("scores", 2)],
}
"""What a row needs of processes apart, see `together`."""

ROWS: dict[str, Callable[[Bench], Row]] = {
    "training / plain loop": training_over_plain,
    "plain loop beside Ray": plain_beside,
    "stall": stall,
    "fixed seconds": fixed_seconds,
    "commit": commit,
    "active / passive": active_over_passive,
    "by-product / passive": byproduct_over_passive,
    "overlapped / passive": overlapped_over_passive,
    "two workers / one": two_workers,
    "scoring / bare forward": scoring_over_bare,
    "two scorers / one": two_scorers,
    "predict / bare forward": predict_over_bare,
    "stream / DataLoader": stream_over_loader,
    "first batch / DataLoader": first_batch,
    "precision": lambda b: precision(b, "precision", ARCH),
    "precision unet": lambda b: precision(b, "precision unet", "unet"),
    "augmentation": augmentation,
    "bytes fetched": bytes_fetched,
    "two processes, steps": lambda b: apart("two processes, steps", b.together["steps", 2]),
    "two processes, scores": lambda b: apart("two processes, scores", b.together["scores", 2]),
    "two beside Ray, steps": lambda b: apart("two beside Ray, steps", b.beside_ray("steps")),
    "two beside Ray, scores": lambda b: apart("two beside Ray, scores", b.beside_ray("scores")),
    "controller 1e5": lambda b: controller(b, 5),
    "controller 1e6": lambda b: controller(b, 6),
    "controller 1e7": lambda b: controller(b, 7),
    "controller memory": controller_memory,
    "parameters": parameters,
    "latency": latency,
    "step memory": step_memory,
}


def run_rows(
    names: Sequence[str], prepare: Callable[[], Store], say: Callable[[str], None]
) -> tuple[list[Row], dict[str, str]]:
    """Measure rows one after the other.

    Args:
        names: of the rows.
        prepare: makes the synthetic store, or finds it.
        say: takes lines.

    Returns:
        The rows, and why those could not be measured that are missing.
    """
    counted: dict[tuple[str, int], list[tuple[float, float]]] = {}
    failed: dict[str, str] = {}
    done = []
    for name in names:
        try:
            for pair in APART.get(name, ()):
                counted[pair] = counted.get(pair) or together(*pair, SHAPE)
        except MISHAPS as error:
            failed[name] = str(error)
    with tempfile.TemporaryDirectory(prefix="raysed-bench-") as folder:
        server = ObjectServer(Path(folder) / "s3")
        os.environ.update(server.environment)  # before anything starts Ray, whose workers inherit it
        connect()
        bench = Bench(prepare(), Path(folder), server, counted)
        wanted = {turn for name in names if name not in failed for turn in NEEDS.get(name, ())}
        for group in GROUPS:
            if taking := [turn for turn in group if turn in wanted]:
                try:
                    bench.take_turns(taking)
                except MISHAPS as error:
                    said = f"{', '.join(taking)}: {error}"
                    failed |= {name: said for name in names if NEEDS.get(name, set()) & set(taking)}
        for name in names:
            began = time.monotonic()
            try:
                if name in failed:
                    raise RaysedError(failed[name])
                found = ROWS[name](bench)
            except MISHAPS as error:
                failed[name] = str(error)
                say(f"{name:<24} NOT MEASURED: {error}")
                continue
            done.append(found)
            verdict = {True: "met", False: "NOT MET", None: "reported"}[found.met]
            limit = (
                ""
                if found.goal is None
                else f"  goal {'>=' if GOALS[name].at_least else '<='} {found.goal:g}"
            )
            say(
                f"{name:<24} {found.value:g} [{found.low:g}, {found.high:g}] {found.unit}{limit}  {verdict}  "
                f"({time.monotonic() - began:.0f} s)\n    {found.how}"
            )
    return done, failed


def result_json(rows: Sequence[Row], environment: dict[str, Any]) -> str:
    """`latest.json`."""
    out = io.StringIO()
    machine = {k: environment[k] for k in ("cpu", "cores", "gpu") if k in environment}
    versions = {k: environment[k] for k in ("python", "torch", "ray") if k in environment}
    json.dump(
        {
            "machine": machine,
            "versions": versions,
            "commit": environment.get("commit"),
            "rows": [asdict(r) for r in rows],
        },
        out,
        indent=1,
    )
    return out.getvalue() + "\n"
