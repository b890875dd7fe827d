"""Tiles: classes and palettes, the grammar of tile ids, windows and resizing.

Letters: H W pixels, C classes.  A stored label holds 0 for void (unknown, ignored) and 1..C for the classes in order;
everywhere after decoding a target holds the class index 0..C-1, and `VOID` for void.
"""

import re
from dataclasses import dataclass

import cv2
import numpy as np

VOID = 255
"""Target value of a pixel that takes no part in loss, scores or metrics."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")


@dataclass(frozen=True)
class LandClass:
    """One class of a data set."""

    name: str
    color: str
    """Hex colour, `#RRGGBB`."""
    source_id: int
    """Value of the class in the source's label files."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"#[0-9A-Fa-f]{6}", self.color):
            raise ValueError(f"class {self.name}: colour must look like #80FF00, got {self.color!r}")
        if not 0 <= self.source_id <= 255:
            raise ValueError(f"class {self.name}: id must lie in 0..255, got {self.source_id}")


OPENEARTHMAP = tuple(
    LandClass(name, color, code)
    for code, (name, color) in enumerate(
        [
            ("bareland", "#800000"),
            ("rangeland", "#00FF24"),
            ("developed", "#949494"),
            ("road", "#FFFFFF"),
            ("tree", "#226126"),
            ("water", "#0045FF"),
            ("agriculture", "#4BB549"),
            ("building", "#DE1F07"),
        ],
        start=1,
    )
)
"""Classes, official colours and label codes of OpenEarthMap; code 0 is unknown."""


def check_id(name: str) -> str:
    """The name itself, if it is a legal tile, source or region id: 1-200 of `A-Z a-z 0-9 . _ -`, no leading sign.

    Raises:
        ValueError: with the offending name.
    """
    if not _ID.match(name):
        raise ValueError(f"id {name[:80]!r} is not 1-200 characters of A-Z a-z 0-9 . _ -")
    return name


def tile_id(source: str, row: int, col: int) -> str:
    """Id of the window at grid position (row, col) of a source image."""
    return check_id(f"{source}-r{row:03d}c{col:03d}")


def shard_path(version: int, part: int) -> str:
    """Path of a shard of a tile store, by the version that it came with."""
    return f"shards/part-{part:05d}.parquet" if version == 1 else f"shards/v{version:04d}-{part:05d}.parquet"


def born_in(shard: str) -> int:
    """Version that a shard came with."""
    found = re.match(r"shards/v(\d+)-", shard)
    return int(found[1]) if found else 1


def region_of(source: str) -> str:
    """Region of a source image: its name before the last underscore, or the whole name."""
    return source.rpartition("_")[0] or source


def grid(height: int, width: int, tile: int) -> tuple[int, int]:
    """Rows and columns of whole tile x tile windows in a height x width image; remainders are dropped."""
    return height // tile, width // tile


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8 to (height, width, 3): area average when shrinking, bilinear when enlarging."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_label(label: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) uint8 to (height, width) by nearest neighbour, sampled at pixel centres."""
    if label.shape == (height, width):
        return label
    return cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def label_lookup(classes: tuple[LandClass, ...], ignore: tuple[int, ...]) -> np.ndarray:
    """(256,) int16 from source code to stored label: 1..C, 0 for ignored codes, -1 for codes out of range."""
    table = np.full(256, -1, np.int16)
    table[list(ignore)] = 0
    for position, land_class in enumerate(classes, start=1):
        table[land_class.source_id] = position
    return table


def target_of(label: np.ndarray) -> np.ndarray:
    """Stored label (0 void, 1..C) to target (0..C-1, `VOID`), uint8."""
    return (label - np.uint8(1)).astype(np.uint8)


def pixel_counts(label: np.ndarray, classes: int) -> np.ndarray:
    """(C + 1,) int64 pixels of a stored label: void first, then the classes."""
    return np.bincount(label.reshape(-1), minlength=classes + 1).astype(np.int64)


def palette(classes: tuple[LandClass, ...]) -> np.ndarray:
    """(C, 3) uint8 RGB colours of the classes."""
    return np.array([[int(c.color[i : i + 2], 16) for i in (1, 3, 5)] for c in classes], np.uint8)
