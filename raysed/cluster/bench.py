"""Benchmarks: every figure a ratio measured in one run on the same cores, the two sides alternating.

A row measures both sides in turn and keeps the ratio of each repetition; the value is their median with a bootstrap interval of
95 %, and a goal counts as met only by the interval's worse end.  Runs of the system that are compared stand on the cluster side by
side and take a cycle in turn, so that a machine whose speed drifts slows both.  The rivals are the tuned plain PyTorch a user
would write.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.flop_counter import FlopCounterMode

from raysed.cluster.connect import connect
from raysed.cluster.launch import Stepper
from raysed.cluster.local import ObjectServer
from raysed.cluster.mapper import BATCH, Settings
from raysed.cluster.predict import predict
from raysed.cluster.scoring import Network, ScorerPool, Work, score_pool
from raysed.cluster.stream import Stream
from raysed.config import AugmentConfig, ClusterConfig, Experiment, OptimConfig, SelectConfig
from raysed.core import networks
from raysed.core.augment import augment, to_uint8
from raysed.core.losses import class_weights, focal_loss_sum
from raysed.core.plan import plan
from raysed.core.pool import sorted_names, without
from raysed.core.randomness import keyed_rng
from raysed.core.scores import ScoreTable
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
from raysed.io.store import INDEX, LOCATION, POOL, TRAINING, Dataset, Store, Tile, read_tiles

CPU = torch.device("cpu")
ARCH = "efficientunet-b0"
ARCHS = ("unet", ARCH, "efficientunet-b4")
SCENES, TILE = 300, 128
"""Of the synthetic store: 960 training tiles, 240 of validation, all of `TILE` pixels."""
TILES = 192
"""A cycle, in rows that train: a fifth of the pool, twelve steps."""
CYCLES = 9
"""Of a run, in rows that train; the first is cold and left out."""
BOOTSTRAP = 2000
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
    "active / passive": Goal("x the bare costs' ratio", 1.03, False, "a warm cycle with fresh scores of the whole pool over a passive one, over the ratio that the bare costs of step, scoring and validation on the same cores predict; bare scoring is that of one process with all cores or of a process on every core at once, whichever is faster"),
    "by-product / passive": Goal("x", 1.05, False, "cycles with by-product scores (first full scoring spread over 30 cycles) over passive cycles of the same tiles"),
    "overlapped / passive": Goal("x", 1.03, False, "cycles scored with weights one cycle old, at half the side, while training runs, trainer and scorer on a core each, over passive cycles with the trainer on one core; at the full side one core scores the pool in more time than the other trains a fifth of it"),
    "training / plain loop": Goal("x", 0.97, True, "training tiles/s of the system, stall included, over a plain PyTorch loop fed by the best of several DataLoader settings that does the same reading, decoding and augmenting"),
    "stall": Goal("% of the step time", 3, False, "time the trainer waited for tiles over the time it trained, warm passive cycles"),
    "precision": Goal("x", 1.5 if HAS_AMX else None, True, "one training step of efficientunet-b0 in our precision and layout against fp32 NCHW; only CPUs with AMX have a goal"),
    "precision unet": Goal("x", 3.0 if HAS_AMX else None, True, "the same of the classic U-Net"),
    "scoring / bare forward": Goal("x a core", 0.95, True, "tiles/s a core of the whole pool through the scorers over a bare forward pass with scores of one thread, same precision, inference mode"),
    "two scorers / one": Goal("x", 1.8, True, "tiles/s of two scorers of one thread over one"),
    "predict / bare forward": Goal("x", 0.9, True, "windows/s of jobs/predict.py on GeoTIFFs, reading, blending and writing included, over a bare forward pass of as many windows in memory by the same cores; a long image minus a short one, so that the start of the actors is left out"),
    "stream / DataLoader": Goal("x", 1.0, True, "tiles/s of the tile stream alone from a bucket, warm, over the best of several DataLoader settings with the same functions, which read a batch at once as we do"),
    "first batch / DataLoader": Goal("x", 1.5, False, "seconds until the first eight tiles of a warm cycle are there, from a bucket, over those of the best of several warm DataLoaders"),
    "augmentation": Goal("% of a step", 3, False, "augmenting a tile over a training step a tile of efficientunet-b0, both on one thread"),
    "bytes fetched": Goal("x", 1.1, False, "bytes asked of the storage for a random fifth over the bytes of those tiles"),
    "fixed seconds": Goal("s a cycle", 1.5, False, "a warm passive cycle without steps and validation"),
    "two workers / one": Goal("x", 1.7, True, "tiles/s of two workers of one thread over one of one thread, same global batch"),
    "two processes, steps": Goal("x", None, True, "training steps/s of two processes of one thread that share nothing but the machine over one such process: the most that two workers can do here, and how far a trainer slows beside a busy scorer"),
    "two processes, scores": Goal("x", None, True, "the same of forward passes with scores: the most that two scorers can do here"),
    "controller 1e5": Goal("s a cycle", 60, False, "scores in, selection, plan and ledger tables of 10^5 tiles, strategy entropy, a fifth selected"),
    "controller 1e6": Goal("s a cycle", 60, False, "the same of 10^6 tiles"),
    "controller 1e7": Goal("s a cycle", 60, False, "the same of 10^7 tiles"),
    "controller memory": Goal("GiB", 4, False, "the most that a process holds that does this for 10^7 tiles, every column of their index, torch and Ray included"),
    "commit": Goal("% of the step time", 1, False, "time a warm cycle of twelve steps is blocked by its commit over the time it trains"),
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
    """A row of its samples: median, bootstrap interval of the median, verdict."""
    values, goal = np.asarray(samples, float), GOALS[name]
    drawn = np.median(np.random.default_rng(0).choice(values, (BOOTSTRAP, len(values))), 1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value, worst, best, *kept = (float(f"{v:.4g}") for v in (np.median(values), low, high, *values))
    return Row(name, value, worst, best, goal.unit, goal.limit, goal.met(low, high), goal.how, [*kept, *note])


@dataclass
class Bench:
    """What the rows share: the store and the results of the runs, each made once.

    Args:
        store: the synthetic store.
        folder: for run directories.
        server: runs only while a row needs a bucket; Ray has its credentials from the start.
    """

    store: Store
    folder: Path
    server: ObjectServer

    def __post_init__(self) -> None:
        self.turns: dict[str, list[Any]] = {}
        """What is measured in turn, by name, and what it gave in each turn."""
        self.rival: tuple[Callable[[Any], None], str, Any] | None = None
        """The plain training loop, its best DataLoader setting, and the loader."""
        self.together: dict[tuple[str, int], list[tuple[float, float]]] = {}
        """Work a second of so many processes at once, and of one, by what they do and how many they are."""
        self.controller_gib = 0.0
        """Peak of the controller row of most tiles."""
        self.ids = sorted(self.store.split("train")["tile_id"].to_pylist())
        self.classes = len(self.store.dataset.classes)
        self.side = self.store.dataset.tile_size
        self.alpha = class_weights(np.array(self.store.dataset.pixels["train"][1:]), 0.5)

    def take_turns(self, group: Sequence[str]) -> None:
        """Measure each of a group once a turn; runs of the system take a cycle, and the first turn does not count."""
        runs = {
            name: Stepper(self._experiment(name), 0, say=lambda _: None) for name in group if name in RUNS
        }
        try:
            for turn in range(CYCLES):
                for name in group:
                    found = runs[name].step(turn).record if name in runs else TURNS[name](self)
                    if turn:
                        self.turns.setdefault(name, []).append(found)
        finally:
            for run in runs.values():
                run.stop()

    def run(self, name: str) -> Path:
        """Run directory of a run of the system."""
        return self.folder / name.replace(" ", "-")

    def _experiment(self, name: str) -> Experiment:
        fields = dict(RUNS[name])
        select = fields.pop("select", SelectConfig())
        base = Experiment(run=str(self.run(name)), cycles=CYCLES, optim=OptimConfig(lr=1e-3, micro_batch=8))
        return replace(
            base,
            data=replace(base.data, uri=self.store.storage.uri),
            select=replace(select, tiles=TILES),
            cluster=ClusterConfig(worker_cpus=SHARE, **fields),
        )

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


def alternating(one: Callable[[], Any], other: Callable[[], Any], times: int) -> list[tuple[float, float]]:
    """Seconds of both, in turn, after a turn that does not count."""
    one(), other()
    return [(timed(one), timed(other)) for _ in range(times)]


def bare_costs(bench: Bench, threads: int) -> tuple[float, float, float]:
    """Seconds a tile of a training step, of scoring and of validation, on tiles in memory, this process alone."""
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

    def step() -> None:
        learner.step(micro, lr=1e-6, key=("bench",), total=2)

    def score() -> None:
        scored(learner.net, whole[0], learner.precision)

    def validate() -> None:
        learner.evaluate([(*whole, torch.zeros(len(whole[0]), dtype=torch.int64))], 1)

    found = []
    for action in (step, score, validate):
        action()
        found.append(float(np.median([timed(action) for _ in range(5)])) / 16)
    return found[0], found[1], found[2]


def _halves(images: np.ndarray, labels: np.ndarray) -> list[MicroBatch]:
    """A step of 16 tiles as two micro-batches."""
    return [
        MicroBatch(k, *to_device(images[8 * k : 8 * k + 8], labels[8 * k : 8 * k + 8], CPU)) for k in range(2)
    ]


APART_SECONDS = 4.0
"""For which processes that share nothing are measured."""


def together(bench: Bench, act: str, count: int) -> list[tuple[float, float]]:
    """Batches of 16 tiles a second of so many processes that share nothing but the machine, and of one, in turn."""

    def rate(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                _apart, (folder, count, act, (bench.classes, bench.side)), nprocs=count
            )
            return sum(float(path.read_text()) for path in Path(folder).glob("rate-*"))

    if (act, count) not in bench.together:
        bench.together[act, count] = [(rate(count), rate(1)) for _ in range(4)]
    return bench.together[act, count]


def apart(bench: Bench, name: str, act: str) -> Row:
    """Work of two processes over that of one."""
    pairs = together(bench, act, 2)
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


def loaders(store: Store, ids: list[str]) -> Iterator[tuple[str, Any]]:
    """DataLoader settings to choose the best of."""
    data = Loaded(store.storage.uri, store.locations(ids), store.dataset.tile_size)
    for workers, prefetch in ((0, None), (1, 4), (2, 2), (2, 8)):
        # forked workers would hang in the threads of this process's S3 client
        started: dict[str, Any] = (
            {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
        )
        loader = torch.utils.data.DataLoader(
            data, batch_size=8, num_workers=workers, prefetch_factor=prefetch, **started
        )  # type: ignore[arg-type]
        yield f"{workers} workers, prefetch {prefetch}", loader


def best_loader(store: Store, ids: list[str], use: Callable[[Any], Any]) -> tuple[str, Any]:
    """The setting with which `use` is fastest, warm."""
    times = {}
    for name, loader in loaders(store, ids):
        use(loader)
        times[name] = timed(lambda loader=loader: use(loader)), loader  # type: ignore[misc]
    name = min(times, key=lambda n: times[n][0])
    return name, times[name][1]


def plain_loop(bench: Bench) -> Callable[[Any], None]:
    """The training loop a user would write: channels last, Adam, the same loss; a step of two micro-batches of 8."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    net = networks.build(ARCH, bench.classes, 0).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    adam = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-3, fused=True)
    alpha = torch.from_numpy(bench.alpha)
    dtype = DTYPES[bench.precision]
    if bench.precision == "bf16":
        train_grouped_in_fp32(net)  # what our step gains by it is the row of precision's

    def loop(loader: Any) -> None:
        for k, (images, labels) in enumerate(loader):
            x, y = to_device(images.numpy(), labels.numpy(), CPU)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                logits = net(x)
            (focal_loss_sum(log_probabilities(logits), y, alpha) / (16 * y[0].numel())).backward()
            if k % 2:
                adam.step()
                adam.zero_grad(set_to_none=True)

    return loop


def plain_turn(bench: Bench) -> float:
    """Seconds of the rival for the tiles of a cycle."""
    if bench.rival is None:
        loop = plain_loop(bench)
        bench.rival = (loop, *best_loader(bench.store, bench.ids[:TILES], loop))
    loop, _, loader = bench.rival
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return timed(lambda: loop(loader))


def training_over_plain(bench: Bench) -> Row:
    both = zip(bench.turns["passive"], bench.turns["plain loop"], strict=True)
    assert bench.rival is not None
    return row("training / plain loop", [s / _training(r) for r, s in both], [f"rival: {bench.rival[1]}"])


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
    threads = len(os.sched_getaffinity(0))
    gain = float(np.median([all_of_them / one for all_of_them, one in together(bench, "scores", threads)]))
    step, score, validate = bare_costs(bench, threads)
    scoring = min(score, bare_costs(bench, 1)[1] / gain)
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

    pairs = alternating(fast, slow, 6 if arch == ARCH else 3)  # a step of the U-Net takes seconds
    return row(name, [b / a for a, b in pairs], [f"{found}, channels last"])


MAPPED_BLOCK = 1440
"""Side of a block, pixels, in the row of predict."""


def predict_over_bare(bench: Bench) -> Row:
    model = of_run(str(bench.run("passive")))
    settings = Settings(block=MAPPED_BLOCK**2)
    cores = len(os.sched_getaffinity(0))
    short, long = (_scene(bench, cores * n) for n in (2, 8))
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
    for _ in range(3):
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

    pairs = alternating(lambda: _pool_seconds(bench, scorers, weights), bare, 4)
    scorers.kill()
    return row("scoring / bare forward", [b / a for a, b in pairs])


def two_scorers(bench: Bench) -> Row:
    weights, one, two = _weights(bench), _scorers(bench, 1), _scorers(bench, 2)
    pairs = alternating(
        lambda: _pool_seconds(bench, one, weights), lambda: _pool_seconds(bench, two, weights), 4
    )
    one.kill()
    two.kill()
    return row("two scorers / one", [a / b for a, b in pairs])


def stream_over_loader(bench: Bench) -> Row:
    ids = bench.ids[:STREAMED]
    with bench.in_bucket() as store:

        def drained(loader: Any) -> None:
            for _ in loader:
                pass

        name, loader = best_loader(store, ids, drained)

        def ours() -> None:
            stream = _stream(store, ids)
            stream.take(range(len(ids)))
            stream.close()

        pairs = alternating(ours, lambda: drained(loader), 5)
    return row("stream / DataLoader", [b / a for a, b in pairs], [f"rival: {name}"])


def first_batch(bench: Bench) -> Row:
    ids, size = bench.ids[:STREAMED], 8
    with bench.in_bucket() as store:

        def one(loader: Any) -> None:
            next(iter(loader))

        name, loader = best_loader(store, ids, one)

        def ours() -> float:
            began = time.perf_counter()
            stream = _stream(store, ids)
            stream.take(range(size))
            seconds = time.perf_counter() - began
            stream.close()
            return seconds

        ours()
        pairs = [(ours(), timed(lambda: one(loader))) for _ in range(15)]
    return row(
        "first batch / DataLoader",
        [a / b for a, b in pairs],
        [f"rival: {name}", f"{np.median(pairs, 0)[0]:.2f} s"],
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
    step = bare_costs(bench, 1)[0]
    tiles = [t for t in bench.tiles(64) if t.label is not None]

    def all_of_them() -> None:
        for t in tiles:
            assert t.label is not None
            augment(t.image, t.label, keyed_rng("augment", 0, 0, t.tile_id))

    all_of_them()
    return row("augmentation", [100 * timed(all_of_them) / len(tiles) / step for _ in range(7)])


def bytes_fetched(bench: Bench) -> Row:
    from raysed.io import storage

    ratios = []
    for seed in range(5):
        chosen = np.random.default_rng(seed).choice(bench.ids, len(bench.ids) // 5, replace=False).tolist()
        spans: dict[str, list[tuple[int, int]]] = {}
        for at in bench.store.locations(chosen):
            for kind in ("image", "label"):
                spans.setdefault(at["shard"], []).append((at[f"{kind}_offset"], at[f"{kind}_length"]))
        fetched = sum(n for s in spans.values() for _, n in storage.coalesce(s, storage.GAP))
        ratios.append(fetched / sum(n for s in spans.values() for _, n in s))
    return row("bytes fetched", ratios)


def controller_costs(uri: str) -> tuple[list[float], float]:
    """Seconds of what rank 0 does in a cycle for the tiles of a store, and the most GiB that this process has held, opening it included."""
    rng = np.random.default_rng(0)
    store = Store.open(uri, None, TRAINING)
    n = len(store.index)
    pool, store = training_rows(store.only(POOL).index, None), store.only(LOCATION)
    candidates = sorted_names(pool["tile_id"])
    experiment = Experiment(select=SelectConfig(strategy="entropy"))

    def cycle() -> None:
        ids = without(candidates, ())
        work = Work(store.located(ids), 8)
        for k in range(work.whole):
            work.tiles(k)
        scores = ScoreTable.unknown(ids, 8).with_scores(ids, rng.random((n, 10), np.float32)).table()
        selection = choose(experiment, 1, scores=scores, index=pool, state={}, excluded=set())
        plan(selection.tile_ids, 0, 1, 16, 8)
        table_bytes(selection_table(selection))
        table_bytes(scores)

    seconds = [timed(cycle) for _ in range(3)]
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


PROCESS_SECONDS = 600
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
TURNS: dict[str, Callable[[Bench], float]] = {"plain loop": plain_turn, "bare costs": bare_turn}
"""What else takes turns with them."""
GROUPS = (
    ("passive", "plain loop"),
    ("passive beside", "active", "by-product", "bare costs"),
    ("passive, one thread", "overlapped"),
    ("one worker", "two workers"),
)
"""What takes turns with what; idle runs take a few per cent of a core each, so no more stand side by side than are compared."""

NEEDS = {
    "training / plain loop": {"passive", "plain loop"},
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

ROWS: dict[str, Callable[[Bench], Row]] = {
    "training / plain loop": training_over_plain,
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
    "two processes, steps": lambda b: apart(b, "two processes, steps", "steps"),
    "two processes, scores": lambda b: apart(b, "two processes, scores", "scores"),
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
    failed: dict[str, str] = {}
    done = []
    with tempfile.TemporaryDirectory(prefix="raysed-bench-") as folder:
        server = ObjectServer(Path(folder) / "s3")
        os.environ.update(server.environment)  # before anything starts Ray, whose workers inherit it
        connect()
        bench = Bench(prepare(), Path(folder), server)
        wanted = {turn for name in names for turn in NEEDS.get(name, ())}
        for group in GROUPS:
            if taking := [turn for turn in group if turn in wanted]:
                bench.take_turns(taking)
        for name in names:
            began = time.monotonic()
            try:
                found = ROWS[name](bench)
            except (RaysedError, subprocess.SubprocessError) as error:
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
