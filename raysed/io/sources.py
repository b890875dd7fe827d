"""Where tiles come from: folders of images and labels, on disk or in a bucket.

Two layouts are known.  OpenEarthMap: `<region>/images/<region>_<n>.tif`, `<region>/labels/...`, `train.txt` and `val.txt`.
Plain folder: `images/`, `labels/`, `classes.json`, `train.txt` and `val.txt`; without lists every image is a training image,
without a label it joins the pool unlabelled.  Letters: H W pixels of a source.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from raysed.core.tiles import OPENEARTHMAP, LandClass, check_id, region_of
from raysed.errors import UsageError
from raysed.io.checkpoint import digest
from raysed.io.storage import Storage

Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, against the limits below, before anything is decoded
MAX_WHOLE = 1 << 28
"""Pixels of an image that is decoded whole (PNG, JPEG, or anything resized)."""
MAX_WINDOWED = 1 << 32
"""Pixels of a GeoTIFF that is read window by window."""
_TIFF, _PILLOW = (".tif", ".tiff"), {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
ENDINGS = (*_TIFF, *_PILLOW)


class BadSource(Exception):
    """A source that cannot be used; the text says why.

    Args:
        reason: what was found.
        sha256: of the offending file's bytes, empty if there are none.
    """

    def __init__(self, reason: str, sha256: str = "") -> None:
        super().__init__(reason)
        self.sha256 = sha256


@dataclass(frozen=True)
class Source:
    """One image and its label."""

    name: str
    region: str
    split: str
    image: str
    """Path below the layout's root."""
    label: str | None
    bytes: int
    """Of the image file; 0 if it is missing."""


@dataclass(frozen=True)
class Layout:
    """What a folder holds."""

    kind: str
    """`openearthmap` or `folder`."""
    name: str
    classes: tuple[LandClass, ...]
    ignore: tuple[int, ...]
    sources: tuple[Source, ...]
    """Sorted by name; a listed image that is not there has 0 bytes."""


def find(storage: Storage, classes_file: str | None = None) -> Layout:
    """The layout below a root.

    Args:
        storage: the root.
        classes_file: path of a `classes.json` on this machine, instead of the folder's own.

    Raises:
        UsageError: nothing there, no images, names used twice, or a bad classes.json.
    """
    paths = storage.list()
    if not paths:
        raise UsageError(f"{storage.uri} does not exist or is empty")
    name, classes, ignore = _classes(storage, paths, classes_file)
    images = {p: n for p, n in paths.items() if PurePosixPath(p).suffix.lower() in ENDINGS}
    lists = {s: storage.read(f"{s}.txt").decode().split() for s in ("train", "val") if f"{s}.txt" in paths}
    if lists and not any(p.startswith(("images/", "labels/")) for p in images):
        return Layout(
            "openearthmap", name, classes, ignore, _sorted(openearthmap_sources(lists, images), storage)
        )
    found = _sorted(_folder(lists, images), storage)
    if not found:
        raise UsageError(f"{storage.uri} holds no image ({', '.join(ENDINGS)})")
    return Layout("folder", name, classes, ignore, found)


def openearthmap_sources(lists: dict[str, list[str]], images: dict[str, int]) -> Iterator[Source]:
    """Sources of the OpenEarthMap lists ({train: names, val: names}); `images` is path -> bytes of what is there."""
    for split, names in lists.items():
        for file in names:
            stem = PurePosixPath(file).stem
            region = region_of(stem)
            image = f"{region}/images/{file}"
            yield Source(stem, region, split, image, f"{region}/labels/{file}", images.get(image, 0))


def _folder(lists: dict[str, list[str]], images: dict[str, int]) -> Iterator[Source]:
    inside = [p for p in images if p.startswith("images/")] or [p for p in images if "/" not in p]
    by_stem = {PurePosixPath(p).stem: p for p in inside}
    labels = {PurePosixPath(p).stem: p for p in images if p.startswith("labels/")}
    if not lists:
        lists = {"train": [PurePosixPath(p).name for p in inside]}
    for split, names in lists.items():
        for file in names:
            stem = PurePosixPath(file).stem if PurePosixPath(file).suffix.lower() in ENDINGS else file
            image = by_stem.get(stem, f"images/{file}")
            yield Source(stem, region_of(stem), split, image, labels.get(stem), images.get(image, 0))


def _sorted(sources: Iterator[Source], storage: Storage) -> tuple[Source, ...]:
    by_name: dict[str, Source] = {}
    for source in sources:
        try:
            check_id(source.name)
        except ValueError as error:
            raise UsageError(f"{storage.uri}: {error}") from error
        if source.name in by_name:
            raise UsageError(
                f"{storage.uri}: source {source.name} is listed twice ({by_name[source.name].split} and {source.split})"
            )
        by_name[source.name] = source
    return tuple(by_name[n] for n in sorted(by_name))


def _classes(
    storage: Storage, paths: dict[str, int], classes_file: str | None
) -> tuple[str, tuple[LandClass, ...], tuple[int, ...]]:
    if classes_file:
        where, data = classes_file, _local(classes_file)
    elif "classes.json" in paths:
        where, data = f"{storage.uri}/classes.json", storage.read("classes.json")
    else:
        return "openearthmap", OPENEARTHMAP, (0,)
    try:
        fields = json.loads(data)
        classes = tuple(LandClass(c["name"], c["color"], c["id"]) for c in fields["classes"])
        ignore = tuple(int(i) for i in fields.get("ignore", []))
        ids = [c.source_id for c in classes] + list(ignore)
        if len(set(ids)) < len(ids) or not classes:
            raise ValueError(f"class and ignore ids must be different, got {ids}")
        return str(fields.get("name", "folder")), classes, ignore
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{where}: not a class list ({type(error).__name__}: {error})") from error


def _local(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"--classes {path}: {error.strerror}") from error


class Raster:
    """One open image: its size, its place on earth, and its pixels by windows.

    Args:
        storage: root.
        path: below it.
        bands: 3 for an image, 1 for a label.

    Raises (on entering):
        BadSource: missing, another format, bands or type than expected, or too large; read from the header.
    """

    def __init__(self, storage: Storage, path: str, bands: int) -> None:
        self.storage, self.path, self.bands = storage, path, bands
        self.crs: str | None = None
        self.transform: tuple[float, ...] | None = None
        self.data = b""
        self._whole: np.ndarray | None = None

    @contextmanager
    def opened(self) -> Iterator["Raster"]:
        """Read the header; close again at the end."""
        try:
            self.data = self.storage.read(self.path)
        except FileNotFoundError as error:
            raise BadSource(f"{self.path} is missing") from error
        if PurePosixPath(self.path).suffix.lower() in _TIFF:
            with self._opened_tiff():
                yield self
        else:
            self._open_pillow()
            yield self

    @contextmanager
    def _opened_tiff(self) -> Iterator[None]:
        import rasterio
        from rasterio.errors import RasterioError

        with (
            rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", CPL_LOG_ERRORS="OFF"),
            rasterio.MemoryFile(self.data) as file,
        ):
            try:
                raster = file.open(driver="GTiff")
            except RasterioError as error:
                raise self.bad(f"is no readable GeoTIFF ({_line(error)})") from error
            with raster:
                self.height, self.width, self._tiff = raster.height, raster.width, raster
                self._check(raster.count, set(raster.dtypes), MAX_WINDOWED)
                self.crs = _crs(raster.crs)
                if not raster.transform.is_identity:
                    self.transform = tuple(raster.transform)[:6]
                yield

    def _open_pillow(self) -> None:
        form = _PILLOW[PurePosixPath(self.path).suffix.lower()]
        try:
            self._image = Image.open(io.BytesIO(self.data), formats=[form])
        except Exception as error:  # Pillow raises many kinds for a broken header
            raise self.bad(f"is no {form} ({_line(error)})") from error
        self.width, self.height = self._image.size
        bands = {"RGB": 3, "L": 1, "P": 1}.get(self._image.mode, len(self._image.getbands()))
        kind = "uint8" if self._image.mode in ("RGB", "RGBA", "L", "P", "LA") else self._image.mode
        self._check(bands, {kind}, MAX_WHOLE)
        self._tiff = None

    def _check(self, bands: int, kinds: set[str], limit: int) -> None:
        if self.height * self.width > limit:
            raise self.bad(f"has {self.width} x {self.height} pixels, at most {limit} are read")
        if bands != self.bands or kinds != {"uint8"}:
            raise self.bad(f"has {bands} bands of {', '.join(sorted(kinds))}, expected {self.bands} of uint8")

    def read(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) or (height, width) uint8 window.

        Raises:
            BadSource: the pixels cannot be decoded.
        """
        if self._tiff is not None:
            return self._read_tiff(row, col, height, width)
        if self._whole is None:
            try:
                self._whole = np.asarray(self._image)
            except Exception as error:  # truncated or corrupt pixel data, of whatever kind
                raise self.bad(f"cannot be decoded ({_line(error)})") from error
        return np.ascontiguousarray(self._whole[row : row + height, col : col + width])

    def _read_tiff(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        try:
            found = self._tiff.read(window=Window(col, row, width, height))  # type: ignore[union-attr]
        except RasterioError as error:
            raise self.bad(f"cannot be decoded ({_line(error)})") from error
        return np.ascontiguousarray(found.transpose(1, 2, 0)) if self.bands == 3 else found[0]

    def bad(self, what: str) -> BadSource:
        """The error that this file gives."""
        return BadSource(f"{self.path} {what}", digest(self.data))


def size(storage: Storage, source: Source) -> tuple[int, int]:
    """(height, width) of a source, from its header.

    Raises:
        BadSource: it cannot be used.
    """
    with Raster(storage, source.image, 3).opened() as image:
        return image.height, image.width


def _crs(crs: Any) -> str | None:
    if not crs:
        return None
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else crs.to_wkt()


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
