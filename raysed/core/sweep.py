"""A sweep over learning rate, focusing power and class weights: its ranges, its points, which of them run at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raysed.core.randomness import keyed_rng

LOWEST_LR, HIGHEST_LR = 1e-5, 1e-2
"""Range of the step size, log-uniform; the paper's 5e-5 lies in it."""
HIGHEST_GAMMA = 4.0
"""Range of gamma is 0 to this, uniform; the paper's is 2."""
SWEPT = ("optim.lr", "loss.gamma", "loss.alpha_power")
"""Fields that differ from trial to trial."""


def point(seed: int, trial: int) -> dict[str, float]:
    """Fields of a trial; the same whatever the number of trials."""
    lr, gamma, power = keyed_rng("sweep", seed, trial).random(3)
    span = math.log(HIGHEST_LR / LOWEST_LR)
    values = (LOWEST_LR * math.exp(span * lr), HIGHEST_GAMMA * gamma, power)
    return {name: float(f"{v:.4g}") for name, v in zip(SWEPT, values, strict=True)}


@dataclass(frozen=True)
class Demand:
    """What one trial takes of a cluster."""

    workers: int
    cpus: float
    """Of workers, scorers, a read task and the trial itself."""
    gpus: float


def at_once(demand: Demand, have: Mapping[str, float], trials: int) -> int:
    """Trials that fit a cluster at the same time, at least one.

    A worker counts as a whole CPU, and as a whole GPU where there are any: what is left over is for read tasks.

    Args:
        demand: of one trial.
        have: resources of the cluster by name.
        trials: there are.
    """
    fit = have.get("CPU", 0) / max(demand.cpus, demand.workers)
    if demand.gpus:
        fit = min(fit, have.get("GPU", 0) / max(demand.gpus, demand.workers))
    return max(1, min(trials, math.floor(fit + 1e-9)))
