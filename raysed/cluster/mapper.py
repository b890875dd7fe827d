"""What actors and tasks do to make maps: plan an image, map a block, put pieces together, compare with labels.

Nothing holds more than a block, so memory does not grow with the image (PNG and JPEG are decoded whole).
"""

import itertools
import json
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysed.core import tiles, windows
from raysed.core.counts import confusion
from raysed.core.step import DTYPES, resolve_precision
from raysed.core.uncertainty import map_layers
from raysed.core.windows import Axis, Block
from raysed.errors import DataError, UsageError
from raysed.io import maps
from raysed.io.imagery import Image
from raysed.io.maps import Piece, Place
from raysed.io.model import Model, Record
from raysed.io.sources import BadSource, Raster, ground_size
from raysed.io.storage import Storage, digest

BLOCK = 1 << 25
"""Pixels of a block that gives nothing but classes; with more layers it is smaller, so that memory stays the same."""
BATCH = 8
"""Windows a forward pass."""
AHEAD = 2
"""Batches read while the network works."""
LARGEST = 1 << 40
"""Pixels of a GeoTIFF."""
MOST = 16
"""Source pixels a model pixel, or the other way round, at most: beyond, the image does not show what was trained on."""
STRIP = 1 << 24
"""Pixels of a map that are compared with labels at once."""
REMEDY = (
    "give 8-bit RGB: gdal_translate -b 1 -b 2 -b 3 picks bands, -ot Byte -scale makes 8 bits of 16 (scale as "
    "the training images were); or train on such images: jobs/prepare.py --bands --stretch"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What determines maps besides model and images."""

    overlap: float = 0.25
    """Share of a window that its neighbours see too."""
    entropy: bool = False
    """Also write the entropy."""
    probabilities: bool = False
    """Also write the probabilities of the classes."""
    block: int = BLOCK
    """Pixels mapped at once."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 0.75:
            raise UsageError(f"--overlap must lie in 0..0.75, got {self.overlap}")

    def layers(self, classes: int) -> int:
        """Layers of a map."""
        return 1 + self.entropy + classes * self.probabilities


@dataclass(frozen=True)
class Task:
    """All that actors and tasks need to know besides the weights; what they are called with is one image or block."""

    record: Record
    settings: Settings
    target: str

    @property
    def key(self) -> str:
        """Hash of model and settings: outputs of others are not touched."""
        layers = {k: v for k, v in asdict(self.settings).items() if k != "block"}
        what = {"model": self.record.sha256, "scale": self.record.scale, "metres": self.record.metres}
        text = json.dumps({**what, **layers}, sort_keys=True)
        return digest(text.encode())[:12]

    def marker(self, image: Image) -> str:
        """Path of the file that says whose the outputs of an image are."""
        return f"made/{self.key}/{image.name}@{image.identity}"

    def pieces(self, image: Image) -> str:
        """Folder of its pieces."""
        return f"pieces/{self.key}/{image.name}@{image.identity}"

    def outputs(self, image: Image) -> list[str]:
        """Paths of its outputs, the map last."""
        wanted = (self.settings.entropy, self.settings.probabilities)
        return [*itertools.compress(extras(image), wanted), image.name + image.ending]


def extras(image: Image) -> tuple[str, str]:
    """Paths of the entropy and the probabilities beside its map."""
    return f"{image.name}.entropy{image.ending}", f"{image.name}.probabilities.tif"


def open_image(image: Image, task: Task) -> Raster:
    """The raster of an image, read by the rule of training."""
    return Raster(Storage(image.root), image.path, image.size, 3, LARGEST, rule=task.record.rule)


def open_label(label: Image) -> Raster:
    """The raster of a label."""
    return Raster(Storage(label.root), label.path, label.size, 1, LARGEST)


def grid_of(raster: Raster, task: Task) -> tuple[Axis, Axis, bool]:
    """Rows and columns of an image at the scale of training, and whether that was known in metres.

    Raises:
        BadSource: its pixels are far larger or smaller than those trained on.
    """
    record = task.record
    ground = ground_size(raster.wkt, raster.transform)
    by_metres = record.metres is not None and ground is not None
    scale = record.scale
    if record.metres is not None and ground is not None:
        scale = (record.metres / ground[0], record.metres / ground[1])
    if not all(1 / MOST <= f <= MOST for f in scale):
        found = f"pixels of {ground[0]:.3g} m" if ground else f"{1 / scale[0]:.3g} times the pixels"
        raise raster.bad(
            f"has {found}, the model was trained on {record.metres or 1:.3g} m: more than {MOST} times apart"
        )
    rows, cols = (
        windows.axis(size, f, record.tile_size, task.settings.overlap)
        for size, f in zip((raster.height, raster.width), scale, strict=True)
    )
    return rows, cols, by_metres


@dataclass(frozen=True)
class Plan:
    """What there is to do for one image."""

    image: Image
    label: Image | None
    blocks: tuple[Block, ...]
    pieces: tuple[str, ...]
    """Names of the blocks' pieces."""
    pixels: int
    has_crs: bool
    by_metres: bool
    """Its scale was taken in metres a pixel, not in source pixels."""


def plan_image(image: Image, label: Image | None, task: Task) -> Plan:
    """The plan of an image, from its header and that of its label.

    Raises:
        BadSource: one of them cannot be used.
    """
    block, layers = task.settings.block, task.settings.layers(len(task.record.classes))
    with ExitStack() as stack:
        raster = stack.enter_context(open_image(image, task).opened(header=True))
        if label:
            truth = stack.enter_context(open_label(label).opened(header=True))
            if (truth.height, truth.width) != (raster.height, raster.width):
                raise truth.bad(
                    f"has {truth.width} x {truth.height} pixels, its image {raster.width} x {raster.height}"
                )
        rows, cols, by_metres = grid_of(raster, task)
        blocks = windows.blocks(rows, cols, max(block // 4, 2 * block // (1 + layers)))
        return Plan(
            image,
            label,
            tuple(blocks),
            tuple(piece_name(rows, cols, b) for b in blocks),
            raster.height * raster.width,
            raster.wkt is not None,
            by_metres,
        )


def reason_of(error: BadSource) -> str:
    """Why an image gives no map, with what to do where that is known."""
    remedy = f": {REMEDY}" if "expected 3 of uint8" in str(error) else ""
    return f"{error}{remedy}"


class BlockMapper:
    """Maps blocks with one network.

    Args:
        task: what to make.
        weights: state dict of `Network.net`.
        device: `cpu` or `cuda`.
    """

    def __init__(self, task: Task, weights: dict[str, Tensor], device: str) -> None:
        self.task, self.device = task, torch.device(device)
        net = Model(task.record, weights).network().to(self.device)
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = DTYPES[resolve_precision("auto", self.device)]
        codes = [c.source_id for c in task.record.classes]
        self.codes = torch.tensor(codes, dtype=torch.uint8, device=self.device)

    @torch.inference_mode()
    def make(self, image: Image, block: Block, *, whole: bool) -> None:
        """Map a block: into a piece, or into the outputs if it is the whole image.

        Raises:
            BadSource: it cannot be decoded, or the whole image holds no data.
        """
        target = Storage(self.task.target)
        with open_image(image, self.task).opened() as raster:
            place = Place(raster.height, raster.width, raster.wkt, raster.transform)
            rows, cols, _ = grid_of(raster, self.task)
            row, col, layers = self.map(raster, rows, cols, block)
            if whole and (layers[0] == self.task.record.nodata).all():
                raise raster.bad(_EMPTY)
        if whole:
            write_outputs(self.task, image, place, lambda: [(row, col, layers)])
        else:
            path = f"{self.task.pieces(image)}/{piece_name(rows, cols, block)}"
            target.write(path, maps.pack_piece(layers))

    def map(self, raster: Raster, rows: Axis, cols: Axis, block: Block) -> Piece:
        """First source row and column of a block, and its layers."""
        (y, bottom), (x, right) = spans(rows, cols, block)
        left, _ = cols.owned(*block.cols)
        record = self.task.record
        classes, settings = len(record.classes), self.task.settings
        out = np.empty((settings.layers(classes), bottom - y, right - x), np.uint8)
        across = cols.nearest(x, right) - left
        images = read_windows(raster, rows, cols, block)
        with closing(self.predict(images)) as predicted:
            for first, blended in windows.stitch(
                rows, cols, block, predicted, classes=classes, device=self.device
            ):
                layers = map_layers(
                    blended, self.codes, entropy=settings.entropy, each=settings.probabilities
                )
                above, below = rows.source_span(first, first + layers.shape[1])
                down = rows.nearest(above, below) - first
                found = layers.cpu().numpy()[:, down][:, :, across]
                void = ~raster.valid(above, x, below - above, right - x)
                found[0][void] = record.nodata
                found[1:, void] = maps.UNKNOWN
                out[:, above - y : below - y] = found
        return y, x, out

    def predict(self, images: Iterable[np.ndarray | None]) -> Generator[Tensor | None, None, None]:
        """(C, S, S) probabilities of each window, in order; None where there is nothing to see."""
        for batch in ahead(_batches(images), AHEAD):
            seen = [image for image in batch if image is not None]
            found: Iterator[Tensor] = iter(self.forward(np.stack(seen))) if seen else iter(())
            yield from (None if image is None else next(found) for image in batch)

    def forward(self, images: np.ndarray) -> Tensor:
        """(B, S, S, 3) uint8 to (B, C, S, S) float32 probabilities."""
        x = torch.from_numpy(images).to(self.device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.net(x)
        return logits.float().softmax(1)


_EMPTY = "holds no data: every pixel is nodata or masked"


def spans(rows: Axis, cols: Axis, block: Block) -> tuple[tuple[int, int], tuple[int, int]]:
    """Source rows and source columns of a block."""
    return rows.source_span(*rows.owned(*block.rows)), cols.source_span(*cols.owned(*block.cols))


def piece_name(rows: Axis, cols: Axis, block: Block) -> str:
    """Name of a block's piece: it says where the piece lies, so another cut of the image takes none for its own."""
    (top, bottom), (left, right) = spans(rows, cols, block)
    return f"{top}-{left}-{bottom}-{right}"


def read_windows(raster: Raster, rows: Axis, cols: Axis, block: Block) -> Iterator[np.ndarray | None]:
    """(S, S, 3) uint8 windows that touch a block, at the scale of training, row by row; None for one without data.

    The source rows of a row of windows are read once, over all its columns.
    """
    side, across = rows.side, {}
    wanted = windows.windows_of(rows, cols, block)
    for c in {c for _, c in wanted}:
        across[c] = cols.resampling(cols.starts[c], min(cols.starts[c] + side, cols.length))
    left = min(first for first, _ in across.values())
    right = max(first + weights.shape[1] for first, weights in across.values())
    same = rows.size == rows.length and cols.size == cols.length
    last = None
    for r, c in wanted:
        if r != last:
            top, down = rows.resampling(rows.starts[r], min(rows.starts[r] + side, rows.length))
            pixels = raster.read(top, left, down.shape[1], right - left)
            valid = raster.valid(top, left, down.shape[1], right - left)
            last = r
        first, weights = across[c]
        cut = slice(first - left, first - left + weights.shape[1])
        if not valid[:, cut].any():
            yield None
            continue
        image = pixels[:, cut]
        yield windows.pad(image if same else windows.resample(image, down, weights), side)


def _batches(images: Iterable[np.ndarray | None]) -> Iterator[list[np.ndarray | None]]:
    """Batches of `BATCH` windows with something to see, and those without between them."""
    batch: list[np.ndarray | None] = []
    seen = 0
    for image in images:
        batch.append(image)
        seen += image is not None
        if seen == BATCH or len(batch) == 16 * BATCH:
            yield batch
            batch, seen = [], 0
    if batch:
        yield batch


def ahead(items: Iterable[Any], depth: int) -> Iterator[Any]:
    """The items, made by a thread up to `depth` before they are asked for; what it raises comes out here."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(item, timeout=0.5)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:  # handed to the caller below
            put((False, error))

    thread = threading.Thread(target=work, daemon=True, name="raysed-ahead")
    thread.start()
    try:
        while True:
            more, item = waiting.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stopped.set()
        thread.join()  # the raster it reads from is closed next


def write_outputs(task: Task, image: Image, place: Place, pieces: Callable[[], Iterable[Piece]]) -> None:
    """All outputs of an image from its pieces, the map last."""
    target, record, settings = Storage(task.target), task.record, task.settings
    target.write(task.marker(image), b"\n")
    *_, path = task.outputs(image)
    layer = lambda part: ((row, col, piece[part]) for row, col, piece in pieces())  # noqa: E731
    at = 1
    if settings.entropy:
        maps.write_entropy(target, f"{image.name}.entropy{image.ending}", place, layer(slice(1, 2)), record)
        at = 2
    if settings.probabilities:
        maps.write_probabilities(
            target, f"{image.name}.probabilities.tif", place, layer(slice(at, None)), record
        )
    maps.write_map(target, path, place, layer(slice(0, 1)), record)


def assemble(task: Task, image: Image, names: tuple[str, ...]) -> None:
    """Put the pieces of an image together, and remove them.

    Raises:
        BadSource: the whole image holds no data.
        DataError: a piece is gone.
    """
    target, folder = Storage(task.target), task.pieces(image)

    def pieces() -> Iterator[Piece]:
        for name in names:
            row, col, _, _ = map(int, name.split("-"))
            try:
                data = target.read(f"{folder}/{name}")
            except FileNotFoundError as error:
                raise DataError(
                    f"{target.uri}/{folder}/{name} is gone: is another job making the same maps?  Run this one again"
                ) from error
            yield row, col, maps.unpack_piece(data, f"{target.uri}/{folder}/{name}")

    with open_image(image, task).opened(header=True) as raster:
        place = Place(raster.height, raster.width, raster.wkt, raster.transform)
        if not any((piece[0] != task.record.nodata).any() for _, _, piece in pieces()):
            raise raster.bad(_EMPTY)
    write_outputs(task, image, place, pieces)
    for name in names:
        target.remove(f"{folder}/{name}")


def count(task: Task, image: Image, label: Image) -> np.ndarray:
    """(C, C) confusion counts of a finished map and its label; pixels without a class in either are left out.

    Raises:
        BadSource: the label cannot be used.
    """
    record, target, classes = task.record, Storage(task.target), len(task.record.classes)
    of_label = tiles.label_lookup(record.classes, record.ignore)
    of_map = tiles.label_lookup(record.classes, (record.nodata,))
    path = task.outputs(image)[-1]
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    with (
        open_label(label).opened() as truth,
        Raster(target, path, target.size(path), 1, LARGEST).opened() as made,
    ):
        height = max(1, STRIP // made.width)
        for top in range(0, made.height, height):
            window = (top, 0, min(height, made.height - top), made.width)
            codes = truth.read(*window)
            known = of_label[codes]
            if known.min() < 0:
                legal = np.flatnonzero(of_label >= 0).tolist()
                raise truth.bad(f"holds label code {codes[known < 0].min()}, the model knows {legal}")
            wanted = tiles.target_of(known.astype(np.uint8))
            said = tiles.target_of(of_map[made.read(*window)].astype(np.uint8))
            wanted[said == tiles.VOID] = tiles.VOID
            counts += confusion(torch.from_numpy(said), torch.from_numpy(wanted), classes)
    return counts.numpy()
