"""Strategies that follow scores.  Letters: N tiles, k budget, C classes, D features.

Columns that scorers give (entropy, margin, mass, features) cost a forward pass over the pool; columns that training leaves
behind (loss, class_loss) cost nothing, are smoothed over a tile's visits (half the newest, half what was), and are null for a tile
that no cycle has visited.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from raysed.core import draws
from raysed.core.passive import Select
from raysed.core.pool import Pool, Selection

TAIL = 0.875
"""Progress from which a run ends on uniform draws (InfoBatch's delta); 1 is never."""
GAP_POWER = 2.0
"""Power of 1 - IoU in the class weights of `class_gap`."""


def before(tail: float, progress: float) -> bool:
    """Whether the tail of uniform draws has not begun."""
    return tail >= 1 or progress < tail


def margin(
    scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
) -> Selection:
    """The smallest mean margin first.

    Idea: where the two likeliest classes are close, the network is undecided.
    Formula: ascending mean over pixels of p_(1) - p_(2).
    Source: margin sampling (Scheffer et al., IDA 2001).
    Cost: a forward pass over the pool; O(N log N).
    Protocol: pool-based; in re-selection a control, as `entropy`.
    """
    pool = Pool(scores, index)
    margins = pool.score("margin")
    return ranked(pool, -margins, budget, rng, "margin", shown=margins)


def power_entropy(beta: float = 1.0) -> Select:
    """Draws proportional to a power of the entropy.

    Idea: the top k are alike and often all ambiguous; noise spreads them at no cost.
    Formula: the top k of log H_i + Gumbel(0, 1 / beta), that is draws without replacement proportional to H_i^beta.
    Source: power acquisition of Kirsch et al., Stochastic Batch Acquisition (TMLR 2023), beta 1.
    Cost: a forward pass over the pool; O(N log N).
    Protocol: both.  Entropy of a focal loss is nearly flat, so beta 1 is nearly uniform.
    Options: beta.

    Args:
        beta: 0 is uniform, infinity the top k.
    """

    def select(
        scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
    ) -> Selection:
        pool = Pool(scores, index)
        entropy = pool.score("entropy")
        return ranked(pool, draws.noisy_log(entropy, rng, beta), budget, rng, "entropy", shown=entropy)

    return select


def clasp_pe(first: float = 1.0, last: float = 100.0, stratified: float = 0.66) -> Select:
    """Class-stratified power entropy.

    Idea: two thirds of the budget are divided evenly over the classes, each taking the tiles uncertain about it; noise that
    fades over the run keeps them apart.
    Formula: s_ic = mean over pixels of p_c H; class c takes the highest log s_ic + Gumbel(0, 1 / beta) not yet taken, classes in
    random order; the rest goes by log H_i + Gumbel(0, 1 / beta); beta = first (last / first)^progress.
    Source: ClaSP PE (Lüth et al., TMLR 2026, arXiv 2601.13677): 66 %, beta 1 to 100.
    Cost: a forward pass over the pool; O(C N log N).
    Protocol: pool-based, progress counted in purchases.  In re-selection beta 100 ends as the top k: stop at last=8.
    Options: first, last, stratified.

    Args:
        first: beta of the first cycle, or purchase.
        last: beta of the last.
        stratified: share of the budget that is divided over the classes.
    """

    def select(
        scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
    ) -> Selection:
        pool = Pool(scores, index)
        beta = first * (last / first) ** state["progress"]
        mass, entropy = pool.scores("mass").astype(float), pool.score("entropy")
        classes = rng.permutation(mass.shape[1]).tolist()
        share, more = divmod(int(stratified * budget), len(classes))
        free = np.ones(len(pool), bool)
        chosen: list[np.ndarray] = []
        reasons: list[str] = []
        for turn, c in enumerate([*classes, None]):
            values, word = (entropy, "entropy") if c is None else (mass[:, c], f"class {c} mass")
            open_ = np.flatnonzero(free if c is None else free & ~np.isnan(values))
            quota = budget - len(reasons) if c is None else min(share + (turn < more), len(open_))
            keys = draws.noisy_log(values[open_], rng, beta)
            at = open_[draws.top(keys, quota, rng, unknown_first=False)]
            chosen.append(at)
            reasons += _reasons(word, values[at])
            free[at] = False
        return pool.selection(np.concatenate(chosen), reasons)

    return select


def class_gap(power: float = GAP_POWER) -> Select:
    """The highest entropy first, weighted by how badly each class does.

    Idea: entropy counts area of any class; weights by the gap to a perfect IoU turn it to the classes that fail.
    Formula: descending sum over c of w_c s_ic, s_ic = mean over pixels of p_c H, w_c = (1 - IoU_c)^power with mean 1; IoU of
    training batches, and a class without one has gap 1.
    Source: after DCAU-AL (arXiv 2604.08965), known to us from summaries only; its adaptive threshold is left out.
    Cost: a forward pass over the pool; O(N (C + log N)).
    Protocol: pool-based; in re-selection a control, as `entropy`.
    Options: power.

    Args:
        power: 0 is plain entropy.
    """

    def select(
        scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
    ) -> Selection:
        pool = Pool(scores, index)
        mass = pool.scores("mass").astype(float)
        weighted = (mass * gap_weights(state, mass.shape[1], power)).sum(1)
        return ranked(pool, weighted, budget, rng, "weighted entropy")

    return select


def gap_weights(state: dict[str, Any], classes: int, power: float) -> np.ndarray:
    """(C,) (1 - IoU_c)^power with mean 1; gap 1 where `state["class_iou"]` has none."""
    iou = np.array(state.get("class_iou") or [None] * classes, float)
    gaps = np.where(np.isnan(iou), 1.0, 1 - iou) ** power
    return gaps / gaps.mean() if gaps.any() else np.ones(classes)


def infobatch(pruned: float = 0.5, tail: float = TAIL) -> Select:
    """Tiles that are well learned half as often, and weighted to make up for it.

    Idea: skip a random part of the easy tiles, keep the expected gradient.
    Formula: inclusion probability pi_i proportional to 1 - r where the loss is below the mean, else to 1; sum k; weight k / (N pi_i), so that the weighted sum of any tile quantity is unbiased for k times its mean.  Tiles without a
    visit count as hard.  Uniform from `tail` on.  Systematic sample in random order.
    Source: InfoBatch (Qin et al., ICLR 2024), r 0.5, delta 0.875.  There the kept tiles are as many as they come and weigh
    1 / (1 - r) or 1; here the budget is fixed, which leaves the same ratio of weights.  There the loss is the last visit's; here
    it is smoothed over visits.
    Cost: none; O(N log N).
    Protocol: re-selection from labelled tiles.
    Options: pruned, tail.

    Args:
        pruned: r.
        tail: delta, progress from which all tiles are alike; 1 is never.
    """

    def select(
        scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
    ) -> Selection:
        pool = Pool(scores, index)
        loss = pool.score("loss")
        known = loss[~np.isnan(loss)]
        easy = loss < (known.mean() if len(known) and before(tail, state["progress"]) else -np.inf)
        probability = draws.inclusion(np.where(easy, 1 - pruned, 1.0), budget)
        order = rng.permutation(len(pool))
        at = order[draws.systematic(probability[order], rng)]
        kinds = np.where(easy, "easy", "hard")[at].tolist()
        return pool.selection(at, kinds, budget / len(pool) / probability[at])

    return select


def top_loss(
    scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
) -> Selection:
    """The highest loss first, smoothed over a tile's visits.

    Idea: train on what the network gets wrong.
    Formula: descending mean cross-entropy; tiles without a visit come before all others, in random order.
    Source: online batch selection (Loshchilov and Hutter, 2015) without its ranks.
    Cost: none; O(N log N).
    Protocol: re-selection from labelled tiles, as a control: it collects mislabelled and ambiguous tiles.
    """
    pool = Pool(scores, index)
    return ranked(pool, pool.score("loss"), budget, rng, "loss", unknown_first=True)


def reducible_loss(
    scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
) -> Selection:
    """The highest loss that training can still take away first.

    Idea: an ambiguous tile keeps its loss whoever predicts it; what is above that can be learned.
    Formula: descending loss - irreducible, the latter the tile's loss under a network that has not trained on it (or a lower
    bound of it); tiles without a visit come before all others, in random order.
    Source: RHO-loss (Mindermann et al., ICML 2022).
    Cost: none beyond what fills the column `irreducible` (a run or two that are trained before, and a pass); O(N log N).
    Protocol: re-selection from labelled tiles.
    """
    pool = Pool(scores, index)
    reducible = pool.score("loss") - pool.score("irreducible")
    return ranked(pool, reducible, budget, rng, "reducible loss", unknown_first=True)


def k_center(
    scores: pa.Table | None, index: pa.Table, state: dict[str, Any], budget: int, rng: np.random.Generator
) -> Selection:
    """Tiles that cover the space of features.

    Idea: each next tile is the one farthest from all chosen, so none is a near copy of another.
    Formula: greedy 2-approximation of k-center under Euclidean distance.  Tiles that have features and cannot be selected, such
    as those labelled already, are centers from the start; without any the first tile is random.
    Source: core-set selection (Sener and Savarese, ICLR 2018).
    Cost: a forward pass over the pool, then O(N k D): seconds for ten thousand tiles, out of the question for a million.
    Protocol: pool-based, redundant pools.
    """
    pool = Pool(scores, index)
    features = pool.scores("features").astype(np.float32)
    known = np.flatnonzero(np.isfinite(features).all(1))
    others = rng.permutation(np.setdiff1d(np.arange(len(pool)), known))
    steps = min(budget, len(known))
    chosen, radii = np.zeros(steps, int), np.zeros(steps)
    nearest, points = np.full(len(known), np.inf), features[known]
    squares = np.einsum("nd,nd->n", points, points)

    def reach(center: np.ndarray) -> np.ndarray:
        """(N,) squared distance to the nearest center once there is this one too."""
        distances = squares + center @ center - 2 * np.einsum("nd,d->n", points, center)
        return np.minimum(nearest, np.maximum(distances, 0))

    centers = pool.other_scores("features").astype(np.float32)
    for center in centers:
        nearest = reach(center)
    at = int(rng.integers(max(len(known), 1))) if not len(centers) or not steps else int(nearest.argmax())
    for step in range(steps):
        chosen[step], radii[step] = at, nearest[at]
        nearest = reach(points[at])
        nearest[at] = -1
        at = int(nearest.argmax())
    reasons = [f"distance {r:.4f}" for r in np.sqrt(radii).tolist()] + ["not scored"] * (budget - steps)
    return pool.selection(np.r_[known[chosen], others[: budget - steps]], reasons)


def ranked(
    pool: Pool,
    values: np.ndarray,
    budget: int,
    rng: np.random.Generator,
    word: str,
    *,
    shown: np.ndarray | None = None,
    unknown_first: bool = False,
) -> Selection:
    """The highest values first; reasons name the value, or `shown` in its place."""
    at = draws.top(values, budget, rng, unknown_first=unknown_first)
    return pool.selection(at, _reasons(word, (values if shown is None else shown)[at]))


def _reasons(word: str, values: np.ndarray) -> list[str]:
    return ["not scored" if math.isnan(v) else f"{word} {v:.4f}" for v in values.tolist()]
