"""Augmentation as in the paper: quarter turn, Gaussian noise, colour shift in HSV, in this order, on images in [0, 1].

Letters: H W pixels.  The random draw is separate from the transform; `augment` joins them, keyed by its generator alone.
"""

import cv2
import numpy as np


def turn(image: np.ndarray, label: np.ndarray, quarter_turns: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn (H, W, 3) and (H, W) together by quarter_turns * 90 degrees, eq. (1)."""
    return np.rot90(image, quarter_turns), np.rot90(label, quarter_turns)


def add_noise(image: np.ndarray, noise: np.ndarray, variance: float) -> np.ndarray:
    """Add sqrt(variance) * noise, eq. (2), and clip to [0, 1].

    Args:
        image: (H, W, 3) float32 in [0, 1].
        noise: (H, W, 3) float32, standard normal, independent per pixel and channel.
        variance: of the noise added.
    """
    return np.clip(image + np.float32(np.sqrt(variance)) * noise, 0, 1)


def shift_hsv(image: np.ndarray, hue: float, saturation: float, value: float) -> np.ndarray:
    """Shift hue (degrees, modulo 360), saturation and value (clipped to [0, 1]), eqs. (3) and (4).

    Args:
        image: (H, W, 3) float32 RGB in [0, 1]; a grey pixel has hue 0.

    Returns:
        (H, W, 3) float32 RGB in [0, 1].
    """
    hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
    hsv += np.array([hue, saturation, value], np.float32)
    np.mod(hsv[..., 0], 360, out=hsv[..., 0])
    np.clip(hsv[..., 1:], 0, 1, out=hsv[..., 1:])
    return np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), 0, 1)


def augment(
    image: np.ndarray,
    label: np.ndarray,
    rng: np.random.Generator,
    *,
    turns: bool = True,
    max_noise_variance: float = 0.04,
    max_hue_shift: float = 30.0,
    max_saturation_shift: float = 0.15,
    max_value_shift: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """One random augmentation of a tile.

    Args:
        image: (H, H, 3) uint8 RGB.
        label: (H, H) uint8.
        rng: the tile's own generator; the same generator gives the same result.
        turns: whether to turn.
        max_noise_variance: the variance is uniform in [0, this].
        max_hue_shift: degrees; the shift is uniform in [-this, this].
        max_saturation_shift: likewise, of 0..1.
        max_value_shift: likewise, of 0..1.

    Returns:
        (H, H, 3) float32 RGB in [0, 1], and the (H, H) uint8 label turned alike.
    """
    if turns:
        image, label = turn(image, label, int(rng.integers(4)))
    pixels = image.astype(np.float32) / np.float32(255)
    if max_noise_variance:
        variance = rng.uniform(0, max_noise_variance)
        pixels = add_noise(pixels, rng.standard_normal(pixels.shape, np.float32), variance)
    limits = np.array([max_hue_shift, max_saturation_shift, max_value_shift])
    if limits.any():
        pixels = shift_hsv(pixels, *rng.uniform(-limits, limits))
    return pixels, np.ascontiguousarray(label)


def disturb(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    noise_variance: float = 0.0,
    hue: float = 0.0,
    saturation: float = 0.0,
    value: float = 0.0,
) -> np.ndarray:
    """A tile under noise and other colours of fixed strength: what a network should bear.

    Args:
        image: (H, W, 3) uint8 RGB.
        rng: the tile's own generator; it draws the noise and the sign of each shift.
        noise_variance: of Gaussian noise, image in 0..1.
        hue: degrees, either way.
        saturation, value: of 0..1, either way.

    Returns:
        (H, W, 3) float32 RGB in [0, 1].
    """
    pixels = image.astype(np.float32) / np.float32(255)
    signs = rng.choice([-1.0, 1.0], 3)
    if noise_variance:
        pixels = add_noise(pixels, rng.standard_normal(pixels.shape, np.float32), noise_variance)
    if hue or saturation or value:
        pixels = shift_hsv(pixels, *(signs * [hue, saturation, value]))
    return pixels


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] float to uint8, rounded: how a tile travels to the network (the rounding, 1/510 at most, drowns in the noise)."""
    return np.rint(pixels * 255).astype(np.uint8)
