import math

import pytest
import torch

from raysed.core.uncertainty import tile_scores


def test_entropy_is_zero_when_sure_and_log_c_when_uniform():
    sure = torch.full((1, 8, 4, 4), -1e4)
    sure[:, 0] = 1e4
    assert tile_scores(sure)[0, 0] == 0
    assert tile_scores(torch.zeros(1, 8, 4, 4))[0, 0].item() == pytest.approx(math.log(8))


def test_masses_sum_to_the_entropy_and_margin_is_top_two():
    logits = torch.randn(3, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    scores = tile_scores(logits)
    p = logits.double().softmax(1)
    assert scores[:, 2:].sum(1).tolist() == pytest.approx(scores[:, 0].tolist(), rel=1e-5)
    assert scores[:, 0].tolist() == pytest.approx((-(p * p.log()).sum(1)).mean((1, 2)).tolist(), rel=1e-5)
    top = p.sort(1, descending=True).values
    assert scores[:, 1].tolist() == pytest.approx((top[:, 0] - top[:, 1]).mean((1, 2)).tolist(), rel=1e-5)


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(tile_scores(logits), tile_scores(logits.float()))
