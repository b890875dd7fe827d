"""What the bench says of its samples."""

import math

import numpy as np
import pytest

from raysed.cluster import bench
from raysed.cluster.bench import CONFIDENCE, FEWEST, GOALS, GROUP_SECONDS, TURNS, Bench, interval, row


def test_few_samples_have_their_range_as_interval():
    assert interval([1.0, 2.0, 4.0]) == (1.0, 4.0)
    assert interval([3.0]) == (3.0, 3.0)
    assert interval(list(range(6))) == (0, 5)


@pytest.mark.parametrize("n", [6, 9, 15])
def test_the_interval_holds_the_median_as_often_as_promised(n):
    rng = np.random.default_rng(n)
    drawn = np.sort(rng.exponential(size=(4000, n)), 1)
    held = np.mean([low <= math.log(2) <= high for low, high in map(interval, drawn)])
    assert CONFIDENCE - 0.01 <= held < 0.99
    inner = int(interval(list(range(n)))[0]) + 1
    assert np.mean((drawn[:, inner] <= math.log(2)) & (math.log(2) <= drawn[:, -1 - inner])) < CONFIDENCE


def test_a_goal_is_met_by_the_worse_end():
    name = "stall"
    assert not GOALS[name].at_least
    assert row(name, [2.0] * 8 + [9.0]).met  # one of nine is left out
    assert not row(name, [2.0] * 7 + [9.0] * 2).met
    found = row(name, [2.0, 1.0, 4.0], ["a note"])
    assert (found.value, found.low, found.high, found.met) == (2.0, 1.0, 4.0, False)
    assert found.samples == [2.0, 1.0, 4.0, "a note"]
    assert row("latency", [1.0]).met is None


@pytest.mark.parametrize(("seconds", "counted"), [(0.0, TURNS - 1), (GROUP_SECONDS, FEWEST)])
def test_a_slow_machine_takes_fewer_turns(monkeypatch, seconds, counted):
    now = 0.0

    def take(_: Bench) -> float:
        nonlocal now
        now += seconds
        return now

    made = object.__new__(Bench)
    made.turns = {}
    monkeypatch.setattr(bench, "RIVALS", {"one": take, "other": take})
    monkeypatch.setattr(bench.time, "monotonic", lambda: now)
    made.take_turns(("one", "other"))
    assert {name: len(found) for name, found in made.turns.items()} == {"one": counted, "other": counted}
