import hashlib
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysed.core.tiles import OPENEARTHMAP, pixel_counts, tile_id
from raysed.errors import DataError, UsageError
from raysed.io import codec, store
from raysed.io.storage import Storage
from raysed.io.store import INDEX, LOCATION, BadTile, Store, Tile, as_written, read_tiles

SIDE = 32


def rows(count: int) -> list[dict]:
    made = []
    for i in range(count):
        rng = np.random.default_rng(i)
        image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        label = rng.integers(0, 9, (SIDE, SIDE)).astype(np.uint8)
        labelled = i % 7 > 0
        made.append(
            {
                "tile_id": tile_id(f"here_{i}", 0, 0),
                "region": "here",
                "source": f"here_{i}",
                "row": 0,
                "col": 0,
                "split": "val" if i % 5 == 4 else "train",
                "pixels": pixel_counts(label, 8).tolist() if labelled else None,
                "crs": None,
                "transform": None,
                "scale": [1.0, 1.0],
                "image": codec.encode_image(image),
                "label": codec.encode_label(label) if labelled else None,
            }
        )
    return made


@pytest.fixture
def made(tmp_path):
    storage, tiles = Storage(str(tmp_path)), rows(50)
    piece = store.write_shard(storage, "shards/part-00000.parquet", tiles)
    store.finish(storage, name="x", classes=OPENEARTHMAP, ignore=(0,), tile_size=SIDE, index=piece)
    return Store.open(str(tmp_path)), tiles


def test_what_was_written_is_read_back_in_the_order_asked_for(made):
    opened, tiles = made
    wanted = [t["tile_id"] for t in tiles[::-3]]
    read = read_tiles(opened.storage, opened.locations(wanted), SIDE)
    assert [t.tile_id for t in read] == wanted
    for tile, row in zip(read, tiles[::-3], strict=True):
        assert isinstance(tile, Tile)
        assert codec.encode_image(tile.image) == row["image"]
        assert (tile.label is None) == (row["label"] is None)


def test_a_random_fifth_costs_at_most_a_tenth_more_bytes_than_its_tiles(made, monkeypatch):
    opened, tiles = made
    fetched = []
    original = store.Storage.read_ranges

    def counting(self, path, spans):
        from raysed.io.storage import GAP, coalesce

        fetched.append(sum(n for _, n in coalesce(spans, GAP)))
        return original(self, path, spans)

    monkeypatch.setattr(store.Storage, "read_ranges", counting)
    chosen = [tiles[i] for i in np.random.default_rng(0).permutation(50)[:10]]
    read_tiles(opened.storage, opened.locations([t["tile_id"] for t in chosen]), SIDE)
    own = sum(len(t["image"]) + len(t["label"] or b"") for t in chosen)
    assert own <= sum(fetched) <= own + 10 * 8192  # never whole row groups; gaps up to 8 kB share a request


def test_shards_of_a_bucket_are_read_side_by_side(tmp_path, monkeypatch):
    storage, tiles = Storage(str(tmp_path)), rows(8)
    index = [
        store.write_shard(storage, f"shards/part-{k:05d}.parquet", tiles[4 * k : 4 * k + 4]) for k in range(2)
    ]
    store.finish(
        storage, name="x", classes=OPENEARTHMAP, ignore=(0,), tile_size=SIDE, index=pa.concat_tables(index)
    )
    opened, met = Store.open(str(tmp_path)), threading.Barrier(2)
    original = store.Storage.read_ranges

    def meeting(self, path, spans):
        met.wait(30)  # for the request of the other shard
        return original(Storage(self.uri), path, spans)

    monkeypatch.setattr(store.Storage, "read_ranges", meeting)
    monkeypatch.setattr(opened.storage, "is_local", False)
    read = read_tiles(opened.storage, opened.locations([t["tile_id"] for t in tiles]), SIDE)
    assert [t.tile_id for t in read] == [t["tile_id"] for t in tiles]


def test_shards_are_ordinary_parquet(made):
    opened, tiles = made
    table = pq.read_table(f"{opened.storage.uri}/shards/part-00000.parquet")
    assert table["image"].to_pylist() == [t["image"] for t in tiles]
    assert table["tile_id"].to_pylist() == [t["tile_id"] for t in tiles]


def test_counts_and_splits(made):
    opened, tiles = made
    assert opened.dataset.tiles == {"train": 40, "val": 10}
    known = [t for t in tiles if t["pixels"]]
    total = np.sum([opened.dataset.pixels[s] for s in ("train", "val")], axis=0)
    assert total.tolist() == np.sum([t["pixels"] for t in known], axis=0).tolist()


def test_the_index_has_the_training_tiles_first_and_the_same_values_as_its_file(made):
    opened, _ = made
    file = pq.read_table(f"{opened.storage.uri}/index.parquet").cast(INDEX)
    order = [("split", "ascending"), ("tile_id", "ascending")]
    assert as_written(opened.index) == file.sort_by(order).combine_chunks()
    assert opened.index["tile_id"][:40].to_pylist() == opened.split("train")["tile_id"].to_pylist()
    part = Store.open(opened.storage.uri, None, ["pixels", "shard"]).index
    assert part == opened.index.select(["pixels", "shard"])


def test_hashes_are_written_as_digits_wherever_they_lie(monkeypatch):
    monkeypatch.setattr(store, "_PIECE", 3)
    hashes = [hashlib.sha256(bytes([i])).digest() for i in range(20)]
    hashes[5] = None
    column = pa.chunked_array([pa.array(hashes, pa.binary(32))[2:], pa.array([], pa.binary(32))])
    table = pa.table({"sha256": column})
    expected = [h and h.hex() for h in hashes[2:]]
    assert as_written(table)["sha256"].to_pylist() == expected
    assert as_written(table[4:9])["sha256"].to_pylist() == expected[4:9]
    assert as_written(table[:0]).num_rows == 0


@pytest.mark.parametrize(
    ("name", "wrong", "text"),
    [
        ("sha256", "ab\n12", r"a tile has sha256 'ab\\n12', expected 64 hexadecimal digits"),
        ("sha256", "g" * 64, r"a tile has sha256 'g+', expected"),
        ("sha256", None, "a tile has sha256 None, expected"),
        ("image_offset", -1, "-1"),
        ("image_length", 1 << 40, str(1 << 40)),
    ],
)
def test_an_index_of_impossible_values_is_one_line_that_names_the_store(made, name, wrong, text):
    opened, _ = made
    index = as_written(opened.index)
    values = pa.array([wrong, *index[name].to_pylist()[1:]], INDEX.field(name).type)
    damaged = index.set_column(index.schema.get_field_index(name), INDEX.field(name), values)
    pq.write_table(damaged, f"{opened.storage.uri}/index.parquet")
    with pytest.raises(DataError, match=f"{text}.*: prepare the store anew") as refused:
        Store.open(opened.storage.uri)
    assert str(refused.value).startswith(f"{opened.storage.uri}/index.parquet is damaged (")
    assert "\n" not in str(refused.value)


def test_places_of_tiles_are_the_same_however_they_are_asked_for(made):
    opened, _ = made
    rows = {r["tile_id"]: r for r in as_written(opened.index).select(LOCATION).to_pylist()}
    train = opened.split("train")["tile_id"].to_pylist()
    for ids in (train, train[::-1]):
        found = opened.located(ids)
        assert [found[i] for i in range(40)] == [rows[t] for t in ids]
        assert [r for i in range(0, 40, 3) for r in found[i : i + 3]] == [rows[t] for t in ids]
        assert found[30:50] == [rows[t] for t in ids[30:]]
        assert found[:] == [rows[t] for t in ids]
        assert found.ids.to_pylist() == ids


def test_the_content_hash_does_not_depend_on_the_shards_but_on_every_pixel(tmp_path):
    def build(name: str, tiles: list[dict], cut: int) -> str:
        storage = Storage(str(tmp_path / name))
        pieces = [
            store.write_shard(storage, f"shards/part-{k:05d}.parquet", tiles[k * cut : (k + 1) * cut])
            for k in range(-(-len(tiles) // cut))
        ]
        index = pa.concat_tables(pieces[::-1])
        return store.finish(
            storage, name="x", classes=OPENEARTHMAP, ignore=(0,), tile_size=SIDE, index=index
        ).content_hash

    tiles = rows(20)
    assert build("a", tiles, 20) == build("b", tiles, 7)
    image = codec.decode_image(tiles[3]["image"], SIDE).copy()
    image[0, 0, 0] ^= 1
    tiles[3]["image"] = codec.encode_image(image)
    assert build("c", tiles, 20) != build("a2", rows(20), 20)


def test_flipped_bytes_truncated_and_missing_shards_are_bad_tiles_not_exceptions(made):
    opened, tiles = made
    path = f"{opened.storage.uri}/shards/part-00000.parquet"
    ids = [t["tile_id"] for t in tiles]
    at = opened.locations([ids[8]])[0]
    with open(path, "r+b") as file:
        file.seek(at["image_offset"] + 20)
        file.write(b"\x00\xff\x00")
    found = read_tiles(opened.storage, opened.locations(ids), SIDE)
    assert [type(f) for f in found].count(BadTile) == 1
    assert found[8].reason.startswith("bytes have sha256")
    with open(path, "r+b") as file:
        file.truncate(at["image_offset"] + 10)
    found = read_tiles(opened.storage, opened.locations(ids), SIDE)
    assert all(isinstance(f, BadTile) for f in found[8:])
    import os

    os.unlink(path)
    assert read_tiles(opened.storage, opened.locations(ids[:1]), SIDE)[0].reason.endswith("is missing")


def test_a_label_that_is_no_class_makes_a_bad_tile(tmp_path):
    storage, tiles = Storage(str(tmp_path)), rows(2)
    label = codec.decode_label(tiles[1]["label"], SIDE).copy()
    label[3, 4] = 9
    tiles[1]["label"] = codec.encode_label(label)
    index = store.write_shard(storage, "shards/part-00000.parquet", tiles)
    store.finish(
        storage, name="x", classes=OPENEARTHMAP, ignore=(0,), tile_size=SIDE,
        index=index.set_column(index.schema.get_field_index("pixels"), "pixels", pa.array([[0] * 9] * 2)),
    )  # fmt: skip
    opened = Store.open(storage.uri)
    found = read_tiles(opened.storage, opened.locations([t["tile_id"] for t in tiles]), SIDE, 8)
    assert [type(f) for f in found] == [store.Tile, BadTile]
    assert found[1].reason == "its label holds 9, the store has 8 classes"


def test_missing_unfinished_and_foreign_stores_are_named(tmp_path, made):
    opened, _ = made
    with pytest.raises(UsageError, match="no finished tile store at"):
        Store.open(str(tmp_path / "nowhere"))
    opened.storage.write("dataset.json", replace(opened.dataset, format=99).to_json())
    with pytest.raises(DataError, match="store format 99"):
        Store.open(opened.storage.uri)
    with pytest.raises(UsageError, match="tile nope is not in the store"):
        opened.locations(["nope"])


def test_only_the_stores_own_formats_are_decoded():
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(out, "GIF")
    with pytest.raises(ValueError, match="not WebP"):
        codec.decode_image(out.getvalue(), SIDE)
    good = codec.encode_image(np.zeros((SIDE, SIDE, 3), np.uint8))
    with pytest.raises(ValueError, match="the store holds"):
        codec.decode_image(good, SIDE * 2)
    with pytest.raises(ValueError, match="cannot be decoded"):
        codec.decode_image(good[:30], SIDE)


def test_appending_gives_a_version_and_leaves_the_ones_before_readable(made, tmp_path):
    opened, tiles = made
    first, more = opened.dataset, rows(60)[50:]
    piece = store.write_shard(opened.storage, "shards/part-00001.parquet", more)
    both = pa.concat_tables([as_written(opened.index), piece])
    names = {"name": "x", "classes": OPENEARTHMAP, "ignore": (0,), "tile_size": SIDE}
    second = store.finish(opened.storage, **names, index=both, version=2)
    assert Store.open(opened.storage.uri).dataset == second
    older = Store.open(opened.storage.uri, first.content_hash)
    assert older.dataset == first
    assert older.index == opened.index
    third = store.finish(opened.storage, **names, index=both.slice(1), version=3)
    for dataset, count in ((first, 50), (second, 60), (third, 59)):
        assert len(Store.open(opened.storage.uri, dataset.content_hash).index) == count
    with pytest.raises(UsageError, match="no version with 000000000000, which the run used: give its store"):
        Store.open(opened.storage.uri, "0" * 64)
    at_once = Storage(str(tmp_path / "at_once"))
    piece = store.write_shard(at_once, "shards/part-00000.parquet", [*tiles, *more])
    assert store.finish(at_once, **names, index=piece).content_hash == second.content_hash
