"""What curves and counts of several runs say: pure numbers, no run directory.  Letters: T cycles, S seeds, M source images, C classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raysed.core.metrics import class_iou

_CHUNK = 500
"""Bootstrap draws at a time: bounds the memory, to about 30 MB for 10 seeds and 8 classes."""


def aulc(cost: Sequence[float], values: Sequence[float]) -> float:
    """Area under a learning curve by trapezoids, over the width of its axis: a constant has itself as area.

    Args:
        cost: (T,) increasing: tile visits, seconds, operations.
        values: (T,).
    """
    x, y = np.asarray(cost, float), np.asarray(values, float)
    if (np.diff(x) <= 0).any():
        raise ValueError("cost must increase from cycle to cycle")
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else float(y[0])


def fluctuation(values: Sequence[float], last: float = 0.5) -> float:
    """Population standard deviation of the change from one cycle to the next, over the last share of the cycles.

    Args:
        values: (T,).
        last: share; 1 is the whole run.
    """
    changes = np.diff(np.asarray(values, float))[-max(1, round(last * len(values))) :]
    return float(changes.std()) if len(changes) else 0.0


def mean_of_last(values: Sequence[float | None], n: int = 10) -> float | None:
    """Mean of the known ones among the last n values; None if none is known."""
    known = [v for v in values[-n:] if v is not None]
    return float(np.mean(known)) if known else None


def first_above(values: Sequence[float | None], threshold: float) -> int | None:
    """First cycle, from 0, whose value is above the threshold: of a class's IoU, the cycle that finds the class."""
    return next((t for t, v in enumerate(values) if v is not None and v > threshold), None)


@dataclass(frozen=True)
class Difference:
    """A difference of two arms with its bootstrap interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    one: np.ndarray,
    other: np.ndarray,
    rng: np.random.Generator,
    *,
    draws: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """Difference of mean IoU, `one` minus `other`, and its percentile interval over seeds and source images.

    Each draw takes S seeds and M source images with replacement, the same for both arms, and the same images for every seed,
    since all seeds are validated on the same images (the pigeonhole bootstrap of Owen, Annals of Applied Statistics 2007).  A
    seed's counts are summed over the images before its IoU is computed, and the mean runs over seeds.  Tiles of one image stay
    together, since they are not independent.

    Args:
        one, other: (S, M, C, C) pixel counts, row = truth; the same seeds and images in the same order.
        rng: of the draws.
        draws: number of them.
        confidence: of the interval.
    """
    if one.shape != other.shape:
        raise ValueError(
            f"arms must have the same seeds, sources and classes, got {one.shape} and {other.shape}"
        )
    seeds, sources, classes, _ = one.shape
    both = np.stack([one, other]).astype(float)
    by_source = both.transpose(2, 0, 1, 3, 4).reshape(sources, -1)

    def differences(times: np.ndarray) -> np.ndarray:
        """(B, S) of (B, M) times that each source occurs."""
        summed = (times @ by_source).reshape(len(times), 2, seeds, classes, classes)
        iou = _mean_iou(summed)
        return iou[:, 0] - iou[:, 1]

    found = []
    for start in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - start)
        seed_times = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size)
        source_times = rng.multinomial(sources, np.full(sources, 1 / sources), size)
        found.append((differences(source_times.astype(float)) * seed_times).sum(1) / seeds)
    low, high = np.quantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(differences(np.ones((1, sources))).mean()), float(low), float(high))


def _mean_iou(counts: np.ndarray) -> np.ndarray:
    """(...) mean IoU of (..., C, C) counts over the classes that have truth pixels; 0 if none has."""
    iou = class_iou(counts)
    present = ~np.isnan(iou)
    return np.nan_to_num(iou).sum(-1) / np.maximum(present.sum(-1), 1)
