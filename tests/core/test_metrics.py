import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from raysed.core.counts import class_sums, confusion, iou_of_sums, soft_iou
from raysed.core.metrics import class_iou, scores
from raysed.core.tiles import VOID


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 6, (3, 20, 20), generator=generator)
    target = torch.where(torch.rand(3, 20, 20, generator=generator) < 0.6, prediction, (prediction + 1) % 5)
    target[prediction == 4] = 3  # class 5 never is truth
    target[0, :4] = VOID
    return prediction, target.clamp(max=VOID).where(target != 5, 0)


def test_iou_agrees_with_torchmetrics(maps):
    prediction, target = maps
    counts = confusion(prediction, target, 6).numpy()
    theirs = MulticlassJaccardIndex(6, average=None, ignore_index=VOID)(prediction, target).numpy()
    truth = counts.sum(1) > 0
    assert class_iou(counts)[truth] == pytest.approx(theirs[truth], rel=1e-6)
    micro = MulticlassJaccardIndex(6, average="micro", ignore_index=VOID)(prediction, target).item()
    assert scores(counts, list("abcdef"))["iou_micro"] == pytest.approx(micro, rel=1e-6)


def test_sums_by_class_add_up_to_the_iou_of_the_counts(maps):
    prediction, target = maps
    target = torch.where(target == 2, 0, target)  # a class without truth
    added = sum(class_sums(p[None], t[None], 6) for p, t in zip(prediction, target, strict=True))
    wanted = class_iou(confusion(prediction, target, 6).numpy())
    assert iou_of_sums(added.tolist()) == [None if np.isnan(v) else pytest.approx(v) for v in wanted]
    assert iou_of_sums([0.0] * 6) == [None, None]


def test_counts_add_up_over_batches(maps):
    prediction, target = maps
    parts = sum(confusion(p[None], t[None], 6) for p, t in zip(prediction, target, strict=True))
    assert torch.equal(parts, confusion(prediction, target, 6))
    assert parts.sum() == (target != VOID).sum()


def test_macro_leaves_out_classes_without_truth(maps):
    counts = confusion(*maps, 6).numpy()
    found = scores(counts, list("abcdef"))
    assert found["classes_present"] == np.sum(counts.sum(1) > 0) < 6
    values = [v for v in found["iou"].values() if v is not None]
    assert found["miou"] == pytest.approx(np.mean(values))
    assert found["iou_variance"] == pytest.approx(np.var(np.array(values) * 100))
    assert found["iou_cv"] == pytest.approx(np.std(values) / np.mean(values))


def test_variance_is_the_one_of_the_papers_table():
    table = np.array([14.55, 35.46, 33.92, 38.13, 46.45, 24.26, 46.94, 53.72])
    counts = np.zeros((9, 9))
    for c, value in enumerate(table):  # hits and misses that give these IoU
        counts[c, c], counts[c, 8] = value, 100 - value
    found = scores(counts, list("abcdefghi"))
    assert found["iou_variance"] == pytest.approx(143.29, abs=0.01)


def test_soft_iou_of_a_sure_and_right_network_is_the_share_of_classes_present():
    target = torch.tensor([[[0, 1], [1, VOID]]])
    sure = torch.nn.functional.one_hot(target.where(target != VOID, 0), 4).permute(0, 3, 1, 2).float()
    assert soft_iou(sure, target).item() == pytest.approx(2 / 4)


def test_scores_of_nothing_are_zero():
    assert scores(np.zeros((2, 2), int), ["a", "b"])["miou"] == 0
