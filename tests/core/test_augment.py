import colorsys

import numpy as np
import pytest

from raysed.core.augment import add_noise, augment, disturb, shift_hsv, to_uint8, turn
from raysed.core.randomness import keyed_rng


@pytest.fixture
def image():
    return np.random.default_rng(0).random((9, 9, 3), np.float32)


def test_four_quarter_turns_are_the_identity_and_label_moves_with_image(image):
    label = (image[..., 0] * 200).astype(np.uint8)
    turned = image, label
    for _ in range(4):
        turned = turn(*turned, 1)
        assert np.array_equal((turned[0][..., 0] * 200).astype(np.uint8), turned[1])
    assert np.array_equal(turned[0], image)
    assert not np.array_equal(turn(image, label, 1)[1], label)


def test_hsv_shift_agrees_with_colorsys(image):
    image[0, 0] = 0.5  # grey: hue 0
    shifted = shift_hsv(image, 77.0, 0.1, -0.12)
    for y, x in np.ndindex(9, 9):
        h, s, v = colorsys.rgb_to_hsv(*map(float, image[y, x]))
        s, v = np.clip([s + 0.1, v - 0.12], 0, 1)
        expected = colorsys.hsv_to_rgb((h + 77 / 360) % 1, s, v)
        assert shifted[y, x] == pytest.approx(expected, abs=2e-5)


def test_a_full_turn_of_hue_is_the_identity(image):
    assert shift_hsv(image, 360.0, 0, 0) == pytest.approx(image, abs=2e-5)
    assert shift_hsv(image, -360.0, 0, 0) == pytest.approx(image, abs=2e-5)


def test_noise_has_the_variance_asked_for_and_is_independent_per_channel():
    grey = np.full((256, 256, 3), 0.5, np.float32)
    noise = keyed_rng("t").standard_normal(grey.shape, np.float32)
    added = add_noise(grey, noise, 0.01) - grey
    assert added.var() == pytest.approx(0.01, rel=0.03)
    assert abs(np.corrcoef(added[..., 0].ravel(), added[..., 1].ravel())[0, 1]) < 0.02


def test_same_key_same_result_other_key_other_result(image):
    pixels, label = to_uint8(image), to_uint8(image[..., 0])
    one = augment(pixels, label, keyed_rng("augment", 0, 3, "a"))
    again = augment(pixels, label, keyed_rng("augment", 0, 3, "a"))
    other = augment(pixels, label, keyed_rng("augment", 0, 4, "a"))
    assert np.array_equal(one[0], again[0])
    assert np.array_equal(one[1], again[1])
    assert not np.array_equal(one[0], other[0])


def test_draws_cover_the_ranges_of_the_paper():
    pixels, label = np.full((4, 4, 3), (50, 200, 100), np.uint8), np.arange(16, dtype=np.uint8).reshape(4, 4)
    turns, hues = set(), []
    for k in range(200):
        out, moved = augment(pixels, label, keyed_rng("range", k), max_noise_variance=0)
        turns.add(moved.tobytes())
        hues.append(colorsys.rgb_to_hsv(*map(float, out[0, 0]))[0] * 360 - 140)
    assert len(turns) == 4
    assert -30.1 < min(hues) < -27
    assert 27 < max(hues) < 30.1


def test_nothing_switched_on_changes_nothing():
    pixels, label = to_uint8(np.random.default_rng(1).random((8, 8, 3))), np.zeros((8, 8), np.uint8)
    off = {
        "turns": False,
        "max_noise_variance": 0,
        "max_hue_shift": 0,
        "max_saturation_shift": 0,
        "max_value_shift": 0,
    }
    assert np.array_equal(to_uint8(augment(pixels, label, keyed_rng("x"), **off)[0]), pixels)


def test_a_disturbance_has_the_strength_asked_for_and_is_the_tiles_own():
    pixels = np.full((64, 64, 3), (50, 200, 100), np.uint8)
    noisy = disturb(pixels, keyed_rng("x"), noise_variance=0.0025)
    assert (noisy - pixels / 255).std() == pytest.approx(0.05, rel=0.05)
    assert np.array_equal(noisy, disturb(pixels, keyed_rng("x"), noise_variance=0.0025))
    hues = {
        round(colorsys.rgb_to_hsv(*map(float, disturb(pixels, keyed_rng(k), hue=20)[0, 0]))[0] * 360 - 140)
        for k in range(20)
    }
    assert hues == {-20, 20}
    assert np.array_equal(to_uint8(disturb(pixels, keyed_rng("x"))), pixels)
