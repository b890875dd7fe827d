"""Batch norm whose running statistics do not care how micro-batches are spread over ranks."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNormStatistics:
    """Running mean and variance of all batch-norm layers as one flat tensor.

    Layers run with momentum 1, so that after a forward pass the flat tensor holds that micro-batch's own statistics; `merge`
    then applies the moving average of each layer in micro-batch order.  A young average is the plain mean of what it has seen:
    the momentum of the n-th micro-batch is at least 1 / n.  Without that an EfficientNet (momentum 0.01) evaluates with little
    but its initial values for the first hundred micro-batches.
    """

    def __init__(self, net: nn.Module) -> None:
        layers = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        buffers = [(m, name) for m in layers for name in ("running_mean", "running_var")]
        tensors = [getattr(m, name) for m, name in buffers]
        device = next(net.parameters()).device
        self.flat = torch.cat([torch.empty(0, device=device), *(t.flatten() for t in tensors)])
        self.momentum = torch.cat(
            [
                torch.empty(0, device=device),
                *(torch.full_like(t, m.momentum or 0.0) for (m, _), t in zip(buffers, tensors, strict=True)),
            ]
        )
        offset = 0
        for (layer, name), tensor in zip(buffers, tensors, strict=True):
            setattr(layer, name, self.flat[offset : offset + tensor.numel()])
            offset += tensor.numel()
        for layer in layers:
            layer.momentum = 1.0
        self.counters = [m.num_batches_tracked for m in layers if m.num_batches_tracked is not None]

    def merge(self, before: tuple[Tensor, Tensor], statistics: list[Tensor]) -> None:
        """Set the running values to those of `before` (from `now`), moved by each micro-batch's statistics in turn."""
        flat, count = before
        for k, own in enumerate(statistics, start=1):
            flat = torch.lerp(flat, own, torch.clamp(self.momentum, min=1 / (int(count) + k)))
        self.flat.copy_(flat)
        for counter in self.counters:
            counter.copy_(count + len(statistics))

    def now(self) -> tuple[Tensor, Tensor]:
        """Copies of the flat tensor and of the number of batches seen."""
        counter = self.counters[0].clone() if self.counters else torch.zeros((), dtype=torch.int64)
        return self.flat.clone(), counter

    def set(self, flat: Tensor, count: Tensor) -> None:
        """Running values from elsewhere, and the number of batches they stand for."""
        self.flat.copy_(flat)
        for counter in self.counters:
            counter.copy_(count)
