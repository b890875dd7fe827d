"""How long a run will take: an estimate, and called so."""

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
    score: int
    """A cycle; 0 without scores."""
    validate: int
    """A cycle."""

    def seconds(self, speed: Speed) -> float:
        """Seconds of all cycles: `cycles (train / train speed + (score + validate) / forward speed)`."""
        return self.cycles * (self.train / speed.train + (self.score + self.validate) / speed.forward)
