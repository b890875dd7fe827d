"""Strategies that need no scores: they cost nothing, and are what an active one has to beat.  Letters: N tiles, k budget, C classes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from raysed.core import draws
from raysed.core.pool import Pool, Selection

Select = Callable[[pa.Table | None, pa.Table, dict[str, Any], int, np.random.Generator], Selection]
"""A strategy: scores, index, state, budget, generator -> selection."""
Reads = Callable[[float, Callable[[float], bool]], bool]
"""Whether a strategy looks at scores in a cycle of re-selection, by `progress` and by whether its epoch queue (`queue` in its state) has
gone so many rounds of the pool.
"""
RARE_TEMPERATURE = 0.01
"""Of rare class sampling, as in DAFormer."""
RARE_SHARE = 3000 / 512**2
"""Share of a tile's pixels from which it counts as holding a class: DAFormer's 3000 pixels of a crop of 512 x 512."""


def epoch_queue(
    scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
) -> Selection:
    """Uniform without replacement over epochs, as ordinary shuffled training sees its data.

    Idea: independent draws of 20 % leave 11 % of the tiles unseen after ten cycles; a queue leaves none after five.
    Formula: each epoch is a random order of the pool, consumed k tiles a cycle (`draws.from_queue`).
    Source: random reshuffling, the common practice of training by epochs.
    Cost: none; O(N log N).
    Protocol: re-selection from labelled tiles.
    """
    pool = Pool(scores, index)
    at, queue = draws.from_queue(pool.ids, state.get("queue"), budget, rng)
    return pool.selection(at, [f"queue, epoch {queue['epoch']}"] * budget, state={"queue": queue})


def class_random(temperature: float = RARE_TEMPERATURE, share: float = RARE_SHARE) -> Select:
    """Random tiles of random classes, rare classes more often.

    Idea: draw a class, then any tile that holds it, until there are k different tiles.
    Formula: P(c) proportional to exp((1 - f_c) / T), f_c the class's share of the pool's pixels, over the classes that some tile
    holds; a tile's weight is w_i = sum over its classes of P(c) / (tiles that hold c).  Drawing until k tiles differ is the top
    k of log w + Gumbel(0, 1).  Tiles without weight follow in random order.
    Source: rare class sampling of DAFormer (Hoyer et al., CVPR 2022), T 0.01, 3000 pixels.
    Cost: none; O(N (C + log N)).
    Protocol: re-selection from labelled tiles.  Class weights in the loss on top of it count rare classes twice: one channel for
    class balance, so `loss.alpha_power` 0.
    Options: temperature, share.

    Args:
        temperature: T; lower prefers rare classes more.
        share: of a tile's known pixels from which it holds a class.
    """

    def select(
        scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
    ) -> Selection:
        pool = Pool(scores, index)
        weights = class_weights(pool, temperature, share)
        keys = draws.noisy_log(weights, rng)
        at = draws.top(keys, budget, rng, unknown_first=False)
        rarest = rarest_class(pool, share)[at].tolist()
        return pool.selection(at, [f"holds class {c}" if c >= 0 else "holds no class" for c in rarest])

    return select


def class_weights(pool: Pool, temperature: float, share: float) -> np.ndarray:
    """(N,) chance of each tile in one draw of rare class sampling."""
    holds = pool.class_shares >= share
    tiles = holds.sum(0)
    frequency = pool.pixels.sum(0) / max(pool.pixels.sum(), 1)
    rarest = frequency[tiles > 0].min(initial=1)
    chance = np.where(tiles > 0, np.exp((rarest - frequency) / temperature), 0)
    return (holds * (chance / np.maximum(tiles, 1))).sum(1) / max(chance.sum(), 1e-300)


def rarest_class(pool: Pool, share: float) -> np.ndarray:
    """(N,) the class of fewest pixels in the pool among those a tile holds; -1 if it holds none."""
    holds = pool.class_shares >= share
    rarity = np.argsort(pool.pixels.sum(0), kind="stable")
    return np.where(holds.any(1), rarity[holds[:, rarity].argmax(1)], -1)


def region_random(
    scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
) -> Selection:
    """Uniform draws, stratified by region.

    Idea: every region gets its share of each cycle to within one tile, where independent draws vary.
    Formula: systematic sample at equal probability k / N over the tiles sorted by region, in random order within.
    Source: proportional stratified sampling (Cochran, Sampling Techniques, ch. 5 and 8).
    Cost: none; O(N log N).
    Protocol: both; it needs no labels.
    """
    pool = Pool(scores, index)
    at = draws.stratified(pool.codes("region"), budget, rng)
    return pool.selection(at, ["region's share"] * budget)
