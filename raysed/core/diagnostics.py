"""What the selections of a run did to its pool: how much of it they saw, how much they repeated, what they preferred."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def coverage(cycles: Sequence[Sequence[str]], pool: int) -> list[float]:
    """Share of the pool selected at least once, after each cycle; the rest was never selected.

    Args:
        cycles: tile ids of each cycle.
        pool: tiles that could be selected.
    """
    seen: set[str] = set()
    shares = []
    for ids in cycles:
        seen.update(ids)
        shares.append(len(seen) / max(pool, 1))
    return shares


def repeats(cycles: Sequence[Sequence[str]]) -> list[float]:
    """Share of each cycle's tiles that the cycle before had selected too; one value less than cycles."""
    return [len(set(now) & set(before)) / max(len(now), 1) for before, now in pairwise(cycles)]


def class_shares(pool: pa.Table, names: Sequence[str], ids: Sequence[str] | None = None) -> dict[str, float]:
    """Class -> share of the known pixels.

    Args:
        pool: labelled rows of the store's index.
        names: of the classes.
        ids: tiles, counted as often as they occur; None counts the whole pool once.
    """
    pixels = np.array(pool["pixels"].to_pylist(), np.int64).reshape(len(pool), len(names) + 1)[:, 1:]
    total = pixels.T @ _times(pool, ids)
    return dict(zip(names, (total / max(total.sum(), 1)).tolist(), strict=True))


def region_shares(pool: pa.Table, ids: Sequence[str] | None = None) -> dict[str, float]:
    """Region -> share of the tiles, the pool's largest region first; arguments as of `class_shares`."""
    times = _times(pool, ids)
    shares: Counter[str] = Counter()
    for region, n in zip(pool["region"].to_pylist(), times.tolist(), strict=True):
        shares[region] += n
    order = [r for r, _ in Counter(pool["region"].to_pylist()).most_common()]
    return {r: shares[r] / max(int(times.sum()), 1) for r in order}


def ambiguous_share(pool: pa.Table, ids: Sequence[str] | None = None) -> float | None:
    """Mean of how far the synthetic world obscured the tiles, 0..1; None of other pools; arguments as of `class_shares`."""
    if "ambiguous" not in pool.column_names or pool["ambiguous"].null_count:
        return None
    times = _times(pool, ids)
    return float(times @ pool["ambiguous"].to_numpy() / max(int(times.sum()), 1))


def _times(pool: pa.Table, ids: Sequence[str] | None) -> np.ndarray:
    """How often each tile of the pool occurs; tiles that have left the pool do not count."""
    if ids is None:
        return np.ones(len(pool), np.int64)
    at = pc.index_in(pa.array(ids, pa.string()), pool["tile_id"]).drop_null()
    return np.bincount(at.to_numpy(), minlength=len(pool)).astype(np.int64)
