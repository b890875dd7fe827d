"""How much memory a training step takes, found without a GPU."""

import torch
from torch import nn

CONTEXT = 1 << 30
"""Bytes a process spends on a GPU before its first tensor: CUDA context, kernels, workspaces."""
_SLACK = 1.25
"""The allocator's blocks are larger than what is asked of them."""
_PARAMETER = 4 + 4 + 8 + 4
"""Bytes a parameter: weight, gradient, two moments of Adam, DDP's bucket; all float32."""


def saved_bytes(net: nn.Module, tiles: int, side: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that autograd keeps for the backward pass of one forward pass; `net` is left on the meta device.

    Args:
        net: (B, 3, H, W) to (B, C, H, W).
        tiles: B.
        side: H and W, pixels.
        dtype: of weights and activations.
    """
    net = net.to(device="meta", dtype=dtype).train()
    known = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = net(torch.empty(tiles, 3, side, side, device="meta", dtype=dtype))
    # the loss reads logits, log-probabilities and probabilities in float32
    return sum(s.nbytes() for s in kept.values()) + 3 * 4 * out.numel()


def step_bytes(net: nn.Module, tiles: int, side: int, dtype: torch.dtype = torch.float32) -> int:
    """GPU memory that a training worker needs for micro-batches of `tiles`, bytes: an estimate, meant to be on the safe side."""
    parameters = sum(p.numel() for p in net.parameters())
    cast = 2 * parameters if dtype != torch.float32 else 0
    return CONTEXT + int(_SLACK * (_PARAMETER * parameters + cast + saved_bytes(net, tiles, side, dtype)))
