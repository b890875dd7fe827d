"""A cycle while it is under way: its clock, and what its steps have left so far."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from raysed.cluster.stream import Stream
from raysed.core.pool import Selection

SELECTED = ("selected.parquet", "scores.parquet", "bought.parquet")
"""Files of a commit that are known once tiles are selected."""
WORK = ("read", "train", "visit")
"""Work of the ranks that is counted by node."""


@dataclass
class Clock:
    """Seconds of a cycle by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds of a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def closed(self) -> dict[str, float]:
        """All phases, `other` and `total`, rounded to milliseconds."""
        total = time.perf_counter() - self.began
        other = total - sum(self.seconds.values())
        return {k: round(v, 3) for k, v in {**self.seconds, "other": other, "total": total}.items()}


@dataclass
class OpenCycle:
    """A cycle from its selection on: all that a commit inside it has to keep beside the learner's state."""

    cycle: int
    selection: Selection
    excluded: list[str]
    """Tiles that were in quarantine when it selected."""
    files: dict[str, bytes]
    """selected.parquet and, if there are such, scores.parquet and bought.parquet."""
    scores: dict[str, Any] | None
    """About the scores it selected by, for the record."""
    clock: Clock
    done: int = 0
    """Steps that are done and counted below."""
    losses: list[list[float]] = field(default_factory=list)
    """Of every step on every rank what `Learner.step` returns: summed focal loss, known pixels, and pixels by class if asked for."""
    visits: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """Positions and their rows of `visit_scores`."""
    nodes: dict[str, Counter[str]] = field(default_factory=lambda: {k: Counter() for k in WORK})
    """Tiles read, steps trained and tiles visited by them, by node."""


@dataclass
class Part:
    """What one rank has done of a cycle and not yet told the others."""

    stream: Stream
    began: float = field(default_factory=time.perf_counter)
    losses: list[torch.Tensor] = field(default_factory=list)
    positions: list[range] = field(default_factory=list)
    visits: list[torch.Tensor] = field(default_factory=list)
