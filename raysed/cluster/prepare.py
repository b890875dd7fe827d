"""Images to tile store with Ray Data: plan, cut, pack.

INPUT: a layout of sources.  FAN-OUT: one task a shard, each reading its sources, writing the shard and, as its commit, its piece
of the index; a shard whose piece exists is not made again.  OUTPUT: a finished tile store.
"""

import hashlib
import io
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysed.cluster.connect import check_paths, connect
from raysed.cluster.room import secure_task
from raysed.cluster.tasks import run_tasks
from raysed.core import tiles
from raysed.core.tiles import OPENEARTHMAP, shard_path
from raysed.errors import DataError, UsageError
from raysed.io import codec, sources, store
from raysed.io.ledger import table_bytes
from raysed.io.sources import PLAIN, BadSource, Layout, Raster, Rule, Source
from raysed.io.storage import Storage
from raysed.io.store import BadTile

TILES_A_SHARD = 128
SCENE_SIDE = 256
"""Side of a synthetic scene, pixels."""
_SOURCES = ("sources", "listing", "stamps")
"""What a plan says of its sources: their number, names and sizes, and when they were written."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What determines a store besides its sources."""

    resize: int | None = None
    """Side that every source is resized to, pixels; None leaves it."""
    tile: int = 256
    """Side of the windows cut, pixels of the (resized) source."""
    store: int | None = None
    """Side of the tiles stored; None means `tile`."""
    seed: int = 0
    """Of the synthetic world."""
    rule: Rule = PLAIN
    """How the images become 8-bit RGB."""

    def __post_init__(self) -> None:
        for name in ("resize", "tile", "store"):
            value = getattr(self, name)
            if value is not None and not 16 <= value <= 4096:
                raise UsageError(f"{name} must lie in 16..4096 pixels, got {value}")
        if self.resize and self.resize < self.tile:
            raise UsageError(f"resize {self.resize} is smaller than tile {self.tile}: no tile would fit")

    @property
    def side(self) -> int:
        """Side of a stored tile."""
        return self.store or self.tile


@dataclass(frozen=True)
class Work:
    """Windows first..last (exclusive) of one source, counted row by row over its grid."""

    source: Source
    rows: int
    cols: int
    first: int
    last: int


def pack(grids: Sequence[tuple[Source, int, int]], limit: int = TILES_A_SHARD) -> list[list[Work]]:
    """Shards of about `limit` tiles from (source, rows, cols) in order of name: whole sources where they fit."""
    shards: list[list[Work]] = []
    room = 0
    for source, rows, cols in grids:
        count = rows * cols
        if count > room and count <= limit:
            room = 0
        first = 0
        while first < count:
            if not room:
                shards.append([])
                room = limit
            last = min(count, first + room)
            shards[-1].append(Work(source, rows, cols, first, last))
            room -= last - first
            first = last
    return shards


def synthetic(scenes: int) -> Layout:
    """The synthetic world as a layout: every fifth scene is validation."""
    from raysed.core.synthetic import scene

    if scenes < 1:
        raise UsageError(f"--scenes must be at least 1, got {scenes}")
    names = [(n, scene(0, n, side=16).region) for n in range(scenes)]
    made = [
        Source(f"{region}_{n}", region, "val" if n % 5 == 4 else "train", f"scene/{n}", f"scene/{n}", 1, 1)
        for n, region in names
    ]
    return Layout("synthetic", "synthetic", OPENEARTHMAP, (0,), tuple(sorted(made, key=lambda s: s.name)))


def prepare_synthetic(
    target: str, *, scenes: int, tile: int, shared_filesystem: bool = False, say: Callable[[str], None]
) -> None:
    """The synthetic store, made once."""
    prepare(
        None, synthetic(scenes), target, Settings(tile=tile), shared_filesystem=shared_filesystem, say=say
    )


def prepare(
    root: Storage | None,
    layout: Layout,
    target: str,
    settings: Settings,
    *,
    append: bool = False,
    bad_budget: float = 0.01,
    shared_filesystem: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Make the store of a layout, add to one, or finish what was begun.

    Args:
        root: of the sources; None for the synthetic world.
        layout: what is there.
        target: URI of the store.
        settings: sizes.
        append: add the sources that the store does not hold, by name, as new shards and a new version of its index.
        bad_budget: share of the sources that may be unusable.
        shared_filesystem: all nodes of the cluster see the same files.
        say: prints a line.

    Returns:
        tiles a split, quarantined sources, content hash, bytes of the shards, pixels dropped as remainders.

    Raises:
        UsageError: the target holds a store of other input or settings, or none to append to.
        DataError: more unusable sources than the budget allows.
        ResourcesError: the cluster has no room.
    """
    storage = Storage(target)
    if not 0 <= bad_budget <= 1:
        raise UsageError(f"--bad-budget must lie in 0..1, got {bad_budget}")
    base = None
    if append:
        base = store.Store.open(storage.uri)
        layout = _new_sources(base, layout, settings, say)
    for note in layout.notes:
        say(f"note: {note}")
    wanted = _plan(layout, settings, root)
    if not layout.sources or not _agree(storage, wanted, base):
        result = _result(storage)
        say(f"{storage.uri} is finished already: {_text(result)}")
        return result
    connect()
    check_paths({p.uri: p.uri for p in (root, storage) if p}, shared=shared_filesystem)
    secure_task(say)
    grids, bad, dropped = _grids(root, layout, settings)
    _check_budget(storage, base, bad, layout, bad_budget)  # before the work, as far as it is known
    first = _shards(base)
    shards = dict(enumerate(pack(grids), start=first))
    done = storage.list("pieces")
    items = [
        {"part": k, "work": json.dumps([asdict(w) for w in works])}
        for k, works in shards.items()
        if _piece(k) not in done
    ]
    total = sum(w.last - w.first for works in shards.values() for w in works)
    if not total and base:
        result = _result(storage)
        say(f"{storage.uri}: nothing to append, {len(bad)} sources cannot be used still; {_text(result)}")
        return result
    if not total:
        raise UsageError(
            f"no source gives a tile of {settings.tile} px ({len(layout.sources)} sources, {len(bad)} unusable)"
        )
    say(f"{len(layout.sources)} sources, {total} tiles in {len(shards)} shards, {len(items)} to make")
    begun = _own(base, "plan.json"), _json_hash(wanted)
    arguments = {
        "root": root.uri if root else None,
        "target": storage.uri,
        "settings": settings,
        "lookup": layout.lookup(),
        "classes": len(layout.classes),
        "version": 1 + (base.dataset.version if base else 0),
        "plan": begun,
    }
    _make(items, arguments, say)
    _still(storage, *begun)
    if _version(storage) == (base.dataset.version if base else 0):  # else somebody beside us has finished it
        _finish(
            storage,
            base,
            layout,
            settings,
            shards=list(shards),
            bad=bad,
            dropped=dropped,
            bad_budget=bad_budget,
        )
    for k in shards:
        storage.remove(_piece(k))
    result = _result(storage)
    say(f"{storage.uri}: {_text(result)}")
    return result


def _finish(
    storage: Storage,
    base: store.Store | None,
    layout: Layout,
    settings: Settings,
    *,
    shards: Sequence[int],
    bad: Sequence[BadTile],
    dropped: int,
    bad_budget: float,
) -> None:
    """Make a version of the pieces of these shards; `bad` are the sources that have none."""
    index, spoiled = _collect(storage, shards)
    quarantine = [*bad, *spoiled]
    _check_budget(storage, base, quarantine, layout, bad_budget)
    if base:
        tried = {s.name for s in layout.sources}
        quarantine += [b for b in _quarantined(base) if b.tile_id not in tried]
        index, dropped = (
            pa.concat_tables([store.as_written(base.index), index]),
            dropped + base.dataset.dropped_pixels,
        )
    store.finish(
        storage,
        name=base.dataset.name if base else layout.name,
        classes=layout.classes,
        ignore=layout.ignore,
        tile_size=settings.side,
        index=index,
        quarantine=quarantine,
        dropped_pixels=dropped,
        rule=settings.rule,
        remap={str(value): wanted for value, wanted in layout.remap},
        version=base.dataset.version + 1 if base else 1,
    )


def _version(storage: Storage) -> int:
    """The newest finished version; 0 if there is none."""
    return store.Store.open(storage.uri).dataset.version if storage.exists("dataset.json") else 0


def _new_sources(base: store.Store, layout: Layout, settings: Settings, say: Callable[[str], None]) -> Layout:
    """The part of a layout that a store does not hold; images without classes take the store's.

    Raises:
        UsageError: it would not fit the store.
    """
    where, dataset = base.storage.uri, base.dataset
    if not base.storage.exists("plan.json"):
        raise UsageError(f"{where} holds a store that was not made by prepare: nothing can be appended to it")
    if not layout.classes:
        remap = tuple((int(value), wanted) for value, wanted in dataset.remap.items())
        layout = replace(layout, classes=dataset.classes, ignore=dataset.ignore, remap=remap)
    there = _begun(base.storage, "plan.json")
    if differs := _differences(there, _plan(layout, settings, None), but=("layout", *_SOURCES)):
        raise UsageError(f"{where} has other classes or settings than what is to be appended ({differs})")
    held = set(pc.unique(base.index["source"]).to_pylist())
    new = tuple(s for s in layout.sources if s.name not in held)
    if len(new) < len(layout.sources):
        name = next(s.name for s in layout.sources if s.name in held)
        count = len(layout.sources) - len(new)
        say(f"{count} of {len(layout.sources)} sources are in the store already ({name}): left as they are")
    return replace(layout, sources=new)


def _shards(base: store.Store | None) -> int:
    """Number of the first shard that may be written."""
    if base is None:
        return 0
    return 1 + max(
        (
            int(p.removesuffix(".parquet").rpartition("-")[2])
            for p in pc.unique(base.index["shard"]).to_pylist()
        ),
        default=-1,
    )


def _result(storage: Storage) -> dict[str, Any]:
    dataset = store.Store.open(storage.uri).dataset
    return {
        "tiles": dataset.tiles,
        "quarantined": pq.read_metadata(
            io.BytesIO(storage.read(dataset.path("quarantine.parquet")))
        ).num_rows,
        "hash": dataset.content_hash,
        "bytes": sum(storage.list("shards").values()),
        "dropped_pixels": dataset.dropped_pixels,
        "version": dataset.version,
    }


def _text(result: dict[str, Any]) -> str:
    return (
        f"{result['tiles']['train']} training and {result['tiles']['val']} validation tiles, {result['bytes'] / 1e6:.1f} MB, "
        f"{result['quarantined']} sources quarantined, {result['dropped_pixels']} pixels of remainders dropped, "
        f"hash {result['hash'][:12]}" + (f", version {result['version']}" if result["version"] > 1 else "")
    )


def _plan(layout: Layout, settings: Settings, root: Storage | None) -> dict[str, Any]:
    """What determines a store, as JSON gives it back; of a root also when its files were written."""
    listing = _json_hash([asdict(s) for s in layout.sources])
    plan: dict[str, Any] = {
        **asdict(settings),
        "layout": layout.kind,
        "classes": [asdict(c) for c in layout.classes],
        "ignore": list(layout.ignore),
        "sources": len(layout.sources),
        "listing": listing,
        "remap": layout.remap,
    }
    if settings.rule == PLAIN:
        del plan["rule"]
    if not layout.remap:
        del plan["remap"]
    if root:
        stamps = {path: str(seen.changed) for path, seen in root.look_below().items()}
        plan["stamps"] = _json_hash(
            [(stamps.get(s.image), stamps.get(s.label or "")) for s in layout.sources]
        )
    return json.loads(json.dumps(plan))


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _begun(storage: Storage, path: str) -> dict[str, Any]:
    """The plan that is there; whose it is does not matter."""
    return {k: v for k, v in json.loads(storage.read(path)).items() if k != "owner"}


def _differences(there: dict[str, Any], now: dict[str, Any], but: Sequence[str] = ()) -> str:
    """How two plans differ, as text; empty if they do not."""
    differs = {k: now.get(k) for k in there | now if k not in but and there.get(k) != now.get(k)}
    texts = {"listing": "of other sizes or names", "stamps": "written again since"}
    changed = [text for key, text in texts.items() if differs.pop(key, None) and key in there]
    if changed and not differs:
        differs = {"sources": changed[0]}
    lines = [f"{k}: {there.get(k)!r} there, {v!r} now" for k, v in differs.items()]
    return "; ".join(line if len(line) < 120 else line[:117] + "..." for line in lines)


def _agree(storage: Storage, plan: dict[str, Any], base: store.Store | None) -> bool:
    """Write the plan, or check that the one there is the same; whether there is anything left to do.

    What is unfinished and whose sources have changed since (a bad file was repaired, say) is begun anew.
    """
    # an owner, because a bucket takes the second of two equal puts for the first
    body = (json.dumps({**plan, "owner": uuid.uuid4().hex}, indent=1) + "\n").encode()
    path = _own(base, "plan.json")
    finished = base is None and storage.exists("dataset.json")
    if finished and not storage.exists(path):
        raise UsageError(f"{storage.uri} holds a store that was not made by prepare: choose another --target")
    if storage.create(path, body):
        for stale in storage.list("pieces"):  # of a store that was killed when it was finished
            storage.remove(stale)
        return True
    there = _begun(storage, path)
    if not finished and not _differences(there, plan, but=_SOURCES):
        if there != plan:
            kept = set(base.index["shard"].to_pylist()) if base else set()
            for stale in {*storage.list("pieces"), *storage.list("shards")} - kept:
                storage.remove(stale)
            storage.write(path, body)
        return True
    if differs := _differences(there, plan):
        raise UsageError(
            f"{storage.uri} holds a store of other input or settings ({differs}): choose another --target, or add new "
            "sources to it with --append"
        )
    return not finished


def _still(storage: Storage, path: str, plan: str) -> None:
    """Prove that a plan is still the one that the target is made by.

    Args:
        storage: the target.
        path: of the plan.
        plan: hash of it.

    Raises:
        UsageError: another job has begun the target anew, with sources that have changed since.
    """
    if _json_hash(_begun(storage, path)) != plan:
        raise UsageError(
            f"{storage.uri} was begun anew by another job, of sources that have changed meanwhile: let it finish, or start again"
        )


def _grids(
    root: Storage | None, layout: Layout, settings: Settings
) -> tuple[list[tuple[Source, int, int]], list[BadTile], int]:
    """(source, rows, cols) of the sources that can be planned, in order of name; those that cannot; pixels dropped."""
    present = [s for s in layout.sources if s.image_bytes is not None]
    bad = [BadTile(s.name, f"{s.image} is missing", "") for s in layout.sources if s.image_bytes is None]
    sizes = {s.name: (SCENE_SIDE, SCENE_SIDE) for s in present}
    if settings.resize:
        sizes = {s.name: (settings.resize, settings.resize) for s in present}
    elif root is not None:
        items = [{"source": json.dumps(asdict(s))} for s in present]
        rows = list(run_tasks(read_headers, items, 16, {"root": root.uri, "rule": settings.rule}))
        bad += [BadTile(r["name"], r["reason"], r["sha256"]) for r in rows if "reason" in r]
        sizes = {r["name"]: (r["height"], r["width"]) for r in rows if "reason" not in r}
    grids = plan_grids([s for s in present if s.name in sizes], sizes, settings.tile)
    kept = sum(rows * cols for _, rows, cols in grids) * settings.tile**2
    return grids, bad, sum(h * w for h, w in sizes.values()) - kept


def plan_grids(
    present: Sequence[Source], sizes: dict[str, tuple[int, int]], tile: int
) -> list[tuple[Source, int, int]]:
    """(source, rows, cols) in order of name, from the (resized) sizes."""
    return [(s, *tiles.grid(*sizes[s.name], tile)) for s in sorted(present, key=lambda s: s.name)]


def read_headers(batch: dict[str, np.ndarray], root: str, rule: Rule) -> list[dict[str, Any]]:
    """INPUT: sources.  OUTPUT: name and height, width, or reason, sha256."""
    found: list[dict[str, Any]] = []
    images = Storage(root)
    for text in batch["source"]:
        source = Source(**json.loads(text))
        try:
            height, width = sources.size(images, source, rule)
            found.append({"name": source.name, "height": height, "width": width})
        except BadSource as error:
            found.append({"name": source.name, "reason": str(error), "sha256": error.sha256(images)})
    return found


def write_parts(
    batch: dict[str, np.ndarray],
    *,
    root: str | None,
    target: str,
    settings: Settings,
    lookup: np.ndarray,
    classes: int,
    version: int,
    plan: tuple[str, str],
) -> list[dict[str, int]]:
    """INPUT: shards to make.  OUTPUT: tiles written; the shard and its piece of the index are in the target then."""
    storage, made = Storage(target), []
    images = Storage(root) if root else None
    for part, text in zip(batch["part"], batch["work"], strict=True):
        rows: list[dict[str, Any]] = []
        bad: list[BadTile] = []
        for fields in json.loads(text):
            work = Work(**{**fields, "source": Source(**fields["source"])})
            try:
                rows += list(_cut(images, work, settings, lookup, classes))
            except BadSource as error:
                bad.append(BadTile(work.source.name, str(error), error.sha256(images) if images else ""))
        _still(storage, *plan)
        piece = (
            store.write_shard(storage, shard_path(version, part), rows) if rows else store.INDEX.empty_table()
        )
        out = io.BytesIO()
        pq.write_table(piece.replace_schema_metadata({"bad": json.dumps([asdict(b) for b in bad])}), out)
        storage.write(_piece(part), out.getvalue())
        made.append({"tiles": len(rows)})
    return made


def _piece(part: int) -> str:
    return f"pieces/part-{part:05d}.parquet"


def _cut(
    root: Storage | None, work: Work, settings: Settings, lookup: np.ndarray, classes: int
) -> Iterator[dict[str, Any]]:
    source, tile, side = work.source, settings.tile, settings.side
    with _pixels(root, source, settings) as pixels:
        for n in range(work.first, work.last):
            row, col = divmod(n, work.cols)
            image, label = pixels.window(row * tile, col * tile, tile)
            valid = pixels.valid(row * tile, col * tile, tile)
            if not valid.any():
                continue
            stored = None if label is None else _stored_label(label, lookup, pixels)
            if stored is not None:
                stored[~valid] = 0
                stored = tiles.resize_label(stored, side, side)
            scale = [f * tile / side for f in pixels.factor]
            yield {
                "tile_id": tiles.tile_id(source.name, row, col),
                "region": source.region,
                "source": source.name,
                "row": row,
                "col": col,
                "split": source.split,
                "pixels": None if stored is None else tiles.pixel_counts(stored, classes).tolist(),
                "crs": pixels.crs,
                "transform": pixels.transform and _moved(pixels.transform, row * side, col * side, scale),
                "scale": scale,
                "ambiguous": pixels.ambiguity(row * tile, col * tile, tile),
                "image": codec.encode_image(tiles.resize_image(image, side, side)),
                "label": None if stored is None else codec.encode_label(stored),
            }


def _moved(transform: Sequence[float], row: int, col: int, scale: Sequence[float]) -> list[float]:
    """Transform of a tile whose corner is at (row, col) of the scaled grid, `scale` source pixels a tile pixel."""
    a, b, c, d, e, f = transform
    y, x = row * scale[0], col * scale[1]
    return [a * scale[1], b * scale[0], a * x + b * y + c, d * scale[1], e * scale[0], d * x + e * y + f]


def _stored_label(label: np.ndarray, lookup: np.ndarray, pixels: "_Pixels") -> np.ndarray:
    stored = lookup[label]
    if stored.min() < 0:
        legal = np.flatnonzero(lookup >= 0).tolist()
        code = min(set(np.unique(label).tolist()) - set(legal))
        raise pixels.label.bad(f"holds label code {code}, expected one of {legal}")
    return stored.astype(np.uint8)


class _Pixels:
    """Image and label of one source as windows of the (resized) grid."""

    crs: str | None = None
    transform: tuple[float, ...] | None = None
    factor = (1.0, 1.0)
    ambiguous: np.ndarray | None = None
    known: np.ndarray | None = None
    """Where a whole image that was resized has data."""

    def __init__(
        self, image: Any, label: Any, whole: tuple[np.ndarray, np.ndarray | None] | None = None
    ) -> None:
        self.image, self.label, self.whole = image, label, whole

    def window(self, row: int, col: int, side: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(side, side, 3) uint8 image and (side, side) uint8 codes."""
        if self.whole:
            cut = slice(row, row + side), slice(col, col + side)
            image, label = self.whole
            return np.ascontiguousarray(image[cut]), None if label is None else np.ascontiguousarray(
                label[cut]
            )
        label = self.label.read(row, col, side, side) if self.label else None
        return self.image.read(row, col, side, side), label

    def valid(self, row: int, col: int, side: int) -> np.ndarray:
        """(side, side) bool: where the image has data."""
        if self.known is not None:
            return self.known[row : row + side, col : col + side]
        return self.image.valid(row, col, side, side) if self.image else np.ones((side, side), bool)

    def ambiguity(self, row: int, col: int, side: int) -> float | None:
        """Mean over a window of how far it is obscured; None where that is not known."""
        return (
            None
            if self.ambiguous is None
            else float(self.ambiguous[row : row + side, col : col + side].mean())
        )


@contextmanager
def _pixels(root: Storage | None, source: Source, settings: Settings) -> Iterator[_Pixels]:
    if root is None:
        from raysed.core.synthetic import scene

        made = scene(settings.seed, int(source.image.rpartition("/")[2]), side=SCENE_SIDE)
        pixels = _Pixels(None, None, (made.image, made.label))
        pixels.ambiguous = made.ambiguous
        yield pixels
        return
    with ExitStack() as stack:
        image = stack.enter_context(
            Raster(root, source.image, source.image_bytes, 3, rule=settings.rule).opened()
        )
        label = (
            stack.enter_context(Raster(root, source.label, source.label_bytes, 1).opened())
            if source.label
            else None
        )
        if label and (label.height, label.width) != (image.height, image.width):
            raise label.bad(
                f"has {label.width} x {label.height} pixels, its image {image.width} x {image.height}"
            )
        pixels = _Pixels(image, label)
        if settings.resize:
            pixels.whole = _resized(image, label, settings.resize)
            known = image.valid(0, 0, image.height, image.width).astype(np.uint8)
            pixels.known = tiles.resize_label(known, settings.resize, settings.resize) > 0
            pixels.factor = (image.height / settings.resize, image.width / settings.resize)
        pixels.crs, pixels.transform = image.crs, image.transform
        yield pixels


def _resized(image: Raster, label: Raster | None, side: int) -> tuple[np.ndarray, np.ndarray | None]:
    if image.height * image.width > sources.MAX_WHOLE:
        raise image.bad(
            f"has {image.width} x {image.height} pixels, at most {sources.MAX_WHOLE} can be resized"
        )
    whole = tiles.resize_image(image.read(0, 0, image.height, image.width), side, side)
    if label is None:
        return whole, None
    return whole, tiles.resize_label(label.read(0, 0, label.height, label.width), side, side)


def _make(items: list[dict[str, Any]], arguments: dict[str, Any], say: Callable[[str], None]) -> None:
    began, last, made = time.monotonic(), 0.0, 0
    for shard, row in enumerate(run_tasks(write_parts, items, 1, arguments), start=1):
        made += row["tiles"]
        passed = time.monotonic() - began
        if passed - last > 10 or shard == len(items):
            last = passed
            left = passed / shard * (len(items) - shard)
            say(
                f"shard {shard}/{len(items)}  {made} tiles  {made / max(passed, 1e-9):.0f} tiles/s  ETA {left:.0f} s"
            )


def _collect(storage: Storage, shards: Sequence[int]) -> tuple[pa.Table, list[BadTile]]:
    """The index of all pieces without the tiles of sources that went bad, and those sources."""
    pieces = [pq.read_table(io.BytesIO(storage.read(_piece(k)))) for k in shards]
    bad = {b["tile_id"]: BadTile(**b) for p in pieces for b in json.loads(p.schema.metadata[b"bad"])}
    index = pa.concat_tables([store.INDEX.empty_table(), *(p.cast(store.INDEX) for p in pieces)])
    gone = pa.array(sorted(bad), pa.string())
    return index.filter(pc.invert(pc.is_in(index["source"], gone))), list(bad.values())


def _check_budget(
    storage: Storage, base: store.Store | None, quarantine: list[BadTile], layout: Layout, budget: float
) -> None:
    known = {(b.tile_id, b.reason) for b in _quarantined(base)} if base else set()
    found = len(quarantine)
    quarantine = [
        b for b in quarantine if (b.tile_id, b.reason) not in known
    ]  # those were within their budget
    if len(quarantine) <= budget * (len(layout.sources) - (found - len(quarantine))):
        return
    path = _own(base, "quarantine.parquet")
    storage.write(path, table_bytes(store.quarantine_table(quarantine)))
    shown = "; ".join(f"{b.tile_id}: {b.reason}" for b in quarantine[:3])
    remedy = "; --bands picks bands, --stretch makes 8 bits of 16" if " bands of " in shown else ""
    raise DataError(
        f"{len(quarantine)} of {len(layout.sources)} sources are unusable, --bad-budget allows {budget:g} of them "
        f"({shown}; all are in {storage.uri}/{path}){remedy}"
    )


def _quarantined(base: store.Store) -> list[BadTile]:
    """The sources that a store could not use."""
    data = base.storage.read(base.dataset.path("quarantine.parquet"))
    return [BadTile(**b) for b in pq.read_table(io.BytesIO(data)).to_pylist()]


def _own(base: store.Store | None, name: str) -> str:
    """Path of a file of the version that is being made."""
    return f"{store.folder(base.dataset.version + 1)}/{name}" if base else name
