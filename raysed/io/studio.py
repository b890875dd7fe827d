"""Label Studio's files: the tasks and the configuration that go out, and the regions of an export that comes back."""

import json
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np

from raysed.core.pool import Selection
from raysed.core.tiles import LandClass
from raysed.errors import DataError
from raysed.io.storage import Storage
from raysed.io.store import Dataset

IMAGE, POLYGON, BRUSH = "image", "label", "brush"
"""Names of the tags in the configuration."""
LOCAL = "/data/local-files/?d="
"""Address of a file in Label Studio's document root."""
_HEADER = 32 + 5 + 4 * 4
"""Bits before the runs of a mask."""


def tasks(picks: Selection, folder: str) -> bytes:
    """The task file of a round's picks.

    Label Studio shows files of its own machine by addresses relative to LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT, if they lie in a local
    storage of the project, which must be below that root; relative paths it does not show.
    Source: its guide to local storage, and label_studio/io_storages/localfiles.

    Args:
        picks: of the round.
        folder: of the round, in the document root.
    """
    found = [
        {"data": {IMAGE: LOCAL + quote(f"{folder}/images/{t}.png"), "tile_id": t, "reason": reason}}
        for t, reason in zip(picks.tile_ids, picks.reasons, strict=True)
    ]
    return json.dumps(found, indent=1).encode()


def configuration(classes: tuple[LandClass, ...]) -> bytes:
    """The labelling interface: every class as polygon and as brush."""
    labels = "\n".join(
        f"    <Label value={quoteattr(c.name)} background={quoteattr(c.color)}/>" for c in classes
    )
    tools = "\n".join(
        f'  <{tag} name="{name}" toName="{IMAGE}">\n{labels}\n  </{tag}>'
        for tag, name in (("PolygonLabels", POLYGON), ("BrushLabels", BRUSH))
    )
    return f'<View>\n  <Image name="{IMAGE}" value="${IMAGE}"/>\n{tools}\n</View>\n'.encode()


def annotations(folder: Storage, path: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(tile_id, regions of the last annotation that has any and was not cancelled) of each task of an export that has one.

    Raises:
        DataError: not an export in JSON, or one of other tasks than ours.
    """
    found = []
    try:
        for task in json.loads(folder.read(path)):
            if task.keys() == {"data"}:  # as it went out
                continue
            kept = [a for a in task["annotations"] if a["result"] and not a.get("was_cancelled")]
            if kept:
                found.append((task["data"]["tile_id"], list(kept[-1]["result"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder.uri}/{path} is not a Label Studio export in JSON with tile_id in data ({error!r})"
        ) from error
    return found


def drawn(regions: list[dict[str, Any]], dataset: Dataset, where: str) -> np.ndarray:
    """(side, side) uint8 stored label; later regions are drawn over earlier ones, what none covers is void.

    Args:
        regions: of one task.
        dataset: its classes and the side of a tile.
        where: file and tile, for errors.

    Raises:
        DataError: a region of another kind, class or image size, or one that cannot be read.
    """
    label = np.zeros((dataset.tile_size, dataset.tile_size), np.uint8)
    numbers = {c.name: k for k, c in enumerate(dataset.classes, start=1)}
    for turn, region in enumerate(regions, start=1):
        name = region.get("id", turn) if isinstance(region, dict) else turn
        try:
            _draw(region, label, numbers)
        except ValueError as error:
            raise DataError(f"{where}, region {name}: {error}") from error
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{where}, region {name} cannot be read ({error!r})") from error
    return label


def _draw(region: dict[str, Any], label: np.ndarray, numbers: dict[str, int]) -> None:
    kind, side = region.get("type"), len(label)
    if kind not in ("polygonlabels", "brushlabels", "choices"):
        raise ValueError(f"type {kind!r}; polygons, brush masks and one choice a tile are read")
    value = region["value"]
    names = value[kind]
    if len(names) != 1 or names[0] not in numbers:
        raise ValueError(f"class {names}, the data set has {', '.join(numbers)}")
    number = numbers[names[0]]
    if kind == "choices":
        label[:] = number
    elif kind == "brushlabels":
        size = region["original_width"], region["original_height"]
        if size != (side, side):
            raise ValueError(f"a mask of an image of {size[0]} x {size[1]}, the tile has {side} x {side}")
        if not isinstance(value["rle"], list):
            raise ValueError("a mask that is not a list of bytes")
        alpha = unpacked(bytes(value["rle"]), 4 * side * side)[3::4]
        label[alpha.reshape(side, side) > 0] = number  # Label Studio's own converters take any opacity too
    else:
        points = np.array(value["points"], float)
        if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
            raise ValueError("points that are no list of x and y")
        centres = points * side / 100 - 0.5
        shifted = np.rint(centres * 16).astype(np.int32)  # with four bits of fraction
        cv2.fillPoly(label, [shifted], number, shift=4)


def unpacked(data: bytes, count: int) -> np.ndarray:
    """(count,) uint8 values of a brush mask: rows of RGBA pixels, run-length encoded in bits, most significant first.

    The header is the number of values in 32 bits, their width less one in 5, and four widths of run lengths less one in 4 each.
    Then come runs: a bit, 1 if one value is repeated and 0 if each value follows; 2 bits, which of the widths; the length less
    one; the value or values.
    Source: encoding format of @thi.ng/rle-pack, with which Label Studio packs the canvas of a region.

    Args:
        data: the bytes of `rle`.
        count: values that there must be.

    Raises:
        ValueError: another number or width of values, a run beyond the last value, or an end within a run.
    """
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    at = 0

    def take(width: int) -> int:
        nonlocal at
        first, at = at, at + width
        if at > len(bits):
            raise ValueError(f"a mask that ends after {len(data)} bytes within a run")
        window = int.from_bytes(data[first // 8 : -(-at // 8)], "big")
        return window >> (-at % 8) & ((1 << width) - 1)

    if len(bits) < _HEADER:
        raise ValueError(f"a mask of {len(data)} bytes, its header alone has 7")
    said, width = take(32), take(5) + 1
    if said != count or width != 8:
        raise ValueError(f"a mask of {said} values of {width} bits, expected {count} of 8")
    lengths = [take(4) + 1 for _ in range(4)]
    values, done = np.zeros(count, np.uint8), 0
    while done < count:
        repeated = take(1)
        run = take(lengths[take(2)]) + 1
        if done + run > count:
            raise ValueError(f"a mask with a run of {run} at value {done} of {count}")
        if repeated:
            values[done : done + run] = take(8)
        else:
            take(8 * run)
            values[done : done + run] = np.packbits(bits[at - 8 * run : at])
        done += run
    return values
