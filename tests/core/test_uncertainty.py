import math

import pytest
import torch
import torch.nn.functional as F

from raysed.core.tiles import VOID
from raysed.core.uncertainty import log_probabilities, map_layers, tile_scores, visit_scores


def test_entropy_is_zero_when_sure_and_log_c_when_uniform():
    sure = torch.full((1, 8, 4, 4), -1e4)
    sure[:, 0] = 1e4
    assert tile_scores(log_probabilities(sure))[0, 0] == 0
    assert tile_scores(log_probabilities(torch.zeros(1, 8, 4, 4)))[0, 0].item() == pytest.approx(math.log(8))


def test_masses_sum_to_the_entropy_and_margin_is_top_two():
    logits = torch.randn(3, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    scores = tile_scores(log_probabilities(logits))
    p = logits.double().softmax(1)
    assert scores[:, 2:].sum(1).tolist() == pytest.approx(scores[:, 0].tolist(), rel=1e-5)
    assert scores[:, 0].tolist() == pytest.approx((-(p * p.log()).sum(1)).mean((1, 2)).tolist(), rel=1e-5)
    top = p.sort(1, descending=True).values
    assert scores[:, 1].tolist() == pytest.approx((top[:, 0] - top[:, 1]).mean((1, 2)).tolist(), rel=1e-5)


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores = [tile_scores(log_probabilities(x)) for x in (logits, logits.float())]
    assert torch.equal(*scores)


def test_a_visit_tells_the_scores_and_the_cross_entropy_by_class():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 5, generator=generator)
    target = torch.randint(0, 4, (3, 5, 5), generator=generator)
    target[0, :2] = VOID
    target[2] = VOID  # nothing is known about it
    log_p = log_probabilities(logits)
    visits = visit_scores(log_p, target.to(torch.uint8))
    assert torch.equal(visits[:, :6], tile_scores(log_p))
    for i in range(3):
        known = target[i] != VOID
        pixels = F.cross_entropy(
            logits[i].flatten(1).T, target[i].flatten(), ignore_index=VOID, reduction="none"
        )
        assert visits[i, 6].item() == pytest.approx(pixels.sum().item() / max(1, int(known.sum())), rel=1e-5)
        for c in range(4):
            share = pixels[target[i].flatten() == c].sum().item() / max(1, int(known.sum()))
            assert visits[i, 7 + c].item() == pytest.approx(share, rel=1e-5)


def test_map_layers_are_class_entropy_and_probabilities():
    p = torch.tensor([[1.0, 0.5], [0.0, 0.5]])[:, None]  # (2, 1, 2): sure, and undecided
    layers = map_layers(p, torch.tensor([7, 9], dtype=torch.uint8), entropy=True, each=True)
    assert layers[:, 0].tolist() == [[7, 7], [0, 254], [254, 127], [0, 127]]
    assert map_layers(p, torch.tensor([7, 9], dtype=torch.uint8), entropy=False, each=False).shape == (
        1,
        1,
        2,
    )
