"""Maps larger than a network's tile: overlapping windows, resampling to the scale of training, blending, the way back.

Two grids: the source's own pixels, and the model grid, which is the source resampled to the scale of training.  Windows lie on
the model grid.  Letters: H W pixels of the model grid, C classes, S side of a window.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SNAP = 0.01
"""A scale that differs by less than this share from the source's own is taken as it: resampling would only blur."""


@dataclass(frozen=True)
class Axis:
    """Rows or columns of one image: its source pixels, its model pixels and the windows over these."""

    size: int
    """Source pixels."""
    length: int
    """Model pixels."""
    side: int
    """S, model pixels; may exceed the length, then the image is padded."""
    starts: tuple[int, ...]
    """First model pixel of every window."""

    def owned(self, first: int, last: int) -> tuple[int, int]:
        """Model pixels that windows first..last (exclusive) answer for: from their start to that of the next one."""
        end = self.length if last == len(self.starts) else self.starts[last]
        return (0 if first == 0 else self.starts[first]), end

    def touching(self, begin: int, end: int) -> range:
        """Windows that hold any of model pixels begin..end (exclusive)."""
        held = [k for k, s in enumerate(self.starts) if s < end and s + self.side > begin]
        return range(held[0], held[-1] + 1)

    def source_span(self, begin: int, end: int) -> tuple[int, int]:
        """Source pixels whose centre lies in model pixels begin..end (exclusive)."""
        first, last = (-((self.length - 2 * self.size * m) // (2 * self.length)) for m in (begin, end))
        return first, last

    def nearest(self, begin: int, end: int) -> np.ndarray:
        """(end - begin,) model pixel under the centre of each of source pixels begin..end (exclusive)."""
        return (2 * np.arange(begin, end) + 1) * self.length // (2 * self.size)

    def resampling(self, begin: int, end: int) -> tuple[int, np.ndarray]:
        """How model pixels begin..end (exclusive) follow from source pixels: the first of these, and (end - begin, n) float32
        weights.  Area average when shrinking, bilinear when enlarging, as for the tiles trained on.
        """
        factor, at = self.size / self.length, np.arange(begin, end)[:, None]
        if factor >= 1:
            first = int(begin * factor)
            last = min(self.size, int(np.ceil(end * factor - 1e-9)))
            pixel = np.arange(first, last)[None]
            covered = np.minimum((at + 1) * factor, pixel + 1) - np.maximum(at * factor, pixel)
        else:
            centre = np.clip((at + 0.5) * factor - 0.5, 0, self.size - 1)
            first, last = int(centre[0, 0]), min(self.size, int(centre[-1, 0]) + 2)
            covered = 1 - np.abs(np.arange(first, last)[None] - centre)
        weights = np.maximum(covered, 0)
        return first, (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def axis(size: int, scale: float, side: int, overlap: float) -> Axis:
    """The windows over one axis: evenly spread, together covering every pixel, neighbours sharing at least `overlap` of S.

    Args:
        size: source pixels.
        scale: source pixels a model pixel.
        side: S.
        overlap: share of S, at least 0 and less than 1.
    """
    length = size if abs(scale - 1) < SNAP else max(1, round(size / scale))
    stride = max(1, side - round(overlap * side))
    last = max(0, length - side)
    count = -(-last // stride) + 1
    starts = tuple(k * last // max(1, count - 1) for k in range(count))
    return Axis(size, length, side, starts)


def blend(windows: Axis) -> np.ndarray:
    """(windows, S) float32 weights that sum to 1 over the windows of every pixel and fade towards a window's edges, where
    a neighbour takes over: so no edge shows.
    """
    edge = np.minimum(np.arange(windows.side) + 0.5, windows.side - np.arange(windows.side) - 0.5)
    fade = (
        edge**2
    )  # a trained network errs most at the rim, where it sees padding: linear weights let that show
    total = np.zeros(max(windows.length, windows.side))
    for start in windows.starts:
        total[start : start + windows.side] += fade
    return np.stack([fade / total[s : s + windows.side] for s in windows.starts]).astype(np.float32)


@dataclass(frozen=True)
class Block:
    """A part of an image that is mapped at once: the windows it answers for, first..last (exclusive)."""

    rows: tuple[int, int]
    cols: tuple[int, int]


def blocks(rows: Axis, cols: Axis, limit: int) -> list[Block]:
    """Blocks that together answer for every window once, each of about `limit` pixels, of source or model, at most."""
    side = max(1, int(limit**0.5))
    parts = []
    for along in (rows, cols):
        count = min(len(along.starts), -(-max(along.size, along.length) // side))
        edges = [k * len(along.starts) // count for k in range(count + 1)]
        parts.append(list(itertools.pairwise(edges)))
    return [Block(r, c) for r in parts[0] for c in parts[1]]


def resample(pixels: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 source pixels to (len(down), len(across), 3) uint8 by the weights of `Axis.resampling`."""
    planes = pixels.astype(np.float32).transpose(2, 0, 1)
    return np.rint(down @ planes @ across.T).astype(np.uint8).transpose(1, 2, 0)


def pad(image: np.ndarray, side: int) -> np.ndarray:
    """(h, w, 3) mirrored at its lower and right edge up to (side, side, 3)."""
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    return np.pad(image, ((0, side - height), (0, side - width), (0, 0)), mode="symmetric")


def stitch(
    rows: Axis,
    cols: Axis,
    block: Block,
    predicted: Iterable[Tensor | None],
    *,
    classes: int,
    device: torch.device,
) -> Iterator[tuple[int, Tensor]]:
    """Blended probabilities of a block, top to bottom: only the rows that windows still change are held.

    Args:
        rows: of the image.
        cols: of the image.
        block: the part asked for.
        predicted: (C, S, S) probabilities of the windows that touch it, row by row, as `windows_of` names them; None
            leaves zeros.
        classes: C.
        device: of the probabilities.

    Yields:
        First model row, and (C, n, width) probabilities of the block's columns.
    """
    (top, bottom), (left, right) = rows.owned(*block.rows), cols.owned(*block.cols)
    row_range, col_range = rows.touching(top, bottom), cols.touching(left, right)
    origin, side = cols.starts[col_range[0]], rows.side
    width = cols.starts[col_range[-1]] + side - origin
    down = torch.from_numpy(blend(rows)).to(device)
    across = torch.from_numpy(blend(cols)).to(device)
    strip = torch.zeros(classes, side, width, device=device)
    windows = iter(predicted)
    for r in row_range:
        start = rows.starts[r]
        for c in col_range:
            probabilities = next(windows)
            if probabilities is not None:
                at = cols.starts[c] - origin
                strip[:, :, at : at + side] += probabilities * (down[r][:, None] * across[c])
        after = rows.starts[r + 1] if r + 1 < len(rows.starts) else rows.length
        first, last = max(start, top), min(after, bottom)
        if first < last:
            yield first, strip[:, first - start : last - start, left - origin : right - origin].clone()
        done = min(side, after - start)
        strip = torch.cat([strip[:, done:], torch.zeros(classes, done, width, device=device)], 1)


def windows_of(rows: Axis, cols: Axis, block: Block) -> list[tuple[int, int]]:
    """(row, column) of the windows that touch a block, row by row."""
    row_range = rows.touching(*rows.owned(*block.rows))
    col_range = cols.touching(*cols.owned(*block.cols))
    return [(r, c) for r in row_range for c in col_range]


def seam_score(probabilities: np.ndarray, borders: Iterable[int], others: Iterable[int]) -> float:
    """How much window borders show: mean absolute difference of the class probabilities of the two pixels at either side of
    a border, over that at other lines; 1 means not at all.

    Args:
        probabilities: (C, H, W).
        borders: columns at which a window starts or ends (the line lies before the column).
        others: columns to compare with.
    """
    steps = np.abs(np.diff(probabilities.astype(np.float64), axis=2)).mean((0, 1))  # (W - 1,)
    at_borders, elsewhere = (steps[np.asarray(list(lines)) - 1].mean() for lines in (borders, others))
    return float(at_borders / elsewhere)
