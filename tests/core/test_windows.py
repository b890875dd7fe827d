"""Windows cover, weights sum to one, a constant stays one, and what is resampled comes back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysed.core.tiles import resize_image
from raysed.core.windows import (
    axis,
    blend,
    blocks,
    pad,
    resample,
    seam_score,
    stitch,
    windows_of,
)

AXES = st.builds(
    axis,
    st.integers(1, 400),
    st.sampled_from([1.0, 1.005, 2.0, 1.7, 3.3, 0.5, 0.61]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]),
)


@given(AXES)
def test_windows_cover_exactly_and_weights_sum_to_one(a):
    seen, total = np.zeros(a.length, int), np.zeros(max(a.length, a.side))
    for start, weights in zip(a.starts, blend(a), strict=True):
        assert start >= 0
        assert start + a.side <= max(a.length, a.side)
        seen[start : start + a.side] += 1
        total[start : start + a.side] += weights
    assert seen.min() >= 1
    assert total == pytest.approx(1, abs=1e-6)
    assert sorted(set(a.starts)) == list(a.starts)


@given(st.integers(65, 2000), st.sampled_from([0.0, 0.25, 0.5]))
def test_neighbours_share_at_least_the_overlap(size, overlap):
    a = axis(size, 1.0, 64, overlap)
    assert max(np.diff(a.starts)) <= 64 - round(overlap * 64)


def test_without_overlap_a_whole_number_of_tiles_is_the_grid_of_tiles():
    assert axis(192, 1.0, 64, 0.0).starts == (0, 64, 128)
    assert np.array_equal(blend(axis(192, 1.0, 64, 0.0)), np.ones((3, 64)))


@given(AXES, AXES, st.integers(50, 20000))
def test_blocks_answer_for_every_source_pixel_once(rows, cols, limit):
    seen = np.zeros((rows.size, cols.size), int)
    for block in blocks(rows, cols, limit):
        (y0, y1), (x0, x1) = (
            a.source_span(*a.owned(*part)) for a, part in ((rows, block.rows), (cols, block.cols))
        )
        seen[y0:y1, x0:x1] += 1
        for a, part, span in ((rows, block.rows, (y0, y1)), (cols, block.cols, (x0, x1))):
            begin, end = a.owned(*part)
            assert ((begin <= a.nearest(*span)) & (a.nearest(*span) < end)).all()
    assert (seen == 1).all()


@given(AXES, AXES, st.integers(50, 20000))
@settings(max_examples=12)
def test_stitching_a_constant_is_constant(rows, cols, limit):
    side = max(rows.side, cols.side)
    rows, cols = (axis(a.size, a.size / a.length, side, 0.3) for a in (rows, cols))
    value = torch.tensor([0.25, 0.75])[:, None, None].expand(2, side, side)
    made = np.zeros((2, rows.length, cols.length))
    for block in blocks(rows, cols, limit):
        left, right = cols.owned(*block.cols)
        predicted = [value] * len(windows_of(rows, cols, block))
        for first, part in stitch(rows, cols, block, iter(predicted), classes=2, device=torch.device("cpu")):
            made[:, first : first + part.shape[1], left:right] += part.numpy()
    assert made[0] == pytest.approx(0.25, abs=1e-5)
    assert made[1] == pytest.approx(0.75, abs=1e-5)


def test_stitching_a_picture_gives_the_picture_whatever_the_blocks():
    rng = np.random.default_rng(0)
    rows, cols = axis(150, 1.0, 32, 0.25), axis(210, 1.0, 32, 0.25)
    truth = torch.from_numpy(rng.random((3, 150, 210)).astype(np.float32))
    for limit in (10**6, 5000, 900):
        made = torch.zeros_like(truth)
        for block in blocks(rows, cols, limit):
            left, right = cols.owned(*block.cols)
            cut = (
                truth[:, rows.starts[r] : rows.starts[r] + 32, cols.starts[c] : cols.starts[c] + 32]
                for r, c in windows_of(rows, cols, block)
            )
            for first, part in stitch(rows, cols, block, cut, classes=3, device=torch.device("cpu")):
                made[:, first : first + part.shape[1], left:right] = part
        assert torch.allclose(made, truth, atol=1e-6)


@pytest.mark.parametrize(("size", "scale"), [(128, 2.0), (150, 1.5), (100, 3.3), (60, 0.5), (64, 1.0)])
def test_windows_are_resampled_as_the_whole_image_was_for_training(size, scale):
    image = np.random.default_rng(1).integers(0, 256, (size, size, 3), np.uint8)
    a = axis(size, scale, 16, 0.25)
    whole = resize_image(image, a.length, a.length).astype(int)
    for start in a.starts:
        end = min(a.length, start + 16)
        first, weights = a.resampling(start, end)
        source = image[first : first + weights.shape[1], first : first + weights.shape[1]]
        assert np.abs(resample(source, weights, weights) - whole[start:end, start:end]).max() <= 1


def test_the_way_back_is_the_nearest_pixel():
    a = axis(100, 2.0, 32, 0.25)
    assert a.nearest(0, 6).tolist() == [0, 0, 1, 1, 2, 2]
    b = axis(100, 0.5, 32, 0.25)
    assert b.nearest(0, 3).tolist() == [1, 3, 5]


def test_padding_mirrors_even_a_single_pixel():
    assert (pad(np.full((1, 3, 3), 7, np.uint8), 8) == 7).all()
    assert pad(np.zeros((8, 8, 3), np.uint8), 8).shape == (8, 8, 3)


def test_seam_score_is_one_without_seams_and_high_with_them():
    rng = np.random.default_rng(0)
    p = rng.random((2, 400, 120))
    borders, others = [30, 60, 90], [10, 20, 40, 50, 70, 80, 100, 110]
    assert seam_score(p, borders, others) == pytest.approx(1, abs=0.05)
    for column in borders:
        p[:, :, column:] += 0.5
    assert seam_score(p, borders, others) > 1.3
