"""What curves and counts of several runs say: pure numbers, no run directory.  Letters: T cycles, S seeds, M source images, C classes."""

import math
from collections.abc import Callable, Collection, Sequence
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


def fluctuation(values: Sequence[float], last: float = 0.5, restarts: Collection[int] = ()) -> float | None:
    """Population standard deviation of the change from one cycle to the next, over the last share of the cycles; None of fewer than two changes.

    Args:
        values: (T,).
        last: share; 1 is the whole run.
        restarts: cycles that begin with initial weights: the falls into them are no fluctuation.
    """
    own = ~np.isin(np.arange(1, len(values)), list(restarts))
    length = max(1, round(last * len(values)))
    changes = np.diff(np.asarray(values, float))[-length:][own[-length:]]
    return float(changes.std()) if len(changes) > 1 else None


def mean_of_last(values: Sequence[float | None], n: int = 10) -> float | None:
    """Mean of the known ones among the last n values; None if none is known."""
    known = [v for v in values[-n:] if v is not None]
    return float(np.mean(known)) if known else None


def first_above(values: Sequence[float | None], threshold: float) -> int | None:
    """First cycle, from 0, whose value is above the threshold: of a class's IoU, the cycle that finds the class."""
    return next((t for t, v in enumerate(values) if v is not None and v > threshold), None)


@dataclass(frozen=True)
class Difference:
    """A difference of two arms with its interval."""

    mean: float
    low: float
    high: float
    p: float
    """Two-sided; below 1 - confidence just where the interval is apart from 0.  Not a number without an interval, as its ends."""


def t_within(t: float, freedom: int) -> float:
    """Share of Student's t distribution from -t to t, by Abramowitz & Stegun 26.7.3 and 26.7.4.

    Args:
        t: not negative.
        freedom: degrees of freedom, at least 1.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd, square = freedom % 2, math.cos(angle) ** 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(1 + odd, freedom - 2, 2):
        term *= square * k / (k + 1)
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0))


def t_limit(confidence: float, freedom: int) -> float:
    """The t of which `t_within` is the confidence, at least 0 and below 1."""
    angle = _bisected(lambda a: t_within(math.sqrt(freedom) * math.tan(a), freedom), confidence, math.pi / 2)
    return math.sqrt(freedom) * math.tan(angle)


def _bisected(rising: Callable[[float], float], value: float, high: float) -> float:
    """Where between 0 and high a rising function takes a value."""
    low = 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


def _by_student(mean: float, errors: Sequence[tuple[float, int]], confidence: float) -> Difference:
    """A mean with the standard error that each factor gives it, and the degrees of freedom of that error.

    The half widths by Student's t of each factor alone, added in squares.  Where one factor has all the variance it is the exact
    interval; in between it covers more than it says, where Satterthwaite's degrees of freedom, of 2 or 3 seeds, cover less.
    """

    def half(level: float) -> float:
        return math.hypot(*(t_limit(level, freedom) * error for error, freedom in errors))

    if not any(error for error, _ in errors):
        return Difference(mean, mean, mean, float(mean == 0))
    width = half(confidence)
    return Difference(mean, mean - width, mean + width, 1 - _bisected(half, abs(mean), 1.0))


def paired_t(differences: Sequence[float], *, confidence: float = 0.95) -> Difference:
    """Mean of paired differences with Student's t interval; without one for a single pair.

    Args:
        differences: (S,) of two arms, one a seed.
        confidence: of the interval.
    """
    values = np.asarray(differences, float)
    n = len(values)
    if n < 2:
        return Difference(float(values.mean()), np.nan, np.nan, np.nan)
    return _by_student(float(values.mean()), [(float(values.std(ddof=1)) / math.sqrt(n), n - 1)], confidence)


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
    """Difference of mean IoU or another score, `one` minus `other`, and its interval over seeds and source images.

    Both are factors that cross, since all seeds are validated on the same images (Owen, Annals of Applied Statistics 2007), and the
    difference has an error of each.  That of the seeds is known from their differences.  That of the images is the deviation of draws
    that take M of them with replacement, the same for all seeds and both arms; a seed's counts are summed over the images before
    its IoU is computed, and tiles of one image stay together, since they are not independent.  Such draws understate the variance
    by (M - 1) / M, which is made good.  What seed and image have together counts in both errors.  One seed leaves the images
    alone; a single image has no interval.

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

    by_seed = differences(np.ones((1, sources)))[0]
    mean = float(by_seed.mean())
    if sources < 2:
        return Difference(mean, np.nan, np.nan, np.nan)
    found = []
    chunk = max(1, int(_CHUNK_BYTES / (16 * seeds * np.prod(rest))))
    for start in range(0, draws, chunk):
        times = rng.multinomial(sources, np.full(sources, 1 / sources), min(chunk, draws - start))
        found.append(differences(times.astype(float)).mean(1))
    spread = float(np.concatenate(found).std())
    errors = [(spread * math.sqrt(sources / (sources - 1)), sources - 1)]
    if seeds > 1:
        errors.append((float(by_seed.std(ddof=1)) / math.sqrt(seeds), seeds - 1))
    return _by_student(mean, errors, confidence)


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
