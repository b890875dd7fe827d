"""The procedural world: reproducible, in real proportions, built like land, and not to be read off its colours."""

import cv2
import numpy as np
import pytest

from raysed.core.synthetic import AMBIGUOUS, BUILDING, ROAD, UNKNOWN, scene

SHARES = {1: 1.9, 2: 21.0, 3: 18.2, 4: 6.6, 5: 18.6, 6: 3.2, 7: 13.2, 8: 16.6}
"""Per cent of OpenEarthMap's pixels."""


@pytest.fixture(scope="module")
def world():
    return [scene(0, number) for number in range(60)]


def test_a_scene_depends_on_its_arguments_alone(world):
    for number in (41, 3):
        again = scene(0, number)
        assert np.array_equal(again.image, world[number].image)
        assert np.array_equal(again.label, world[number].label)
        assert again.region == world[number].region


def test_scenes_and_worlds_differ(world):
    for other in (scene(0, 15), scene(1, 3)):
        assert (other.label != world[3].label).mean() > 0.3


@pytest.mark.parametrize("side", [128, 256, 320])
def test_arrays_are_tiles(side):
    drawn = scene(5, 29, side, regions=7)
    assert drawn.region == "world01"
    assert (drawn.image.shape, drawn.image.dtype) == ((side, side, 3), np.uint8)
    assert (drawn.label.shape, drawn.label.dtype) == ((side, side), np.uint8)
    assert drawn.label.max() <= 8


def test_unknown_is_black(world):
    cut = [s for s in world if (s.label == UNKNOWN).any()]
    assert cut
    assert all((s.image[s.label == UNKNOWN] == 0).all() for s in cut)


def test_shares_are_near_those_of_openearthmap(world):
    counts = np.bincount(np.concatenate([s.label.ravel() for s in world]), minlength=9)
    percent = 100 * counts / counts.sum()
    assert percent[UNKNOWN] < 2
    for code, real in SHARES.items():
        low, high = (1, 5) if code in (1, 6) else (0.65 * real, 1.35 * real)
        assert low < percent[code] < high, f"class {code}: {percent[code]:.1f} %, real {real} %"


def test_the_roads_of_a_scene_are_one_network(world):
    """But where the survey's edge cuts it, which may part it."""
    whole = [s.label == ROAD for s in world if not (s.label == UNKNOWN).any()]
    networks = [cv2.connectedComponents(road.astype(np.uint8))[0] - 1 for road in whole]
    assert set(networks) <= {0, 1}
    assert networks.count(1) > 40


def test_buildings_stand_along_roads(world):
    """In the countryside, where most ground is far from any road, and from the road's edge at most one building deep."""
    rural = [s.label for s in world if 0 < (s.label == BUILDING).mean() < 0.05 and (s.label == ROAD).any()]
    built, ground = [], []
    for label in rural:
        distance = cv2.distanceTransform((label != ROAD).astype(np.uint8), cv2.DIST_L2, 5)
        built.append(distance[label == BUILDING])
        ground.append(distance[label != ROAD])
    assert np.quantile(np.concatenate(built), 0.99) < 30
    assert np.median(np.concatenate(ground)) > 30


def test_buildings_cast_shadows_away_from_the_sun(world):
    """The darker side of the buildings is the same all over a region's scenes."""
    for region in range(3):
        built = [s for s in world[region::12] if (s.label == BUILDING).any()]
        sides = [darker_side(s.image, s.label == BUILDING) for s in built]
        strength = np.hypot(*np.sum(sides, 0)) / np.sum(np.hypot(*np.transpose(sides)))
        assert strength > 0.8


def test_what_is_ambiguous_is_known_by_pixel():
    """Whole scenes that are obscured have lost a fifth of their contrast and more."""
    scenes = [scene(1, number, 64) for number in range(200)]
    obscured = np.array([s.ambiguous.mean() for s in scenes])
    assert all(
        s.ambiguous.shape == (64, 64) and s.ambiguous.min() >= 0 and s.ambiguous.max() <= 1 for s in scenes
    )
    assert (obscured > 0).mean() == pytest.approx(AMBIGUOUS, abs=0.05)
    assert 0 < (obscured == 1).sum() < (obscured > 0).sum()
    contrast = np.array([s.image.std((0, 1)).mean() / s.image.mean() for s in scenes])
    assert np.median(contrast[obscured == 1]) < 0.8 * np.median(contrast[obscured == 0])


def darker_side(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(2,) sum over the mask's rim of the outward normal times how dark it is just outside."""
    height = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 2)
    outside = ~mask & (height > 0.1)
    dark = image[outside].mean() - image.mean(-1)
    return np.array(
        [-(dark * cv2.Sobel(height, cv2.CV_32F, *axis))[outside].sum() for axis in ((1, 0), (0, 1))]
    )


def test_colour_alone_does_not_tell_the_classes(world):
    """The best class of each of 32^3 colours, learnt on 45 scenes, stays well below half of the 0.42 mIoU that a U-Net of ImageNet weights
    reaches on 96 (uniform selection in results/evidence/world-dev, far from converged: 0.56 by five times the training).
    """
    bins, classes = zip(*(colours(s) for s in world[:45]), strict=True)
    seen = np.bincount(np.concatenate(bins) * 8 + np.concatenate(classes), minlength=8 * 32**3).reshape(-1, 8)
    bins, classes = (np.concatenate(part) for part in zip(*(colours(s) for s in world[45:]), strict=True))
    for weight in (1.0, 1 / seen.sum(0)):
        guess = (seen * weight).argmax(1)[bins]
        counts = np.bincount(classes * 8 + guess, minlength=64).reshape(8, 8)
        iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
        assert 0.08 < iou.mean() < 0.179


def colours(drawn) -> tuple[np.ndarray, np.ndarray]:
    """(n,) colour bin in [0, 32^3) and (n,) class in [0, 8) of the known pixels."""
    known = drawn.label != UNKNOWN
    red, green, blue = (drawn.image[known] >> 3).astype(int).T
    return (red * 32 + green) * 32 + blue, drawn.label[known].astype(int) - 1
