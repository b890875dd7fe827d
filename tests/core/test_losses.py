import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raysed.core.losses import class_weights, focal_loss_sum
from raysed.core.tiles import VOID
from raysed.core.uncertainty import log_probabilities


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, 6, 7, generator=generator) * 3
    target = torch.randint(0, 5, (2, 6, 7), generator=generator)
    target[0, :2] = VOID
    alpha = torch.tensor([0.2, 1.0, 0.0, 2.5, 1.3])
    return logits, target.to(torch.uint8), alpha


def test_gamma_zero_is_weighted_cross_entropy(batch):
    logits, target, alpha = batch
    expected = F.cross_entropy(logits, target.long(), weight=alpha, ignore_index=VOID, reduction="sum")
    assert focal_loss_sum(log_probabilities(logits), target, alpha, 0.0).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_against_a_float64_oracle(batch, gamma):
    logits, target, alpha = (np.asarray(t, np.float64) for t in batch)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    total = 0.0
    for b, y, x in np.ndindex(*target.shape):
        if (c := int(target[b, y, x])) != VOID:
            total -= alpha[c] * (1 - p[b, c, y, x]) ** gamma * np.log(p[b, c, y, x])
    logits, *others = batch
    assert focal_loss_sum(log_probabilities(logits), *others, gamma).item() == pytest.approx(total, rel=1e-5)


def test_a_weight_counts_a_tile_so_many_times(batch):
    logits, target, alpha = batch
    log_p = log_probabilities(logits)
    own = [focal_loss_sum(log_p[i : i + 1], target[i : i + 1], alpha).item() for i in range(2)]
    weighted = focal_loss_sum(log_p, target, alpha, weight=torch.tensor([2.0, 0.5])).item()
    assert weighted == pytest.approx(2 * own[0] + 0.5 * own[1], rel=1e-6)


def test_void_pixels_leave_no_gradient(batch):
    logits, target, alpha = batch
    logits.requires_grad_()
    focal_loss_sum(log_probabilities(logits), target, alpha).backward()
    assert logits.grad[0, :, :2].abs().max() == 0
    assert logits.grad[0, :, 2:].abs().max() > 0


def test_gradient_is_finite_for_a_certain_pixel_and_small_gamma():
    logits = torch.tensor([[[[200.0]], [[0.0]]]], requires_grad=True)
    target = torch.zeros(1, 1, 1, dtype=torch.uint8)
    focal_loss_sum(log_probabilities(logits), target, torch.ones(2), 0.3).backward()
    assert torch.isfinite(logits.grad).all()


def test_class_weights_have_mean_one_over_present_classes_and_are_zero_for_absent_ones():
    alpha = class_weights(np.array([400, 100, 0]), 0.5)
    assert alpha == pytest.approx([2 / 3, 4 / 3, 0])
    assert class_weights(np.array([400, 100, 0]), 0) == pytest.approx([1, 1, 0])
