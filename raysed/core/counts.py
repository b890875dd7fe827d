"""Counts of one batch, on its device; `metrics` makes scores of them and needs no torch.  Letters: B batch, C classes, H W pixels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raysed.core.tiles import VOID


def confusion(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """(C, C) int64 pixel counts, row = truth, column = prediction; void pixels are left out.

    Args:
        prediction: (B, H, W) class indices.
        target: (B, H, W) class indices, `VOID` where unknown.
        classes: C.
    """
    known = target != VOID
    pairs = target[known].long() * classes + prediction[known].long()
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def class_sums(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """(3 C,) float32 pixels of each class: hit, in the truth, predicted; arguments as of `confusion`."""
    counts = confusion(prediction, target, classes)
    return torch.cat([counts.diagonal(), counts.sum(1), counts.sum(0)]).float()


def iou_of_sums(sums: Sequence[float]) -> list[float | None]:
    """IoU of each class from added `class_sums`; None without truth pixels."""
    hits, truth, predicted = np.reshape(sums, (3, -1)).tolist()
    return [h / (t + p - h) if t else None for h, t, p in zip(hits, truth, predicted, strict=True)]


def grouped_confusion(prediction: Tensor, target: Tensor, classes: int, group: Tensor, groups: int) -> Tensor:
    """(G, C, C) `confusion` of each group of tiles, such as those of one source image.

    Args:
        prediction, target: (B, H, W).
        classes: C.
        group: (B,) number of each tile's group.
        groups: G.
    """
    known = target != VOID
    pairs = target.long() * classes + prediction.long() + group.long()[:, None, None] * classes**2
    return torch.bincount(pairs[known], minlength=groups * classes**2).reshape(groups, classes, classes)


def soft_iou(probabilities: Tensor, target: Tensor) -> Tensor:
    """Legacy soft IoU of one batch, as OpenEarthMap's own code computes it: no argmax, mean over all C classes, an absent
    class scores about 0.  Logged beside the true IoU so that published numbers of that kind can be compared.

    Args:
        probabilities: (B, C, H, W) float, after softmax.
        target: (B, H, W) class indices, `VOID` where unknown (left out).
    """
    known = (target != VOID)[:, None]
    truth = torch.zeros_like(probabilities).scatter_(
        1, torch.where(known[:, 0], target, 0).long()[:, None], 1.0
    )
    p, t = probabilities * known, truth * known
    both = (p * t).sum((0, 2, 3))
    return (both / (p.sum((0, 2, 3)) + t.sum((0, 2, 3)) - both + 1e-7)).mean()
