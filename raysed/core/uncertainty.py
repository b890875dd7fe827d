"""What a network's output says about a tile.  Letters: B batch, C classes, H W pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def tile_scores(logits: Tensor) -> Tensor:
    """Scores of each tile, in float32 whatever the network computed in.

    Args:
        logits: (B, C, H, W) float, before softmax.

    Returns:
        (B, 2 + C) float32: mean pixel entropy (nats, the paper's score), mean margin between the two likeliest classes, and
        the entropy mass of each class, mean over pixels of p_c H(p); the masses sum to the entropy.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)  # (B, H, W)
    first, second = p.topk(2, dim=1).values.unbind(1)
    mass = torch.einsum("bchw,bhw->bc", p, entropy) / entropy[0].numel()
    return torch.cat([entropy.mean((1, 2))[:, None], (first - second).mean((1, 2))[:, None], mass], 1)
