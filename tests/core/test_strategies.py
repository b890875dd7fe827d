import json
import math
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysed.config import SelectConfig, fields_of
from raysed.core import acquisition
from raysed.core.acquisition import BETWEEN, STRATEGIES, strategy_of
from raysed.core.active import clasp_pe, class_gap, infobatch, k_center, power_entropy, reducible_loss
from raysed.core.defensive import defensive, difficulty
from raysed.core.passive import class_random, class_weights, epoch_queue, rarest_class, region_random
from raysed.core.pool import Pool
from raysed.core.randomness import keyed_rng
from raysed.errors import UsageError

N, C = 60, 4
VISITED = ("loss", "class_loss", "irreducible")
HALF = {"progress": 0.5, "class_iou": [0.9, 0.2, None, 0.5]}
SECOND = {**HALF, "queue": {"epoch": 1, "key": "0" * 16, "last": None}}
"""The second round of the pool has begun."""


def second(key: int) -> dict:
    """The same, with tiles in another order."""
    return {**SECOND, "queue": {**SECOND["queue"], "key": f"{key:016x}"}}


def lists(rows) -> pa.Array:
    return pa.array([None if r is None else list(r) for r in rows], pa.list_(pa.float32()))


def world(seed: int = 0, unvisited: int = 10) -> tuple[pa.Table, pa.Table]:
    """Scores and index of 60 tiles in 5 regions; values on a grid, so that there are ties; the last tiles never visited."""
    rng = np.random.default_rng(seed)
    ids = [f"t{i:02d}" for i in range(N)]
    pixels = rng.multinomial(1000, [0.1, 0.3, 0.08, 0.02, 0.5], N) * (rng.random((N, 5)) < 0.7)
    mass, class_loss = rng.integers(1, 6, (2, N, C)) / 8
    never = np.arange(N) >= N - unvisited
    index = pa.table(
        {
            "tile_id": ids,
            "region": [f"r{i % 5}" for i in range(N)],
            "source": [f"r{i % 5}_{i % 15}" for i in range(N)],
            "pixels": pixels.tolist(),
        }
    )
    scores = pa.table(
        {
            "tile_id": ids,
            "entropy": pa.array(mass.sum(1), pa.float32()),
            "margin": pa.array(rng.integers(1, 9, N) / 10, pa.float32()),
            "mass": lists(mass),
            "age": pa.array(np.zeros(N), pa.int32()),
            "loss": pa.array(class_loss.sum(1), pa.float32(), mask=never),
            "class_loss": lists(None if no else r for no, r in zip(never, class_loss, strict=True)),
            "irreducible": pa.array(rng.random(N) / 4, pa.float32(), mask=never),
            "features": lists(rng.random((N, 3))),
        }
    )
    return scores, index


def shuffled(table: pa.Table, seed: int) -> pa.Table:
    return table.take(np.random.default_rng(seed).permutation(len(table)))


def select(name, scores, index, budget, key="x", *, state=SECOND):
    return STRATEGIES[name].select(scores, index, state, budget, keyed_rng(key))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(("budget", "progress"), [(1, 0.0), (13, 0.5), (N, 1.0)])
def test_a_selection_is_the_budget_in_tiles_of_the_index_each_once(name, budget, progress):
    scores, index = world()
    more = pa.concat_tables([scores, scores.slice(0, 1).set_column(0, "tile_id", pa.array(["gone"]))])
    chosen = select(name, more, index, budget, state={**SECOND, "progress": progress})
    assert len(chosen.tile_ids) == len(set(chosen.tile_ids)) == budget
    assert set(chosen.tile_ids) <= set(index["tile_id"].to_pylist())
    assert len(chosen.weights) == len(chosen.reasons) == budget
    assert all(math.isfinite(w) and w > 0 for w in chosen.weights)
    assert all(chosen.reasons)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_selection_replays_whatever_the_order_of_rows(name):
    scores, index = world()
    state = before = HALF
    for cycle in range(4):
        one = select(name, scores, index, 13, cycle, state=state)
        again = select(name, shuffled(scores, cycle), shuffled(index, 9 - cycle), 13, cycle, state=before)
        assert one == again
        assert not one.state.keys() & HALF.keys()
        state, before = {**one.state, **HALF}, {**json.loads(json.dumps(again.state)), **HALF}


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"entropy"}))
def test_tiles_without_a_score_can_be_selected_and_do_not_stop_a_selection(name):
    scores, index = world(unvisited=N)
    few = scores.slice(0, 5)
    for known in (scores, few, few.slice(0, 0)):
        assert len(set(select(name, known, index, 20).tile_ids)) == 20


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_reads_no_column_that_it_does_not_name(name):
    scores, index = world()
    strategy = STRATEGIES[name]
    own = scores.select(["tile_id", *sorted(strategy.needs)]) if strategy.needs else None
    assert strategy.select(own, index, SECOND, 13, keyed_rng("x")) == select(name, scores, index, 13)
    assert strategy.missing(own) == []
    assert strategy.missing(scores.select(["tile_id"])) == sorted(strategy.needs)
    assert strategy.needs_scores == bool(strategy.needs - set(VISITED))


def test_who_needs_scores_says_when():
    def reads(options: str, progress: float, rounds: float) -> bool:
        strategy = strategy_of("defensive-entropy", options)
        assert strategy.reads is not None
        return strategy.reads(progress, lambda times: rounds >= times)

    assert [reads("", p, r) for p, r in ((0.1, 0.9), (0.1, 1), (0.59, 9), (0.6, 9))] == [0, 1, 1, 0]
    assert [reads("tail=1+warm_up=2", p, r) for p, r in ((0.1, 1.9), (1, 2))] == [0, 1]
    assert not reads("mixture=0", 0.5, 2)
    assert STRATEGIES["entropy"].reads is None


@pytest.mark.parametrize("name", ["margin", "top-loss", "class-gap", "reducible-loss"])
def test_ties_go_to_the_lower_id(name):
    scores, index = world(unvisited=0)
    for column in ("margin", "loss", "irreducible"):
        scores = scores.set_column(
            scores.column_names.index(column), column, pa.array([0.5] * N, pa.float32())
        )
    scores = scores.set_column(scores.column_names.index("mass"), "mass", lists([[0.25] * C] * N))
    assert select(name, shuffled(scores, 3), shuffled(index, 4), 5).tile_ids == [f"t0{i}" for i in range(5)]


def test_the_configuration_names_every_strategy():
    doc = next(f.doc for f in fields_of(SelectConfig) if f.name == "strategy")
    words = doc.replace(",", " ").replace(";", " ").replace(".", " ").split()
    assert set(STRATEGIES) <= set(words)


def rows(scores, column):
    return dict(zip(scores["tile_id"].to_pylist(), scores[column].to_pylist(), strict=True))


def test_margin_and_losses_rank_as_they_say():
    scores, index = world()
    low = rows(scores, "margin")
    assert select("margin", scores, index, N).tile_ids == sorted(low, key=lambda t: (low[t], t))
    loss, floor = rows(scores, "loss"), rows(scores, "irreducible")
    never = {t for t, v in loss.items() if v is None}
    seen = set(loss) - never
    top = select("top-loss", scores, index, N).tile_ids
    assert set(top[:10]) == never
    assert top[10:] == sorted(seen, key=lambda t: (-loss[t], t))
    learnable = reducible_loss(scores, index, HALF, N, keyed_rng("x")).tile_ids
    assert set(learnable[:10]) == never
    assert learnable[10:] == sorted(seen, key=lambda t: (floor[t] - loss[t], t))


def test_class_gap_weighs_entropy_by_the_gap_to_a_perfect_class():
    scores, index = world()
    gaps = [0.1**2, 0.8**2, 1.0, 0.5**2]  # a class without an IoU has the whole gap
    value = {t: sum(g * m for g, m in zip(gaps, row, strict=True)) for t, row in rows(scores, "mass").items()}
    best = class_gap()(scores, index, HALF, 20, keyed_rng("x")).tile_ids
    assert [value[t] for t in best] == pytest.approx(sorted(value.values(), reverse=True)[:20])
    plain = class_gap()(scores, index, {"progress": 0.0}, 20, keyed_rng("x"))
    assert plain.tile_ids == select("entropy", scores, index, 20).tile_ids


def test_power_entropy_ends_as_the_top_and_begins_as_a_draw():
    scores, index = world()
    sharp = power_entropy(1e9)(scores, index, HALF, 20, keyed_rng("x")).tile_ids
    entropy = rows(scores, "entropy")
    assert [entropy[t] for t in sharp] == sorted(entropy.values(), reverse=True)[:20]
    assert set(select("power-entropy", scores, index, 20).tile_ids) != set(sharp)


def test_clasp_divides_two_thirds_evenly_over_classes():
    scores, index = world()
    jitter = np.random.default_rng(5).random((N, C)) / 100  # no ties: beta is large, not infinite
    mass = np.array(scores["mass"].to_pylist()) + jitter
    scores = scores.set_column(3, "mass", lists(mass)).set_column(
        1, "entropy", pa.array(mass.sum(1), pa.float32())
    )
    mass = np.array(scores["mass"].to_pylist())
    entropy = scores["entropy"].to_pylist()
    order = keyed_rng("x").permutation(C).tolist()
    wanted: list[int] = []
    for turn, c in enumerate(order):  # int(.66 * 29) = 19 = 4 * 4 + 3
        free = [i for i in range(N) if i not in wanted]
        wanted += sorted(free, key=lambda i: -mass[i, c])[: 5 if turn < 3 else 4]
    free = [i for i in range(N) if i not in wanted]
    wanted += sorted(free, key=lambda i: -entropy[i])[: 29 - 19]
    sharp = clasp_pe(first=1e9, last=1e9)(scores, index, HALF, 29, keyed_rng("x"))
    assert sharp.tile_ids == [f"t{i:02d}" for i in wanted]


def test_clasp_sharpens_over_the_run():
    scores, index = world()
    entropy, early, late = rows(scores, "entropy"), 0.0, 0.0
    for key in range(20):
        early += sum(
            entropy[t] for t in select("clasp-pe", scores, index, 10, key, state={"progress": 0}).tile_ids
        )
        late += sum(
            entropy[t] for t in select("clasp-pe", scores, index, 10, key, state={"progress": 1}).tile_ids
        )
    assert late > 1.1 * early


def test_class_weights_are_those_of_rare_class_sampling():
    _, index = world()
    pixels = np.array(index["pixels"].to_pylist())[:, 1:]
    temperature, share = 0.2, 0.03
    frequency = pixels.sum(0) / pixels.sum()
    chance = np.exp((1 - frequency) / temperature)
    chance /= chance.sum()
    held = [[c for c in range(C) if p.sum() and p[c] / p.sum() >= share] for p in pixels]
    tiles = [sum(c in h for h in held) for c in range(C)]
    wanted = [sum(chance[c] / tiles[c] for c in h) for h in held]
    pool = Pool(None, index)
    assert class_weights(pool, temperature, share) == pytest.approx(wanted)
    assert sum(wanted) == pytest.approx(1)
    rarest = [min(h, key=lambda c: frequency[c]) if h else -1 for h in held]
    assert rarest_class(pool, share).tolist() == rarest


def test_class_random_prefers_the_rare_and_fills_up_with_the_rest():
    _, index = world()
    pool = Pool(None, index)
    has_rare = dict(zip(pool.ids, pool.class_shares[:, 2] >= 3000 / 512**2, strict=True))
    chosen = class_random()(None, index, {}, 10, keyed_rng("x")).tile_ids
    assert all(has_rare[t] for t in chosen)
    void = index.set_column(3, "pixels", pa.array([[5, 0, 0, 0, 0]] * 30 + [[0, 5, 0, 0, 0]] * 30))
    filled = class_random()(None, void, {}, 40, keyed_rng("x")).tile_ids
    assert sorted(filled[:30]) == [f"t{i}" for i in range(30, 60)]
    assert filled[30:] != sorted(filled[30:])


def test_every_region_gets_its_share_to_within_a_tile():
    _, index = world()
    uneven = index.set_column(1, "region", pa.array(["a"] * 7 + ["b"] * 23 + ["c"] * 30))
    for key in range(30):
        chosen = region_random(None, shuffled(uneven, key), {}, 13, keyed_rng(key)).tile_ids
        counts = np.bincount(np.digitize([int(t[1:]) for t in chosen], [7, 30]), minlength=3)
        assert (np.abs(counts - 13 * np.array([7, 23, 30]) / N) < 1).all()


def test_region_random_is_uniform():
    _, index = world()
    counts = np.zeros(N)
    for key in range(300):
        for t in region_random(None, index, {}, 13, keyed_rng("r", key)).tile_ids:
            counts[int(t[1:])] += 1
    p = 13 / N
    assert np.abs(counts - 300 * p).max() < 4.5 * math.sqrt(300 * p * (1 - p))


def test_infobatch_halves_the_easy_and_its_weights_undo_it():
    scores, index = world()
    loss = np.array([v if v is not None else np.nan for v in scores["loss"].to_pylist()])
    easy = loss < np.nanmean(loss)
    value = (
        np.random.default_rng(7).random(N) + easy
    )  # some quantity that differs between easy and hard tiles
    estimates, picks = [], np.zeros(N)
    for key in range(300):
        chosen = infobatch()(scores, index, HALF, 20, keyed_rng(key))
        at = [int(t[1:]) for t in chosen.tile_ids]
        picks[at] += 1
        estimates.append(value[at] @ chosen.weights)
        assert {round(w / min(chosen.weights), 6) for w in chosen.weights} <= {1.0, 2.0}
        assert [w > 1.1 * min(chosen.weights) for w in chosen.weights] == easy[at].tolist()
    assert picks[~easy].mean() == pytest.approx(2 * picks[easy].mean(), rel=0.05)
    assert np.mean(estimates) == pytest.approx(
        20 * value.mean(), abs=4.5 * np.std(estimates) / math.sqrt(300)
    )
    tail = infobatch()(scores, index, {"progress": 0.9}, 20, keyed_rng("x"))
    assert tail.weights == pytest.approx([1.0] * 20)
    assert set(tail.reasons) == {"hard"}


def test_k_center_takes_the_farthest_each_time():
    scores, index = world()
    points = np.array(scores["features"].to_pylist())
    chosen = [int(t[1:]) for t in k_center(scores, index, {}, 12, keyed_rng("x")).tile_ids]
    for step in range(1, 12):
        radii = [min(np.linalg.norm(points[i] - points[j]) for j in chosen[:step]) for i in range(N)]
        assert radii[chosen[step]] == pytest.approx(max(radii), rel=1e-4)


def test_features_beyond_their_float_type_are_no_place_in_space():
    scores, index = world()
    points = np.array(scores["features"].to_pylist())
    points[[5, 20]] = np.inf  # a sum over pixels that half precision cannot hold
    left = index.filter(pa.array(i != 5 for i in range(N)))
    found = scores.set_column(scores.column_names.index("features"), "features", lists(points))
    chosen = k_center(found, left, {}, N - 1, keyed_rng("x"))
    assert sorted(chosen.tile_ids) == sorted(left["tile_id"].to_pylist())
    assert chosen.tile_ids[-1] == "t20"
    assert chosen.reasons[-1] == "not scored"


def test_tiles_that_cannot_be_selected_are_centers_from_the_start():
    scores, index = world()
    points = np.array(scores["features"].to_pylist())
    taken = [3, 17, 41]
    left = index.filter(pa.array(i not in taken for i in range(N)))
    chosen = [int(t[1:]) for t in k_center(scores, left, {}, 8, keyed_rng("x")).tile_ids]
    for step in range(8):
        centers = [*taken, *chosen[:step]]
        radii = [min(np.linalg.norm(points[i] - points[j]) for j in centers) for i in range(N)]
        assert radii[chosen[step]] == pytest.approx(max(radii), rel=1e-4)


def test_difficulty_by_hand():
    values = np.array([[4.0, 0.0], [3.0, 0.0], [2.0, 1.0], [np.nan, np.nan]])
    capped = [
        [3, 0],
        [3, 0],
        [2, 1],
        [8 / 3, 1 / 3],
    ]  # three quarters of (2, 3, 4) are at most 3; the last has the mean
    totals = [32 / 3, 4 / 3]
    wanted = [1.5 * a / totals[0] + 0.5 * b / totals[1] for a, b in capped]
    assert difficulty(values, np.array([1.5, 0.5]), cap=0.75) == pytest.approx(wanted)
    assert difficulty(np.full((3, 2), np.nan), np.ones(2), 0.9).tolist() == [1, 1, 1]


def test_every_class_has_the_same_say_and_one_bad_tile_has_a_limit():
    rng = np.random.default_rng(0)
    values = rng.random((200, 3)) * [1, 100, 1]
    values[20:, 2] = 0  # a class in 20 tiles of 200
    values[7] *= 1e6
    h = difficulty(values, np.ones(3), cap=0.95)
    assert h.sum() == pytest.approx(3)
    assert h[:20].sum() > 1
    assert h[7] <= 3 * np.median(h[:20])


@pytest.mark.parametrize(
    ("served", "progress", "hard"),
    [(0, 0.0, 0), (59, 0.5, 0), (60, 0.5, 10), (75, 0.1, 10), (75, 0.59, 10), (75, 0.6, 0), (75, 1.0, 0)],
)
def test_defensive_is_half_queue_half_hard_between_the_first_round_and_the_tail(served, progress, hard):
    scores, index = world()
    state = {"progress": progress}
    for tiles in (min(served, N), served - N):
        if tiles > 0:
            state |= epoch_queue(None, index, state, tiles, keyed_rng("before")).state
    chosen = defensive()(scores if hard else None, index, state, 21, keyed_rng("x"))
    queue = epoch_queue(None, index, state, 21 - hard, keyed_rng("x"))
    assert chosen.tile_ids[: 21 - hard] == queue.tile_ids
    assert chosen.state == queue.state
    assert [r.startswith("difficulty") for r in chosen.reasons] == [False] * (21 - hard) + [True] * hard
    assert chosen.weights == [1.0] * 21


def test_without_strata_defensive_draws_by_the_loss_of_whole_tiles():
    scores, index = world(unvisited=0)
    values = np.array(scores["class_loss"].to_pylist()) * [40, 1, 1, 1]  # one class has most of the loss
    scores = scores.set_column(scores.column_names.index("class_loss"), "class_loss", lists(values))
    picks = {0.0: np.zeros(N), 1.0: np.zeros(N)}
    for stratified, found in picks.items():
        for key in range(150):
            chosen = defensive(stratified=stratified)(scores, index, second(key), 12, keyed_rng(key))
            found[[int(t[1:]) for t in chosen.tile_ids[6:]]] += 1
    by_tile = [np.corrcoef(found, values.sum(1))[0, 1] for found in picks.values()]
    assert by_tile[0] > 0.8
    assert by_tile[0] > by_tile[1] + 0.2


@pytest.mark.parametrize(("progress", "hard"), [(0.0, 6), (0.5, 12), (1.0, 18)])
def test_where_labels_are_bought_defensive_trusts_scores_more_with_every_purchase(progress, hard):
    scores, index = world()
    state = {"protocol": "pool", "progress": progress}
    chosen = select("defensive-entropy", scores, index, 20, state=state)
    kinds = [r.split()[0] for r in chosen.reasons]
    assert kinds == ["region's"] * (20 - hard) + ["difficulty"] * hard
    assert chosen.state == {}
    regions = [int(t[1:]) % 5 for t in chosen.tile_ids[: 20 - hard]]
    assert np.ptp(np.bincount(regions, minlength=5)) <= 1


def test_a_tail_of_one_never_begins():
    scores, index = world()
    kinds = [
        set(made(scores, index, {"progress": 1.0}, 20, keyed_rng("x")).reasons)
        for made in (infobatch(tail=1.0), infobatch())
    ]
    assert kinds == [{"easy", "hard"}, {"hard"}]
    last = defensive(tail=1.0)(scores, index, {**SECOND, "progress": 1.0}, 20, keyed_rng("x"))
    assert sum(r.startswith("difficulty") for r in last.reasons) == 10


def test_defensive_visits_every_tile_whatever_the_scores():
    scores, index = world()
    state, seen = {}, set()
    for cycle in range(math.ceil(N / 7)):
        chosen = select("defensive", scores, index, 13, cycle, state={**SECOND, **state})
        state = chosen.state
        seen |= set(chosen.tile_ids[:7])
    assert len(seen) == N


def test_defensive_draws_by_difficulty():
    scores, index = world(unvisited=0)
    values = np.array(scores["class_loss"].to_pylist()) ** 3
    scores = scores.set_column(scores.column_names.index("class_loss"), "class_loss", lists(values))
    picks = np.zeros(N)
    for key in range(150):
        chosen = defensive()(scores, index, second(key), 12, keyed_rng(key))
        picks[[int(t[1:]) for t in chosen.tile_ids[6:]]] += 1
    h = difficulty(values, np.ones(C), 0.95)
    assert np.corrcoef(picks, h)[0, 1] > 0.8
    assert picks[np.argsort(h)[-15:]].sum() > 2 * picks[np.argsort(h)[:15]].sum()


def test_defensive_weights_undo_the_preference_and_are_bounded():
    scores, index = world(unvisited=0)
    chosen = defensive(weight_power=1.0)(scores, index, SECOND, 12, keyed_rng("x"))
    h = difficulty(np.array(scores["class_loss"].to_pylist()), np.ones(C), 0.95)
    chance = {f"t{i:02d}": 6 / N + (1 - 6 / N) * 6 * h[i] / h.sum() for i in range(N)}
    raw = [12 / N / chance[t] for t in chosen.tile_ids]
    assert max(raw) <= 2
    assert chosen.weights == pytest.approx([w / (sum(raw) / 12) for w in raw])


def test_defensive_reducible_forgives_what_cannot_be_learned():
    scores, index = world(unvisited=0)
    pool = Pool(scores, index)
    share = pool.class_shares
    labelled = [i for i in range(N) if share[i].sum()]
    loss = np.full(N, 1.0)
    floor = np.where(np.arange(N) % 2, 0.0, 0.9)  # every other tile keeps nine tenths of its loss
    scores = scores.set_column(
        scores.column_names.index("class_loss"), "class_loss", lists(loss[:, None] * share)
    )
    scores = scores.set_column(
        scores.column_names.index("irreducible"), "irreducible", pa.array(floor, pa.float32())
    )
    picks = np.zeros(N)
    for key in range(60):
        chosen = select("defensive-reducible", scores, index, 12, key)
        picks[[int(t[1:]) for t in chosen.tile_ids[6:]]] += 1
    even = [i for i in labelled if i % 2 == 0]
    odd = [i for i in labelled if i % 2]
    assert picks[odd].mean() > 4 * picks[even].mean()


def options_of(name: str) -> dict[str, float]:
    return STRATEGIES[name].options


TUNABLE = [n for n in STRATEGIES if options_of(n)]


@pytest.mark.parametrize("name", TUNABLE)
def test_options_at_their_defaults_change_nothing(name):
    scores, index = world()
    same = strategy_of(name, "+".join(f"{k}={v}" for k, v in options_of(name).items()))
    for state in ({**SECOND, "protocol": p} for p in ("reselect", "pool")):
        chosen = same.select(scores, index, state, 13, keyed_rng("x"))
        assert chosen == select(name, scores, index, 13, state=state)
    assert strategy_of(name) is STRATEGIES[name]
    assert options_of(name).keys() <= BETWEEN.keys()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("defensive", "mixture=0.2"),
        ("defensive-entropy", "cap=0.3"),
        ("defensive-reducible", "weight_power=1"),
        ("defensive", "gap_power=2"),
        ("defensive", "warm_up=1.5"),
        ("defensive", "stratified=0"),
        ("clasp-pe", "last=8"),
        ("clasp-pe", "stratified=0+first=2"),
        ("power-entropy", "beta=1000"),
        ("class-gap", "power=0"),
        ("class-random", "temperature=10"),
        ("infobatch", "pruned=0.1"),
        ("infobatch", "tail=0.1"),
    ],
)
def test_an_option_changes_what_is_chosen(name, options):
    scores, index = world()
    chosen = strategy_of(name, options).select(scores, index, SECOND, 29, keyed_rng("x"))
    assert chosen != select(name, scores, index, 29)


def test_defensive_sees_the_iou_of_classes_only_if_it_weighs_by_it():
    assert [strategy_of("defensive", o).reads_iou for o in ("", "gap_power=0", "gap_power=1")] == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("unifrom", "", "must be one of uniform, .* got 'unifrom'"),
        ("defensive", "mixtur=0.3", "has no option 'mixtur', did you mean 'mixture'"),
        ("uniform", "tail=1", "strategy uniform has no option 'tail', it has none"),
        ("defensive", "mixture=1", r"mixture must be a number in \[0, 1\), got '1'"),
        ("defensive", "cap=0", r"cap must be a number in \(0, 1\]"),
        ("clasp-pe", "last=inf", r"last must be a number in \(0, inf\)"),
        ("clasp-pe", "last=", "last must be a number"),
        ("clasp-pe", "last=nan", "last must be a number"),
        ("clasp-pe", "last=8,first=2", "last must be a number"),
        ("clasp-pe", "last=8+last=9", "gives last twice"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, text):
    with pytest.raises(UsageError, match=text):
        strategy_of(name, options)


def test_the_configuration_names_every_option():
    doc = next(f.doc for f in fields_of(SelectConfig) if f.name == "options")
    words = set(doc.replace(",", " ").replace(";", " ").replace(".", " ").split())
    assert {o for n in STRATEGIES for o in options_of(n)} <= words


def test_the_strategy_in_the_readme_runs_where_it_says():
    """The snippet is executed as if it stood at the end of the module that the text names."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    text = text[text.index("A strategy of your own") :]
    snippet = text[: text.index("\n`reads_labels`")].split("\n", 1)[1]
    module = {**vars(acquisition), "STRATEGIES": {}}
    exec(textwrap.dedent(snippet), module)  # our own README
    (own,) = module["STRATEGIES"].values()
    _, index = world()
    chosen = own.select(None, shuffled(index, 1), HALF, 3, keyed_rng("x"))
    share = Pool(None, index).class_shares[:, 3]
    wanted = sorted(range(N), key=lambda i: (-share[i], i))[:3]
    assert chosen.tile_ids == [f"t{i:02d}" for i in wanted]
    assert own.needs_labels
    assert not own.needs
