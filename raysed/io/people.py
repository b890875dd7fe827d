"""Labels by people: a round's picks go out with their images, labels come back as PNG files or a Label Studio export.

labelling/round_0002/images/<tile_id>.png   what to label
labelling/round_0002/picks.csv picks.geojson label-studio.json label-studio.xml
labelling/round_0002/scores.parquet         what the strategy saw, so that the picks replay when the labels are there
labelling/round_0002/request.json           written last: who was picked
labelled/                                   tile store of all labels that have come
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysed.core.pool import Selection
from raysed.core.tiles import label_lookup, pixel_counts
from raysed.errors import DataError, WaitingForLabels
from raysed.io import codec, store, studio
from raysed.io.ledger import table_bytes
from raysed.io.sources import corners
from raysed.io.storage import Storage
from raysed.io.store import BadTile, Dataset, Store, Tile, read_tiles

LABELLED = "labelled"
"""Folder of the run that is a tile store of the labels that have come."""


@dataclass(frozen=True)
class Request:
    """A round's picks, as they went out."""

    number: int
    """Of the round."""
    tile_ids: list[str]
    weights: str | None
    """Hash of the weights that the pool was scored with; None without scores."""
    scored: int
    """Tiles scored."""
    quarantine: tuple[BadTile, ...] = ()
    """Tiles known to be bad then; those since the last commit stand nowhere else."""


def place(number: int) -> str:
    """Folder of a round's request in the run directory."""
    return f"labelling/round_{number:04d}"


def unreadable(tiles: Store, ids: Sequence[str]) -> list[BadTile]:
    """Those of the tiles that nobody can be shown."""
    found = read_tiles(tiles.storage, tiles.locations(ids), tiles.dataset.tile_size)
    return [t for t in found if isinstance(t, BadTile)]


def ask(run: Storage, request: Request, picks: Selection, tiles: Store, scores: pa.Table | None) -> None:
    """Write what people need to label a round's picks; `request.json` last.  The same picks give the same files."""
    folder, dataset = run.at(place(request.number)), tiles.dataset
    rows = tiles.index.take(pc.index_in(pa.array(picks.tile_ids), tiles.index["tile_id"])).to_pylist()
    for tile in read_tiles(tiles.storage, tiles.locations(picks.tile_ids), dataset.tile_size):
        if not isinstance(tile, Tile):
            raise DataError(f"tile {tile.tile_id} was picked for labelling and is unusable: {tile.reason}")
        folder.write(f"images/{tile.tile_id}.png", codec.encode_picture(tile.image))
    if scores is not None:
        folder.write("scores.parquet", table_bytes(scores))
    folder.write("picks.csv", _csv(rows, picks).encode())
    folder.write("picks.geojson", json.dumps(geojson(rows, dataset.tile_size), indent=1).encode())
    folder.write("label-studio.json", studio.tasks(picks, folder.uri.rsplit("/", 1)[1]))
    folder.write("label-studio.xml", studio.configuration(dataset.classes))
    folder.write("request.json", (json.dumps(asdict(request), indent=1) + "\n").encode())


def asked(run: Storage, number: int) -> Request | None:
    """The request of a round; None if there was none."""
    folder = run.at(place(number))
    if not folder.exists("request.json"):
        return None
    fields = json.loads(folder.read("request.json"))
    return Request(**{**fields, "quarantine": tuple(BadTile(**b) for b in fields["quarantine"])})


def seen(run: Storage, number: int) -> pa.Table:
    """The scores that a round's picks were chosen by.

    Raises:
        FileNotFoundError: they were chosen without.
    """
    return pq.read_table(io.BytesIO(run.at(place(number)).read("scores.parquet")))


def read_labels(folder: Storage, ids: Sequence[str], dataset: Dataset) -> dict[str, np.ndarray]:
    """The stored labels (0 void, 1..C) of those tiles that have come.

    `<tile_id>.png` holds the data set's own class codes; a `.json` file is a Label Studio export whose tasks carry `tile_id`, with
    polygons, brush masks, or one choice for the whole tile; one submitted without a region has not come.  A PNG goes before an
    export; pixels that no region covers are void.

    Raises:
        DataError: a label that is unreadable, of another size or with a code or class that the data set does not have.
    """
    there = folder.list()
    lookup = label_lookup(dataset.classes, dataset.ignore)
    found: dict[str, np.ndarray] = {}
    for path in sorted(p for p in there if p.endswith(".json") and "/" not in p):
        for tile_id, regions in studio.annotations(folder, path):
            if tile_id in ids:
                where = f"{folder.uri}/{path}, tile {tile_id}"
                found[tile_id] = studio.drawn(regions, dataset, where)
    for tile_id in ids:
        name = f"{tile_id}.png"
        if name not in there:
            continue
        try:
            codes = codec.decode_codes(folder.read(name), dataset.tile_size)
        except ValueError as error:
            raise DataError(f"{folder.uri}/{name}: {error}") from error
        label = lookup[codes]
        if (label < 0).any():
            known = ", ".join(str(c.source_id) for c in dataset.classes)
            raise DataError(
                f"{folder.uri}/{name}: code {int(codes[label < 0][0])} is no class, the data set has {known} and for "
                f"unknown {', '.join(map(str, dataset.ignore))}"
            )
        found[tile_id] = label.astype(np.uint8)
    return found


def require(
    run: Storage, number: int, ids: Sequence[str], folder: str, dataset: Dataset
) -> dict[str, np.ndarray]:
    """The stored labels of all picks of a round.

    Raises:
        WaitingForLabels: not all have come.
        DataError: see `read_labels`.
    """
    labels = read_labels(Storage(folder), ids, dataset)
    if left := sorted(set(ids) - labels.keys()):
        raise WaitingForLabels(
            f"round {number} waits for {len(left)} of {len(ids)} labels, the first of {left[0]}: label the images of "
            f"{run.uri}/{place(number)}, put <tile_id>.png or a Label Studio export into {folder}, and start the same command again"
        )
    return labels


def take(run: Storage, number: int, tiles: Store, labels: dict[str, np.ndarray]) -> None:
    """Append a round's tiles with their labels to the run's own store; done twice it is the same store."""
    target, dataset = run.at(LABELLED), tiles.dataset
    ids = sorted(labels)
    at = tiles.index.take(pc.index_in(pa.array(ids), tiles.index["tile_id"])).to_pylist()
    images = read_tiles(tiles.storage, tiles.locations(ids), dataset.tile_size)
    rows = []
    for row, tile in zip(at, images, strict=True):
        if not isinstance(tile, Tile):
            raise DataError(f"tile {tile.tile_id} was labelled and is unusable: {tile.reason}")
        label = labels[tile.tile_id]
        own = {f.name: row[f.name] for f in store.TILES if f.name in row}
        own["pixels"] = pixel_counts(label, len(dataset.classes)).tolist()
        rows.append(own | {"image": codec.encode_image(tile.image), "label": codec.encode_label(label)})
    path = f"shards/round-{number:04d}.parquet"
    piece = store.write_shard(target, path, rows)
    if target.exists("dataset.json"):
        before = Store.open(target.uri).index
        before = before.filter(pc.not_equal(before["shard"], path))
        piece = pa.concat_tables([store.as_written(before), piece])
    store.finish(
        target, name=f"{dataset.name}, labelled", classes=dataset.classes, ignore=dataset.ignore,
        tile_size=dataset.tile_size, index=piece,
    )  # fmt: skip


def _csv(rows: list[dict[str, Any]], picks: Selection) -> str:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["tile_id", "rank", "reason", "region", "source", "row", "col", "image"])
    for rank, (row, reason) in enumerate(zip(rows, picks.reasons, strict=True)):
        own = [row[k] for k in ("region", "source", "row", "col")]
        table.writerow([row["tile_id"], rank, reason, *own, f"images/{row['tile_id']}.png"])
    return out.getvalue()


def geojson(rows: Sequence[dict[str, Any]], side: int) -> dict[str, Any]:
    """Footprints of tiles in longitude and latitude, WGS 84; null geometry where a tile has no georeference.

    Args:
        rows: of the index.
        side: of a tile, pixels.
    """
    features = []
    for row in rows:
        ring = corners(row["crs"], row["transform"], side)
        shape = None if ring is None else {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        properties = {k: row[k] for k in ("tile_id", "region", "source", "row", "col")}
        features.append({"type": "Feature", "geometry": shape, "properties": properties})
    return {"type": "FeatureCollection", "features": features}
