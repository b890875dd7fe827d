import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysed.core.metrics import evenness, scores
from raysed.core.randomness import keyed_rng
from raysed.core.statistics import (
    aulc,
    aulc_between,
    first_above,
    fluctuation,
    holm,
    iou_variation,
    mean_iou,
    mean_of_last,
    paired_bootstrap,
    paired_t,
    t_limit,
    t_within,
    worst_iou,
)

COSTS = st.lists(st.floats(0.1, 100), min_size=2, max_size=20).map(lambda gaps: np.cumsum(gaps).tolist())


@given(COSTS, st.floats(-5, 5))
@settings(max_examples=30)
def test_the_area_under_a_constant_is_the_constant_whatever_it_costs(cost, value):
    assert aulc(cost, [value] * len(cost)) == pytest.approx(value, abs=1e-9)


@given(COSTS)
@settings(max_examples=30)
def test_the_area_under_a_ramp_is_its_middle_and_units_do_not_matter(cost):
    middle = (cost[0] + cost[-1]) / 2
    assert aulc(cost, cost) == pytest.approx(middle)
    assert aulc([60 * c + 3 for c in cost], cost) == pytest.approx(middle)


def test_area_of_an_uneven_axis_and_of_one_cycle():
    assert aulc([0, 1, 10], [0, 1, 1]) == pytest.approx(9.5 / 10)
    assert aulc([5], [0.3]) == 0.3
    with pytest.raises(ValueError, match="increase"):
        aulc([0, 2, 2], [1, 1, 1])


def test_fluctuation_is_of_changes_in_the_last_half():
    assert fluctuation([0.1 * t for t in range(20)]) == pytest.approx(0)
    wild_then_calm = [5.0, -5.0] * 5 + [0.0] * 10
    assert fluctuation(wild_then_calm, last=0.45) == 0
    assert fluctuation(wild_then_calm, last=1.0) == pytest.approx(np.std(np.diff(wild_then_calm)))
    assert fluctuation([0.0] * 10 + [0, 1] * 5) == pytest.approx(np.std([0, 1, -1, 1, -1, 1, -1, 1, -1, 1]))
    assert fluctuation([1.0]) is None
    assert fluctuation([0.1, 0.9]) is None  # one change does not fluctuate


def test_a_round_that_begins_anew_is_no_fluctuation():
    rounds = [0.1 * t for t in range(4)] * 3
    assert fluctuation(rounds, last=1.0, restarts=[4, 8]) == pytest.approx(0)
    assert fluctuation(rounds, restarts=[8]) == pytest.approx(0)  # of the last six changes
    assert fluctuation(rounds, restarts=[4]) > 0.1


def test_mean_of_last_and_first_above_leave_the_unknown_out():
    assert mean_of_last([9, 9, 1, None, 3], 3) == 2
    assert mean_of_last([4, 6]) == 5
    assert mean_of_last([1, None], 1) is None
    assert first_above([None, 0.0, 0.01, 0.02, 0.5], 0.01) == 3
    assert first_above([0.0, None], 0.01) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda v: sum(v) > 1e-6))
@settings(max_examples=40)
def test_evenness_by_its_definition(values):
    n, mean = len(values), sum(values) / len(values)
    got = evenness(np.array([*values, np.nan]))
    assert got["gini"] == pytest.approx(
        sum(abs(a - b) for a in values for b in values) / (2 * n * n * mean), abs=1e-9
    )
    assert got["cv"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / n) / mean, abs=1e-9)
    assert got["worst"] == min(values)


def test_evenness_does_not_reward_low_values():
    iou = np.array([0.2, 0.5, 0.8])
    half = evenness(iou / 2)
    assert half["cv"] == pytest.approx(evenness(iou)["cv"])
    assert half["gini"] == pytest.approx(evenness(iou)["gini"])


def additive(seed_effects: list[int], source_effects: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of two arms with one class in the truth and 100 pixels an image, so that IoU is the share of hits and its
    difference the mean over seeds and images of (seed effect + image effect) / 100.
    """
    hits = 40 + np.add.outer(seed_effects, source_effects)
    one, other = (np.zeros((*hits.shape, 2, 2), np.int64) for _ in range(2))
    one[..., 0, 0], other[..., 0, 0] = hits, 40
    for arm in (one, other):
        arm[..., 0, 1] = 100 - arm[..., 0, 0]
    return one, other


def test_the_bootstrap_interval_is_the_analytic_one():
    rng = np.random.default_rng(1)
    seeds, sources = rng.integers(-8, 12, 20), rng.integers(-15, 16, 60)
    got = paired_bootstrap(*additive(seeds.tolist(), sources.tolist()), keyed_rng("b"), draws=4000)
    mean = (seeds.mean() + sources.mean()) / 100
    half = math.hypot(2.0930 * seeds.std(ddof=1) / math.sqrt(20), 2.0010 * sources.std(ddof=1) / math.sqrt(60)) / 100  # fmt: skip
    assert got.mean == pytest.approx(mean)
    assert got.low == pytest.approx(mean - half, abs=0.03 * half)
    assert got.high == pytest.approx(mean + half, abs=0.03 * half)


def percentile_interval(values: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Ends of the plain bootstrap's interval over seeds and images, of (S, M) differences."""
    times = [rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in values.shape]
    return np.quantile(((times[0] @ values) * times[1]).sum(1), [0.025, 0.975])


@pytest.mark.parametrize("seeds", [3, 8])
def test_intervals_of_few_seeds_hold_the_truth_as_often_as_they_say(seeds):
    """Random effects of seeds, of 14 images, and of both together; the truth is 0."""
    trials, images, draws = 300, 14, 100
    rng = keyed_rng("coverage", seeds)
    plain = ours = 0
    for _ in range(trials):
        effects = (
            2.0 * rng.normal(size=(seeds, 1)) + rng.normal(size=images) + rng.normal(size=(seeds, images))
        )
        low, high = percentile_interval(effects, rng, draws)
        plain += low <= 0 <= high
        counts = np.zeros((2, seeds, images, 1, 1))
        counts[0, ..., 0, 0] = effects
        got = paired_bootstrap(*counts, rng, statistic=lambda c: c[..., 0, 0] / images, draws=draws)
        ours += got.low <= 0 <= got.high
    assert ours / trials >= 0.93
    assert plain / trials < (0.8 if seeds == 3 else 0.91)


def test_the_bootstrap_is_paired_seeded_and_of_the_mean_iou():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 50, (2, 3, 7, 4, 4))
    one[..., 3, :] = other[..., 3, :] = 0  # a class without truth
    got = paired_bootstrap(one, other, keyed_rng("b"), draws=300)
    names = list("abcd")
    by_hand = [
        scores(a.sum(0), names)["miou"] - scores(b.sum(0), names)["miou"]
        for a, b in zip(one, other, strict=True)
    ]
    assert got.mean == pytest.approx(np.mean(by_hand))
    assert got.low < got.mean < got.high
    assert got == paired_bootstrap(one, other, keyed_rng("b"), draws=300)
    back = paired_bootstrap(other, one, keyed_rng("b"), draws=300)
    assert (back.low, back.high) == pytest.approx((-got.high, -got.low))
    same = paired_bootstrap(one, one, keyed_rng("b"), draws=300)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    wide = paired_bootstrap(one, other, keyed_rng("b"), draws=300, confidence=0.99)
    assert wide.low < got.low
    with pytest.raises(ValueError, match="same seeds"):
        paired_bootstrap(one, other[:2], keyed_rng("b"))


def test_curves_of_other_cost_a_cycle_are_compared_over_the_same_range():
    line = [0.1 * c for c in range(1, 11)]
    assert aulc_between(range(1, 11), line, 2.5, 7.5) == pytest.approx(0.5)
    assert aulc_between(range(5, 55, 5), line, 5, 20) == pytest.approx(0.25)
    assert aulc_between([1, 2], [0, 1], 2, 2) is None


def test_the_bootstrap_takes_other_scores_and_the_mean_over_cycles():
    rng = np.random.default_rng(0)
    one, other = rng.integers(1, 50, (2, 3, 7, 2, 4, 4))  # seeds, images, cycles, classes
    one[..., 3, :] = other[..., 3, :] = 0
    for statistic, name in ((mean_iou, "miou"), (worst_iou, "iou_worst"), (iou_variation, "iou_cv")):
        got = paired_bootstrap(one, other, keyed_rng("b"), draws=50, statistic=statistic)
        score = [
            [scores(c, list("abcd"))[name] for c in arm.sum(1).reshape(-1, 4, 4)] for arm in (one, other)
        ]
        assert got.mean == pytest.approx(np.mean(score[0]) - np.mean(score[1]))
        assert got.low < got.mean < got.high


def test_the_p_of_a_difference_goes_with_its_interval():
    for mean in (0.0, 3.0, 9.0):
        rng = keyed_rng("p", int(mean))
        seeds, sources = rng.normal(mean, 4, 20).round(), rng.normal(0, 4, 60).round()
        counts = additive(seeds.tolist(), sources.tolist())
        got = paired_bootstrap(*counts, keyed_rng("b"), draws=500)
        assert (got.p < 0.05) == (got.low > 0 or got.high < 0)
        at_edge = paired_bootstrap(*counts, keyed_rng("b"), draws=500, confidence=1 - got.p)
        assert min(abs(at_edge.low), abs(at_edge.high)) < 1e-9
    same = additive([1, 2, 3], [0, 0, 0])[0]
    assert paired_bootstrap(same, same, keyed_rng("b"), draws=50).p == 1


def test_student_s_t_is_that_of_the_tables():
    found = [t_limit(0.95, n) for n in (1, 2, 3, 7, 10, 30, 120)]
    assert found == pytest.approx([12.7062, 4.3027, 3.1824, 2.3646, 2.2281, 2.0423, 1.9799], abs=1e-4)
    assert t_limit(0.99, 5) == pytest.approx(4.0321, abs=1e-4)
    assert t_within(2.0, 4) == pytest.approx(0.88388, abs=1e-5)
    assert t_within(0, 3) == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_an_interval_over_seeds_is_student_s_and_needs_two_of_them():
    values = [0.1, 0.2, 0.4, 0.5]
    got = paired_t(values)
    half = 3.1824 * np.std(values, ddof=1) / 2
    assert (got.mean, got.low, got.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=1e-5)
    assert got.p == pytest.approx(1 - t_within(0.3 / (half / 3.1824), 3), abs=1e-6)
    assert paired_t([0.0, 0.0]).p == 1
    assert math.isnan(paired_t([0.1]).low)
    assert math.isnan(paired_t([0.1]).p)


def test_one_seed_has_an_interval_over_images_and_one_image_none():
    one, other = additive([3], [1, 5, 9, 2])
    got = paired_bootstrap(one, other, keyed_rng("b"), draws=4000)
    half = 3.1824 * np.std([1, 5, 9, 2], ddof=1) / 2 / 100
    assert got.high - got.mean == pytest.approx(half, rel=0.05)
    assert math.isnan(paired_bootstrap(*additive([3, 4], [1]), keyed_rng("b"), draws=9).low)
