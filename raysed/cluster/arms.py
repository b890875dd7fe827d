"""What the driver hands to every worker.  Apart from the loop, so that the driver starts without the networks' libraries."""

from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from raysed.cluster.scoring import ScorerPool
from raysed.config import Experiment


@dataclass(frozen=True)
class Arm:
    """One run: a strategy in its own run directory."""

    name: str
    experiment: Experiment
    epoch: int
    """Fencing token of the lease on its run directory."""
    dataset: str
    """Content hash of the version of the tile store that it runs on."""


@dataclass(frozen=True)
class Setup:
    """What the driver hands to every worker."""

    arms: tuple[Arm, ...]
    scorers: ScorerPool
    monitor: ActorHandle
    device: str
    environment: dict[str, Any]
    patience: float
    """Seconds to wait for nodes."""
    hold: str | None
    """`point@cycle` to wait at, for tests that kill a run there."""
    shrinks: bool
    """Whether nodes without work go away, so that scorers are given back while they are idle."""
