from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysed.core.plan import norm_plan, plan
from raysed.core.pool import names_of

IDS = [f"t{i:03d}" for i in range(101)]


@given(
    tiles=st.integers(1, 101),
    micro=st.integers(1, 5),
    groups=st.integers(3, 6),
    workers=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_every_tile_is_visited_once_whatever_the_worker_count(tiles, micro, groups, workers, seed):
    found = plan(IDS[:tiles], seed, 5, micro * groups, micro)
    shares = [found.share(rank, workers) for rank in range(workers)]
    assert Counter(p for share in shares for p in share) == Counter(range(tiles))
    assert sorted(found.order) == IDS[:tiles]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_global_order_of_micro_batches_does_not_depend_on_the_worker_count(workers):
    found = plan(IDS, 0, 0, 12, 2)
    steps = []
    for step in range(found.steps):
        parts = [m for rank in range(workers) for m in found.micro_batches(step, rank, workers)]
        steps += [found.order[p] for _, positions in sorted(parts, key=lambda m: m[0]) for p in positions]
    assert steps == list(found.order)


def test_all_ranks_take_part_in_every_step():
    found = plan(IDS, 0, 0, 16, 4)
    for step in range(found.steps):
        assert all(found.micro_batches(step, rank, 4) for rank in range(4))


def test_order_follows_seed_and_cycle_and_not_the_order_of_the_ids():
    assert plan(IDS, 1, 2, 16, 8) == plan(IDS[::-1], 1, 2, 16, 8)
    assert plan(IDS, 1, 2, 16, 8) != plan(IDS, 1, 3, 16, 8) != plan(IDS, 2, 3, 16, 8)


def drawn(ids=IDS, count=32, seed=1, cycle=2):
    return norm_plan(names_of(ids), count, seed=seed, cycle=cycle, batch=16, micro_batch=8)


def test_batch_norm_is_estimated_on_tiles_that_follow_from_seed_and_cycle_alone():
    assert len(set(drawn().order)) == 32
    assert set(drawn().order) <= set(IDS)
    assert drawn() == drawn()
    assert drawn() != drawn(cycle=3) != drawn(seed=2, cycle=3)
    assert sorted(drawn(count=1000).order) == IDS
    assert drawn([]).steps == 0


def test_batch_norm_is_estimated_on_every_tile_alike():
    seen = Counter(t for cycle in range(400) for t in drawn(count=20, cycle=cycle).order)
    share = 20 / len(IDS)
    deviation = (400 * share * (1 - share)) ** 0.5
    assert all(abs(seen[t] - 400 * share) < 5 * deviation for t in IDS)
