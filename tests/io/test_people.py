"""Picks go out to people and labels come back: files alone."""

import csv
import io
import json
import struct
import zlib
from urllib.parse import parse_qs
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raysed.core.pool import Selection
from raysed.core.tiles import LandClass, pixel_counts
from raysed.errors import DataError, WaitingForLabels
from raysed.io import codec, people, store
from raysed.io.people import Request
from raysed.io.storage import Storage
from raysed.io.store import BadTile, Store, read_tiles

SIDE = 32
CLASSES = (LandClass("road & rail", "#112233", 4), LandClass("water", "#7788AA", 9))
PICKS = Selection(["t2", "t0"], [1.0, 1.0], ["entropy 2", "entropy 1"])


@pytest.fixture
def tiles(tmp_path) -> Store:
    """Four tiles, the last labelled; t0 lies near Dubai, the others nowhere."""
    rng = np.random.default_rng(0)
    label = np.ones((SIDE, SIDE), np.uint8)
    rows = [
        {
            "tile_id": f"t{i}", "region": "r", "source": "s", "row": 0, "col": i, "split": "val" if i == 3 else "train",
            "pixels": pixel_counts(label, 2).tolist() if i == 3 else None, "crs": None if i else "EPSG:32640",
            "transform": None if i else [0.5, 0, 325000, 0, -0.5, 2786000], "scale": [1.0, 1.0],
            "image": codec.encode_image(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)),
            "label": codec.encode_label(label) if i == 3 else None,
        }
        for i in range(4)
    ]  # fmt: skip
    storage = Storage(str(tmp_path / "tiles"))
    index = store.write_shard(storage, "shards/part-00000.parquet", rows)
    store.finish(storage, name="x", classes=CLASSES, ignore=(0,), tile_size=SIDE, index=index)
    return Store.open(storage.uri)


@pytest.fixture
def labels(tmp_path) -> Storage:
    return Storage(str(tmp_path / "labels"))


def png(codes: np.ndarray) -> bytes:
    return codec.encode_picture(codes.astype(np.uint8))


def test_a_request_holds_all_that_people_and_the_replay_need(tiles, tmp_path):
    run = Storage(str(tmp_path / "run"))
    scores = pa.table({"tile_id": ["t0", "t2"], "entropy": [1.0, 2.0]})
    request = Request(2, PICKS.tile_ids, "abc", 2, (BadTile("t1", "torn", "0" * 64),))
    assert people.asked(run, 2) is None
    people.ask(run, request, PICKS, tiles, scores)
    assert people.asked(run, 2) == request
    assert people.seen(run, 2) == scores
    folder = run.at(people.place(2))
    seen = codec.decode_picture(folder.read("images/t2.png"))
    assert np.array_equal(seen, read_tiles(tiles.storage, tiles.locations(["t2"]), SIDE)[0].image)
    rows = list(csv.DictReader(io.StringIO(folder.read("picks.csv").decode())))
    assert [(r["tile_id"], r["rank"], r["reason"], r["col"]) for r in rows] == [
        ("t2", "0", "entropy 2", "2"),
        ("t0", "1", "entropy 1", "0"),
    ]
    tasks = json.loads(folder.read("label-studio.json"))
    assert {k: tasks[0]["data"][k] for k in ("tile_id", "reason")} == {"tile_id": "t2", "reason": "entropy 2"}
    for task in tasks:
        address, _, query = task["data"]["image"].partition("?")
        assert address == "/data/local-files/"
        (path,) = parse_qs(query)["d"]
        shown = run.at("labelling").read(path)  # <run>/labelling is the document root
        assert shown == folder.read(f"images/{task['data']['tile_id']}.png")
    tools = ElementTree.fromstring(folder.read("label-studio.xml"))
    assert [t.tag for t in tools] == ["Image", "PolygonLabels", "BrushLabels"]
    assert [[c.get("value") for c in t] for t in tools[1:]] == [["road & rail", "water"]] * 2
    nowhere, place = json.loads(folder.read("picks.geojson"))["features"]
    assert nowhere["geometry"] is None
    ring = place["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1]
    lon, lat = np.array(ring).T
    assert 55 < lon.min() < lon.max() < 56
    assert 25 < lat.min() < lat.max() < 26
    assert (lat.max() - lat.min()) * 111_000 == pytest.approx(SIDE / 2, rel=0.05)  # metres


def test_labels_that_came_make_a_store_that_training_can_read(tiles, labels, tmp_path):
    run = Storage(str(tmp_path / "run"))
    codes = np.full((SIDE, SIDE), 9)
    codes[:4], codes[4:8] = 0, 4
    labels.write("t2.png", png(codes))
    with pytest.raises(WaitingForLabels, match="round 0 waits for 1 of 2 labels, the first of t0"):
        people.require(run, 0, PICKS.tile_ids, labels.uri, tiles.dataset)
    labels.write("t0.png", png(codes.T))
    found = people.require(run, 0, PICKS.tile_ids, labels.uri, tiles.dataset)
    people.take(run, 0, tiles, found)
    once = Store.open(run.at(people.LABELLED).uri)
    people.take(run, 0, tiles, found)
    assert Store.open(once.storage.uri).dataset == once.dataset
    assert once.dataset.pixels["train"] == [256, 256, 1536]
    tile = read_tiles(once.storage, once.locations(["t2"]), SIDE)[0]
    assert tile.label[:9, 0].tolist() == [0] * 4 + [1] * 4 + [2]
    labels.write("t1.png", png(codes))
    people.take(run, 1, tiles, people.require(run, 1, ["t1"], labels.uri, tiles.dataset))
    assert Store.open(once.storage.uri).index["tile_id"].to_pylist() == ["t0", "t1", "t2"]


def grey_png(bits: int) -> bytes:
    """Codes 0 and 1 in turn, in so many bits a pixel."""
    values = np.tile([0, 1], SIDE // 2)
    planes = (values[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    row = b"\0" + np.packbits(planes.astype(np.uint8).ravel()).tobytes()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row * SIDE))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_label_of_few_grey_levels_is_refused_because_decoders_stretch_it(tiles, labels, bits):
    labels.write("t0.png", grey_png(bits))
    with pytest.raises(
        DataError, match=r"t0.png: holds (1|L;2|L;4), expected codes in 8-bit grey or a palette"
    ):
        people.read_labels(labels, ["t0"], tiles.dataset)


def test_a_label_may_be_a_palette_and_has_the_size_of_its_tile(tiles, labels):
    codes = np.full((SIDE, SIDE), 9, np.uint8)
    codes[3] = 4
    image, out = Image.fromarray(codes), io.BytesIO()
    image.putpalette(list(range(30)))
    image.save(out, "PNG")
    labels.write("t0.png", out.getvalue())
    found = people.read_labels(labels, ["t0"], tiles.dataset)["t0"]
    assert found[2:5, 0].tolist() == [2, 1, 2]
    labels.write("t0.png", png(codes[:-1]))
    with pytest.raises(DataError, match=r"has 32 x 31 pixels, the tile has 32 x 32"):
        people.read_labels(labels, ["t0"], tiles.dataset)


def test_tiles_that_nobody_can_be_shown_are_named(tiles):
    shard = tiles.storage.read("shards/part-00000.parquet")
    [at] = tiles.locations(["t2"])
    start = at["image_offset"]
    tiles.storage.write("shards/part-00000.parquet", shard[:start] + bytes(8) + shard[start + 8 :])
    assert [t.tile_id for t in people.unreadable(tiles, ["t0", "t2", "t1"])] == ["t2"]


def polygon(name: str, points: list[list[float]]) -> dict:
    return {"type": "polygonlabels", "value": {"points": points, "polygonlabels": [name]}}


def export(*tasks: tuple[str, list[dict]]) -> bytes:
    return json.dumps([{"data": {"tile_id": t}, "annotations": [{"result": r}]} for t, r in tasks]).encode()


def test_what_is_no_answer_of_label_studio_has_not_come(tiles, labels):
    half = polygon("road & rail", [[0, 0], [50, 0], [50, 100], [0, 100]])
    answered = {"data": {"tile_id": "t0"}, "annotations": [{"result": [half]}, {"result": []}]}
    skipped = {"data": {"tile_id": "t1"}, "annotations": [{"result": [half], "was_cancelled": True}]}
    empty = {"data": {"tile_id": "t2"}, "annotations": [{"result": []}]}
    outgoing = {"data": {"tile_id": "t2", "image": "x"}}
    labels.write("export.json", json.dumps([answered, skipped, empty, outgoing]).encode())
    assert sorted(people.read_labels(labels, ["t0", "t1", "t2"], tiles.dataset)) == ["t0"]
    labels.write(
        "export.json", json.dumps([{"id": 1, "tile_id": "t0", "label": [half]}]).encode()
    )  # JSON-MIN
    with pytest.raises(DataError, match="is not a Label Studio export in JSON"):
        people.read_labels(labels, ["t0"], tiles.dataset)


def test_a_label_studio_export_is_drawn_in_its_order(tiles, labels):
    half = polygon("road & rail", [[0, 0], [50, 0], [50, 100], [0, 100]])
    corner = polygon("water", [[25, 50], [75, 50], [75, 100], [25, 100]])
    whole = {"type": "choices", "value": {"choices": ["water"]}}
    labels.write("export.json", export(("t0", [half, corner]), ("t2", [whole]), ("other", [half])))
    found = people.read_labels(labels, ["t0", "t1", "t2"], tiles.dataset)
    assert sorted(found) == ["t0", "t2"]
    assert (found["t2"] == 2).all()
    expected = np.zeros((SIDE, SIDE), int)
    expected[:, :16] = 1
    expected[16:, 8:24] = 2
    assert (found["t0"] != expected).mean() < 0.05  # edges fall on pixel borders
    assert (found["t0"] == expected)[2:14, 2:14].all()
    labels.write("t0.png", png(np.full((SIDE, SIDE), 4)))
    assert (people.read_labels(labels, ["t0"], tiles.dataset)["t0"] == 1).all()


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("t0.png", png(np.full((SIDE, SIDE), 7)), r"t0.png: code 7 is no class, the data set has 4, 9 and for unknown 0"),
        ("t0.png", png(np.zeros((8, 8))), r"t0.png: has 8 x 8 pixels, the tile has 32 x 32"),
        ("t0.png", b"GIF89a", r"t0.png: is not PNG"),
        ("e.json", b"[{]", r"e.json is not a Label Studio export"),
        ("e.json", export(("t0", [polygon("lava", [[0, 0], [9, 0], [9, 9]])])), r"e.json, tile t0, region 1: class \['lava'\]"),
        ("e.json", export(("t0", [{"type": "keypointlabels", "value": {}}])), r"tile t0, region 1: type 'keypointlabels'"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_used_are_named(tiles, labels, name, data, text):
    labels.write(name, data)
    with pytest.raises(DataError, match=text):
        people.read_labels(labels, ["t0"], tiles.dataset)
