"""What curves and counts of several runs say: pure numbers, no run directory.  Letters: T cycles, S seeds, M source images, C classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raysed.core.metrics import class_iou

LAST = 10
"""The headline is the mean of the last so many cycles, never the best cycle on validation."""
_CHUNK_BYTES = 64e6
"""Memory for the counts of the bootstrap draws at a time."""


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


def aulc_between(cost: Sequence[float], values: Sequence[float], low: float, high: float) -> float | None:
    """`aulc` of the part of a curve between two costs, so that curves of other cost a cycle are compared over the same range.

    Args:
        cost: (T,) increasing.
        values: (T,).
        low, high: within the curve's costs, its values there by interpolation; None if high is not above low.
    """
    if high <= low:
        return None
    x, y = np.asarray(cost, float), np.asarray(values, float)
    inside = (x > low) & (x < high)
    at = np.r_[low, x[inside], high]
    return aulc(at.tolist(), np.interp(at, x, y).tolist())


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
    p: float
    """Two-sided: twice the share of draws on the rarer side of 0; nan without an interval."""


def bootstrap_over_seeds(
    differences: Sequence[float], rng: np.random.Generator, *, draws: int = 10_000, confidence: float = 0.95
) -> Difference:
    """Mean of paired differences and its percentile interval over seeds alone: too narrow for few of them, and not a number for one.

    Args:
        differences: (S,) of two arms, one a seed.
        rng: of the draws.
        draws: number of them.
        confidence: of the interval.
    """
    values = np.asarray(differences, float)
    if len(values) < 2:
        return Difference(float(values.mean()), np.nan, np.nan, np.nan)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    return _difference(float(values.mean()), means, confidence)


def _difference(mean: float, found: np.ndarray, confidence: float) -> Difference:
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    rarer = min((found <= 0).sum(), (found >= 0).sum())
    p = min(1.0, 2 * (1 + rarer) / (1 + len(found)))  # itself one of the draws, so never 0
    return Difference(mean, float(low), float(high), float(p))


def holm(chances: Sequence[float]) -> list[float]:
    """p of several comparisons, each corrected for their number by Holm's steps (Scandinavian Journal of Statistics 1979)."""
    p = np.asarray(chances, float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1)
    return corrected.tolist()


Statistic = Callable[[np.ndarray], np.ndarray]
"""(..., C, C) pixel counts to (...) a score of each."""


def paired_bootstrap(
    one: np.ndarray,
    other: np.ndarray,
    rng: np.random.Generator,
    *,
    statistic: Statistic | None = None,
    draws: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """Difference of mean IoU or another score, `one` minus `other`, and its percentile interval over seeds and source images.

    Each draw takes S seeds and M source images with replacement, the same for both arms, and the same images for every seed,
    since all seeds are validated on the same images (the pigeonhole bootstrap of Owen, Annals of Applied Statistics 2007).  A
    seed's counts are summed over the images before its IoU is computed, and the mean runs over seeds.  Tiles of one image stay
    together, since they are not independent.

    Args:
        one, other: (S, M, ..., C, C) pixel counts, row = truth; the same seeds and images in the same order.  Axes between, such
            as cycles, are averaged over: the score is the mean of theirs.
        rng: of the draws.
        statistic: the score; None is `mean_iou`.
        draws: number of them.
        confidence: of the interval.
    """
    if one.shape != other.shape:
        raise ValueError(
            f"arms must have the same seeds, sources and classes, got {one.shape} and {other.shape}"
        )
    seeds, sources, *rest = one.shape
    both = np.stack([one, other]).astype(float)
    by_source = np.moveaxis(both, 2, 0).reshape(sources, -1)
    score = statistic or mean_iou

    def differences(times: np.ndarray) -> np.ndarray:
        """(B, S) of (B, M) times that each source occurs."""
        summed = (times @ by_source).reshape(len(times), 2, seeds, *rest)
        found = score(summed).reshape(len(times), 2, seeds, -1).mean(-1)
        return found[:, 0] - found[:, 1]

    found = []
    chunk = max(1, int(_CHUNK_BYTES / (16 * seeds * np.prod(rest))))
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        seed_times = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size)
        source_times = rng.multinomial(sources, np.full(sources, 1 / sources), size)
        found.append((differences(source_times.astype(float)) * seed_times).sum(1) / seeds)
    mean = float(differences(np.ones((1, sources))).mean())
    return _difference(mean, np.concatenate(found), confidence)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """(...) mean IoU of (..., C, C) counts over the classes that have truth pixels; 0 if none has."""
    iou = class_iou(counts)
    present = ~np.isnan(iou)
    return np.nan_to_num(iou).sum(-1) / np.maximum(present.sum(-1), 1)


def worst_iou(counts: np.ndarray) -> np.ndarray:
    """(...) IoU of the worst class of (..., C, C) counts among those that have truth pixels; 0 if none has."""
    iou = class_iou(counts)
    return np.where(np.isnan(iou).all(-1), 0, np.nan_to_num(iou, nan=np.inf).min(-1))


def iou_variation(counts: np.ndarray) -> np.ndarray:
    """(...) standard deviation over mean of the class IoU of (..., C, C) counts, over the classes that have truth pixels."""
    iou = class_iou(counts)
    present = ~np.isnan(iou)
    n = np.maximum(present.sum(-1), 1)
    mean = np.nan_to_num(iou).sum(-1) / n
    squares = np.where(present, (iou - mean[..., None]) ** 2, 0).sum(-1) / n
    return np.sqrt(squares) / np.maximum(mean, 1e-12)
