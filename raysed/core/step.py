"""Train step and evaluation: torch only.  Letters: B batch, C classes, H W pixels, M micro-batches a step.

Batch norm and gradients do not care how micro-batches are spread over ranks: running statistics are merged in micro-batch
order on every rank, and with `ordered_sums` so are gradients.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from raysed.core.counts import confusion, soft_iou
from raysed.core.losses import focal_loss_sum
from raysed.core.randomness import keyed_seed
from raysed.core.tiles import target_of
from raysed.core.uncertainty import log_probabilities, visit_scores

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Precision = Literal["fp32", "bf16", "fp16"]


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """`auto` as what the device computes in: bf16 where it is native, else fp16 on GPUs and fp32 on CPUs.

    On a CPU that has no bf16 matrix units, bf16 autocast is an emulation, measured 10 times slower than fp32.
    """
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def to_device(images: np.ndarray, labels: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, H, W, 3) uint8 and stored (B, H, W) labels to (B, 3, H, W) float32 in [0, 1], channels last, and uint8 targets."""
    x = torch.from_numpy(images).to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
    return x, torch.from_numpy(target_of(labels)).to(device, non_blocking=True)


def learning_rate(base: float, schedule: str, step: int, steps: int) -> float:
    """Learning rate of a step (0-based) out of all steps of the run."""
    return base * 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else base


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


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, on the CPU, contiguous, copied."""
    return {n: t.detach().cpu().clone().contiguous() for n, t in net.state_dict().items()}


@dataclass
class Totals:
    """Sums of one evaluation; sums over ranks add up."""

    counts: Tensor
    """(C, C) int64 confusion counts."""
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    """Focal loss, known pixels, soft IoU, batches."""


@dataclass(frozen=True)
class MicroBatch:
    """Tiles of one forward pass; one that has no tile is one black tile, all void, and leaves no trace."""

    number: int
    """In the step."""
    images: Tensor
    """(B, 3, H, W)."""
    target: Tensor
    """(B, H, W)."""
    weight: Tensor | None = None
    """(B,) importance of each tile's loss; None is 1."""


class Learner:
    """A network in training on one rank: weights, Adam state, batch-norm statistics, precision.

    Args:
        net: on its device already.
        alpha: (C,) float32 class weights.
        gamma: of the focal loss.
        batch: tiles a step over all ranks; the loss is summed over its pixels and divided by batch x H x W.
        precision: of the forward pass.
        ordered_sums: sum gradients in micro-batch order instead of by DDP.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        alpha: np.ndarray,
        gamma: float,
        batch: int,
        precision: Precision,
        ordered_sums: bool = False,
    ) -> None:
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = next(net.parameters()).device
        self.rank, self.workers = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        self.alpha = torch.from_numpy(alpha).to(self.device)
        self.gamma, self.batch, self.precision, self.ordered_sums = gamma, batch, precision, ordered_sums
        self.norm = BatchNormStatistics(net)
        self.parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}
        self.adam = torch.optim.Adam(self.parameters.values(), betas=(0.9, 0.999))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")  # type: ignore[attr-defined]
        self.wrapped: nn.Module = net
        if self.workers > 1:
            for tensor in (*net.parameters(), *net.buffers()):
                dist.broadcast(tensor.data, 0)
            if not ordered_sums:
                self.wrapped = DistributedDataParallel(
                    net,
                    device_ids=[self.device.index] if self.device.type == "cuda" else None,
                    broadcast_buffers=False,
                    init_sync=False,
                    gradient_as_bucket_view=True,
                )

    def step(
        self,
        micro_batches: list[MicroBatch],
        *,
        lr: float,
        key: tuple[str | int, ...],
        total: int,
        visits: list[Tensor] | None = None,
    ) -> Tensor:
        """One optimiser step.

        Args:
            micro_batches: of this rank, at least one.
            lr: learning rate.
            key: owner of the randomness inside the network; the micro-batch's number is added.
            total: M, micro-batches of the step over all ranks that hold tiles.
            visits: if given, each micro-batch's `visit_scores` are appended.

        Returns:
            (2,) float32 on the device, detached: summed focal loss and known pixels of this rank.
        """
        self.net.train()
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.zero_grad(set_to_none=True)
        before = self.norm.now()
        done = torch.zeros(2, device=self.device)
        statistics: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}
        for position, micro in enumerate(micro_batches):
            number, target = micro.number, micro.target
            torch.manual_seed(keyed_seed(*key, number))
            last = position == len(micro_batches) - 1
            hold = nullcontext() if last or self.wrapped is self.net else self.wrapped.no_sync()  # type: ignore[operator]
            with hold:
                with self._autocast():
                    logits = self.wrapped(micro.images)
                log_p = log_probabilities(logits)
                loss = focal_loss_sum(log_p, target, self.alpha, self.gamma, micro.weight)
                averaged = (
                    self.workers if self.wrapped is not self.net else 1
                )  # DDP divides by the number of ranks
                scale = averaged / (self.batch * target.shape[1] * target.shape[2])
                self.scaler.scale(loss * scale).backward()
            done += torch.stack([loss.detach(), (target < len(self.alpha)).sum()])
            if visits is not None:
                with torch.no_grad():
                    visits.append(visit_scores(log_p.detach(), target))
            if number < total:
                statistics[number] = self.norm.flat.clone()
            if self.ordered_sums and self.workers > 1:
                gradients[number] = torch.cat([self._grad(p).flatten() for p in self.parameters.values()])
                self.adam.zero_grad(set_to_none=True)
        if gradients:
            self._set_gradients(self._in_order(gradients, total))
        self.norm.merge(before, self._in_order(statistics, total))
        self.scaler.step(self.adam)
        self.scaler.update()
        return done

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _grad(self, parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def _in_order(self, own: dict[int, Tensor], total: int) -> list[Tensor]:
        """The tensors of all micro-batches of the step, in their order, on every rank."""
        if self.workers == 1:
            return [own[j] for j in range(total)]
        width = self.norm.flat.numel() if not own else next(iter(own.values())).numel()
        slots = -(-total // self.workers)
        mine = torch.zeros(slots, width, device=self.device)
        for j, tensor in own.items():
            if j < total:
                mine[j // self.workers] = tensor
        everyone = [torch.empty_like(mine) for _ in range(self.workers)]
        dist.all_gather(everyone, mine)
        return [everyone[j % self.workers][j // self.workers] for j in range(total)]

    def _set_gradients(self, gradients: list[Tensor]) -> None:
        total = gradients[0].clone()
        for gradient in gradients[1:]:
            total += gradient
        offset = 0
        for p in self.parameters.values():
            p.grad = torch.empty_like(p).copy_(total[offset : offset + p.numel()].view(p.shape))
            offset += p.numel()

    @torch.inference_mode()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Totals:
        """Confusion counts, focal loss and legacy soft IoU over batches of (images, targets), summed over all ranks."""
        self.net.eval()
        classes = len(self.alpha)
        totals = Totals(torch.zeros(classes, classes, dtype=torch.int64, device=self.device))
        sums = totals.sums.to(self.device)
        for images, target in batches:
            with self._autocast():
                logits = self.net(images)
            log_p = log_probabilities(logits)
            loss = focal_loss_sum(log_p, target, self.alpha, self.gamma)
            known = (target < classes).sum()
            soft = soft_iou(log_p.exp(), target)
            sums += torch.stack(
                [loss.double(), known.double(), soft.double(), torch.ones_like(loss).double()]
            )
            totals.counts += confusion(logits.argmax(1), target, classes)
        if self.workers > 1:
            dist.all_reduce(totals.counts)
            dist.all_reduce(sums)
        totals.sums = sums.cpu()
        return totals

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """(B, H, W) uint8 class indices of (B, 3, H, W) images, on the CPU."""
        self.net.eval()
        with self._autocast():
            return self.net(images).argmax(1).to(torch.uint8).cpu()

    def weights(self) -> dict[str, Tensor]:
        """All parameters and buffers by name, on the CPU, contiguous: what is committed and what scorers load."""
        return weights_of(self.net)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Inverse of `weights`."""
        self.net.load_state_dict(weights)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Adam's moments and step count as `<parameter>.<name>`, and the fp16 loss scale; empty before the first step."""
        state = {
            f"{name}.{kind}": value.detach().cpu().clone().contiguous()
            for name, p in self.parameters.items()
            for kind, value in self.adam.state.get(p, {}).items()
        }
        return state | (
            {"loss_scale": torch.tensor(self.scaler.get_scale())} if self.scaler.is_enabled() else {}
        )

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `optimizer_state`."""
        for name, p in self.parameters.items():
            kinds = {k: state[f"{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            self.adam.state[p] = {
                k: v.clone() if k == "step" else torch.empty_like(p).copy_(v) for k, v in kinds.items()
            }
        if self.scaler.is_enabled():
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": float(state["loss_scale"])})
