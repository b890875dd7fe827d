"""This rank's share of a cycle as Ray Data: read by ranged reads, verified, decoded, augmented, in plan order.

An open Ray Data execution spins in the process that consumes it, so the stream is drained in chunks: chunk k + 1 in a thread
while chunk k trains, and nothing is open during most steps; a trainer that has to wait for a chunk begins the next one beside it.
An execution takes 0.2 s to begin, so the first few tiles are read by the trainer's own process, a piece at a time: the first
piece alone, so that training begins soonest, the others while the execution begins.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import ray.data

from raysed.config import AugmentConfig
from raysed.core.augment import augment, to_uint8
from raysed.core.randomness import keyed_rng
from raysed.errors import RaysedError, rebuilt
from raysed.io.storage import Storage
from raysed.io.store import BadTile, Store, read_tiles

BLOCK = 64
"""Tiles a read task, at most: a task costs Ray Data about 10 ms, measured 1.0, 0.77, 0.68 s for 256 tiles at 16, 32, 64."""
TASKS = 4
"""Read tasks of a chunk, at least, so that several CPUs share it."""


FIRST = 16
"""Tiles that the trainer's process reads itself at the beginning, at most."""
PIECE = 8
"""Of these, tiles read at once: training begins with the first."""


STARVED_SECONDS = 120.0
"""Seconds without the tiles of a chunk after which the trainer's process reads them itself: no CPU may be left for a read task."""


@dataclass(frozen=True)
class Row:
    """One tile of the stream; a bad tile is black and all void."""

    position: int
    tile_id: str
    image: np.ndarray
    """(side, side, 3) uint8 RGB."""
    label: np.ndarray
    """(side, side) uint8, 0 void, 1..C classes."""

    def kept(self) -> "Row":
        """A copy in this process's memory: tiles that came by Ray are views of its object store, and would fill it."""
        return replace(self, image=self.image.copy(), label=self.label.copy())


Drained = tuple[list[Row], Counter[str], list[BadTile]]
"""Tiles, how many of them each node has read, and the bad ones."""


@dataclass(frozen=True)
class _Coming:
    """Tiles that are being read."""

    rows: Future[Drained]
    wanted: list[tuple[int, str]]
    is_read_here: bool
    """By this process and not by read tasks, so that no CPU has to be free."""


@cache
def _storage(uri: str) -> Storage:
    return Storage(uri)  # one client a process, with its open files


def read_and_augment(
    batch: dict[str, np.ndarray],
    *,
    uri: str,
    side: int,
    classes: int,
    keys: tuple[int, int] | None,
    limits: dict[str, Any],
) -> dict[str, Any]:
    """INPUT: position and location of tiles.  OUTPUT: position, tile_id, image, label, bad ("" or reason and hash), node, failed.

    Args:
        batch: columns of numbers and strings.
        uri: root of the store.
        side: side of a stored tile, pixels.
        classes: of the store.
        keys: (seed, cycle) that own the augmentation; None leaves tiles as they are.
        limits: arguments of `augment`.
    """
    locations = [dict(zip(batch, map(_plain, row), strict=True)) for row in zip(*batch.values(), strict=True)]
    images = np.zeros((len(locations), side, side, 3), np.uint8)
    labels = np.zeros((len(locations), side, side), np.uint8)
    bad = [""] * len(locations)
    failed = ""
    try:
        tiles = read_tiles(_storage(uri), locations, side, classes)
    except RaysedError as error:  # raised by the consumer: Ray Data loses the cause of what a task raises
        tiles, failed = [], f"{type(error).__name__} {error}"
    for i, tile in enumerate(tiles):
        if isinstance(tile, BadTile):
            bad[i] = f"{tile.sha256} {tile.reason}"
            continue
        assert tile.label is not None
        images[i], labels[i] = tile.image, tile.label
        if keys:
            pixels, labels[i] = augment(
                tile.image, tile.label, keyed_rng("augment", *keys, tile.tile_id), **limits
            )
            images[i] = to_uint8(pixels)
    node = ray.get_runtime_context().get_node_id()
    return {
        "position": batch["position"],
        "tile_id": batch["tile_id"],
        "image": images,
        "label": labels,
        "bad": bad,
        "node": [node] * len(bad),
        "failed": [failed] * len(bad),
    }


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


class Stream:
    """Tiles of one rank in the order it needs them, drained chunk by chunk.

    Args:
        store: the tile store.
        wanted: (position, tile_id) in the order of use.
        name: of the data sets, as the dashboard shows them.
        chunk: tiles drained at once.
        reader_cpus: CPUs of a read task.
        keys: (seed, cycle) that own the augmentation; None leaves tiles as they are.
        limits: of the augmentation.
        alone: read everything in this process.
    """

    def __init__(
        self,
        store: Store,
        wanted: Sequence[tuple[int, str]],
        *,
        name: str,
        chunk: int,
        reader_cpus: float,
        keys: tuple[int, int] | None,
        limits: AugmentConfig,
        alone: bool = False,
    ) -> None:
        self.bad: list[BadTile] = []
        self.nodes: Counter[str] = Counter()
        self.stall = 0.0
        """Seconds spent waiting for tiles."""
        self.alone, self.starved = alone, False
        """Whether this process reads everything itself, and whether it does so because no read task found a place."""
        self._wanted, self._store, self._name, self._reader_cpus = list(wanted), store, name, reader_cpus
        self._arguments: dict[str, Any] = {
            "uri": store.storage.uri,
            "side": store.dataset.tile_size,
            "classes": len(store.dataset.classes),
            "keys": keys,
            "limits": asdict(limits),
        }
        first = min(FIRST, chunk, len(self._wanted))
        rest = range(first, len(self._wanted), chunk)
        self._chunks = deque(self._wanted[i : i + chunk] for i in rest)
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="raysed-read")
        self._drains = ThreadPoolExecutor(2, thread_name_prefix="raysed-stream")
        self._coming: deque[_Coming] = deque()
        self._ready: list[Row] = []
        for i in range(0, first, PIECE):
            self._begin_here(self._wanted[i : min(i + PIECE, first)])
        self._first = self._coming[0].rows if self._coming else None
        self._advance()

    def take(self, positions: Sequence[int]) -> list[Row]:
        """The next tiles, whose positions the caller knows; they are checked."""
        began = time.perf_counter()
        while len(self._ready) < len(positions):
            assert self._coming, "more tiles asked for than were planned"
            coming = self._coming.popleft()
            if not self._coming and not coming.rows.done():
                self._advance()
            try:
                rows, nodes, bad = coming.rows.result(
                    timeout=None if coming.is_read_here else STARVED_SECONDS
                )
            except TimeoutError:
                if coming.rows.done():
                    raise
                self.alone = self.starved = True
                rows, nodes, bad = self._read_here(coming.wanted)
                self._starve()
            self._ready += rows
            self.nodes += nodes
            self.bad += bad
            if not self._coming:
                self._advance()
        self.stall += time.perf_counter() - began
        rows, self._ready = self._ready[: len(positions)], self._ready[len(positions) :]
        assert [r.position for r in rows] == list(positions), "the stream lost the order of the plan"
        return rows

    def told(self) -> tuple[float, Counter[str], list[BadTile]]:
        """Stall, nodes and bad tiles since the last time they were asked for."""
        told = self.stall, self.nodes, self.bad
        self.stall, self.nodes, self.bad = 0.0, Counter(), []
        return told

    def close(self) -> None:
        """End the drain that may still run."""
        self._readers.shutdown(cancel_futures=True)
        self._drains.shutdown(wait=not self.starved, cancel_futures=True)

    def _starve(self) -> None:
        """Read here what read tasks were asked for; the threads that wait for these are left alone."""
        waiting, self._coming = self._coming, deque()
        for coming in waiting:
            self._begin_here(coming.wanted)

    def _begin_here(self, wanted: list[tuple[int, str]]) -> None:
        self._coming.append(_Coming(self._readers.submit(self._read_here, wanted), wanted, True))

    def _advance(self) -> None:
        if not self._chunks:
            return
        wanted = self._chunks.popleft()
        if self.alone:
            self._begin_here(wanted)
        else:
            self._coming.append(_Coming(self._drains.submit(self._drain, wanted), wanted, False))

    def _items(self, wanted: list[tuple[int, str]]) -> list[dict[str, Any]]:
        locations = self._store.locations([t for _, t in wanted])
        return [{"position": p, **at} for (p, _), at in zip(wanted, locations, strict=True)]

    def _read_here(self, wanted: list[tuple[int, str]]) -> Drained:
        items = self._items(wanted)
        columns = {name: np.array([item[name] for item in items]) for name in items[0]}
        return _drained([read_and_augment(columns, **self._arguments)])

    def _drain(self, wanted: list[tuple[int, str]]) -> Drained:
        if self._first:
            wait([self._first])
        items = self._items(wanted)
        tasks = min(len(items), max(TASKS, -(-len(items) // BLOCK)))
        source = ray.data.from_items(items, override_num_blocks=tasks)
        stream = source.map_batches(
            read_and_augment,  # type: ignore[arg-type]  # Ray's hints leave out the keyword arguments
            fn_kwargs=self._arguments,
            batch_size=None,
            num_cpus=self._reader_cpus,
        )
        stream.set_name(self._name)
        # an execution learns after a second what it may take, and until then runs one task at a time
        stream.context.op_resource_reservation_enabled = False
        return _drained(stream.iter_batches(batch_size=None, prefetch_batches=len(items)))


def _drained(blocks: Iterable[dict[str, Any]]) -> Drained:
    """What `read_and_augment` gave, tile by tile."""
    rows: list[Row] = []
    nodes: Counter[str] = Counter()
    bad_ones: list[BadTile] = []
    for block in blocks:
        if block["failed"][0]:
            raise rebuilt(*str(block["failed"][0]).split(" ", 1))
        nodes.update(map(str, block["node"]))
        for i, (position, tile_id, bad) in enumerate(
            zip(block["position"], block["tile_id"], block["bad"], strict=True)
        ):
            if bad:
                found, _, reason = str(bad).partition(" ")
                bad_ones.append(BadTile(str(tile_id), reason, found))
            rows.append(Row(int(position), str(tile_id), block["image"][i], block["label"][i]))
    return rows, nodes, bad_ones
