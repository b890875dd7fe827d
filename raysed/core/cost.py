"""What a run will take: device memory of a training worker, hours of a run.  Estimates, and called so."""

from dataclasses import dataclass

import torch
from torch import nn

STATE_BYTES = 16
"""A parameter in float32 with its gradient and Adam's two moments."""


def training_bytes(net: nn.Module, side: int, micro_batch: int, activation_bytes: int) -> int:
    """Device memory of training: parameters with gradient and Adam state, and what every layer keeps for the backward pass.

    Args:
        net: the network; it is moved to the meta device, nothing is computed.
        side: of a tile, pixels.
        micro_batch: tiles a forward pass.
        activation_bytes: bytes a value, 2 under autocast to half precision, else 4.
    """
    net, kept = net.to("meta").train(), 0

    def keep(_: nn.Module, __: object, output: object) -> None:
        nonlocal kept
        kept += output.numel() if isinstance(output, torch.Tensor) else 0

    hooks = [m.register_forward_hook(keep) for m in net.modules() if not any(m.children())]
    net(torch.empty(micro_batch, 3, side, side, device="meta"))
    for hook in hooks:
        hook.remove()
    return STATE_BYTES * sum(p.numel() for p in net.parameters()) + activation_bytes * kept


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
