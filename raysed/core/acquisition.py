"""Acquisition: which tiles a cycle trains on.  Pure and replayable from the ledger.

A strategy is a function of the scores, the index, a state, a budget and a generator; ties are broken by tile_id, so neither the
number of scorers nor the order of their answers matters.  The state is what the strategy itself kept, plus the facts that the
run adds: `protocol` (reselect or pool), `progress` (0 in the first cycle and 1 in the last; where labels are bought, in the first and
the last purchase that the strategy makes) and, for a strategy that reads it and after the first cycle, `class_iou`
(IoU of each class on the training batches of the cycle before, None for a class they did not show).
"""

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
from raysed.core.defensive import defensive, reads_scores
from raysed.core.passive import Reads, Select, class_random, epoch_queue, region_random
from raysed.core.pool import Pool, Selection
from raysed.errors import UsageError

OF_LABELS = frozenset({"loss", "class_loss", "irreducible"})
"""Columns of the scores that follow from labels."""
FORWARD = frozenset({"entropy", "margin", "mass", "features"})
"""Columns of the scores that cost a forward pass over the pool; the others are left behind by training."""
BETWEEN = {
    "mixture": "[0, 1)",
    "first_mixture": "[0, 1)",
    "last_mixture": "[0, 1)",
    "warm_up": "[0, inf)",
    "tail": "[0, 1]",
    "cap": "(0, 1]",
    "gap_power": "[0, 10]",
    "weight_power": "[0, 1]",
    "first": "(0, inf)",
    "last": "(0, inf)",
    "stratified": "[0, 1]",
    "beta": "[0, inf)",
    "power": "[0, 10]",
    "temperature": "(0, inf)",
    "share": "(0, 1]",
    "pruned": "[0, 1)",
}
"""Option of a strategy -> the interval that it must lie in; one that is not here, of somebody's own strategy, may be any number."""


def uniform(
    scores: pa.Table, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
) -> Selection:
    """Tiles by chance.

    Idea: every tile as often as any other, each cycle anew.
    Formula: k of N without replacement, independent of the cycles before.
    Source: the paper's passive selection.
    Cost: none; O(N).
    Protocol: both.
    """
    ids = np.sort(index["tile_id"].to_numpy())
    chosen = rng.choice(ids, budget, replace=False).tolist()
    return Selection(chosen, [1.0] * budget, ["uniform"] * budget)


def top_entropy(
    scores: pa.Table, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
) -> Selection:
    """The tiles that the network is least sure of.

    Idea: what it is unsure of, it can learn most from.
    Formula: the k of the highest mean over pixels of -sum over c of p_c ln p_c, nats; tiles without a score last.
    Source: the paper's active selection.
    Cost: a forward pass over the pool; O(N log N).
    Protocol: both.
    """
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
    factory: Callable[..., Select] | None = None
    """Makes `select`; its keyword arguments with a float as default are the options of the strategy."""
    reads: Reads | None = None
    """When `select` looks at scores at all; without it, always.  Nothing is scored for a cycle that does not."""
    reads_factory: Callable[..., Reads] | None = None
    """Makes `reads` of the options."""

    @classmethod
    def made(
        cls,
        factory: Callable[..., Select],
        needs: frozenset[str] = frozenset(),
        *,
        reads: Callable[..., Reads] | None = None,
        **looks: bool,
    ) -> "Strategy":
        """What factories make of their defaults."""
        return cls(factory(), needs, factory=factory, reads=reads and reads(), reads_factory=reads, **looks)

    @property
    def options(self) -> dict[str, float]:
        """Its options and their defaults."""
        parameters = inspect.signature(self.factory).parameters if self.factory else {}
        return {n: p.default for n, p in parameters.items() if isinstance(p.default, float)}

    def with_options(self, numbers: dict[str, float]) -> "Strategy":
        """The same with other numbers; one that weighs classes by their gap has to see their IoU."""
        if not numbers or self.factory is None:
            return self
        reads_iou = self.reads_iou or numbers.get("gap_power", 0.0) > 0
        reads = self.reads_factory and self.reads_factory(**numbers)
        return replace(self, select=self.factory(**numbers), reads=reads, reads_iou=reads_iou)

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
    "class-random": Strategy.made(class_random, reads_labels=True),
    "region-random": Strategy(region_random),
    "infobatch": Strategy.made(infobatch, frozenset({"loss"})),
    "entropy": Strategy(top_entropy, frozenset({"entropy"})),
    "margin": Strategy(margin, frozenset({"margin"})),
    "power-entropy": Strategy.made(power_entropy, frozenset({"entropy"})),
    "clasp-pe": Strategy.made(clasp_pe, frozenset({"entropy", "mass"})),
    "class-gap": Strategy.made(class_gap, frozenset({"mass"}), reads_iou=True),
    "top-loss": Strategy(top_loss, frozenset({"loss"})),
    "reducible-loss": Strategy(reducible_loss, frozenset({"loss", "irreducible"})),
    "k-center": Strategy(k_center, frozenset({"features"})),
    "defensive": Strategy.made(defensive, frozenset({"class_loss"}), reads=reads_scores),
    "defensive-entropy": Strategy.made(partial(defensive, "mass"), frozenset({"mass"}), reads=reads_scores),
    "defensive-reducible": Strategy.made(
        partial(defensive, reducible=True), frozenset({"class_loss", "irreducible"}), reads=reads_scores
    ),
}
"""Name -> strategy; `select.strategy` takes these names."""


def strategy_of(name: str, options: str = "") -> Strategy:
    """The strategy of this name, made with the numbers of `select.options`.

    Args:
        name: of `STRATEGIES`.
        options: such as `mixture=0.3+tail=1`; empty is the strategy as it is.

    Raises:
        UsageError: no such strategy, an option that it does not have, or a value that the option does not take.
    """
    if name not in STRATEGIES:
        raise UsageError(f"select.strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
    strategy = STRATEGIES[name]
    numbers: dict[str, float] = {}
    for option in options.split("+") if options else ():
        key, _, value = option.partition("=")
        if key not in strategy.options:
            near = difflib.get_close_matches(key, strategy.options, n=1)
            raise UsageError(
                f"select.options: strategy {name} has no option {key!r}, "
                + (
                    f"did you mean {near[0]!r}?"
                    if near
                    else f"it has {', '.join(strategy.options) or 'none'}"
                )
            )
        if key in numbers:
            raise UsageError(f"select.options gives {key} twice: {options}")
        numbers[key] = _number(key, value)
    return strategy.with_options(numbers)


def _number(name: str, text: str) -> float:
    between = BETWEEN.get(name, "(-inf, inf)")
    low, high = map(float, between[1:-1].split(","))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    above = low <= value if between[0] == "[" else low < value
    below = value <= high if between[-1] == "]" else value < high
    if not (above and below):
        raise UsageError(f"select.options: {name} must be a number in {between}, got {text!r}")
    return value
