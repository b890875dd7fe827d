"""Images to tile store: layouts, sizes, places on earth, bad files, kills."""

import hashlib
import io
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from PIL import Image
from rasterio.transform import Affine

from raysed import cli
from raysed.cluster import prepare as prepare_module
from raysed.cluster.prepare import Settings, pack, plan_grids, prepare, synthetic
from raysed.config import ClusterConfig, Experiment, with_overrides
from raysed.errors import DataError, StorageError, UsageError
from raysed.io import store as store_module
from raysed.io.sources import (
    BadSource,
    Raster,
    Rule,
    Source,
    find,
    openearthmap_sources,
    remapped,
)
from raysed.io.storage import Storage
from raysed.io.store import Store, read_tiles
from raysed.runs import with_data

ROOT = Path(__file__).resolve().parents[2]


def quiet(_: str) -> None:
    pass


def write(path: Path, pixels: np.ndarray, **keys) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        bands = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
        shape = {
            "count": bands.shape[0],
            "height": bands.shape[1],
            "width": bands.shape[2],
            "dtype": bands.dtype,
        }
        with rasterio.open(path, "w", driver="GTiff", **shape, **keys) as file:
            file.write(bands)
    else:
        Image.fromarray(pixels).save(path)


def folder(root: Path, count: int = 6, side: int = 96) -> Path:
    """A plain folder of PNG images with labels 0..2."""
    rng = np.random.default_rng(0)
    names = [f"town_{i}" for i in range(count)]
    for name in names:
        write(root / f"images/{name}.png", rng.integers(0, 256, (side, side, 3), np.uint8))
        write(root / f"labels/{name}.png", rng.integers(0, 3, (side, side)).astype(np.uint8))
    classes = [{"id": 1, "name": "grass", "color": "#00FF00"}, {"id": 2, "name": "roof", "color": "#FF0000"}]
    (root / "classes.json").write_text(json.dumps({"name": "town", "ignore": [0], "classes": classes}))
    (root / "train.txt").write_text("\n".join(names[:-2]))
    (root / "val.txt").write_text("\n".join(names[-2:]))
    return root


def make(
    root: Path, target: Path | str, *, budget: float = 0.0, append: bool = False, say=quiet, **settings
) -> dict:
    storage = Storage(str(root))
    options = {"bad_budget": budget, "append": append, "say": say}
    return prepare(storage, find(storage), str(target), Settings(**settings), **options)


def test_the_official_lists_plan_to_9212_and_1536_tiles(real_data):
    lists = {s: (real_data / f"openearthmap/{s}_wo_xBD.txt").read_text().split() for s in ("train", "val")}
    images = {f"{n.rpartition('_')[0]}/images/{n}": 1 for names in lists.values() for n in names}
    sources = list(openearthmap_sources(lists, images))
    assert all(s.image_bytes for s in sources)
    assert next(s for s in sources if s.name == "san_tome_3").region == "san_tome"
    grids = plan_grids(sources, {s.name: (512, 512) for s in sources}, 256)
    counts = {"train": 0, "val": 0}
    for source, rows, cols in grids:
        counts[source.split] += rows * cols
    assert counts == {"train": 9212, "val": 1536}


def test_packing_takes_every_window_once_and_keeps_small_sources_whole():
    grids = [(Source(f"s{i:02d}", "r", "train", "", None, 1, None), 3, 1 + i % 5) for i in range(30)]
    grids.append((Source("s99", "r", "train", "", None, 1, None), 20, 20))
    shards = pack(grids, limit=32)
    seen = [(w.source.name, n) for shard in shards for w in shard for n in range(w.first, w.last)]
    assert len(seen) == len(set(seen)) == sum(r * c for _, r, c in grids)
    assert all(sum(w.last - w.first for w in shard) <= 32 for shard in shards)
    small = [w.source.name for shard in shards for w in shard if w.source.name != "s99"]
    assert len(small) == len(set(small))


@pytest.mark.ray
def test_the_content_hash_is_that_of_the_input_whatever_was_lost_on_the_way(
    ray_session, tmp_path, monkeypatch
):
    root = folder(tmp_path / "in", count=8)
    one = make(root, tmp_path / "one", tile=32)
    assert one["tiles"] == {"train": 54, "val": 18}
    monkeypatch.setattr("raysed.cluster.prepare.TILES_A_SHARD", 7)
    monkeypatch.setattr("raysed.cluster.prepare.pack", lambda grids: pack(grids, 7))
    many = make(root, tmp_path / "many", tile=32)
    assert many["hash"] == one["hash"]
    assert make(root, tmp_path / "many", tile=32) == many  # finished: nothing is done again

    torn = tmp_path / "torn"
    original = store_module.finish
    monkeypatch.setattr(store_module, "finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        make(root, torn, tile=32)
    monkeypatch.setattr(store_module, "finish", original)
    for piece in sorted((torn / "pieces").iterdir())[:2]:
        piece.unlink()
    seen = []
    monkeypatch.setattr("raysed.cluster.prepare._make", _recording(seen))
    assert make(root, torn, tile=32)["hash"] == one["hash"]
    assert seen == [2]  # only the lost shards were made again


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_the_same_command_again_continues_or_does_nothing_on_disk_and_in_a_bucket(
    ray_session, tmp_path, request, monkeypatch, kind
):
    """Also after tiles of another folder were appended: the version with them stays the newest."""
    target = request.getfixturevalue("bucket") if kind == "bucket" else str(tmp_path / "out")
    root, other = folder(tmp_path / "in"), folder(tmp_path / "other", count=8)
    monkeypatch.setattr("raysed.cluster.prepare.TILES_A_SHARD", 9)
    monkeypatch.setattr("raysed.cluster.prepare.pack", lambda grids: pack(grids, 9))
    seen: list[int] = []
    monkeypatch.setattr("raysed.cluster.prepare._make", _recording(seen))
    with monkeypatch.context() as killed:
        killed.setattr(store_module, "finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            make(root, target, tile=32)
    Storage(target).remove("pieces/part-00002.parquet")
    first = make(root, target, tile=32)
    assert make(root, target, tile=32) == first
    second = make(other, target, tile=32, append=True)
    assert second["version"] == 2
    before = {p: Storage(target).read(p) for p in Storage(target).list()}
    assert make(root, target, tile=32) == second
    assert {p: Storage(target).read(p) for p in Storage(target).list()} == before
    assert seen == [6, 1, 2]


@pytest.mark.ray
def test_who_comes_second_leaves_what_the_first_has_finished(ray_session, tmp_path, monkeypatch):
    """Two processes make the same store; the slower one finds it finished, and appended to."""
    root, other, target = folder(tmp_path / "in"), folder(tmp_path / "other", count=8), tmp_path / "out"
    from raysed.cluster.prepare import _make

    def overtaken(*arguments):
        _make(*arguments)
        monkeypatch.undo()
        make(root, target, tile=32)
        assert make(other, target, tile=32, append=True)["version"] == 2

    monkeypatch.setattr("raysed.cluster.prepare._make", overtaken)
    assert make(root, target, tile=32)["version"] == 2
    assert not list((target / "pieces").iterdir())


def _recording(seen: list[int]):
    from raysed.cluster.prepare import _make

    def recorded(items, *rest):
        seen.append(len(items))
        return _make(items, *rest)

    return recorded


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_killed_prepare_continues_and_ends_with_the_same_hash(ray_session, tmp_path):
    calm = prepare(None, synthetic(24), str(tmp_path / "calm"), Settings(tile=32), say=quiet)
    assert calm["tiles"] == {"train": 1280, "val": 256}
    target = tmp_path / "torn"
    job = ["jobs/prepare.py", "--source", "synthetic", "--scenes", "24", "--tile", "32", "--json"]
    command = [sys.executable, *job, "--target", str(target)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(target.glob("pieces/*.parquet")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (target / "dataset.json").exists()
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == calm  # nothing else is on standard output
    made = re.search(r"12 shards, (\d+) to make", done.stderr)
    assert made
    assert int(made[1]) < 12


@pytest.mark.ray
@pytest.mark.parametrize("resize", [None, 64])
def test_crs_transform_and_scale_follow_resize_and_cut(ray_session, tmp_path, resize):
    transform = Affine(0.5, 0.1, 3000.0, -0.05, -0.5, 7000.0)
    image = np.random.default_rng(0).integers(0, 256, (128, 160, 3), np.uint8)
    write(tmp_path / "in/images/geo_1.tif", image, crs="EPSG:32633", transform=transform)
    make(tmp_path / "in", tmp_path / "out", tile=32, store=16, resize=resize)
    rows = Store.open(str(tmp_path / "out")).index.to_pylist()
    assert len(rows) == (4 if resize else 20)
    for r in rows:
        factor = (128 / resize, 160 / resize) if resize else (1, 1)
        assert r["crs"] == "EPSG:32633"
        assert r["scale"] == pytest.approx([2 * f for f in factor])
        own = Affine(*r["transform"])
        for y, x in ((0, 0), (16, 0), (0, 16), (7, 9)):
            there = ((r["col"] * 32 + 2 * x) * factor[1], (r["row"] * 32 + 2 * y) * factor[0])
            assert own @ (x, y) == pytest.approx(transform @ there)


@pytest.mark.ray
def test_labels_move_with_images_and_ids_become_classes(ray_session, tmp_path):
    root = folder(tmp_path / "in")
    make(root, tmp_path / "out", tile=32)
    opened = Store.open(str(tmp_path / "out"))
    for tile in read_tiles(opened.storage, opened.locations(opened.index["tile_id"].to_pylist()), 32):
        name, _, at = tile.tile_id.rpartition("-")
        row, col = int(at[1:4]) * 32, int(at[5:8]) * 32
        image = np.asarray(Image.open(root / f"images/{name}.png"))[row : row + 32, col : col + 32]
        label = np.asarray(Image.open(root / f"labels/{name}.png"))[row : row + 32, col : col + 32]
        assert np.array_equal(tile.image, image)
        assert np.array_equal(tile.label, label)
    assert [c.name for c in opened.dataset.classes] == ["grass", "roof"]


@pytest.mark.ray
@pytest.mark.parametrize("resize", [None, 64])
def test_pixels_without_data_are_void_and_tiles_without_any_are_left_out(ray_session, tmp_path, resize):
    root = folder(tmp_path / "in", count=3, side=64)
    (root / "images/town_0.png").unlink()
    pixels = np.random.default_rng(0).integers(1, 256, (64, 64, 3), np.uint8)
    pixels[:32], pixels[32:, :8] = 0, 0
    shape = {"count": 3, "height": 64, "width": 64, "dtype": "uint8", "nodata": 0}
    with rasterio.open(root / "images/town_0.tif", "w", driver="GTiff", **shape) as file:
        file.write(pixels.transpose(2, 0, 1))
    label = np.ones((64, 64), np.uint8)
    write(root / "labels/town_0.png", label)
    made = make(root, tmp_path / "out", tile=32, resize=resize)
    assert made["tiles"]["train"] + made["tiles"]["val"] == 10
    opened = Store.open(str(tmp_path / "out"))
    one, other = read_tiles(opened.storage, opened.locations(["town_0-r001c000", "town_0-r001c001"]), 32)
    assert (one.label == np.where(np.arange(32) < 8, 0, 1)).all()
    assert (other.label == 1).all()


@pytest.mark.ray
def test_a_store_with_quarantined_sources_can_be_appended_to(ray_session, tmp_path):
    root = folder(tmp_path / "in")
    (root / "images/town_0.png").write_bytes(b"torn")
    make(root, tmp_path / "out", tile=32, budget=0.2)
    said: list[str] = []
    same = make(root, tmp_path / "out", tile=32, budget=0.2, append=True, say=said.append)
    assert (same["quarantined"], same.get("version", 1)) == (1, 1)
    assert any("nothing to append, 1 sources cannot be used still" in line for line in said)
    rng = np.random.default_rng(1)
    for kind, pixels in (
        ("images", rng.integers(0, 256, (96, 96, 3))),
        ("labels", rng.integers(0, 3, (96, 96))),
    ):
        write(root / f"{kind}/town_9.png", pixels.astype(np.uint8))
    (root / "train.txt").write_text((root / "train.txt").read_text() + "\ntown_9\n")
    more = make(root, tmp_path / "out", tile=32, budget=0.0, append=True)
    assert (more["version"], more["quarantined"]) == (2, 1)
    assert more["tiles"]["train"] == same["tiles"]["train"] + 9


@pytest.mark.ray
def test_a_prepare_whose_sources_another_one_has_begun_anew_ends(ray_session, tmp_path, monkeypatch):
    """The first has planned and not yet written, when the second finds more images."""
    root, target = folder(tmp_path / "in"), tmp_path / "out"
    original, second = prepare_module._make, []

    def meanwhile(*arguments):
        if not second:
            second.append(True)
            (root / "train.txt").write_text((root / "train.txt").read_text() + "\ntown_7\n")
            write(root / "images/town_7.png", np.zeros((96, 96, 3), np.uint8))
            write(root / "labels/town_7.png", np.zeros((96, 96), np.uint8))
            second.append(make(root, target, tile=32))
        original(*arguments)

    monkeypatch.setattr(prepare_module, "_make", meanwhile)
    with pytest.raises(UsageError, match=r"finished|begun anew by another job"):
        make(root, target, tile=32)
    monkeypatch.setattr(prepare_module, "_make", original)
    assert make(root, target, tile=32) == second[1]
    assert make(root, tmp_path / "alone", tile=32)["hash"] == second[1]["hash"]


@pytest.mark.ray
def test_bands_and_bits_are_read_by_the_rule_that_the_store_records(ray_session, tmp_path):
    plain = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    deep = np.concatenate([plain[..., :1], plain[..., ::-1]], 2).astype(np.uint16) * 4
    write(tmp_path / "in/deep_1.tif", deep)
    with pytest.raises(DataError, match=r"has 4 bands of uint16, expected 3 of uint8.*--bands picks bands"):
        make(tmp_path / "in", tmp_path / "out", tile=32)
    rule = Rule((4, 3, 2), (0, 4 * 255))
    make(tmp_path / "in", tmp_path / "ruled", tile=32, rule=rule)
    opened = Store.open(str(tmp_path / "ruled"))
    assert opened.dataset.rule == rule
    tile = read_tiles(opened.storage, opened.locations(["deep_1-r001c000"]), 32)[0]
    assert np.array_equal(tile.image, plain[32:, :32])
    with pytest.raises(UsageError, match=r"rule: .* there, None now"):
        make(tmp_path / "in", tmp_path / "ruled", tile=32)


@pytest.mark.ray
def test_labels_are_remapped_and_the_store_says_how(ray_session, tmp_path):
    root, storage = folder(tmp_path / "in"), Storage(str(tmp_path / "in"))
    hashes = set()
    for n, wanted in enumerate(({"grass": "green", "roof": 8}, {"grass": "green", "roof": "ignore"})):
        classes = [
            {"id": i, "name": c, "color": "#00FF00"} for i, c in ((8, "grey"), (9, "green"), (3, "blue"))
        ]
        (tmp_path / "remap.json").write_text(json.dumps({"classes": classes, "map": wanted}))
        layout = remapped(find(storage), str(tmp_path / "remap.json"))
        made = prepare(storage, layout, str(tmp_path / f"{n}"), Settings(tile=96), bad_budget=0, say=quiet)
        hashes.add(made["hash"])
        opened = Store.open(str(tmp_path / f"{n}"))
        assert opened.dataset.remap == {"0": None, "1": 9, "2": None if n else 8}
        tile = read_tiles(opened.storage, opened.locations(["town_0-r000c000"]), 96)[0]
        label = np.asarray(Image.open(root / "labels/town_0.png"))
        assert np.array_equal(tile.label, np.array([0, 2, 0 if n else 1])[label])
        assert len(opened.dataset.pixels["train"]) == 4
        assert opened.dataset.pixels["train"][3] == 0
    assert len(hashes) == 2
    with pytest.raises(UsageError, match=r"remap: .* there, None now"):
        make(root, tmp_path / "0", tile=96)


@pytest.mark.ray
def test_appended_tiles_make_the_store_of_all_sources_at_once(ray_session, tmp_path, monkeypatch):
    """Killed in the middle of it too; the version before stays as it was."""
    root, target = folder(tmp_path / "in", count=8), tmp_path / "out"
    calm = make(root, tmp_path / "calm", tile=32)
    train, val = (root / "train.txt").read_text().split(), (root / "val.txt").read_text()
    (root / "train.txt").write_text("\n".join(train[:3]))
    before = make(root, target, tile=32)
    older = {p: p.read_bytes() for p in target.rglob("*.parquet")}
    (root / "train.txt").write_text("\n".join(train))
    with pytest.raises(UsageError, match="or add new sources to it with --append"):
        make(root, target, tile=32)

    original = store_module.finish
    monkeypatch.setattr(store_module, "finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        make(root, target, tile=32, append=True)
    assert Store.open(str(target)).dataset.content_hash == before["hash"]
    monkeypatch.setattr(store_module, "finish", original)
    said: list[str] = []
    after = make(root, target, tile=32, append=True, say=said.append)
    assert said[0] == "5 of 8 sources are in the store already (town_0): left as they are"
    assert "3 sources, 27 tiles in 1 shards, 0 to make" in said[1]
    assert (after["hash"], after["version"], after["tiles"]) == (calm["hash"], 2, calm["tiles"])
    assert all(p.read_bytes() == data for p, data in older.items())
    assert len(Store.open(str(target), before["hash"]).index) == 45

    opened = Store.open(str(target))
    tiles = read_tiles(opened.storage, opened.locations(opened.index["tile_id"].to_pylist()), 32)
    assert {type(t).__name__ for t in tiles} == {"Tile"}
    assert make(root, target, tile=32, append=True) == after  # nothing is new
    (root / "val.txt").write_text(val + "\ntown_9")
    write(root / "images/town_9.png", np.zeros((40, 70, 3), np.uint8))
    with pytest.raises(UsageError, match=r"has other classes or settings .*tile: 32 there, 40 now"):
        make(root, target, tile=40, append=True)
    assert make(root, target, tile=32, append=True)["version"] == 3
    assert Store.open(str(target)).index["label_offset"].null_count == 2


@pytest.mark.ray
def test_images_without_labels_are_a_pool(ray_session, tmp_path):
    for i in range(3):
        write(tmp_path / f"in/field_{i}.jpg", np.full((64, 70, 3), 90, np.uint8))
    result = make(tmp_path / "in", tmp_path / "out", tile=32)
    assert result["tiles"] == {"train": 12, "val": 0}
    assert result["dropped_pixels"] == 3 * 64 * 6
    opened = Store.open(str(tmp_path / "out"))
    assert opened.index["label_offset"].null_count == 12
    tile = read_tiles(opened.storage, opened.locations(opened.index["tile_id"].to_pylist()[:1]), 32)[0]
    assert tile.label is None


def _bomb() -> bytes:
    """A PNG of a few hundred bytes whose header says 60000 x 60000."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def _damage(root: Path) -> dict[str, str]:
    """Spoil one source in each way; source -> what its reason must say."""
    rng = np.random.default_rng(1)
    image = lambda n: root / f"images/town_{n}.png"  # noqa: E731
    label = lambda n: root / f"labels/town_{n}.png"  # noqa: E731
    image(0).write_bytes(b"this is no image")
    image(1).write_bytes(image(1).read_bytes()[:2000])
    write(label(2), rng.integers(0, 3, (90, 96)).astype(np.uint8))
    write(label(3), np.full((96, 96), 9, np.uint8))
    image(4).write_bytes(_bomb())
    image(5).unlink()
    write(image(6), rng.integers(0, 256, (96, 96)).astype(np.uint8))
    image(7).write_bytes(b"")
    write(image(8), rng.integers(0, 60000, (96, 96)).astype(np.uint16))
    return {
        "town_0": "is no readable PNG (it starts with",
        "town_1": "cannot be decoded",
        "town_2": "has 96 x 90 pixels, its image 96 x 96",
        "town_3": "holds label code 9, expected one of [0, 1, 2]",
        "town_4": "has 60000 x 60000 pixels",
        "town_5": "is missing",
        "town_6": "has 1 bands of uint8, expected 3",
        "town_7": "is no readable PNG (it is empty)",
        "town_8": "expected 3 of uint8",
    }


@pytest.mark.ray
@pytest.mark.parametrize("resize", [None, 96])
def test_every_kind_of_bad_file_is_quarantined_and_named(ray_session, tmp_path, resize):
    root = folder(tmp_path / "in", count=14)
    expected = _damage(root)
    known = 9 if resize else 6  # what the headers tell is told before any pixel is read
    with pytest.raises(DataError, match=rf"{known} of 14 sources are unusable, --bad-budget allows 0\.1"):
        make(root, tmp_path / "out", tile=32, resize=resize, budget=0.1)
    assert not (tmp_path / "out/dataset.json").exists()
    result = make(root, tmp_path / "out", tile=32, resize=resize, budget=0.9)
    assert result["quarantined"] == 9
    assert result["tiles"] == {"train": 27, "val": 18}
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    assert {r["tile_id"] for r in rows} == expected.keys()
    for row in rows:
        assert expected[row["tile_id"]] in row["reason"]
        spoilt = (
            root
            / ("labels" if row["tile_id"] in ("town_2", "town_3") else "images")
            / f"{row['tile_id']}.png"
        )
        assert row["sha256"] == (hashlib.sha256(spoilt.read_bytes()).hexdigest() if spoilt.exists() else "")


def test_a_bomb_is_refused_from_its_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(_bomb())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        pytest.raises(BadSource, match="60000 x 60000"),
        Raster(Storage(str(tmp_path)), "bomb.png", 400, 3).opened(),
    ):
        pass
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
    )  # KiB; decoded it has 10 GiB


def test_a_disguised_format_is_refused(tmp_path):
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "GIF")
    for name in ("x.png", "x.tif"):
        (tmp_path / name).write_bytes(out.getvalue())
        with pytest.raises(BadSource, match="is no"), Raster(Storage(str(tmp_path)), name, 100, 3).opened():
            pass


@pytest.mark.ray
def test_a_target_of_other_input_or_settings_is_refused_with_the_difference(ray_session, tmp_path):
    root = folder(tmp_path / "in")
    make(root, tmp_path / "out", tile=32)
    with pytest.raises(UsageError, match="tile: 32 there, 48 now"):
        make(root, tmp_path / "out", tile=48)
    write(root / "images/town_1.png", np.zeros((96, 96, 3), np.uint8))
    with pytest.raises(UsageError, match="sources: 6 there, 'of other sizes or names' now"):
        make(root, tmp_path / "out", tile=32)


@pytest.mark.ray
def test_missing_sources_beyond_the_budget_are_told_before_the_work(ray_session, tmp_path):
    root = folder(tmp_path / "in")
    (root / "images/town_1.png").unlink()
    with pytest.raises(
        DataError, match=r"1 of 6 sources .* \(town_1: images/town_1 is missing; all are"
    ) as refused:
        make(root, tmp_path / "out", tile=32, budget=0.1)
    assert refused.value.exit_code == 4
    listed = pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    assert listed == [{"tile_id": "town_1", "reason": "images/town_1 is missing", "sha256": ""}]
    assert not (tmp_path / "out/shards").exists()


@pytest.mark.ray
def test_a_repaired_source_leaves_nothing_of_the_attempt_before(ray_session, tmp_path):
    root = folder(tmp_path / "in")
    good = (root / "images/town_1.png").read_bytes()
    calm = make(root, tmp_path / "calm", tile=32)
    (root / "images/town_1.png").write_bytes(good[:2000])
    with pytest.raises(DataError, match=r"town_1: .* cannot be decoded"):
        make(root, tmp_path / "out", tile=32)
    stale = tmp_path / "out/shards/part-00077.parquet"
    stale.write_bytes(b"of a plan with more shards")
    (root / "images/town_1.png").write_bytes(good)
    assert make(root, tmp_path / "out", tile=32) == calm
    assert not stale.exists()


@pytest.mark.ray
def test_a_source_written_again_is_noticed_and_a_copy_of_all_makes_the_same_store(ray_session, tmp_path):
    """Even if it has the size it had."""
    root, first = folder(tmp_path / "in"), folder(tmp_path / "first")
    good = (root / "images/town_1.png").read_bytes()
    (root / "images/town_1.png").write_bytes(bytes(len(good)))
    with pytest.raises(DataError, match="town_1: "):
        make(root, tmp_path / "out", tile=32)
    (root / "images/town_1.png").write_bytes(good)
    calm = make(root, tmp_path / "out", tile=32)
    assert make(first, tmp_path / "copy", tile=32) == calm
    os.utime(root / "images/town_1.png", ns=(0, 0))
    with pytest.raises(UsageError, match="sources: 6 there, 'written again since' now"):
        make(root, tmp_path / "out", tile=32)


@pytest.mark.ray
def test_a_storage_that_refuses_ends_the_job_as_what_it_is(ray_session, tmp_path):
    """The error is raised in a task: it must not reach the user as Ray's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shards").write_text("a file where a folder must be")
    with pytest.raises(StorageError, match="shards") as failed:
        make(folder(tmp_path / "in"), tmp_path / "out", tile=32)
    assert failed.value.exit_code == 6
    assert "\n" not in str(failed.value)


@pytest.mark.ray
def test_a_local_path_on_several_nodes_is_refused(ray_session, tmp_path, monkeypatch):
    import ray

    root = folder(tmp_path / "in")
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}])
    with pytest.raises(UsageError, match="is a local path, but the cluster has 2 nodes"):
        make(root, tmp_path / "out", tile=32)
    storage = Storage(str(root))
    shared = {"bad_budget": 0, "shared_filesystem": True, "say": quiet}
    assert (
        prepare(storage, find(storage), str(tmp_path / "out"), Settings(tile=32), **shared)["tiles"]["val"]
        == 18
    )


@pytest.mark.parametrize("shared", [False, True])
def test_the_demos_store_is_made_on_disks_that_are_said_to_be_shared(monkeypatch, shared):
    seen = {}
    monkeypatch.setattr("raysed.cluster.prepare.prepare", lambda *_, **options: seen.update(options))
    with_data(Experiment(cluster=ClusterConfig(shared_filesystem=shared)), "demo")
    assert seen["shared_filesystem"] is shared


def test_what_a_run_reads_is_named_absolutely_since_workers_stand_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = {"data.uri": "tiles", "select.reference": "runs/a+s3://bucket/c", "pool.labels": "labels"}
    made = with_data(with_overrides(Experiment(), {**given, "model.encoder_weights": "w.pth"}, ""), None)
    assert made.data.uri == f"{tmp_path}/tiles"
    assert made.select.reference == f"{tmp_path}/runs/a+s3://bucket/c"
    assert made.pool.labels == f"{tmp_path}/labels"
    assert made.model.encoder_weights == f"{tmp_path}/w.pth"
    begun = with_data(with_overrides(Experiment(), {"data.uri": "/d", "model.init": "model"}, ""), None)
    assert begun.model.init == f"{tmp_path}/model"
    named = with_overrides(Experiment(), {"data.uri": "/d", "model.encoder_weights": "imagenet"}, "")
    assert with_data(named, None) == named


@pytest.mark.ray
def test_an_unlabelled_image_joins_labelled_sources(ray_session, tmp_path):
    root = folder(tmp_path / "in")
    (root / "labels/town_5.png").unlink()
    result = make(root, tmp_path / "out", tile=32)
    assert result["tiles"] == {"train": 45, "val": 9}
    index = Store.open(str(tmp_path / "out")).index
    unlabelled = [r["source"] for r in index.to_pylist() if r["pixels"] is None]
    assert unlabelled == ["town_5"] * 9


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--source", "IN", "--tlie", "32"], "did you mean '--tile'?"),
        (["--source", "/nowhere"], "/nowhere does not exist or is empty"),
        (["--source", "IN", "--resize", "big"], "--resize must be a number of pixels or none, got 'big'"),
        (["--source", "IN", "--resize", "128"], "resize 128 is smaller than tile 256"),
        (["--source", "IN", "--tile", "8"], "tile must lie in 16..4096"),
        (
            ["--source", "IN", "--bands", "red"],
            "--bands must be whole numbers with commas between, got 'red'",
        ),
        (["--source", "IN", "--append"], "no finished tile store at"),
        (["--source", "IN", "--bad-budget", "2"], "--bad-budget must lie in 0..1"),
        (["--source", "IN", "--classes", "/nowhere.json"], "--classes /nowhere.json: No such file"),
        (["--source", "synthetic", "--scenes", "0"], "--scenes must be at least 1"),
        (["--source", "s3://key:secret@bucket/x"], "must hold no credentials"),
        (["--source", "ftp://host/x"], "scheme must be file or s3"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, monkeypatch, argv, text):
    """Nothing here starts Ray: what is wrong is found before."""
    monkeypatch.setattr("raysed.cluster.prepare.connect", lambda: pytest.fail("Ray was started"))
    root = folder(tmp_path / "in", side=32)
    argv = [str(root) if a == "IN" else a for a in argv]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *argv, "--target", str(tmp_path / "out")])
    job = runpy.run_path(str(ROOT / "jobs/prepare.py"))["job"]
    with pytest.raises(SystemExit) as ended:
        cli.main(job)
    assert ended.value.code == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("error: ")
    assert out.err.count("\n") == 1
    assert text in out.err
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_images_smaller_than_a_tile_are_refused(ray_session, tmp_path):
    with pytest.raises(UsageError, match="no source gives a tile of 256 px"):
        make(folder(tmp_path / "in", side=32), tmp_path / "out")


def test_wrong_empty_and_double_sources_are_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist or is empty"):
        find(Storage(str(tmp_path / "nowhere")))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/readme.md").write_text("nothing")
    with pytest.raises(UsageError, match="holds no image"):
        find(Storage(str(tmp_path / "x")))
    root = folder(tmp_path / "in")
    (root / "val.txt").write_text("town_0\n")
    with pytest.raises(UsageError, match="town_0 is listed twice"):
        find(Storage(str(root)))
    (root / "val.txt").write_text("../../etc\n")
    with pytest.raises(UsageError, match=r"id .*is not"):
        find(Storage(str(root)))
    (root / "val.txt").write_text("town_5\n")
    (root / "classes.json").write_text('{"classes": [{"id": 1, "name": "a", "color": "red"}]}')
    with pytest.raises(UsageError, match="colour must look like"):
        find(Storage(str(root)))


@pytest.mark.ray
@pytest.mark.real
@pytest.mark.timeout(240)
def test_the_real_tiles(ray_session, tmp_path, real_data):
    assert make(real_data / "dubai", tmp_path / "a", tile=256, store=128)["tiles"] == {
        "train": 1015,
        "val": 290,
    }
    layout = tmp_path / "oem"
    converter = [
        sys.executable,
        str(real_data / "to_openearthmap_layout.py"),
        str(real_data / "dubai"),
        str(layout),
    ]
    subprocess.run([*converter, "--crop", "1000"], check=True, capture_output=True)
    assert find(Storage(str(layout))).kind == "openearthmap"
    assert make(layout, tmp_path / "b", resize=512)["tiles"] == {"train": 280, "val": 80}
    assert make(layout, tmp_path / "c", tile=256, store=64)["tiles"] == {"train": 525, "val": 150}
    pixels = Store.open(str(tmp_path / "b")).dataset.pixels["train"]
    assert [c for c, n in enumerate(pixels) if not n] == [2, 3, 7]  # classes that the converter never writes
