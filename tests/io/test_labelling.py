"""The pool-based protocol by its selections alone: what is bought, what is trained on, and what is never looked at."""

import numpy as np
import pyarrow as pa
import pytest

from raysed.config import Experiment, PoolConfig, SelectConfig
from raysed.core.acquisition import STRATEGIES, Strategy
from raysed.core.labelling import bought, rows_bought
from raysed.core.pool import Selection
from raysed.core.scores import ScoreTable
from raysed.io.ledger import choose

TILES, CLASSES, CYCLES = 60, 3, 9
BUYERS = [n for n, s in STRATEGIES.items() if not s.needs_labels and "features" not in s.needs]


def index(seed: int) -> pa.Table:
    """A pool whose labels, and all that tells of them, follow from the seed."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "tile_id": [f"t{i:02d}" for i in range(TILES)],
            "region": [f"r{i % 4}" for i in range(TILES)],
            "source": [f"s{i % 12}" for i in range(TILES)],
            "label_offset": pa.array(rng.integers(0, 99, TILES)),
            "label_length": pa.array(rng.integers(0, 99, TILES)),
            "sha256": [f"{n:x}" for n in rng.integers(1 << 60, size=TILES)],
            "pixels": pa.array(rng.integers(0, 50, (TILES, CLASSES + 1)).tolist(), pa.list_(pa.int64())),
        }
    )


def experiment(strategy: str, **pool: float) -> Experiment:
    select = SelectConfig(strategy=strategy, protocol="pool", tiles=8)
    return Experiment(cycles=CYCLES, select=select, pool=PoolConfig(start=0.1, buy=0.2, cycles=3, **pool))


def run(strategy: str, pool: pa.Table, excluded: frozenset[str] = frozenset()) -> list[Selection]:
    exp, state, done = experiment(strategy), {}, []
    for cycle in range(CYCLES):
        table = ScoreTable.unknown(pool["tile_id"].to_pylist(), CLASSES)
        scored = np.random.default_rng(cycle).random((TILES, 2 + CLASSES)).astype(np.float32)
        scores = (
            table.with_scores(table.ids.to_pylist(), scored).table() if exp.scores_before(cycle) else None
        )
        made = choose(exp, cycle, scores=scores, index=pool, state=state, excluded=set(excluded))
        state = made.state
        done.append(made)
    return done


@pytest.mark.parametrize("strategy", BUYERS)
def test_the_budget_grows_by_rounds_and_only_labelled_tiles_are_trained_on(strategy):
    done = run(strategy, index(0))
    assert [len(bought(s.state)) for s in done] == [6] * 3 + [18] * 3 + [30] * 3
    assert [len(s.bought.tile_ids) if s.bought else 0 for s in done] == [6, 0, 0, 12, 0, 0, 12, 0, 0]
    assert [len(s.tile_ids) for s in done] == [6] * 3 + [8] * 6
    owned: set[str] = set()
    for made in done:
        if made.bought:
            assert not owned & set(made.bought.tile_ids)
            owned |= set(made.bought.tile_ids)
        assert set(made.tile_ids) <= owned
    assert set(done[3].tile_ids) | set(done[4].tile_ids) | set(done[5].tile_ids) == set(bought(done[5].state))


@pytest.mark.parametrize("strategy", BUYERS)
def test_labels_that_were_not_bought_change_nothing(strategy):
    """Scramble every label of every tile that is never bought, and those of a round until it is bought."""
    pool, other = index(0), index(1)
    calm = run(strategy, pool)
    first = set(bought(calm[0].state))
    mixed = pa.Table.from_pylist(
        [a if a["tile_id"] in first else b for a, b in zip(pool.to_pylist(), other.to_pylist(), strict=True)],
        schema=pool.schema,
    )
    assert run(strategy, mixed) == calm


def test_all_arms_of_a_seed_begin_with_the_same_labels():
    firsts = {tuple(run(s, index(0))[0].bought.tile_ids) for s in BUYERS}
    assert len(firsts) == 1
    assert run("uniform", index(0))[3].bought.tile_ids != run("margin", index(0))[3].bought.tile_ids


def test_a_quarantined_tile_is_neither_bought_nor_trained_on():
    victim = run("uniform", index(0))[0].tile_ids[0]
    done = run("uniform", index(0), frozenset({victim}))
    assert all(victim not in s.tile_ids and victim not in bought(s.state) for s in done)


def test_the_last_rounds_buy_what_is_left():
    exp = Experiment(
        cycles=3, select=SelectConfig(protocol="pool"), pool=PoolConfig(start=0.8, buy=0.5, cycles=1)
    )
    state: dict = {}
    for cycle, wanted in enumerate((48, 60, 60)):
        state = choose(exp, cycle, scores=None, index=index(0), state=state, excluded=set()).state
        assert len(rows_bought(index(0), state)) == wanted
    assert exp.schedule_span(2) == (0, 3)
    again = experiment("uniform", retrain=True)
    assert [again.schedule_span(c) for c in (0, 4, 8)] == [(0, 3), (3, 3), (6, 3)]


def test_strategies_that_look_at_labels_are_known():
    refused = {n for n, s in STRATEGIES.items() if s.needs_labels}
    assert refused == {
        "class-random", "infobatch", "top-loss", "reducible-loss", "defensive", "defensive-reducible",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("budgets", "wanted"), [(4, [0, 0.5, 1]), (3, [0, 1]), (2, [0]), (6, [0, 0.25, 0.5, 0.75, 1])]
)
def test_progress_counts_the_purchases_that_a_strategy_makes(monkeypatch, budgets, wanted):
    """The first budget is drawn by chance, so four budgets are three purchases: 1, 10 and 100 as ClaSP PE's beta."""
    seen = []

    def spy(scores, index, state, budget, rng):
        seen.append((state["protocol"], state["progress"]))
        return STRATEGIES["uniform"].select(scores, index, state, budget, rng)

    monkeypatch.setitem(STRATEGIES, "spy", Strategy(spy))
    exp = Experiment(
        cycles=2 * budgets,
        select=SelectConfig(strategy="spy", protocol="pool"),
        pool=PoolConfig(start=0.1, buy=0.1, cycles=2),
    )
    state: dict = {}
    for cycle in range(exp.cycles):
        state = choose(exp, cycle, scores=None, index=index(0), state=state, excluded=set()).state
    assert seen == [("pool", p) for p in wanted]
