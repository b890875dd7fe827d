"""Our strategy: half of a cycle goes round the pool, the other half to what each class still gets wrong.  Letters: N tiles, k budget, C classes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raysed.core import draws
from raysed.core.active import before, gap_weights
from raysed.core.passive import Reads, Select
from raysed.core.pool import Pool, Selection

MIXTURE = 0.5
"""Share of a cycle that goes to hard tiles."""
FIRST_MIXTURE, LAST_MIXTURE = 0.3, 0.9
"""The same of the first and of the last purchase, where labels are bought: no tile is bought twice, so scores, which grow better,
may have more and more of the say."""
WARM_UP = 1.0
"""Rounds of the pool until which scores are not trusted: what a network first finds hard is mostly what it saw early, and a tile that
it has not seen has no loss."""
TAIL = 0.6
"""Progress from which a run ends in epochs: what the report halves of results/evidence were made with."""
CAP = 0.95
"""Quantile of a class's positive scores above which a tile counts as ambiguous, not harder."""


def defensive(
    column: str = "class_loss",
    *,
    reducible: bool = False,
    mixture: float = MIXTURE,
    warm_up: float = WARM_UP,
    tail: float = TAIL,
    cap: float = CAP,
    gap_power: float = 0.0,
    stratified: float = 1.0,
    weight_power: float = 0.0,
    first_mixture: float = FIRST_MIXTURE,
    last_mixture: float = LAST_MIXTURE,
) -> Select:
    """Defensive class-stratified mixture.

    Idea: a floor under every tile's chance prevents starvation and forgetting; a limit on the score and draws instead of a
    ranking prevent ambiguous tiles and near copies from filling the cycle; scores relative to their class give each class the
    same say.
    Formula, with k tiles a cycle, m = k - floor(lambda k), lambda = `mixture` after the first `warm_up` rounds of the pool and
    before the tail, else 0:
    m tiles come from the epoch queue.  The others are a systematic sample over the rest of the pool, sorted by region, source
    and dominant class, with inclusion probabilities proportional to h_i = sum over c of w_c S_ic / (sum over j of S_jc).
    S_ic is the column, less irreducible_i times the tile's share of c where `reducible`, at least 0, at most the `cap` quantile
    of the class's positive values; the mean of the class where the tile has no score; w_c = (1 - IoU_c)^gap_power, mean 1.  The share
    1 - `stratified` of h comes from the sums over the classes in place of S, so that classes count by what they get wrong in all.
    Weights are ((k / N) / pi_i)^weight_power with mean 1, pi_i = m / N + (1 - m / N) p_i the chance of a tile that stands
    anywhere in the queue, p_i its inclusion probability in a sample of k - m of the whole pool: before scaling at most
    1 / (1 - lambda).
    Source: own; defensive mixtures are Hesterberg's (Technometrics 1995), the sample is Madow's (1949).
    Cost: none for class_loss, a forward pass over the pool for mass; O(N (C + log N)).
    Protocol: re-selection; with mass, which needs no labels but for the dominant class, also pool-based.  There lambda goes from
    `first_mixture` to `last_mixture` with the purchases, warm-up and tail do not exist (the start is by chance anyway), and the m
    tiles are drawn uniformly, every region its share, in place of the queue.
    Options: all numbers below.  Ablations: mixture=0 is the epoch queue, tail=1, warm_up=0, cap=1, stratified=0, gap_power=1 (where
    the loss does not weigh classes), weight_power=0.5.

    Args:
        column: class_loss or mass, (N, C): per-class sums whose total is the tile's mean loss or entropy.
        reducible: subtract the column irreducible, a loss per pixel.
        mixture: lambda in re-selection, 0 <= lambda < 1.
        warm_up: rounds of the pool before which lambda is 0.
        tail: progress from which lambda is 0; 1 is never.
        cap: quantile, 1 is no limit.
        gap_power: 0 gives all classes the same weight, right where the loss weighs classes already.
        stratified: 1 is difficulty by class, 0 by tile.
        weight_power: 0 is no weights, 1 undoes the preference in expectation.
        first_mixture: lambda of the first purchase.
        last_mixture: lambda of the last.
    """

    reads = reads_scores(mixture=mixture, warm_up=warm_up, tail=tail)

    def select(
        scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
    ) -> Selection:
        pool = Pool(scores, index)
        progress, kept = state["progress"], {}
        if state.get("protocol") == "pool":
            hard = int(((1 - progress) * first_mixture + progress * last_mixture) * budget)
            floor = draws.stratified(pool.codes("region"), budget - hard, rng)
            reasons = ["region's share"] * len(floor)
        else:
            is_warm = reads(progress, partial(draws.has_gone_round, pool.ids, state.get("queue")))
            hard = int(mixture * budget) if is_warm else 0
            floor, queue = draws.from_queue(pool.ids, state.get("queue"), budget - hard, rng)
            reasons, kept = [f"queue, epoch {queue['epoch']}"] * len(floor), {"queue": queue}
        if not hard:
            return pool.selection(floor, reasons, state=kept)
        values = pool.scores(column).astype(float)
        if reducible:
            values = np.maximum(values - pool.score("irreducible")[:, None] * pool.class_shares, 0)
        h = difficulty(values, gap_weights(state, values.shape[1], gap_power), cap)
        if stratified < 1:
            by_tile = difficulty(values.sum(1, keepdims=True), np.ones(1), cap)
            h = stratified * h / h.sum() + (1 - stratified) * by_tile / by_tile.sum()
        rest = np.ones(len(pool), bool)
        rest[floor] = False
        order = np.lexsort((pool.class_shares.argmax(1), pool.codes("source"), pool.codes("region")))
        order = order[rest[order]]
        drawn = order[draws.systematic(draws.inclusion(h[order], hard), rng)]
        drawn = drawn[np.lexsort((drawn, -h[drawn]))]
        at = np.r_[floor, drawn]
        weights = None
        if weight_power:
            share = len(floor) / len(pool)
            chance = share + (1 - share) * draws.inclusion(h, hard)[at]
            weights = (budget / len(pool) / chance) ** weight_power
            weights /= weights.mean()
        reasons += [f"difficulty {x:.2f}" for x in (h[drawn] / max(h.mean(), 1e-300)).tolist()]
        return pool.selection(at, reasons, weights, kept)

    return select


def reads_scores(
    *, mixture: float = MIXTURE, warm_up: float = WARM_UP, tail: float = TAIL, **_: float
) -> Reads:
    """Whether `defensive` with these numbers looks at scores, by progress and the rounds that its queue has gone."""

    def reads(progress: float, has_gone_round: Callable[[float], bool]) -> bool:
        return mixture > 0 and before(tail, progress) and has_gone_round(warm_up)

    return reads


def difficulty(values: np.ndarray, class_weights: np.ndarray, cap: float) -> np.ndarray:
    """How much of what the classes get wrong lies in each tile, every class counting by its weight.

    Args:
        values: (N, C) not negative; rows of nan are tiles without a score.
        class_weights: (C,).
        cap: quantile of the positive values of a class above which they are cut.

    Returns:
        (N,) float64; all alike if no tile has a score.
    """
    known = values[~np.isnan(values).any(1)]
    if not known.any():
        return np.ones(len(values))
    limits = np.array([_quantile(v[v > 0], cap) for v in known.T])
    prior = np.minimum(known, limits).mean(0)
    filled = np.where(np.isnan(values).any(1, keepdims=True), prior, np.minimum(values, limits))
    totals = filled.sum(0)
    return (filled * (class_weights / np.where(totals > 0, totals, np.inf))).sum(1)


def _quantile(values: np.ndarray, q: float) -> float:
    """A value of the class itself: between two of them, one extreme tile among few would set its own limit."""
    return float(np.quantile(values, q, method="lower")) if len(values) else 0.0
