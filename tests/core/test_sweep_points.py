"""Points of a sweep and how many trials fit a cluster."""

import numpy as np
import pytest

from raysed.core.sweep import HIGHEST_GAMMA, HIGHEST_LR, LOWEST_LR, Demand, at_once, point


def test_points_are_their_numbers_own_and_spread_over_the_ranges():
    points = [point(0, k) for k in range(1, 400)]
    assert point(0, 7) == points[6]
    assert point(1, 7) != points[6]
    lr = np.array([p["optim.lr"] for p in points])
    assert LOWEST_LR <= lr.min() < 2 * LOWEST_LR
    assert HIGHEST_LR / 2 < lr.max() <= HIGHEST_LR
    assert np.median(lr) == pytest.approx((LOWEST_LR * HIGHEST_LR) ** 0.5, rel=0.3)  # log-uniform
    gamma, power = (np.array([p[n] for p in points]) for n in ("loss.gamma", "loss.alpha_power"))
    assert gamma.max() <= HIGHEST_GAMMA
    assert power.max() <= 1
    assert power.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("demand", "have", "trials", "fit"),
    [
        (Demand(1, 0.76, 0), {"CPU": 2}, 16, 2),
        (Demand(1, 0.76, 0), {"CPU": 1}, 16, 1),
        (Demand(1, 1.3, 0), {"CPU": 2}, 16, 1),
        (Demand(2, 1.26, 0), {"CPU": 2}, 16, 1),
        (Demand(1, 0.76, 0), {"CPU": 64}, 3, 3),
        (Demand(1, 0.76, 0.75), {"CPU": 64, "GPU": 4}, 16, 4),
        (Demand(1, 0.86, 1.0), {"CPU": 3, "GPU": 4}, 16, 3),
        (Demand(2, 1.3, 1.5), {"CPU": 64, "GPU": 4}, 16, 2),
    ],
)
def test_as_many_trials_at_once_as_fit(demand, have, trials, fit):
    assert at_once(demand, have, trials) == fit
