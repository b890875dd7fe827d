import numpy as np
import pytest

from raysed.core.scores import NEVER, SMOOTHING, ScoreTable, calibrated

IDS = [f"t{i}" for i in range(6)]
RNG = np.random.default_rng(0)


def visit(n: int) -> np.ndarray:
    return RNG.random((n, 2 + 3 + 1 + 3)).astype(np.float32)


def test_a_table_survives_parquet_columns_with_what_is_unknown():
    table = ScoreTable.unknown(IDS[::-1], 3).with_scores(["t1", "t4"], RNG.random((2, 5)).astype(np.float32))
    table = table.older().with_losses(["t4", "t5"], visit(2))
    stored = table.table()
    assert stored["tile_id"].to_pylist() == IDS
    assert stored["entropy"].null_count == 4
    assert stored["class_loss"].null_count == 4
    again = ScoreTable.from_table(stored, 3)
    for name in ("scored", "loss", "age"):
        assert np.array_equal(getattr(again, name), getattr(table, name), equal_nan=name != "age")


def test_scores_replace_and_visits_are_smoothed():
    first, second = visit(1), visit(1)
    table = ScoreTable.unknown(IDS, 3).with_visits(["t2"], first).older().with_visits(["t2"], second)
    mixed = (1 - SMOOTHING) * first + SMOOTHING * second
    assert table.scored[2] == pytest.approx(mixed[0, :5])
    assert table.loss[2] == pytest.approx(mixed[0, 5:])
    row = RNG.random((1, 5)).astype(np.float32)
    assert np.array_equal(table.with_scores(["t2"], row).scored[2], row[0])


def test_a_smaller_pool_keeps_what_is_known_and_unknown_rows_take_no_memory():
    rows = RNG.random((6, 5)).astype(np.float32)
    fresh = ScoreTable.unknown(IDS, 3).with_scores(IDS, rows)
    left = fresh.only(["t0", "t2"])
    assert np.array_equal(left.scored, rows[[0, 2]])
    assert left.age.tolist() == [0, 0]
    wider = fresh.only([*IDS, "t9"])
    assert np.array_equal(wider.scored[:6], rows)
    assert wider.age.tolist() == [0] * 6 + [NEVER]
    assert not any((*left.loss.strides, *wider.loss.strides))
    assert not any(fresh.without_scores().only(["t0"]).scored.strides)


def test_what_scorers_told_is_forgotten_and_losses_are_kept():
    table = ScoreTable.unknown(IDS, 3).with_scores(["t1"], visit(1)[:, :5]).with_losses(["t4"], visit(1))
    assert table.with_losses([], visit(0)) is table
    left = table.without_scores()
    assert np.isnan(left.scored).all()
    assert (left.age == NEVER).all()
    assert np.array_equal(left.loss, table.loss, equal_nan=True)


def test_the_oldest_come_first_and_the_never_scored_before_them():
    table = ScoreTable.unknown(IDS, 1)
    for tile in ("t3", "t0", "t5"):
        table = table.older().with_scores([tile], np.zeros((1, 3), np.float32))
    assert table.age.tolist() == [1, NEVER, NEVER, 2, NEVER, 0]
    assert table.oldest(5, besides={"t2"}) == ["t1", "t4", "t3", "t0", "t5"]
    assert table.oldest(2, besides=set()) == ["t1", "t2"]


def test_tiles_may_leave_and_join_the_pool():
    table = ScoreTable.unknown(IDS[:4], 1).with_scores(IDS[:4], np.arange(12, dtype=np.float32).reshape(4, 3))
    moved = table.only(["t1", "t3", "t5"])
    assert moved.ids.tolist() == ["t1", "t3", "t5"]
    assert moved.scored[:2].tolist() == [[3, 4, 5], [9, 10, 11]]
    assert moved.age.tolist() == [0, 0, NEVER]


def test_calibrated_visits_have_the_scorers_mean_and_spread_and_their_own_order():
    reference = RNG.random((40, 5)).astype(np.float32)
    sample = np.hstack([reference * 3 + 1, visit(40)[:, :4]]).astype(
        np.float32
    )  # another scale of the same thing
    moved = calibrated(sample, sample, reference)
    assert moved[:, :5] == pytest.approx(reference, abs=1e-5)
    assert np.array_equal(moved[:, 5:], sample[:, 5:])
    assert (calibrated(sample - 10, sample, reference)[:, :5] >= 0).all()
