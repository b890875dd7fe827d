"""Imagery to map, and the labels that go with it: one file, a folder, a glob or a list, on disk or in a bucket."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from raysed.core.tiles import LandClass
from raysed.errors import UsageError
from raysed.io.sources import ENDINGS
from raysed.io.storage import Seen, Storage, digest


@dataclass(frozen=True)
class Image:
    """One image to map."""

    name: str
    """Its path below what was given, without ending: that of its map below the target."""
    root: str
    path: str
    """Below the root."""
    size: int
    """Of the file, bytes."""
    changed: int
    """When the file was last written, as `Storage.look` tells it."""

    @property
    def identity(self) -> str:
        """Tells it from other images, and from what its file held before, without reading it."""
        return digest(f"{self.root}/{self.path} {self.size} {self.changed}".encode())[:12]

    @property
    def ending(self) -> str:
        """Ending of its map: a GeoTIFF gives one, everything else a PNG."""
        return ".tif" if self.path.lower().endswith((".tif", ".tiff")) else ".png"


def find_images(given: str, target: str | None = None) -> tuple[Image, ...]:
    """The images that an argument names, sorted by name.

    Args:
        given: an image; a folder or s3:// prefix (its `images/`, if there is one, else everything below but `labels/`); a glob
            (`*`, `?`, and `**` for folders); or a .txt file of these images, one a line, relative to its own folder.
        target: folder of the maps; what lies below it is no image where it lies below what was given.

    Raises:
        UsageError: nothing there, a VRT, or two images of the same name.
    """
    if given.lower().endswith(".txt"):
        found = _listed(given)
    elif any(sign in given for sign in "*?"):
        found = _matching(given)
    elif given.lower().endswith((*ENDINGS, ".vrt")):
        found = _one(given)
    else:
        found = _below(Storage(given))
    if target:
        maps = Storage(target).uri
        found = [i for i in found if i.root == maps or not f"{i.root}/{i.path}".startswith(f"{maps}/")]
    if not found:
        raise UsageError(f"{given} holds no image ({', '.join(ENDINGS)})")
    by_name: dict[str, Image] = {}
    for image in found:
        other = by_name.setdefault(image.name, image)
        if other.path != image.path or other.root != image.root:
            raise UsageError(
                f"{image.root}/{image.path} and {other.root}/{other.path} would give the same map"
            )
    return tuple(by_name[n] for n in sorted(by_name))


def _below(storage: Storage) -> list[Image]:
    there = storage.look_below()
    if not there:
        raise UsageError(f"{storage.uri} does not exist or is empty")
    inside = [p for p in there if p.startswith("images/")]
    wanted = inside or [p for p in there if "labels" not in p.split("/")[:-1]]
    return _images(storage, wanted, there, base="images" if inside else "")


def _matching(given: str) -> list[Image]:
    parts = given.split("/")
    first = next(i for i, part in enumerate(parts) if "*" in part or "?" in part)
    storage = Storage("/".join(parts[:first]) or ("/" if given.startswith("/") else "."))
    pattern = re.compile(_regex("/".join(parts[first:])))
    there = storage.look_below()
    return _images(storage, [p for p in there if pattern.fullmatch(p)], there)


def _regex(glob: str) -> str:
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(known.get(piece) or re.escape(piece) for piece in re.split(r"(\*\*/|\*\*|\*|\?)", glob))


def _listed(given: str) -> list[Image]:
    folder, name = _split(given)
    try:
        lines = Storage(folder).read(name).decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"{given} does not exist") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{given} is no list of images, one a line ({error.reason})") from error
    found: list[Image] = []
    for line in filter(None, map(str.strip, lines)):
        found += _one(line if "://" in line or line.startswith("/") else f"{folder}/{line}")
    return found


def _one(given: str) -> list[Image]:
    folder, name = _split(given)
    storage = Storage(folder)
    _check_kind(f"{storage.uri}/{name}")
    if not storage.exists(name):
        raise UsageError(f"{given} does not exist")
    if not name.lower().endswith(ENDINGS):
        raise UsageError(f"{given} is no image ({', '.join(ENDINGS)})")
    return [Image(PurePosixPath(name).stem, storage.uri, name, *storage.look(name))]


def _split(given: str) -> tuple[str, str]:
    folder, _, name = given.rpartition("/")
    return folder or ("/" if given.startswith("/") else "."), name


def _images(storage: Storage, wanted: Iterable[str], there: dict[str, Seen], base: str = "") -> list[Image]:
    found = []
    for path in wanted:
        _check_kind(f"{storage.uri}/{path}")
        if any("\ud800" <= sign <= "\udfff" for sign in path):  # how Python keeps bytes that are no UTF-8
            raise UsageError(f"{storage.uri}: the name {path!a} is no UTF-8: rename the file")
        if path.lower().endswith(ENDINGS) and not PurePosixPath(path).name.startswith("."):
            name = str(PurePosixPath(path).relative_to(base).with_suffix(""))
            found.append(Image(name, storage.uri, path, *there[path]))
    return found


def _check_kind(uri: str) -> None:
    if uri.lower().endswith(".vrt"):
        raise UsageError(
            f"{uri} is a VRT, which may name any file or address: give the GeoTIFFs it is made of"
        )


def find_labels(uri: str, images: Iterable[Image], classes: tuple[LandClass, ...]) -> dict[str, Image]:
    """Labels by name of their image, from a folder of label files named as the images are.

    A `classes.json` in that folder or beside it must say the classes of the model.

    Args:
        uri: the folder.
        images: to be mapped.
        classes: of the model.

    Raises:
        UsageError: no label for any image, or other classes.
    """
    storage = Storage(uri)
    names = {i.name for i in images}
    there = storage.look_below()
    found = {i.name: i for i in _images(storage, there, there) if i.name in names}
    if not found:
        raise UsageError(f"{storage.uri} holds no label named as any of the {len(names)} images")
    above = storage.uri.rpartition("/")[0]
    for place in (storage, *([] if above in ("", "s3:/") else [Storage(above)])):
        if place.exists("classes.json"):
            _check_classes(f"{place.uri}/classes.json", place.read("classes.json"), classes)
    return found


def _check_classes(where: str, text: bytes, classes: tuple[LandClass, ...]) -> None:
    try:
        theirs = {int(c["id"]): str(c["name"]) for c in json.loads(text)["classes"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{where}: not a class list ({type(error).__name__}: {error})") from error
    ours = {c.source_id: c.name for c in classes}
    if theirs != ours:
        raise UsageError(
            f"the labels have other classes than the model: {where} says {_text(theirs)}, the model knows {_text(ours)}"
        )


def _text(classes: dict[int, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in sorted(classes.items()))
