"""Acquisition: which tiles a cycle trains on.  Pure and replayable from the ledger.

A strategy is a function of the scores, the index, a state, a budget and a generator; ties are broken by tile_id, so neither the
number of scorers nor the order of their answers matters.  The state is what the strategy itself kept, plus the facts that the
run adds: `protocol` (reselect or pool), `progress` (0 in the first cycle and 1 in the last; where labels are bought, in the first and
the last purchase that the strategy makes) and, for a strategy that reads it and after the first cycle, `class_iou`
(IoU of each class on the training batches of the cycle before, None for a class they did not show).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raysed.core.active import (
    clasp_pe,
    class_gap,
    infobatch,
    k_center,
    margin,
    power_entropy,
    ranked,
    reducible_loss,
    top_loss,
)
from raysed.core.defensive import defensive
from raysed.core.passive import Select, class_random, epoch_queue, region_random
from raysed.core.pool import Pool, Selection

OF_LABELS = frozenset({"loss", "class_loss", "irreducible"})
"""Columns of the scores that follow from labels."""
FORWARD = frozenset({"entropy", "margin", "mass", "features"})
"""Columns of the scores that cost a forward pass over the pool; the others are left behind by training."""


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
    pool = Pool(scores, index)
    return ranked(pool, pool.score("entropy"), budget, rng, "entropy")


@dataclass(frozen=True)
class Strategy:
    """A selection function and what it needs."""

    select: Select
    needs: frozenset[str] = frozenset()
    """Columns of the scores."""
    reads_labels: bool = False
    """Whether it looks at the labels of tiles it may select."""
    reads_iou: bool = False
    """Whether it looks at `class_iou`, which training then counts."""

    @property
    def needs_labels(self) -> bool:
        """Whether it cannot say which labels to buy."""
        return self.reads_labels or bool(self.needs & OF_LABELS)

    @property
    def needs_scores(self) -> bool:
        """Whether scorers must pass over the pool before each selection."""
        return bool(self.needs & FORWARD)

    def missing(self, scores: pa.Table | None) -> list[str]:
        """Columns that it needs and the scores lack."""
        return sorted(self.needs - set(scores.column_names if scores is not None else ()))


STRATEGIES = {
    "uniform": Strategy(uniform),
    "epoch-queue": Strategy(epoch_queue),
    "class-random": Strategy(class_random(), reads_labels=True),
    "region-random": Strategy(region_random),
    "infobatch": Strategy(infobatch(), frozenset({"loss"})),
    "entropy": Strategy(top_entropy, frozenset({"entropy"})),
    "margin": Strategy(margin, frozenset({"margin"})),
    "power-entropy": Strategy(power_entropy(), frozenset({"entropy"})),
    "clasp-pe": Strategy(clasp_pe(), frozenset({"entropy", "mass"})),
    "class-gap": Strategy(class_gap(), frozenset({"mass"}), reads_iou=True),
    "top-loss": Strategy(top_loss, frozenset({"loss"})),
    "reducible-loss": Strategy(reducible_loss, frozenset({"loss", "irreducible"})),
    "k-center": Strategy(k_center, frozenset({"features"})),
    "defensive": Strategy(defensive(), frozenset({"class_loss"})),
    "defensive-entropy": Strategy(defensive("mass"), frozenset({"mass"})),
    "defensive-reducible": Strategy(defensive(reducible=True), frozenset({"class_loss", "irreducible"})),
}
"""Name -> strategy; `select.strategy` takes these names."""
