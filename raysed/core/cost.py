"""What a run costs: an estimate of its time, and called so; and its passes, counted."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Tiles a second of the whole cluster, and where the figures are from."""

    train: float
    forward: float
    source: str


@dataclass(frozen=True)
class Work:
    """Tiles of a run that is left."""

    cycles: int
    train: int
    """A cycle."""
    score: float
    """A cycle, in passes at full size; 0 without scores."""
    validate: int
    """A cycle."""

    def seconds(self, speed: Speed) -> float:
        """Seconds of all cycles: `cycles (train / train speed + (score + validate) / forward speed)`."""
        return self.cycles * (self.train / speed.train + (self.score + self.validate) / speed.forward)


BACKWARD = 3.0
"""A training visit in forward passes: the backward pass computes two gradients for each product of the forward pass."""


def forwards(*, trained: int, scored: int, scale: float, estimated: int) -> float:
    """Forward passes of a full tile that a cycle's training and selection are worth; validation, alike for all, is left out.

    Args:
        trained: tiles.
        scored: tiles of the scorers.
        scale: side at which they were scored over the tile's side.
        estimated: tiles that batch norm was estimated from.
    """
    return BACKWARD * trained + scored * scale**2 + estimated
