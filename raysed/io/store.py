"""The tile store: ordinary Parquet shards, an index of byte ranges, and `dataset.json`.

    shards/part-00000.parquet   one row a tile, row groups of 16, image and label uncompressed and PLAIN
    index.parquet               every tile without its pixels, with the byte range of its image and label
    quarantine.parquet          what could not be used, and why
    dataset.json                classes, counts, content hash; written last, so a store without it is unfinished
    versions/0002/              index.parquet and quarantine.parquet of a store that tiles were appended to, with version 2;
                                dataset.json of the versions before the newest: what a run has used stays readable

A selection is fetched by ranged reads at the index's offsets and checked against its sha256.
"""

import ctypes
import hashlib
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysed.core.pool import names_of
from raysed.core.tiles import LandClass, check_id
from raysed.errors import DataError, UsageError
from raysed.io import codec
from raysed.io.sources import PLAIN, Rule
from raysed.io.storage import Storage

FORMAT = 1
ROW_GROUP = 16
REREADS = 2
"""Times a tile is fetched again whose bytes have another hash: they may have changed on the way only."""
SHARDS_AT_ONCE = 8
"""That one call reads from."""
_FIELDS = [
    pa.field("tile_id", pa.string()),
    pa.field("region", pa.string()),
    pa.field("source", pa.string()),
    pa.field("row", pa.int32()),
    pa.field("col", pa.int32()),
    pa.field("split", pa.string()),
    pa.field("pixels", pa.list_(pa.int64())),
    pa.field("sha256", pa.string()),
    pa.field("crs", pa.string()),
    pa.field("transform", pa.list_(pa.float64())),
    pa.field("scale", pa.list_(pa.float64())),
    pa.field("ambiguous", pa.float32()),
]
TILES = pa.schema([*_FIELDS, pa.field("image", pa.binary()), pa.field("label", pa.binary())])
"""Schema of a shard.  pixels: void first, then the classes; null without a label.  transform: the six numbers a b c d e f of
x = a col + b row + c, y = d col + e row + f; null where the source has none.  scale: source pixels a tile pixel, (row, column).
ambiguous: how far the synthetic world obscured the tile, 0..1, mean over pixels; null in other stores and older ones."""
INDEX = pa.schema(
    [
        *_FIELDS,
        pa.field("shard", pa.string()),
        pa.field("row_group", pa.int32()),
        pa.field("image_offset", pa.int64()),
        pa.field("image_length", pa.int64()),
        pa.field("label_offset", pa.int64()),
        pa.field("label_length", pa.int64()),
    ]
)
"""Schema of the index; label_offset and label_length are null without a label."""
QUARANTINE = pa.schema([("tile_id", pa.string()), ("reason", pa.string()), ("sha256", pa.string())])
LOCATION = [
    f.name for f in INDEX if f.name in ("tile_id", "sha256", "shard") or f.name.endswith(("offset", "length"))
]
"""Columns of the index that tiles are read by."""
POOL = ["tile_id", "region", "source", "split", "pixels", "ambiguous", "shard", "label_offset"]
"""Columns of the index that tiles are chosen by."""
TRAINING = sorted({*LOCATION, *POOL})
"""Columns of the index that a run needs which shows its tiles to nobody."""
_NAMED = ("region", "source", "split", "shard")
"""Columns that say the same of many tiles: numbers of names in memory."""
_COUNTS = {"pixels": pa.list_(pa.int32()), "image_length": pa.int32(), "label_length": pa.int32()}
"""Columns whose numbers are small, and how they are held in memory."""
_OFFSETS = ("image_offset", "label_offset")
"""Columns that are held in 32 bits where no shard has 4 GiB."""
_HASH = pa.binary(32)
"""How sha256 is held in memory."""


@dataclass(frozen=True)
class Tile:
    """One decoded tile."""

    tile_id: str
    image: np.ndarray
    """(side, side, 3) uint8 RGB."""
    label: np.ndarray | None
    """(side, side) uint8, 0 void, 1..C classes."""


@dataclass(frozen=True)
class BadTile:
    """A tile whose bytes could not be used."""

    tile_id: str
    reason: str
    sha256: str
    """Of the bytes found, empty if there were none."""


@dataclass(frozen=True)
class Dataset:
    """What `dataset.json` says."""

    name: str
    classes: tuple[LandClass, ...]
    ignore: tuple[int, ...]
    """Source codes that mean void."""
    tile_size: int
    """Side of a stored tile, pixels."""
    tiles: dict[str, int]
    """Tiles a split."""
    pixels: dict[str, list[int]]
    """Pixels a split: void first, then the classes."""
    content_hash: str
    """sha256 over ids, splits and tile hashes in order of id, and the classes."""
    dropped_pixels: int = 0
    """Pixels of the (resized) sources that no whole window covered."""
    rule: Rule = PLAIN
    """How the sources became 8-bit RGB."""
    remap: dict[str, int | None] = field(default_factory=dict)
    """Id of the class that a value in the label files became, None for void; empty: values are ids."""
    version: int = 1
    """One more each time that tiles were appended."""
    format: int = FORMAT

    def path(self, name: str) -> str:
        """Path of `index.parquet` or `quarantine.parquet` of this version."""
        return name if self.version == 1 else f"{folder(self.version)}/{name}"

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Dataset":
        try:
            fields = json.loads(data)
            if fields["format"] != FORMAT:
                raise DataError(
                    f"{where}: store format {fields['format']}, this version reads {FORMAT}: prepare it anew"
                )
            fields["classes"] = tuple(LandClass(**c) for c in fields["classes"])
            fields["ignore"] = tuple(fields["ignore"])
            fields["rule"] = Rule.of(fields.get("rule", {}))
            return cls(**fields)
        except (ValueError, KeyError, TypeError, UsageError) as error:
            raise DataError(
                f"{where}: not a raysed data set description ({type(error).__name__}: {error})"
            ) from error


def folder(version: int) -> str:
    """Folder of what belongs to a version only."""
    return f"versions/{version:04d}"


def write_shard(storage: Storage, path: str, tiles: Sequence[dict]) -> pa.Table:
    """Write tiles (rows of `TILES`, sha256 filled in here) as one shard and return their rows of the index."""
    rows = [{**t, "sha256": codec.tile_hash(t["image"], t["label"])} for t in tiles]
    for row in rows:
        check_id(row["tile_id"])
    table = pa.Table.from_pylist(rows, schema=TILES)
    light = [f.name for f in _FIELDS]
    out = io.BytesIO()
    pq.write_table(
        table,
        out,
        row_group_size=ROW_GROUP,
        compression={name: "NONE" if name in ("image", "label") else "ZSTD" for name in _leaves(table)},
        use_dictionary=["region", "source", "split", "crs"],
        write_statistics=["tile_id", "region", "source", "row", "col", "split"],
    )
    data = out.getvalue()
    storage.write(path, data)
    located = _locate(data)
    piece = table.select(light)
    for column in list(INDEX)[len(_FIELDS) :]:
        values = [path] * len(rows) if column.name == "shard" else [at[column.name] for at in located]
        piece = piece.append_column(column, pa.array(values, column.type))
    return piece


def _leaves(table: pa.Table) -> list[str]:
    return [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in table.schema]


def _locate(shard: bytes) -> list[dict]:
    """Row group and byte ranges of image and label of every row: PLAIN byte arrays are a 4-byte length, then the bytes."""
    file = pq.ParquetFile(io.BytesIO(shard))
    found = []
    for group in range(file.num_row_groups):
        meta = file.metadata.row_group(group)
        columns = {meta.column(j).path_in_schema: meta.column(j) for j in range(meta.num_columns)}
        cursor = {name: columns[name].data_page_offset for name in ("image", "label")}
        for row in file.read_row_group(group, columns=["image", "label"]).to_pylist():
            at: dict[str, int | None] = {"row_group": group}
            for name, start in cursor.items():
                value = row[name]
                if value is None:
                    at[f"{name}_offset"] = at[f"{name}_length"] = None
                    continue
                offset = shard.find(value, start)
                assert int.from_bytes(shard[offset - 4 : offset], "little") == len(value)
                at[f"{name}_offset"], at[f"{name}_length"] = offset, len(value)
                cursor[name] = offset + len(value)
            found.append(at)
    return found


def finish(
    storage: Storage,
    *,
    name: str,
    classes: tuple[LandClass, ...],
    ignore: tuple[int, ...],
    tile_size: int,
    index: pa.Table,
    quarantine: Iterable[BadTile] = (),
    dropped_pixels: int = 0,
    rule: Rule = PLAIN,
    remap: dict[str, int | None] | None = None,
    version: int = 1,
) -> Dataset:
    """Write quarantine, index (rows of `INDEX`, or as a store holds them) and, last, `dataset.json` of a store whose shards are written."""
    index = as_written(index).sort_by("tile_id")
    ids = index["tile_id"].to_pylist()
    twice = [a for a, b in itertools.pairwise(ids) if a == b]
    if twice:
        raise DataError(f"{storage.uri}: tile id {twice[0]} occurs twice: source names must be unique")
    digest = hashlib.sha256(json.dumps([asdict(c) for c in classes]).encode() + f"/{tile_size}\n".encode())
    if remap:
        digest.update(json.dumps(remap).encode())
    for line in zip(ids, index["split"].to_pylist(), index["sha256"].to_pylist(), strict=True):
        digest.update("\t".join(line).encode() + b"\n")
    splits = {s: index.filter(pc.equal(index["split"], s)) for s in ("train", "val")}
    dataset = Dataset(
        name=name,
        classes=classes,
        ignore=ignore,
        tile_size=tile_size,
        tiles={s: len(t) for s, t in splits.items()},
        pixels={s: _total_pixels(t, len(classes)) for s, t in splits.items()},
        content_hash=digest.hexdigest(),
        dropped_pixels=dropped_pixels,
        rule=rule,
        remap=remap or {},
        version=version,
    )
    for path, table in (("quarantine.parquet", quarantine_table(quarantine)), ("index.parquet", index)):
        out = io.BytesIO()
        pq.write_table(table, out, compression="ZSTD")
        storage.write(dataset.path(path), out.getvalue())
    if version > 1:
        storage.write(f"{folder(version - 1)}/dataset.json", storage.read("dataset.json"))
    storage.write("dataset.json", dataset.to_json())
    return dataset


def quarantine_table(bad: Iterable[BadTile]) -> pa.Table:
    """Rows of `QUARANTINE`, sorted by tile_id."""
    return pa.Table.from_pylist([asdict(b) for b in bad], schema=QUARANTINE).sort_by("tile_id")


def _total_pixels(index: pa.Table, classes: int) -> list[int]:
    rows = [p for p in index["pixels"].to_pylist() if p is not None]
    return np.sum(np.array(rows, np.int64).reshape(-1, classes + 1), axis=0).tolist()


def _dataset(storage: Storage, path: str) -> Dataset:
    return Dataset.from_json(storage.read(path), f"{storage.uri}/{path}")


@dataclass(frozen=True)
class Store:
    """A finished tile store, opened."""

    storage: Storage
    dataset: Dataset
    index: pa.Table
    """Rows of `INDEX`, or some of its columns; those of split train first, each split by tile_id.  Names that many tiles share are
    dictionaries, what counts pixels or bytes of a tile has 32 bits, and sha256 is its 32 bytes: 10^7 tiles take half the memory.
    `as_written` makes the columns of a file of them."""

    @classmethod
    def open(cls, uri: str, content_hash: str | None = None, columns: Sequence[str] = INDEX.names) -> "Store":
        """Open the store at a URI.

        Args:
            uri: of the store.
            content_hash: of the version wanted; None takes the newest.
            columns: of the index, of which 10^7 tiles have gigabytes.

        Raises:
            UsageError: nothing there, unfinished, or no version of that hash.
            DataError: another format.
        """
        storage = Storage(uri)
        try:
            dataset = _dataset(storage, "dataset.json")
        except FileNotFoundError as error:
            raise UsageError(
                f"no finished tile store at {storage.uri} (no dataset.json): make one with jobs/prepare.py --target {uri}"
            ) from error
        newest, path = dataset, "dataset.json"
        try:
            while content_hash is not None and dataset.content_hash != content_hash:
                if dataset.version == 1:
                    raise UsageError(
                        f"{storage.uri} holds data set {newest.content_hash[:12]} and no version with {content_hash[:12]}, which "
                        "the run used: give its store with --data"
                    )
                path = f"{folder(dataset.version - 1)}/dataset.json"
                dataset = _dataset(storage, path)
            path = dataset.path("index.parquet")
            index = _read_index(storage.read(path), columns)
        except FileNotFoundError as error:
            raise DataError(f"{storage.uri}/{path} is missing: the store is damaged") from error
        except (DataError, pa.ArrowInvalid) as error:
            said = " ".join(str(error).split())[:300]
            raise DataError(f"{storage.uri}/{path} is damaged ({said}): prepare the store anew") from error
        give_back()
        return cls(storage, dataset, index)

    def only(self, columns: Sequence[str]) -> "Store":
        """The same with some columns of the index."""
        return replace(self, index=self.index.select(columns))

    def split(self, name: str) -> pa.Table:
        """Rows of the index of one split."""
        return self.index.filter(pc.equal(self.index["split"], name))

    def locations(self, ids: Sequence[str]) -> list[dict]:
        """Rows of `LOCATION`, one an id, in the order of the ids.

        Raises:
            UsageError: an id that the store does not hold.
        """
        return self.located(ids)[:]

    def located(self, ids: Sequence[str] | pa.StringArray) -> "Locations":
        """`locations` of many tiles, each made when it is asked for.

        Raises:
            UsageError: see there.
        """
        wanted = names_of(ids)
        if wanted.equals(names_of(self.index["tile_id"][: len(wanted)])):  # a search of 10^7 takes 0.8 GiB
            rows = pa.array(np.arange(len(wanted), dtype=np.int32))
            return Locations(self.index.select(LOCATION), rows, wanted)
        at = pc.index_in(wanted, self.index["tile_id"])
        if at.null_count:
            missing = wanted.filter(pc.is_null(at))[0].as_py()
            raise UsageError(f"tile {missing} is not in the store {self.storage.uri}")
        return Locations(self.index.select(LOCATION), at, wanted)


def _read_index(file: bytes, columns: Sequence[str]) -> pa.Table:
    """Columns one by one: joining the pieces of all of them at once would take their memory twice."""
    reader = pq.ParquetFile(io.BytesIO(file), read_dictionary=list(_NAMED))
    train = pc.equal(_column(reader, "split"), "train")
    count = pc.sum(train).as_py() or 0
    order = None
    if pc.any(train[count:]).as_py():
        train = train.to_numpy(zero_copy_only=False)
        order = pa.array(np.r_[np.flatnonzero(train), np.flatnonzero(~train)])
    read = {}
    for name in sorted(columns, key=("sha256", "pixels").__contains__, reverse=True):  # while there is room
        column = _column(reader, name)
        read[name] = column if order is None else column.take(order)
        del column
        give_back()
    return pa.table(read).select(columns)


def give_back() -> None:
    """Give the system what Arrow and glibc have kept of memory that was freed: for 10^7 tiles it would stand beside the columns for good."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim:
        trim(0)


def _column(reader: pq.ParquetFile, name: str) -> pa.Array:
    """A column in as little memory as it takes, a row group at a time."""
    if name not in reader.schema_arrow.names:
        raise DataError(f"it has no column {name}")
    groups = (
        reader.read_row_group(k, [name], use_threads=False).column(0) for k in range(reader.num_row_groups)
    )
    pieces = [chunk for group in groups for chunk in _small(group, name).chunks]
    field = INDEX.field(name)
    if name in _NAMED:
        named = pa.chunked_array(pieces, pa.dictionary(pa.int32(), field.type))
        return named.unify_dictionaries().combine_chunks()
    if not pieces:
        return pa.array([], _HASH if name == "sha256" else _COUNTS.get(name, field.type))
    if any(p.type != pieces[0].type for p in pieces):
        pieces = [p.cast(field.type) for p in pieces]
    return pa.chunked_array(pieces).combine_chunks()


def _small(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A piece of a column in the narrowest type that holds it."""
    written = INDEX.field(name).type
    if name in _NAMED:
        return column.cast(pa.dictionary(pa.int32(), written))
    if name in _COUNTS:
        return column.cast(_COUNTS[name])
    if name == "sha256":
        return pa.chunked_array([_packed(c) for c in column.chunks], _HASH)
    if name in _OFFSETS and (pc.max(column).as_py() or 0) < 2**32:
        return column.cast(pa.uint32())
    return column.cast(written)


def _packed(hashes: pa.StringArray) -> pa.FixedSizeBinaryArray:
    """Hexadecimal digits as the bytes that they stand for.

    Raises:
        DataError: something else.
    """
    wrong = hashes.filter(pc.invert(pc.match_substring_regex(hashes, "^[0-9a-f]{64}$")))
    if len(wrong) or hashes.null_count:
        found = wrong[0].as_py() if len(wrong) else None
        raise DataError(f"a tile has sha256 {found!r}, expected 64 hexadecimal digits")
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(hashes)], hashes), "")[0].as_py()
    return pa.Array.from_buffers(_HASH, len(hashes), [None, pa.py_buffer(bytes.fromhex(joined))])


def as_written(index: pa.Table) -> pa.Table:
    """Rows of an index, some of its columns or all, as its file holds them."""
    if (at := index.schema.get_field_index("sha256")) >= 0 and index.schema.field(at).type == _HASH:
        pieces = (c[i : i + _PIECE] for c in index["sha256"].chunks for i in range(0, len(c), _PIECE))
        digits = [_digits(piece) for piece in pieces]
        index = index.set_column(at, "sha256", pa.chunked_array(digits, pa.string()))
    return index.cast(pa.schema([INDEX.field(name) for name in index.column_names]))


_PIECE = 1 << 24
"""Hashes of which the digits fit into one array of strings."""


def _digits(hashes: pa.FixedSizeBinaryArray) -> pa.StringArray:
    """Hexadecimal digits of hashes, null where there is none."""
    _, held = hashes.buffers()
    n, width = len(hashes), hashes.type.byte_width
    digits = memoryview(held)[hashes.offset * width :][: n * width].hex()
    ends = np.arange(n + 1, dtype=np.int32) * (2 * width)
    found = pa.StringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(digits.encode()))
    return pc.if_else(hashes.is_valid(), found, None) if hashes.null_count else found


class Locations(Sequence[dict]):
    """Rows of `LOCATION`: ten million of them as dicts would take gigabytes.

    Args:
        index: rows of `LOCATION`.
        rows: (n,) of the index.
        ids: (n,) of the tiles.
    """

    def __init__(self, index: pa.Table, rows: pa.Array, ids: pa.StringArray) -> None:
        self._index, self._rows, self.ids = index, rows, ids

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> dict: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict]: ...
    def __getitem__(self, at: int | slice) -> dict | list[dict]:
        return self[at : at + 1][0] if isinstance(at, int) else self.rows(at).to_pylist()

    def rows(self, at: slice) -> pa.RecordBatch:
        """Some of them, as columns of an index file."""
        found = as_written(self._index.take(self._rows[at])).combine_chunks().to_batches()
        return found[0] if found else pa.RecordBatch.from_pylist([], _PLACES)


_PLACES = pa.schema([INDEX.field(name) for name in LOCATION])


def packed(rows: pa.RecordBatch) -> bytes:
    """Rows of `Locations` for another process: 0.4 us a tile, where a list of dicts takes 3."""
    return rows.serialize().to_pybytes()


def unpacked(message: bytes) -> list[dict]:
    """Rows of `LOCATION` that were `packed`."""
    return pa.ipc.read_record_batch(message, _PLACES).to_pylist()


def read_tiles(
    storage: Storage, locations: Sequence[dict], side: int, classes: int = 255
) -> list[Tile | BadTile]:
    """Fetch, verify and decode tiles, in the order asked for; a tile that fails is a `BadTile`, not an exception.

    Args:
        storage: root of the store.
        locations: rows of `LOCATION`.
        side: side of a stored tile, pixels.
        classes: a label of a higher number makes its tile a bad one: it would be an index out of range to a loss.

    Raises:
        StorageError: the store cannot be reached (that is no fault of a tile).
    """
    tiles = _read_once(storage, locations, side, classes)
    for _ in range(REREADS):
        changed = [
            i
            for i, t in enumerate(tiles)
            if isinstance(t, BadTile) and t.sha256 not in ("", locations[i]["sha256"])
        ]
        if not changed:
            break
        for i, tile in zip(
            changed, _read_once(storage, [locations[i] for i in changed], side, classes), strict=True
        ):
            tiles[i] = tile
    return tiles


def _read_once(storage: Storage, locations: Sequence[dict], side: int, classes: int) -> list[Tile | BadTile]:
    wanted = defaultdict(list)
    for position, at in enumerate(locations):
        for kind in ("image", "label"):
            if at[f"{kind}_offset"] is not None:
                wanted[at["shard"]].append((position, kind, (at[f"{kind}_offset"], at[f"{kind}_length"])))
    parts: list[dict[str, bytes]] = [{} for _ in locations]
    missing: dict[int, str] = {}

    def pieces_of(shard: str) -> list[bytes] | None:
        try:
            return storage.read_ranges(shard, [span for _, _, span in wanted[shard]])
        except FileNotFoundError:
            return None

    # one after the other, every shard would cost a round trip to the bucket; a disk has none, and its readers may fork
    each = map if storage.is_local else _shards().map
    for (shard, wants), pieces in zip(wanted.items(), each(pieces_of, wanted), strict=True):
        if pieces is None:
            missing.update({position: f"shard {shard} is missing" for position, _, _ in wants})
            continue
        for (position, kind, _), piece in zip(wants, pieces, strict=True):
            parts[position][kind] = piece
    return [
        BadTile(at["tile_id"], missing[i], "") if i in missing else _decode(at, parts[i], side, classes)
        for i, at in enumerate(locations)
    ]


@cache
def _shards() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="raysed-shard")


def _decode(at: dict, part: dict[str, bytes], side: int, classes: int) -> Tile | BadTile:
    found = codec.tile_hash(part["image"], part.get("label"))
    if found != at["sha256"]:
        return BadTile(
            at["tile_id"], f"bytes have sha256 {found[:12]}, the index says {at['sha256'][:12]}", found
        )
    try:
        label = codec.decode_label(part["label"], side) if "label" in part else None
        if label is not None and label.max() > classes:
            return BadTile(
                at["tile_id"], f"its label holds {label.max()}, the store has {classes} classes", found
            )
        return Tile(at["tile_id"], codec.decode_image(part["image"], side), label)
    except ValueError as error:
        return BadTile(at["tile_id"], str(error), found)
