"""Which tiles a run may train on and which it is judged by: rows of the store's index, decided by names alone."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from raysed.core.tiles import born_in

Half = Literal["dev", "report"]


def halves(regions: Mapping[str, tuple[int, str]]) -> dict[str, Half]:
    """The half that each validation source belongs to, with all its tiles.  Everything is chosen on `dev`.

    The sources of a region, in order of the hash of their names, go to the halves by turns, and the turns go on from region to
    region: few sources would fall unevenly by the hash alone.  Those of a later version of the store come after all earlier ones,
    so that none changes its half when tiles are appended.

    Args:
        regions: source image -> the version of the store that it came with, and its region.
    """
    order = sorted(regions, key=lambda s: (regions[s], hashlib.blake2b(f"validation/{s}".encode()).digest()))
    return {source: "report" if turn % 2 else "dev" for turn, source in enumerate(order)}


def labelled(index: pa.Table) -> pa.Table:
    """Tiles that have a label."""
    if not index["label_offset"].null_count:
        return index
    return index.filter(pc.is_valid(index["label_offset"]))


def training_rows(index: pa.Table, held_out: str | None, *, unlabelled: bool = False) -> pa.Table:
    """Tiles of split train, none of a region that is held out.

    Args:
        index: of the store.
        held_out: regions with commas between.
        unlabelled: also those without a label.
    """
    train = pc.equal(index["split"], "train")
    count = pc.sum(train).as_py() or 0
    first = pc.all(train[:count]).as_py()  # as a store has them: a copy of 10^7 rows is gigabytes
    rows = index[:count] if first else index.filter(train)
    return selectable(rows, held_out, unlabelled=unlabelled)


def selectable(index: pa.Table, held_out: str | None, *, unlabelled: bool = False) -> pa.Table:
    """Of the rows of split train those that are labelled, or not asked to be, and of no region that is held out."""
    rows = index if unlabelled else labelled(index)
    return rows if held_out is None else rows.filter(pc.invert(_within(rows, held_out)))


def validation_rows(index: pa.Table, validation: str, held_out: str | None) -> pa.Table:
    """Labelled tiles of split val, or all those of the regions held out, whatever their split; of all sources or of a half.

    The half of a source does not depend on what is held out: sources of split val have one, and all others one of their own.

    Args:
        index: of the store.
        validation: all, dev or report.
        held_out: regions with commas between.
    """
    rows = labelled(index)
    official = pc.equal(rows["split"], "val")
    own = rows.filter(official if held_out is None else _within(rows, held_out))
    if validation == "all":
        return own
    half = halves(_regions(rows.filter(official)))
    if held_out is not None:
        half = halves({s: r for s, r in _regions(rows).items() if s not in half}) | half
    wanted = [source for source, side in half.items() if side == validation]
    return own.filter(pc.is_in(own["source"], pa.array(wanted, pa.string())))


def first_unseen(held_out: Sequence[str | None], regions: set[str]) -> dict[str, int]:
    """Region -> the first run that has not trained on it; regions that all runs have trained on are missing.

    Args:
        held_out: of each run, regions with commas between.
        regions: of the tiles.
    """
    unseen = [set((h or "").split(",")) for h in held_out]
    return {
        r: next(i for i, own in enumerate(unseen) if r in own) for r in regions if any(r in u for u in unseen)
    }


def _regions(rows: pa.Table) -> dict[str, tuple[int, str]]:
    """Source -> version that it came with, by the name of its shard, and region."""
    groups = rows.group_by(["source", "region", "shard"]).aggregate([]).to_pylist()
    return {g["source"]: (born_in(g["shard"]), g["region"]) for g in groups}


def _within(rows: pa.Table, regions: str) -> pa.ChunkedArray:
    return pc.is_in(rows["region"], pa.array(regions.split(","), pa.string()))
