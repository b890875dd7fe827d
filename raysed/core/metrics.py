"""Metrics: one confusion matrix of counts, scores derived from it at the end.  Letters: B batch, C classes, H W pixels."""

import numpy as np


def class_iou(counts: np.ndarray) -> np.ndarray:
    """(..., C) intersection over union of (..., C, C) counts; nan for a class without truth pixels."""
    hit, truth = np.diagonal(counts, axis1=-2, axis2=-1).astype(float), counts.sum(-1)
    union = truth + counts.sum(-2) - hit
    return np.where(truth > 0, hit / np.maximum(union, 1), np.nan)


def evenness(values: np.ndarray) -> dict[str, float]:
    """How even classes (or tiles) are: cv, population standard deviation over mean; gini, mean difference of two draws over
    twice the mean, 0 if all are alike; worst, the lowest.  Neither of the first two rewards low values as the variance does.

    Args:
        values: (C,) not negative; nan is left out.
    """
    known = values[~np.isnan(values)]
    n, total = len(known), float(known.sum())
    if not total:
        return {"cv": 0.0, "gini": 0.0, "worst": 0.0}
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return {
        "cv": float(known.std() / known.mean()),
        "gini": float((ranks * np.sort(known)).sum() / (n * total)),
        "worst": float(known.min()),
    }


def scores(counts: np.ndarray, names: list[str]) -> dict[str, float | int | dict[str, float | None]]:
    """All scores of a (C, C) confusion matrix, under the names used everywhere.

    miou: mean IoU over the classes that have truth pixels (`classes_present` of them); iou_micro: over pixels of all classes
    together; iou_frequency_weighted: by truth pixels; iou_variance: population variance over classes, in squared percentage
    points as in the paper's table 2; iou_cv: standard deviation over mean; iou_worst: of the worst class.
    """
    iou, truth = class_iou(counts), counts.sum(1).astype(float)
    present = iou[truth > 0]
    hit, total = float(np.trace(counts)), float(counts.sum())
    if not len(present):
        present = np.zeros(1)
    mean, even = float(present.mean()), evenness(present)
    return {
        "miou": mean,
        "classes_present": int((truth > 0).sum()),
        "iou_micro": hit / max(2 * total - hit, 1),
        "iou_frequency_weighted": float(np.nansum(np.where(truth > 0, iou, 0) * truth) / max(total, 1)),
        "pixel_accuracy": hit / max(total, 1),
        "iou_variance": float(present.var() * 1e4),
        "iou_cv": even["cv"],
        "iou_worst": even["worst"],
        "iou": {n: None if np.isnan(v) else float(v) for n, v in zip(names, iou, strict=True)},
    }
