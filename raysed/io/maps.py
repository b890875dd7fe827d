"""Maps as files: Cloud Optimized GeoTIFFs with palette inside and class names beside them, PNGs, and the pieces of an unfinished one.

A map is made in a temporary file on this machine and put in its place at once, so nobody sees half of one.
"""

import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo

from raysed.core.tiles import palette
from raysed.errors import DataError
from raysed.io import checkpoint
from raysed.io.model import Record
from raysed.io.storage import Storage

UNKNOWN = 255
"""Nodata of entropy and probabilities; their values are 0..254."""
THREADED = 1 << 22
"""Pixels for which a thread of compression pays, with its start."""
Piece = tuple[int, int, np.ndarray]
"""First row, first column, (bands, h, w) uint8."""


@dataclass(frozen=True)
class Place:
    """Size and place of the source, which its map takes over."""

    height: int
    width: int
    wkt: str | None
    transform: tuple[float, ...] | None


def write_map(storage: Storage, path: str, place: Place, pieces: Iterable[Piece], record: Record) -> None:
    """The class map: values are the data set's own ids; palette, names and the model's hash are inside."""
    colors = {
        c.source_id: tuple(rgb)
        for c, rgb in zip(record.classes, palette(record.classes).tolist(), strict=True)
    }
    names = {c.source_id: c.name for c in record.classes}
    tags = {"CLASSES": json.dumps(names), "MODEL_SHA256": record.sha256, "MODEL_ARCH": record.arch}
    if path.endswith(".png"):
        _write_png(storage, path, place, pieces, tags=tags, colors=colors)
        return
    storage.write(f"{path}.aux.xml", category_names(names))
    _write_tiff(
        storage,
        path,
        place,
        pieces,
        [("class", {})],
        nodata=record.nodata,
        tags=tags,
        colors=colors,
        overviews="MODE",
    )


def write_entropy(storage: Storage, path: str, place: Place, pieces: Iterable[Piece], record: Record) -> None:
    """Entropy of every pixel, 0..254 for 0 to ln C nats; GeoTIFF readers are told the scale."""
    if path.endswith(".png"):
        tags = {"MEANING": "entropy, 254 is ln C nats, 255 unknown"}
        _write_png(storage, path, place, pieces, tags=tags, colors={})
        return
    scale = float(np.log(len(record.classes))) / 254
    bands: list[tuple[str, dict[str, str]]] = [("entropy", {"UNIT": "nats"})]
    _write_tiff(
        storage, path, place, pieces, bands, nodata=UNKNOWN, tags={}, scale=scale, overviews="AVERAGE"
    )


def write_probabilities(
    storage: Storage, path: str, place: Place, pieces: Iterable[Piece], record: Record
) -> None:
    """One band a class, 0..254 for 0 to 1; a GeoTIFF in any case."""
    bands = [(c.name, {"CLASS_ID": str(c.source_id)}) for c in record.classes]
    _write_tiff(
        storage, path, place, pieces, bands, nodata=UNKNOWN, tags={}, scale=1 / 254, overviews="AVERAGE"
    )


def _write_tiff(
    storage: Storage,
    path: str,
    place: Place,
    pieces: Iterable[Piece],
    bands: list[tuple[str, dict[str, str]]],
    *,
    nodata: int,
    overviews: str,
    tags: dict[str, str],
    colors: dict[int, tuple[int, ...]] | None = None,
    scale: float = 1.0,
) -> None:
    import rasterio
    from rasterio.crs import CRS
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.shutil import copy
    from rasterio.transform import Affine
    from rasterio.windows import Window

    pixels = place.height * place.width * len(bands)
    threads = max(1, min(len(os.sched_getaffinity(0)), pixels // THREADED))
    with (
        tempfile.TemporaryDirectory(prefix="raysed-") as folder,
        warnings.catch_warnings(),
        rasterio.Env(GDAL_CACHEMAX=256, GDAL_NUM_THREADS=threads, CPL_TMPDIR=folder),
    ):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        raw, made = os.path.join(folder, "raw.tif"), os.path.join(folder, "cog.tif")
        where = {"transform": Affine(*place.transform)} if place.transform else {}
        with rasterio.open(
            raw,
            "w",
            driver="GTiff",
            height=place.height,
            width=place.width,
            count=len(bands),
            dtype="uint8",
            nodata=nodata,
            crs=CRS.from_wkt(place.wkt) if place.wkt else None,
            tiled=True,
            blockxsize=512,
            blockysize=512,
            compress="DEFLATE",
            zlevel=1,
            interleave="band",
            bigtiff="IF_SAFER",
            **where,
        ) as file:
            for row, col, piece in pieces:
                file.write(piece, window=Window(col, row, piece.shape[2], piece.shape[1]))
            for number, (name, about) in enumerate(bands, start=1):
                file.set_band_description(number, name)
                file.update_tags(number, **about)
            file.update_tags(**tags)
            if scale != 1:
                file.scales = [scale] * len(bands)
            if colors:
                file.write_colormap(1, {nodata: (0, 0, 0, 0)} | {k: (*v, 255) for k, v in colors.items()})
        copy(
            raw,
            made,
            driver="COG",
            compress="DEFLATE",
            blocksize=512,
            overview_resampling=overviews,
            bigtiff="IF_SAFER",
        )
        storage.upload(path, made)


def _write_png(
    storage: Storage,
    path: str,
    place: Place,
    pieces: Iterable[Piece],
    *,
    tags: dict[str, str],
    colors: dict[int, tuple[int, ...]],
) -> None:
    whole = np.zeros((place.height, place.width), np.uint8)
    for row, col, piece in pieces:
        whole[row : row + piece.shape[1], col : col + piece.shape[2]] = piece[0]
    image, text = Pillow.fromarray(whole), PngInfo()
    if colors:
        table = np.zeros((256, 3), np.uint8)
        for value, color in colors.items():
            table[value] = color
        image.putpalette(table.tobytes())
    for key, said in tags.items():
        text.add_text(key, said)
    with tempfile.NamedTemporaryFile(prefix="raysed-", suffix=".png") as made:
        image.save(made, "PNG", pnginfo=text)
        made.flush()
        storage.upload(path, made.name)


def category_names(names: dict[int, str]) -> bytes:
    """GDAL's sidecar with the names of the values: what gdalinfo prints and QGIS shows in the legend."""
    lines = [f"      <Category>{escape(names.get(v, ''))}</Category>" for v in range(max(names) + 1)]
    body = "\n".join(lines)
    return (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{body}\n    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    ).encode()


def pack_piece(bands: np.ndarray) -> bytes:
    """(bands, h, w) uint8 to the bytes of a piece."""
    return zlib.compress(checkpoint.pack({"bands": torch.from_numpy(bands)}), 1)


def unpack_piece(data: bytes, where: str) -> np.ndarray:
    """Inverse of `pack_piece`.

    Raises:
        DataError: not a piece.
    """
    try:
        return checkpoint.unpack(zlib.decompress(data), where)["bands"].numpy()
    except (zlib.error, KeyError) as error:
        raise DataError(f"{where} is damaged ({error}): remove it, and it is made again") from error
