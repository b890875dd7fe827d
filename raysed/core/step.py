"""Train step and evaluation: torch only.  Letters: B batch, C classes, H W pixels, M micro-batches a step.

Batch norm and gradients do not care how micro-batches are spread over ranks: running statistics are merged in micro-batch
order on every rank, and with `ordered_sums` so are gradients.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raysed.core.averaging import Average
from raysed.core.batchnorm import BatchNormStatistics
from raysed.core.counts import class_sums, grouped_confusion, soft_iou
from raysed.core.losses import focal_loss_sum
from raysed.core.randomness import keyed_seed
from raysed.core.tiles import target_of
from raysed.core.uncertainty import log_probabilities, visit_scores

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Precision = Literal["fp32", "bf16", "fp16"]
_TRAINING, _AGE = "training/", "average/steps"
"""Names in the optimiser's state."""


def resolve_precision(wanted: str, device: torch.device, begun: Precision | None = None) -> Precision:
    """`auto` as what the device computes fastest in: bf16 where it is native, else fp16 on GPUs and fp32 on CPUs.

    A CPU is native in bf16 if it has matrix units (AMX) or vectors of it: on AMD Zen 5, which has vectors alone, a training step takes 1.3
    to 2.6 times as long in fp32 and a forward pass 1.3 to 2 times, for dense networks and, with `train_grouped_in_fp32`, for depthwise
    ones (but for small tiles on two threads, results/LOG.md).  A CPU with neither emulates bf16, measured 10 times slower than fp32.

    Args:
        wanted: auto, fp32, bf16 or fp16.
        device: where it is computed.
        begun: in what the run was begun on such a device; `auto` stays with it where the device has it.
    """
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if begun and (has_bf16 or begun != "bf16"):
            return begun
        return "bf16" if has_bf16 else "fp16"
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if begun == "fp32" or not has_bf16:
        return "fp32"
    return "bf16"


def train_grouped_in_fp32(net: nn.Module) -> None:
    """Compute grouped convolutions in fp32 where autocast would take bf16, when gradients are wanted; results are rounded to bf16 again.

    On CPUs the backward pass of a depthwise convolution takes two to four times as long in bf16 as in fp32, more than the rest of the step
    gains; without gradients bf16 is the faster one.

    Args:
        net: changed in place; its parameters and their names stay.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.forward = MethodType(_grouped_forward, module)  # type: ignore[method-assign]


def _grouped_forward(module: nn.Conv2d, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type)):
        return type(module).forward(module, x)
    with torch.autocast(x.device.type, enabled=False):
        return type(module).forward(module, x.float()).to(torch.get_autocast_dtype(x.device.type))


def common_precision(precisions: Sequence[Precision]) -> Precision:
    """The one in which a group of ranks computes whose devices differ: gradients of one scale are averaged with each other only."""
    return next(p for p in ("fp32", "fp16", "bf16") if p in precisions)  # type: ignore[return-value]


def to_images(images: np.ndarray, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1], channels last."""
    return torch.from_numpy(images).to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def to_device(images: np.ndarray, labels: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, H, W, 3) uint8 and stored (B, H, W) labels to (B, 3, H, W) float32 in [0, 1], channels last, and uint8 targets."""
    return to_images(images, device), torch.from_numpy(target_of(labels)).to(device, non_blocking=True)


def learning_rate(base: float, schedule: str, step: int, steps: int) -> float:
    """Learning rate of a step (0-based) out of all steps of the run."""
    return base * 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else base


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, on the CPU, contiguous, copied."""
    return _copies(net.state_dict().items())


def _copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """On the CPU, contiguous, in one copy each, by one thread: there are hundreds of short ones, threads would meet after each, and each
    meeting would wait for a thread that another process has put aside.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, t in tensors
        }
    finally:
        torch.set_num_threads(threads)


@dataclass
class Totals:
    """Sums of one evaluation; sums over ranks add up."""

    counts: Tensor
    """(G, C, C) int64 confusion counts of each group of tiles."""
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    """Focal loss, known pixels, soft IoU, batches."""
    first: Tensor | None = None
    """(B, H, W) uint8 classes found in this rank's first batch."""


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

    What scores, is evaluated and is committed are the weights in training, unless `ema` sets them apart; then it is `served`, and the weights in training are part of the optimiser's state.

    Args:
        net: on its device already.
        alpha: (C,) float32 class weights.
        gamma: of the focal loss.
        batch: tiles a step over all ranks; the loss is summed over its pixels and divided by batch x H x W.
        precision: of the forward pass.
        ordered_sums: sum gradients in micro-batch order instead of by DDP.
        weight_decay: decoupled (Loshchilov and Hutter, ICLR 2019), on kernels alone: not on biases and norms.
        clip: highest norm of a step's gradient over all parameters; None is no limit.
        ema: decay of the average of the weights; 0 is off.
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
        weight_decay: float = 0.0,
        clip: float | None = None,
        ema: float = 0.0,
    ) -> None:
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = next(net.parameters()).device
        self.rank, self.workers = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        self.alpha = torch.from_numpy(alpha).to(self.device)
        self.gamma, self.batch, self.precision, self.ordered_sums = gamma, batch, precision, ordered_sums
        self.clip = clip
        if self.workers > 1:
            for tensor in (*net.parameters(), *net.buffers()):
                dist.broadcast(tensor.data, 0)
        self.average = Average(net, ema) if ema else None
        self.served: nn.Module = self.average.net if self.average else net
        self.norm = BatchNormStatistics(net)
        self.skipped = 0
        """Steps without a finite gradient since the last good one, the same on every rank."""
        self.parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}
        kernels = [p for p in self.parameters.values() if p.ndim > 1]
        others = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.999), fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")  # type: ignore[attr-defined]
        if self.device.type == "cpu" and precision == "bf16":
            train_grouped_in_fp32(net)
        self.wrapped: nn.Module = net
        if self.workers > 1 and not ordered_sums:
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
        by_class: bool = False,
    ) -> Tensor:
        """One optimiser step.

        Args:
            micro_batches: of this rank, at least one.
            lr: learning rate.
            key: owner of the randomness inside the network; the micro-batch's number is added.
            total: M, micro-batches of the step over all ranks that hold tiles.
            visits: if given, each micro-batch's `visit_scores` are appended.
            by_class: count the pixels of each class too.

        Returns:
            (2,) float32 on the device, detached: summed focal loss and known pixels of this rank; by class (2 + 3 C,), `class_sums`
            after them.  Zeros if the gradient was not finite on any rank: then nothing has changed but `skipped`, or with fp16 the
            scale of the loss.
        """
        self.net.train()
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.zero_grad(set_to_none=True)
        before = self.norm.now()
        classes = len(self.alpha)
        done = torch.zeros(2 + 3 * classes * by_class, device=self.device)
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
            done[:2] += torch.stack([loss.detach(), (target < classes).sum()])
            if by_class:
                done[2:] += class_sums(log_p.detach().argmax(1), target, classes)
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
        statistics_of_all = self._in_order(statistics, total)
        finite = self._tame()
        if (
            finite or self.scaler.is_enabled()
        ):  # which steps only if all is finite, and halves its scale if not
            self.scaler.step(self.adam)
            self.scaler.update()
        if not finite:
            self.norm.set(*before)
            if not self.scaler.is_enabled() or self.scaler.get_scale() < 1:
                self.skipped += 1
            return torch.zeros_like(done)
        self.skipped = 0
        self.norm.merge(before, statistics_of_all)
        if self.average:
            self.average.follow(self.net, self.norm)
        return done

    @torch.no_grad()
    def estimate(self, steps: Iterable[tuple[list[tuple[int, Tensor]], int]]) -> None:
        """Batch norm of the served weights from these micro-batches: the mean of their statistics under the served weights.

        The averaged weights never computed the running statistics that were averaged with them.  Only batch norm is in training
        mode, so that nothing else is random.

        Args:
            steps: of each step the numbers and (B, 3, H, W) images of this rank's micro-batches, and how many of all ranks hold
                tiles (see `step`); none changes nothing.
        """
        found: list[Tensor] = []
        for micro_batches, total in steps:
            assert self.average is not None
            own = {}
            for number, images in micro_batches:
                with self.average.estimating(), self._autocast():
                    self.average.net(images)
                if number < total:
                    own[number] = self.average.norm.flat.clone()
            found += self._in_order(own, total)
        if self.average and found:
            self.average.norm.set(torch.stack(found).mean(0), self.norm.now()[1])

    def _tame(self) -> bool:
        """Limit the gradient where asked for; whether it is finite.  All ranks hold the sum over all micro-batches by now, and so
        the same norm.
        """
        if self.clip is not None:
            self.scaler.unscale_(self.adam)
        own = [p for p in self.parameters.values() if p.grad is not None]
        length = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(own, self.clip, length)
        return bool(length.isfinite())

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
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], groups: int) -> Totals:
        """Confusion counts, focal loss and legacy soft IoU, summed over all ranks.

        Args:
            batches: images, targets, and (B,) number of the group, such as the source image, that each tile counts for.
            groups: G.
        """
        self.served.eval()
        classes = len(self.alpha)
        totals = Totals(torch.zeros(groups, classes, classes, dtype=torch.int64, device=self.device))
        sums = totals.sums.to(self.device)
        for images, target, group in batches:
            with self._autocast():
                logits = self.served(images)
            log_p = log_probabilities(logits)
            loss = focal_loss_sum(log_p, target, self.alpha, self.gamma)
            known = (target < classes).sum()
            soft = soft_iou(log_p.exp(), target)
            sums += torch.stack(
                [loss.double(), known.double(), soft.double(), torch.ones_like(loss).double()]
            )
            found = logits.argmax(1)
            totals.counts += grouped_confusion(found, target, classes, group, groups)
            if totals.first is None:
                totals.first = found.to(torch.uint8)
        if self.workers > 1:
            dist.all_reduce(totals.counts)
            dist.all_reduce(sums)
        totals.sums = sums.cpu()
        return totals

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """(B, H, W) uint8 class indices of (B, 3, H, W) images, on the CPU."""
        self.served.eval()
        with self._autocast():
            return self.served(images).argmax(1).to(torch.uint8).cpu()

    def weights(self) -> dict[str, Tensor]:
        """All served parameters and buffers by name, on the CPU, contiguous: what is committed and what scorers load."""
        return weights_of(self.served)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Inverse of `weights`; `load_optimizer_state` then restores the weights in training, where they are others."""
        self.net.load_state_dict(weights)
        if self.average:
            self.average.net.load_state_dict(weights)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Adam's moments and step count as `<parameter>.<name>`, the fp16 loss scale, and of averaged weights their age and the
        weights in training as `training/<name>`; Adam has nothing before the first step.
        """
        state = _copies(
            (f"{name}.{kind}", value)
            for name, p in self.parameters.items()
            for kind, value in self.adam.state.get(p, {}).items()
        )
        if self.scaler.is_enabled():
            state["loss_scale"] = torch.tensor(self.scaler.get_scale())
            state["loss_scale_steps"] = torch.tensor(self.scaler.state_dict()["_growth_tracker"])
        if self.average:
            state |= {_TRAINING + n: t for n, t in weights_of(self.net).items()}
            state[_AGE] = torch.tensor(self.average.steps)
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `optimizer_state`; a state without an average begins one."""
        for name, p in self.parameters.items():
            if f"{name}.step" not in state:  # no step has been taken
                continue
            kinds = {k: state[f"{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            self.adam.state[p] = {
                k: v.to(p.device, copy=True) if k == "step" else torch.empty_like(p).copy_(v)
                for k, v in kinds.items()
            }
        if self.scaler.is_enabled() and "loss_scale" in state:  # else it was written in another precision
            own = {"scale": float(state["loss_scale"]), "_growth_tracker": int(state["loss_scale_steps"])}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **own})
        if _AGE in state:
            training = {n.removeprefix(_TRAINING): t for n, t in state.items() if n.startswith(_TRAINING)}
            self.net.load_state_dict(training)
            if self.average:
                self.average.steps = int(state[_AGE])
