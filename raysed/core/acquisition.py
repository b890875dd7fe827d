"""Acquisition: which tiles a cycle trains on.  Pure and replayable from the ledger.

A strategy is a function of the scores, the index, its own state, a budget and a generator; ties are broken by tile_id, so
neither the number of scorers nor the order of their answers matters.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Selection:
    """The tiles of one cycle, best first."""

    tile_ids: list[str]
    weights: list[float]
    """Importance weights of the tiles' losses; all 1 where a strategy has none."""
    reasons: list[str]
    state: dict[str, Any] = field(default_factory=dict)
    """What the strategy wants to see again in the next cycle; JSON."""


def uniform(
    scores: pa.Table, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
) -> Selection:
    """Independent uniform draws without replacement: the paper's passive selection.  Costs nothing."""
    ids = np.sort(index["tile_id"].to_numpy())
    chosen = rng.choice(ids, budget, replace=False).tolist()
    return Selection(chosen, [1.0] * budget, ["uniform"] * budget)


def top_entropy(
    scores: pa.Table, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
) -> Selection:
    """The highest mean pixel entropy first: the paper's active selection.  Costs a forward pass over the pool."""
    known = scores.filter(pc.is_in(scores["tile_id"], index["tile_id"]))
    best = known.sort_by([("entropy", "descending"), ("tile_id", "ascending")])[:budget]
    return Selection(
        best["tile_id"].to_pylist(),
        [1.0] * len(best),
        [f"entropy {h:.4f}" for h in best["entropy"].to_pylist()],
    )


@dataclass(frozen=True)
class Strategy:
    """A selection function and what it needs."""

    select: Callable[[pa.Table, pa.Table, dict[str, Any], int, np.random.Generator], Selection]
    needs_scores: bool


STRATEGIES = {
    "uniform": Strategy(uniform, needs_scores=False),
    "entropy": Strategy(top_entropy, needs_scores=True),
}
