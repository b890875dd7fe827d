import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysed.core.draws import from_queue, inclusion, noisy_log, systematic, top
from raysed.core.randomness import keyed_rng

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e9)), min_size=1, max_size=60)


def ids(n: int) -> np.ndarray:
    return np.array([f"t{i:04d}" for i in range(n)], object)


@given(
    st.lists(st.one_of(st.just(math.nan), st.integers(0, 3).map(float)), min_size=1, max_size=30), st.data()
)
@settings(max_examples=30)
def test_top_is_a_stable_sort_with_the_unknown_at_one_end(values, data):
    array, k = np.array(values), data.draw(st.integers(0, len(values)))
    known = sorted((i for i, v in enumerate(values) if not math.isnan(v)), key=lambda i: (-values[i], i))
    unknown = [i for i, v in enumerate(values) if math.isnan(v)]
    last = top(array, k, keyed_rng(1), unknown_first=False).tolist()
    first = top(array, k, keyed_rng(1), unknown_first=True).tolist()
    assert last[: len(known)] == known[:k]
    assert first[len(unknown) :] == known[: max(k - len(unknown), 0)]
    assert set(first[: len(unknown)]) <= set(unknown)
    assert len(set(last)) == len(last) == len(first) == k


def test_unknown_tiles_come_in_a_random_order():
    assert top(np.full(50, np.nan), 50, keyed_rng(1), unknown_first=True).tolist() != list(range(50))


def test_top_of_noisy_logs_draws_one_after_the_other_in_proportion_to_the_powers():
    values, rng = np.array([1.0, 2.0, 3.0, 0.0]), keyed_rng("gumbel")
    share = values**2 / (values**2).sum()
    seen = np.zeros((4, 4))
    for _ in range(4000):
        i, j = top(noisy_log(values, rng, beta=2.0), 2, rng, unknown_first=False)
        seen[i, j] += 1
    for i in range(3):
        for j in range(3):
            p = share[i] * share[j] / (1 - share[i]) if i != j else 0.0
            assert abs(seen[i, j] - 4000 * p) <= 4.5 * math.sqrt(4000 * p * (1 - p))
    assert seen[3].sum() == seen[:, 3].sum() == 0


def test_noisy_logs_without_a_power_are_uniform_and_what_has_no_chance_comes_last_in_random_order():
    values, rng = np.arange(1.0, 21), keyed_rng("flat")
    picks = np.bincount(
        np.concatenate([top(noisy_log(values, rng, beta=0), 5, rng, unknown_first=False) for _ in range(400)])
    )
    assert np.abs(picks - 100).max() < 4.5 * math.sqrt(400 * 0.25 * 0.75)
    never = np.r_[np.zeros(30), 1.0, np.nan]
    order = top(noisy_log(never, rng), 32, rng, unknown_first=False).tolist()
    assert order[0] == 30
    assert [i for i in order if i < 30] != list(range(30))


def capped(weights: list[float], k: int) -> list[float]:
    """Inclusion probabilities as one would by hand: give each its share, fix those above 1, again."""
    certain: set[int] = set()
    while True:
        rest = sum(w for i, w in enumerate(weights) if i not in certain)
        share = [1.0 if i in certain else (k - len(certain)) * w / rest for i, w in enumerate(weights)]
        above = {i for i, p in enumerate(share) if p > 1 and i not in certain}
        if not above:
            return share
        certain |= above


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40), st.data())
@settings(max_examples=30)
def test_inclusion_is_proportional_up_to_certainty(weights, data):
    k = data.draw(st.integers(1, len(weights) - 1))
    assert inclusion(np.array(weights), k) == pytest.approx(capped(weights, k), rel=1e-9)


@given(WEIGHTS, st.data())
@settings(max_examples=60)
def test_a_systematic_sample_has_its_size_and_no_tile_twice(weights, data):
    k = data.draw(st.integers(1, len(weights)))
    probabilities = inclusion(np.array(weights), k)
    assert probabilities.sum() == pytest.approx(k)
    assert 0 <= probabilities.min() <= probabilities.max() <= 1
    drawn = systematic(probabilities, keyed_rng(data.draw(st.integers(0, 1000))))
    assert len(set(drawn.tolist())) == len(drawn) == k
    assert (probabilities[drawn] > 0).all()


def test_a_systematic_sample_includes_each_tile_with_its_probability():
    target = inclusion(np.array([0.2, 9, 1, 3, 0, 2, 2, 5, 0.1, 1, 1, 30]), 5)
    rng, seen = keyed_rng("madow"), np.zeros(12)
    for _ in range(4000):
        seen[systematic(target, rng)] += 1
    assert target.max() == 1
    assert (np.abs(seen - 4000 * target) <= 4.5 * np.sqrt(4000 * target * (1 - target)) + 1e-6).all()


def test_a_systematic_sample_survives_the_largest_random_number():
    class Last:
        def random(self):
            return math.nextafter(1.0, 0.0)

    drawn = systematic(np.full(100_000, 0.5), Last())
    assert len(np.unique(drawn)) == 50_000


@given(st.integers(1, 40), st.data())
@settings(max_examples=30)
def test_the_queue_serves_every_tile_that_stays_within_one_round(n, data):
    k = data.draw(st.integers(1, n))
    rounds = -(-n // k)
    pool, queue, seen = ids(n), None, set()
    for cycle in range(rounds):
        gone = data.draw(st.sets(st.sampled_from(pool.tolist()), max_size=len(pool) - k))
        pool = np.array([t for t in pool if t not in gone], object)
        at, queue = from_queue(pool, queue, k, keyed_rng("q", cycle))
        assert len(set(at.tolist())) == k
        seen |= set(pool[at])
        queue = json.loads(json.dumps(queue))
    assert set(pool) <= seen


@given(st.integers(2, 30), st.data())
@settings(max_examples=30)
def test_between_two_visits_lie_fewer_than_two_epochs(n, data):
    k = data.draw(st.integers(1, n))
    queue, last = None, dict.fromkeys(range(n), -1)
    for cycle in range(6 * -(-n // k)):
        at, queue = from_queue(ids(n), queue, k, keyed_rng("q", cycle))
        for i in at.tolist():
            assert (cycle - last[i] - 1) * k < 2 * n
            last[i] = cycle


def test_a_tile_that_leaves_moves_no_other_and_epochs_differ():
    whole, queue = from_queue(ids(30), None, 30, keyed_rng("a"))
    part, _ = from_queue(np.delete(ids(30), 7), None, 29, keyed_rng("a"))
    assert [t for t in ids(30)[whole] if t != "t0007"] == np.delete(ids(30), 7)[part].tolist()
    again, queue = from_queue(ids(30), queue, 30, keyed_rng("b"))
    assert queue["epoch"] == 1
    assert again.tolist() != whole.tolist()


def test_the_order_of_an_epoch_is_the_same_on_every_machine_and_in_every_version():
    queue = {"epoch": 0, "key": "0123456789abcdef", "last": None}
    assert from_queue(ids(8), queue, 8, keyed_rng("unused"))[0].tolist() == [6, 5, 1, 0, 2, 4, 7, 3]


def test_the_queue_stays_small_and_every_order_is_as_likely():
    _, queue = from_queue(ids(5000), None, 1000, keyed_rng("a"))
    assert len(json.dumps(queue)) < 100
    first = np.bincount([from_queue(ids(5), None, 1, keyed_rng("f", k))[0][0] for k in range(1000)])
    assert np.abs(first - 200).max() < 4.5 * math.sqrt(1000 * 0.2 * 0.8)
