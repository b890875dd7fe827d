"""Draws that strategies share: positions in, positions out, all in numpy.  Letters: N tiles, k tiles to draw.

Ties go to the lower position; the callers' arrays are in order of tile_id.
"""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

CERTAIN = 1 - 1e-9
"""Inclusion probability from which a tile is taken outright, so that rounding cannot draw it twice."""


def top(values: np.ndarray, budget: int, rng: np.random.Generator, *, unknown_first: bool) -> np.ndarray:
    """Positions of the highest values, highest first.  O(N + k log k).

    Args:
        values: (N,) float; nan is unknown.
        budget: k.
        rng: orders the unknown among themselves, lest the lowest ids, which are neighbours on the ground, win.
        unknown_first: unknown values come before all known ones, not after them.
    """
    unknown = np.isnan(values)
    known, others = np.flatnonzero(~unknown), rng.permutation(np.flatnonzero(unknown))
    if unknown_first:
        first = others[:budget]
        return np.r_[first, known[_highest(values[known], budget - len(first))]]
    first = known[_highest(values[known], min(budget, len(known)))]
    return np.r_[first, others[: budget - len(first)]]


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    if count == 0:
        return np.zeros(0, int)
    limit = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= limit)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def noisy_log(values: np.ndarray, rng: np.random.Generator, beta: float = 1.0) -> np.ndarray:
    """(N,) log of the values plus Gumbel noise of scale 1 / beta: the top k of it are k draws without replacement, each
    proportional to value^beta; beta 0 is noise alone.  nan where the value is 0, as where it is unknown: no power gives it a chance.
    """
    logs = np.log(np.where(values > 0, values, np.nan))
    noise = rng.gumbel(size=len(values))
    return logs + noise / beta if beta else 0 * logs + noise


def inclusion(weights: np.ndarray, budget: int) -> np.ndarray:
    """Inclusion probabilities of a sample of fixed size, as near to proportional as the limit of 1 allows.  O(N log N).

    Tiles whose share would exceed 1 get 1, the others divide the rest of the budget by weight; tiles of weight 0 divide what
    is left when all others are certain.

    Args:
        weights: (N,) float, not negative.
        budget: k, 1..N.

    Returns:
        (N,) float64 in [0, 1], sum k.
    """
    positive = weights > 0
    spare = budget - positive.sum()
    if spare >= 0:
        return np.where(positive, 1.0, spare / max((~positive).sum(), 1))
    order = np.argsort(-weights, kind="stable")
    heaviest = weights[order][:budget]
    tails = weights[order][::-1].cumsum()[::-1][:budget]  # weight from each place on
    certain = int(np.argmax((budget - np.arange(budget)) * heaviest <= tails))
    probabilities = np.minimum((budget - certain) * weights / tails[certain], 1.0)
    probabilities[order[:certain]] = 1.0
    return probabilities


def systematic(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Systematic sample of fixed size with exactly these inclusion probabilities (Madow 1949), from one random number.  O(N).

    Points one apart are laid over the cumulated probabilities, so every stretch of neighbours gets its expected number of
    tiles to within one: an order by region makes the regions strata.

    Args:
        probabilities: (N,) in [0, 1], their sum a whole number.

    Returns:
        Sorted positions.
    """
    certain = probabilities >= CERTAIN
    rest = np.flatnonzero(~certain)
    count = round(probabilities.sum()) - int(certain.sum())
    if count == 0:
        return np.flatnonzero(certain)
    edges = probabilities[rest].cumsum()
    edges *= count / edges[-1]
    edges[-1] = count
    points = np.minimum(rng.random() + np.arange(count), np.nextafter(count, 0))
    return np.sort(np.r_[np.flatnonzero(certain), rest[np.searchsorted(edges, points, side="right")]])


def stratified(groups: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform sample of fixed size that gives every group its share to within one tile.  O(N log N).

    Args:
        groups: (N,) int.
        budget: k, 1..N.
        rng: orders the tiles within their groups, and lays the points.

    Returns:
        (k,) positions, group by group.
    """
    order = np.lexsort((rng.random(len(groups)), groups))
    return order[systematic(np.full(len(groups), budget / len(groups)), rng)]


def from_queue(
    ids: np.ndarray, queue: dict[str, Any] | None, budget: int, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """The next k tiles of a queue that holds every tile once an epoch, in an order of its own each epoch.  O(N log N).

    A tile's place is the hash of its id under the epoch's key, so the queue is the key and the last tile served, whatever N,
    and tiles that leave or join the pool move no other.  An epoch that ends within a cycle is continued by the next one
    without the tiles already taken: the first ceil(N / k) cycles serve every tile that stays, and between two visits of a tile
    lie fewer than two epochs.

    Args:
        ids: (N,) str, sorted.
        queue: as returned before; None begins.
        budget: k, 1..N.
        rng: gives a new epoch its key.

    Returns:
        (k,) positions in order of the queue, and the queue: epoch, key, last.
    """
    queue = queue or {"epoch": 0, "key": _new_key(rng), "last": None}
    places = _places(ids, queue["key"])
    order = np.argsort(places, kind="stable")
    taken = order[~_served(ids, places, queue)[order]][:budget]
    missing = budget - len(taken)
    if missing:
        queue = {"epoch": queue["epoch"] + 1, "key": _new_key(rng)}
        order = np.argsort(_places(ids, queue["key"]), kind="stable")
        fresh = np.ones(len(ids), bool)
        fresh[taken] = False
        taken = np.r_[taken, order[fresh[order]][:missing]]
    return taken, {**queue, "last": str(ids[taken[-1]])}


def has_gone_round(ids: np.ndarray | pa.StringArray, queue: dict[str, Any] | None, times: float) -> bool:
    """Whether a queue has gone so often round the pool.  O(N) until it has, then O(1) from the next epoch on.

    Args:
        ids: (N,) str, sorted.
        queue: as `from_queue` returned it; None has not begun.
        times: rounds.
    """
    if queue is None:
        return times <= 0
    missing = times - queue["epoch"]
    if missing <= 0:
        return True
    names = np.asarray(ids)
    return bool(_served(names, _places(names, queue["key"]), queue).mean() >= missing)


def _served(ids: np.ndarray, places: np.ndarray, queue: dict[str, Any]) -> np.ndarray:
    """(N,) bool: the tiles that stand at or before the last one served in a queue's epoch."""
    if queue["last"] is None:
        return np.zeros(len(ids), bool)
    last = _places(np.array([queue["last"]], object), queue["key"])[0]
    return (places < last) | ((places == last) & (ids <= queue["last"]))


def _new_key(rng: np.random.Generator) -> str:
    return f"{rng.integers(2**63):016x}"


def _places(ids: np.ndarray, key: str) -> np.ndarray:
    """(N,) uint64 SipHash of each id."""
    return pd.util.hash_array(ids, hash_key=key, categorize=False)
