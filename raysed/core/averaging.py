"""Exponential moving average of the weights in training (Polyak and Juditsky 1992; decay as in the EMA of TensorFlow)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from raysed.core.batchnorm import BatchNormStatistics


def decay_after(decay: float, steps: int) -> float:
    """Decay of an average that has seen so many steps: at most (1 + n) / (10 + n), so that a young one looks back on the last
    tenth of its life instead of on the initial weights.
    """
    return min(decay, (1 + steps) / (10 + steps))


class Average:
    """The average of a network: parameters, and with them the running statistics of batch norm.

    Args:
        net: its weights begin the average.
        decay: share of the old average that a step keeps, in 0..1.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        self.norm = BatchNormStatistics(self.net)
        self.decay, self.steps = decay, 0
        self._layers = [m for m in self.net.modules() if isinstance(m, _BatchNorm)]
        self._parameters: list[torch.Tensor] = [*self.net.parameters()]

    @torch.no_grad()
    def follow(self, net: nn.Module, norm: BatchNormStatistics) -> None:
        """A step was taken by the network whose batch-norm statistics are `norm`."""
        weight = 1 - decay_after(self.decay, self.steps)
        torch._foreach_lerp_(self._parameters, [*net.parameters()], weight)
        flat, count = norm.now()
        self.norm.set(torch.lerp(self.norm.flat, flat, weight), count)
        self.steps += 1

    @contextmanager
    def estimating(self) -> Iterator[None]:
        """Inside, a forward pass leaves its own batch-norm statistics in `norm`; everything else evaluates."""
        for layer in self._layers:
            layer.train()
        try:
            yield
        finally:
            self.net.eval()
