"""What a network's output says about a tile.  Letters: B batch, C classes, H W pixels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from raysed.core.tiles import VOID


def log_probabilities(logits: Tensor) -> Tensor:
    """(B, C, H, W) float32 log softmax over classes, whatever the network computed in."""
    return F.log_softmax(logits.float(), dim=1)


def tile_scores(log_p: Tensor) -> Tensor:
    """Scores of each tile.

    Args:
        log_p: (B, C, H, W) log probabilities.

    Returns:
        (B, 2 + C) float32: mean pixel entropy (nats, the paper's score), mean margin between the two likeliest classes, and
        the entropy mass of each class, mean over pixels of p_c H(p); the masses sum to the entropy.
    """
    log_p = log_p.contiguous()
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)  # (B, H, W)
    first = second = torch.zeros_like(entropy)
    masses = []
    for each in p.unbind(1):  # the two largest in one pass; topk takes ten times as long
        second = torch.maximum(second, torch.minimum(first, each))
        first = torch.maximum(first, each)
        # a sum, for a matrix product of MKL need not give the same bits in every process
        masses.append((each * entropy).mean((1, 2)))
    return torch.stack([entropy.mean((1, 2)), (first - second).mean((1, 2)), *masses], 1)


def visit_scores(log_p: Tensor, target: Tensor) -> Tensor:
    """What a training visit tells about each tile, for nothing: its scores and its cross-entropy.

    Args:
        log_p: (B, C, H, W) log probabilities.
        target: (B, H, W) integer class indices, `VOID` where unknown.

    Returns:
        (B, 2 + C + 1 + C) float32: `tile_scores`, mean cross-entropy over the known pixels, and each class's share of it, mean
        over the known pixels of 1[y = c] CE; the shares sum to the cross-entropy.
    """
    batch, classes = log_p.shape[:2]
    known = target != VOID
    index = torch.where(known, target, 0).long()
    loss = -log_p.gather(1, index[:, None])[:, 0] * known
    pixels = known.sum((1, 2)).clamp_min(1)
    group = index + torch.arange(batch, device=index.device)[:, None, None] * classes
    shares = torch.zeros(batch * classes, device=loss.device).index_add_(0, group.flatten(), loss.flatten())
    shares = shares.view(batch, classes) / pixels[:, None]
    return torch.cat([tile_scores(log_p), shares.sum(1, keepdim=True), shares], 1)


def map_layers(probabilities: Tensor, codes: Tensor, *, entropy: bool, each: bool) -> Tensor:
    """What a map says of its pixels, (layers, H, W) uint8.

    Args:
        probabilities: (C, H, W) float.
        codes: (C,) uint8 value of each class in the map.
        entropy: add a layer of the pixel entropy, 0..254 for 0 to ln C nats.
        each: add C layers of the probabilities, 0..254 for 0 to 1.
    """
    best = probabilities[0]
    layers = [codes[0].expand(best.shape)[None]]
    for code, likely in zip(
        codes[1:], probabilities[1:], strict=True
    ):  # argmax over the first axis takes ten times as long
        layers[0] = torch.where(likely > best, code, layers[0])
        best = torch.maximum(best, likely)
    if entropy:
        nats = -torch.xlogy(probabilities, probabilities).sum(0, keepdim=True)
        layers.append(_as_bytes(nats / math.log(len(codes))))
    if each:
        layers.append(_as_bytes(probabilities))
    return torch.cat(layers)


def _as_bytes(shares: Tensor) -> Tensor:
    return (shares * 254).round().clamp(0, 254).to(torch.uint8)
