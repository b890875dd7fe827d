"""Where tiles come from: folders of images and labels, on disk or in a bucket.

Two layouts are known.  OpenEarthMap: `<region>/images/<region>_<n>.tif`, `<region>/labels/...`, `train.txt` and `val.txt`.
Plain folder: `images/`, `labels/`, `classes.json`, `train.txt` and `val.txt`; without lists every image is a training image,
without a label it joins the pool of training tiles unlabelled.  Letters: H W pixels of a source.
"""

import contextlib
import hashlib
import io
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from raysed.core.tiles import OPENEARTHMAP, LandClass, check_id, label_lookup, region_of
from raysed.errors import StorageError, UsageError
from raysed.io.codec import stored_kind
from raysed.io.storage import Storage

Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, against the limits below, before anything is decoded
MAX_WHOLE = 1 << 28
"""Pixels of an image, or of one block of a GeoTIFF, that is decoded whole (PNG, JPEG, or anything resized)."""
MAX_WINDOWED = 1 << 30
"""Pixels of a GeoTIFF that is read window by window."""
MAX_FETCHED = 1 << 30
"""Bytes of a PNG or JPEG file."""
MAX_NAME = 187
"""Characters of a source's name: a tile id has 200, and the place of a tile in the longest image takes 13."""
_ORIENTATION = 0x0112
"""EXIF tag."""
FETCHED = 64 << 20
"""Bytes up to which a GeoTIFF in a bucket is fetched at once; of a larger one only what its windows need."""
_TIFF, _PILLOW = (".tif", ".tiff"), {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
ENDINGS = (*_TIFF, *_PILLOW)
_MAGIC = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"<": "text",
}


@dataclass(frozen=True)
class Rule:
    """How an image of other bands or of 16 bits becomes 8-bit RGB; the plain rule takes 8-bit RGB and nothing else."""

    bands: tuple[int, int, int] | None = None
    """Numbers of the bands that are red, green and blue, counted from 1; None takes the three of an image of three."""
    stretch: tuple[int, int] | None = None
    """Values of a 16-bit image that become 0 and 255, linearly and clipped; None takes an image of 8 bits."""

    def __post_init__(self) -> None:
        if self.bands is not None and (len(self.bands) != 3 or min(self.bands) < 1):
            raise UsageError(f"--bands must be three numbers from 1 on, such as 3,2,1, got {self.bands}")
        if self.stretch is not None and (
            len(self.stretch) != 2 or not 0 <= self.stretch[0] < self.stretch[1] <= 65535
        ):
            raise UsageError(
                f"--stretch must be two rising values of 0..65535, such as 0,3000, got {self.stretch}"
            )

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Rule":
        """From its JSON."""
        return cls(**{name: values and tuple(values) for name, values in fields.items()})

    @property
    def kind(self) -> str:
        """Type of a pixel that it takes."""
        return "uint16" if self.stretch else "uint8"

    def takes(self, bands: int) -> bool:
        """Whether it takes an image of so many bands."""
        return bands >= max(self.bands) if self.bands else bands == 3

    def pick(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W) or (H, W, bands) to (H, W, 3) of the same type."""
        if self.bands is None:
            return pixels
        bands = pixels if pixels.ndim == 3 else pixels[..., None]
        return bands[..., [b - 1 for b in self.bands]]

    def to_bytes(self, pixels: np.ndarray) -> np.ndarray:
        """Values to uint8, of any shape."""
        if self.stretch is None:
            return pixels
        low, high = self.stretch
        table = np.rint(np.clip((np.arange(1 << 16) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        out = np.empty(pixels.shape, np.uint8)
        for part, values in zip(out, pixels, strict=True):  # looking up makes 8 bytes of every value
            part[...] = table[values]
        return out

    def __str__(self) -> str:
        """As the flags of prepare."""
        flags = {"--bands": self.bands, "--stretch": self.stretch}
        said = [f"{k} {','.join(map(str, v))}" for k, v in flags.items() if v]
        return " ".join(said) or "8-bit RGB"


PLAIN = Rule()


class BadSource(Exception):
    """A source that cannot be used; the text says why.

    Args:
        reason: what was found.
        path: of the offending file, empty if it is missing.
        size: of that file, bytes.
    """

    def __init__(self, reason: str, path: str = "", size: int = 0) -> None:
        super().__init__(reason)
        self.path, self.size = path, size

    def sha256(self, storage: Storage) -> str:
        """Of the offending file's bytes, which are read in whole; empty if there are none.

        Raises:
            StorageError: the storage cannot be reached.
        """
        if not self.path:
            return ""
        sha = hashlib.sha256()
        for start in range(0, self.size, FETCHED):
            span = start, min(FETCHED, self.size - start)
            sha.update(storage.read_ranges(self.path, [span])[0])
        return sha.hexdigest()


@dataclass(frozen=True)
class Source:
    """One image and its label."""

    name: str
    region: str
    split: str
    image: str
    """Path below the layout's root."""
    label: str | None
    image_bytes: int | None
    """Size of the image file; None if it is missing."""
    label_bytes: int | None
    """Size of the label file; None if there is none, or it is missing."""


@dataclass(frozen=True)
class Layout:
    """What a folder holds."""

    kind: str
    """`openearthmap`, `folder` or `synthetic`."""
    name: str
    classes: tuple[LandClass, ...]
    """Empty for a pool without labels and without a class list."""
    ignore: tuple[int, ...]
    sources: tuple[Source, ...]
    """Sorted by name; a listed image that is not there is among them."""
    remap: tuple[tuple[int, int | None], ...] = ()
    """(value in the label files, id of its class or None for void) by value; empty: values are ids."""
    notes: tuple[str, ...] = ()
    """What is there and is not what one might take it for, a line each."""

    def lookup(self) -> np.ndarray:
        """(256,) int16 from a value in the label files to the stored label: 1..C, 0 for void, -1 for unknown values."""
        table = label_lookup(self.classes, self.ignore)
        if not self.remap:
            return table
        found = np.full(256, -1, np.int16)
        for value, wanted in self.remap:
            found[value] = 0 if wanted is None else table[wanted]
        return found


def find(storage: Storage, classes_file: str | None = None) -> Layout:
    """The layout below a root.

    Args:
        storage: the root.
        classes_file: path of a `classes.json` on this machine, instead of the folder's own.

    Raises:
        UsageError: nothing there, no images, names used twice, a bad list or a bad classes.json.
    """
    paths = storage.list()
    if not paths:
        raise UsageError(f"{storage.uri} does not exist or is empty")
    images = {p: n for p, n in paths.items() if _is_image(PurePosixPath(p))}
    lists = {s: _names(storage, f"{s}.txt") for s in ("train", "val") if f"{s}.txt" in paths}
    plain = any(p.startswith("images/") for p in images)
    regional = not plain and any(p.split("/")[1:-1] == ["images"] for p in images)
    if regional and not lists:
        raise UsageError(f"{storage.uri} has OpenEarthMap's folders but neither train.txt nor val.txt")
    sources = openearthmap_sources(lists, images) if regional else _folder(storage, lists, images)
    found = _sorted(sources, storage)
    if not found or not images:
        raise UsageError(f"{storage.uri} holds no image ({', '.join(ENDINGS)})")
    known = _classes(storage, paths, classes_file)
    if known is None and regional:
        known = ("openearthmap", OPENEARTHMAP, (0,))
    elif known is None and any(s.label for s in found):
        raise UsageError(f"{storage.uri} has labels but no classes.json: add one or give --classes FILE")
    name, classes, ignore = known or (PurePosixPath(storage.uri).name, (), ())
    notes = () if regional else _notes(lists, images, found)
    return Layout("openearthmap" if regional else "folder", name, classes, ignore, found, notes=notes)


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def _names(storage: Storage, path: str) -> list[str]:
    try:
        lines = storage.read(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{storage.uri}/{path} is no list of names, one a line ({error.reason})") from error
    return [line.strip() for line in lines if line.strip()]


def openearthmap_sources(lists: dict[str, list[str]], images: dict[str, int]) -> Iterator[Source]:
    """Sources of the OpenEarthMap lists ({train: names, val: names}); `images` is path -> bytes of what is there."""
    for split, names in lists.items():
        for file in names:
            stem = PurePosixPath(file).stem
            region = region_of(stem)
            image, label = f"{region}/images/{file}", f"{region}/labels/{file}"
            yield Source(stem, region, split, image, label, images.get(image), images.get(label))


def _folder(storage: Storage, lists: dict[str, list[str]], images: dict[str, int]) -> Iterator[Source]:
    inside = [p for p in images if p.startswith("images/")] or [p for p in images if "/" not in p]
    by_stem = _by_stem(storage, inside)
    labels = _by_stem(storage, [p for p in images if p.startswith("labels/")])
    for split, names in (lists or {"train": list(by_stem)}).items():
        for file in names:
            stem = PurePosixPath(file).stem if lists and _is_image(PurePosixPath(file)) else file
            image, label = by_stem.get(stem, f"images/{file}"), labels.get(stem)
            yield Source(
                stem,
                region_of(stem),
                split if label else "train",  # a tile without truth can validate nothing
                image,
                label,
                images.get(image),
                images[label] if label else None,
            )


def _notes(lists: dict[str, list[str]], images: dict[str, int], found: Sequence[Source]) -> tuple[str, ...]:
    """Names that do not match are no error: a pool has no labels, and a list may name a part of a folder."""
    bare = [s for s in found if s.image_bytes is not None and not s.label]
    used = {s.image for s in found} | {s.label for s in found}
    labels = [p for p in images if p.startswith("labels/") and p not in used]
    others = [p for p in images if p not in used and not p.startswith("labels/")]
    listed = {PurePosixPath(name).stem for name in lists.get("val", ())} | {*lists.get("val", ())}
    moved = [s for s in bare if s.name in listed]
    lines = []
    if bare and len(bare) < len(found):
        lines.append(f"{len(bare)} images have no label of their name, the first is {bare[0].image}")
    if moved:
        lines.append(
            f"{len(moved)} of these are listed for validation and go to training, the first is {moved[0].image}"
        )
    if labels:
        lines.append(f"{len(labels)} labels have no image of their name, the first is {min(labels)}")
    if others:
        lines.append(
            f"{len(others)} images are left aside, neither in images/ nor listed, the first is {min(others)}"
        )
    return tuple(lines)


def _by_stem(storage: Storage, paths: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        other = found.setdefault(PurePosixPath(path).stem, path)
        if other != path:
            raise UsageError(f"{storage.uri}: {other} and {path} have the same name")
    return found


def _sorted(sources: Iterable[Source], storage: Storage) -> tuple[Source, ...]:
    by_name: dict[str, Source] = {}
    for source in sources:
        try:
            check_id(source.name)
        except ValueError as error:
            raise UsageError(f"{storage.uri}: {error}") from error
        if len(source.name) > MAX_NAME:
            raise UsageError(
                f"{storage.uri}: the name {source.name[:40]}... has {len(source.name)} characters, at most {MAX_NAME} leave room "
                "for the place of a tile"
            )
        if source.name in by_name:
            raise UsageError(
                f"{storage.uri}: source {source.name} is listed twice ({by_name[source.name].split} and {source.split})"
            )
        by_name[source.name] = source
    return tuple(by_name[n] for n in sorted(by_name))


def _classes(
    storage: Storage, paths: dict[str, int], classes_file: str | None
) -> tuple[str, tuple[LandClass, ...], tuple[int, ...]] | None:
    if classes_file:
        where, data = classes_file, _local("--classes", classes_file)
    elif "classes.json" in paths:
        where, data = f"{storage.uri}/classes.json", storage.read("classes.json")
    else:
        return None
    name, classes, ignore, _ = _class_list(data, where)
    return name or "folder", classes, ignore


def _class_list(
    data: bytes, where: str
) -> tuple[str | None, tuple[LandClass, ...], tuple[int, ...], dict[str, Any]]:
    """Name, classes and ignored ids of a `classes.json`, and all of its fields.

    Raises:
        UsageError: it is none.
    """
    try:
        fields = json.loads(data)
        classes = tuple(LandClass(c["name"], c["color"], int(c["id"])) for c in fields["classes"])
        ignore = tuple(int(i) for i in fields.get("ignore", []))
        ids = [c.source_id for c in classes] + list(ignore)
        if len(set(ids)) < len(ids) or not classes or not all(0 <= i <= 255 for i in ids):
            raise ValueError(f"class and ignore ids must be different and in 0..255, got {ids}")
        return fields.get("name"), classes, ignore, fields
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = '{"classes": [{"id": 1, "name": "roof", "color": "#DE1F07"}, ...]}'
        raise UsageError(
            f"{where}: not a class list ({type(error).__name__}: {error}), expected {wanted}"
        ) from error


def remapped(layout: Layout, file: str) -> Layout:
    """A layout whose labels become other classes.

    Args:
        layout: of a source with classes.
        file: path of a `classes.json` of the classes wanted, on this machine, with `map` beside them: for each class of the
            source, by name or id, the name or id of the class that it becomes, or "ignore".

    Raises:
        UsageError: no such file, a class of the source that is left out, or a class that neither side has.
    """
    name, classes, ignore, fields = _class_list(_local("--remap", file), file)
    if not layout.classes:
        raise UsageError(f"--remap {file}: the source has no classes to map (no labels, no classes.json)")
    wanted = fields.get("map")
    if not isinstance(wanted, dict):
        raise UsageError(f'{file}: "map" must say what each class of the source becomes')
    found: dict[int, int | None] = dict.fromkeys(layout.ignore)
    for key, value in wanted.items():
        here = _known(key, layout.classes, f"{file}: map names {key!r}, the source's classes are")
        if here in found:
            raise UsageError(f"{file}: map names class {here} of the source twice")
        there = f"{file}: map makes {key!r} {value!r}, the classes wanted are"
        found[here] = None if value == "ignore" else _known(value, classes, there)
    if missing := [c.name for c in layout.classes if c.source_id not in found]:
        raise UsageError(
            f'{file}: map leaves out {", ".join(missing)}: say the class that it becomes, or "ignore"'
        )
    return replace(
        layout,
        name=name or layout.name,
        classes=classes,
        ignore=ignore,
        remap=tuple(sorted(found.items(), key=lambda pair: pair[0])),
    )


def _known(named: Any, classes: Sequence[LandClass], otherwise: str) -> int:
    """Id of the class of a name or an id."""
    for key in ("name", "source_id"):
        for c in classes:
            if str(getattr(c, key)) == str(named):
                return c.source_id
    raise UsageError(f"{otherwise} {', '.join(f'{c.source_id} {c.name}' for c in classes)}")


def _local(flag: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from error


class _Ranged(io.RawIOBase):
    """A stored object as a file of which only what is read is fetched.

    What goes wrong in the storage is put into `failures`: decoders would swallow it, and it is no fault of the file.
    """

    def __init__(self, storage: Storage, path: str, size: int, failures: list[Exception]) -> None:
        self.storage, self.path, self.size, self.failures, self.at = storage, path, size, failures, 0

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self.size - self.at)
        if length <= 0:
            return 0
        try:
            [data] = self.storage.read_ranges(self.path, [(self.at, length)])
        except (StorageError, FileNotFoundError) as error:
            self.failures.append(error)
            return 0
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class Raster:
    """One open image: its size, its place on earth, and its pixels by windows.

    Args:
        storage: root.
        path: below it.
        size: of the file, bytes; None if it is missing.
        bands: 3 for an image, 1 for a label.
        limit: pixels of a GeoTIFF.
        rule: how an image becomes 8-bit RGB.
    """

    height: int
    width: int

    def __init__(
        self,
        storage: Storage,
        path: str,
        size: int | None,
        bands: int,
        limit: int = MAX_WINDOWED,
        *,
        rule: Rule = PLAIN,
    ) -> None:
        self.storage, self.path, self.size, self.bands, self.limit = storage, path, size, bands, limit
        self.rule = rule
        self.crs: str | None = None
        self.wkt: str | None = None
        """The CRS in full: an EPSG code can be the nearest one only."""
        self.transform: tuple[float, ...] | None = None
        self.nodata: float | None = None
        self._failures: list[Exception] = []
        self._whole: np.ndarray | None = None
        self._tiff: Any = None

    @contextmanager
    def opened(self, *, header: bool = False) -> Iterator["Raster"]:
        """Check and keep open; with `header` nothing but the header is fetched.

        Raises:
            BadSource: missing, another format, bands or type than expected, or too large: all read from the header.
            StorageError: the storage cannot be reached (that is no fault of the file).
        """
        with ExitStack() as stack:
            try:
                if self.size is None:
                    raise FileNotFoundError
                if PurePosixPath(self.path).suffix.lower() in _TIFF:
                    self._open_tiff(stack, header)
                else:
                    self._open_pillow(header)
            except FileNotFoundError as error:
                raise BadSource(f"{self.path} is missing") from error
            yield self

    def _ranged_file(self) -> BinaryIO:
        return io.BufferedReader(_Ranged(self.storage, self.path, self.size or 0, self._failures), 1 << 16)

    def _open_tiff(self, stack: ExitStack, header: bool) -> None:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError

        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        options = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": 256, "CPL_LOG_ERRORS": "OFF"}
        stack.enter_context(rasterio.Env(**options))
        head = self.storage.read_ranges(self.path, [(0, 16)])[0] if self.size else b""
        try:
            if not head:
                raise RasterioError("no bytes")  # a MemoryFile without bytes is one to write to
            if local := self.storage.local_path(self.path):
                raster = rasterio.open(local, driver="GTiff")
            elif header or (self.size or 0) > FETCHED:
                raster = rasterio.open(
                    "image.tif", driver="GTiff", opener=lambda *_, **__: self._ranged_file()
                )
            else:
                whole = stack.enter_context(rasterio.MemoryFile(self.storage.read(self.path)))
                raster = whole.open(driver="GTiff")
        except RasterioError as error:
            raise self.bad(f"is no readable GeoTIFF ({_kind(head)})") from error
        stack.enter_context(raster)
        self._storage_held()
        self._tiff, self.height, self.width = raster, raster.height, raster.width
        self._check(raster.count, set(raster.dtypes), self.limit)
        rows, cols = raster.block_shapes[0]
        if rows * cols > MAX_WHOLE:
            raise self.bad(f"is stored in blocks of {cols} x {rows} pixels, at most {MAX_WHOLE} are read")
        self.crs, self.nodata = _crs(raster.crs), raster.nodata
        self.wkt = raster.crs.to_wkt() if raster.crs else None
        if not raster.transform.is_identity:
            self.transform = tuple(raster.transform)[:6]

    def _open_pillow(self, header: bool) -> None:
        form = _PILLOW[PurePosixPath(self.path).suffix.lower()]
        if (self.size or 0) > MAX_FETCHED:
            raise self.bad(f"has {self.size} bytes, at most {MAX_FETCHED} are read")
        file = self._ranged_file() if header else io.BytesIO(self.storage.read(self.path))
        head = file.read(16)
        file.seek(0)
        try:
            self._image = Image.open(file, formats=[form])
        except Exception as error:  # Pillow raises many kinds for a broken header
            raise self.bad(f"is no readable {form} ({_kind(head)})") from error
        self._storage_held()
        self.width, self.height = self._image.size
        if self.bands == 1 and form == "JPEG":
            raise self.bad("is a JPEG, which changes class codes near borders: give PNG or GeoTIFF")
        turned = 1
        if form == "JPEG":  # to ask a PNG would decode it
            with contextlib.suppress(Exception):  # broken EXIF turns nothing
                turned = self._image.getexif().get(_ORIENTATION, 1)
        if turned != 1:
            raise self.bad(
                f"is turned by its EXIF orientation {turned}: save it upright, as its label is drawn"
            )
        mode, names = self._image.mode, self._image.getbands()
        kind = "uint8" if mode in ("RGB", "RGBA", "L", "LA") or (mode, self.bands) == ("P", 1) else mode
        stored = stored_kind(self._image)
        if len(names) > 1 and ";16" in stored:
            kind = "uint16 (of which a PNG would give the upper halves: make a GeoTIFF of it)"
        elif stored in ("L;2", "L;4"):
            kind = f"{stored[2]}-bit grey, which is a scale and no codes"
        self._check(len(names), {"uint16" if mode == "I;16" else kind}, MAX_WHOLE)

    def _check(self, bands: int, kinds: set[str], limit: int) -> None:
        if self.height * self.width > limit:
            raise self.bad(f"has {self.width} x {self.height} pixels, at most {limit} are read")
        image = self.bands == 3
        kind = self.rule.kind if image else "uint8"
        if kinds != {kind} or not (self.rule.takes(bands) if image else bands == self.bands):
            least = f"at least {max(self.rule.bands)}" if image and self.rule.bands else self.bands
            rule = f" ({self.rule})" if image and self.rule != PLAIN else ""
            raise self.bad(
                f"has {bands} bands of {', '.join(sorted(kinds))}, expected {least} of {kind}{rule}"
            )

    def read(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) or (height, width) uint8 window.

        Raises:
            BadSource: the pixels cannot be decoded.
            StorageError: the storage cannot be reached.
        """
        if self._tiff is not None:
            return self._read_tiff(row, col, height, width)
        if self._whole is None:
            try:
                self._image.load()
                whole = np.asarray(self._image)
                self._whole = self.rule.to_bytes(self.rule.pick(whole)) if self.bands == 3 else whole
            except Exception as error:  # truncated or corrupt pixel data, of whatever kind
                raise self.bad(f"cannot be decoded ({_line(error)})") from error
        return np.ascontiguousarray(self._whole[row : row + height, col : col + width])

    def _read_tiff(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        wanted = self.rule.bands if self.bands == 3 else None
        try:
            found = self._tiff.read(indexes=wanted, window=Window(col, row, width, height))
        except RasterioError as error:
            raise self.bad(f"cannot be decoded ({_line(error.__cause__ or error)})") from error
        self._storage_held()
        return (
            np.ascontiguousarray(self.rule.to_bytes(found).transpose(1, 2, 0))
            if self.bands == 3
            else found[0]
        )

    def valid(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        """(height, width) bool: False where the file says that there is no data.

        Raises:
            BadSource: the mask cannot be decoded.
        """
        from rasterio.enums import MaskFlags
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        if self._tiff is None or all(MaskFlags.all_valid in flags for flags in self._tiff.mask_flag_enums):
            return np.ones((height, width), bool)
        try:
            mask = self._tiff.dataset_mask(window=Window(col, row, width, height))
        except RasterioError as error:
            raise self.bad(f"cannot be decoded ({_line(error.__cause__ or error)})") from error
        self._storage_held()
        return mask > 0

    def bad(self, what: str) -> BadSource:
        """The error that this file gives.

        Raises:
            StorageError: it is the storage that failed, not the file.
        """
        self._storage_held()
        return BadSource(f"{self.path} {what}", self.path, self.size or 0)

    def _storage_held(self) -> None:
        """Raise what went wrong in the storage: a decoder takes a lost range for a broken file, or for none at all."""
        for failure in self._failures:
            if isinstance(failure, FileNotFoundError):
                raise BadSource(f"{self.path} is missing") from failure
            raise failure


def size(storage: Storage, source: Source, rule: Rule) -> tuple[int, int]:
    """(height, width) of a source, from its header.

    Raises:
        BadSource: it cannot be used.
    """
    with Raster(storage, source.image, source.image_bytes, 3, rule=rule).opened(header=True) as image:
        return image.height, image.width


def ground_size(crs: str | None, transform: Sequence[float] | None) -> tuple[float, float] | None:
    """Height and width of a pixel in metres of the CRS, in a Mercator projection on the ground of the first pixel; None without a
    place on earth, or in degrees.
    """
    if not crs or transform is None:
        return None
    from rasterio.crs import CRS

    parsed = CRS.from_user_input(crs)
    if not parsed.is_projected:
        return None
    unit = parsed.linear_units_factor[1]
    a, b, c, d, e, f = transform
    known = parsed.to_dict()
    if known.get("proj") in ("merc", "webmerc"):
        from rasterio.warp import transform as moved

        latitude = moved(parsed, "EPSG:4326", [c], [f])[1][0]
        unit *= math.cos(math.radians(latitude)) / math.cos(math.radians(known.get("lat_ts", 0)))
    return math.hypot(b, e) * unit, math.hypot(a, d) * unit


def corners(
    crs: str | None, transform: Sequence[float] | None, side: int
) -> list[tuple[float, float]] | None:
    """Longitude and latitude (WGS 84) of a tile's four corners, counter-clockwise on a map whose north is up; None without a
    place on earth.
    """
    if not crs or transform is None:
        return None
    from rasterio.warp import transform as moved

    a, b, c, d, e, f = transform
    at = [(0, 0), (side, 0), (side, side), (0, side)]  # row, column
    xs, ys = [a * col + b * row + c for row, col in at], [d * col + e * row + f for row, col in at]
    longitudes, latitudes = moved(crs, "EPSG:4326", xs, ys)[:2]
    return [(round(x, 9), round(y, 9)) for x, y in zip(longitudes, latitudes, strict=True)]


def _crs(crs: Any) -> str | None:
    if not crs:
        return None
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else crs.to_wkt()


def _kind(head: bytes) -> str:
    """What a file is, from its first bytes."""
    if not head:
        return "it is empty"
    known = [kind for magic, kind in _MAGIC.items() if head.startswith(magic)]
    return f"it is {known[0]}, broken or of another kind" if known else f"it starts with {head[:8]!r}"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
