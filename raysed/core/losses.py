"""Loss.  Letters: B batch, C classes, H W pixels.

`smp.losses.FocalLoss` and kornia's are one-vs-rest sigmoid losses, another function than the paper's; hence these lines.
"""

import numpy as np
import torch
from torch import Tensor

from raysed.core.tiles import VOID


def focal_loss_sum(
    log_p: Tensor, target: Tensor, alpha: Tensor, gamma: float = 2.0, weight: Tensor | None = None
) -> Tensor:
    """Softmax focal loss, eq. (5) of the paper, summed over the pixels that are not void.

    Args:
        log_p: (B, C, H, W) float32 log probabilities.
        target: (B, H, W) integer class indices, `VOID` where unknown.
        alpha: (C,) float32, weight of each class.
        gamma: focusing power; 0 gives weighted cross-entropy.
        weight: (B,) float32, importance of each tile; None is 1.

    Returns:
        Scalar float32.
    """
    known = target != VOID
    index = torch.where(known, target, 0).long()
    log_pt = log_p.gather(1, index[:, None]).squeeze(1)  # (B, H, W)
    rest = (-torch.expm1(log_pt)).clamp_min(
        1e-7
    )  # 1 - p; the bound keeps the gradient finite for 0 < gamma < 1
    loss = -alpha[index] * rest**gamma * log_pt * known
    return loss.sum() if weight is None else (loss * weight[:, None, None]).sum()


def class_weights(pixels: np.ndarray, power: float) -> np.ndarray:
    """alpha of each class: (pixel frequency)^-power with mean 1 over present classes, 0 for absent ones.

    Args:
        pixels: (C,) pixels of each class in the training tiles.
        power: 0 (all alike) to 1 (inverse frequency); the paper leaves its rule open, the default elsewhere is 0.5.

    Returns:
        (C,) float32.
    """
    present = pixels > 0
    alpha = np.zeros(len(pixels))
    alpha[present] = (pixels[present] / pixels.sum()) ** -power
    return (alpha / alpha[present].mean() if present.any() else alpha).astype(np.float32)
