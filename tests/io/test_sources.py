"""Layouts and rasters without Ray: what a folder holds, what is refused, what is fetched."""

import hashlib
import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
from PIL import Image

from raysed.core.tiles import tile_id
from raysed.errors import StorageError, UsageError
from raysed.io import sources
from raysed.io.sources import BadSource, Raster, Rule, find, remapped
from raysed.io.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
PIXELS = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)


def tiff(path: Path, pixels: np.ndarray, **keys) -> None:
    bands = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    count, height, width = bands.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype, **keys
    ) as f:
        f.write(bands)


def png(path: Path, pixels: np.ndarray = PIXELS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def read(path: Path, bands: int = 3, size: int | None = None) -> np.ndarray:
    raster = Raster(Storage(str(path.parent)), path.name, size or path.stat().st_size, bands)
    with raster.opened() as image:
        return image.read(0, 0, image.height, image.width)


CLASSES = json.dumps({"name": "t", "ignore": [0], "classes": [{"id": 1, "name": "a", "color": "#010203"}]})


@pytest.fixture
def town(tmp_path):
    """A plain folder: town_0 and town_1 in train, town_2 in val, all with labels."""
    for i in range(3):
        png(tmp_path / f"images/town_{i}.png", PIXELS[:32, :32])
        png(tmp_path / f"labels/town_{i}.png", np.ones((32, 32), np.uint8))
    (tmp_path / "classes.json").write_text(CLASSES)
    (tmp_path / "train.txt").write_text("town_0\r\ntown_1.png\n\n")
    (tmp_path / "val.txt").write_bytes(b"\xef\xbb\xbftown_2\n")
    return tmp_path


def layout(root: Path):
    return find(Storage(str(root)))


def test_a_plain_folder_is_found_with_its_lists_sizes_and_classes(town):
    found = layout(town)
    assert (found.kind, found.name, found.ignore) == ("folder", "t", (0,))
    assert [(s.name, s.region, s.split) for s in found.sources] == [
        ("town_0", "town", "train"),
        ("town_1", "town", "train"),
        ("town_2", "town", "val"),
    ]
    assert found.sources[1].image == "images/town_1.png"
    assert found.sources[1].image_bytes == (town / "images/town_1.png").stat().st_size
    assert found.sources[1].label_bytes == (town / "labels/town_1.png").stat().st_size


def test_an_image_without_label_joins_the_training_pool_even_from_the_validation_list(town):
    (town / "labels/town_2.png").unlink()
    source = layout(town).sources[2]
    assert (source.split, source.label, source.label_bytes) == ("train", None, None)


def test_a_listed_image_that_is_not_there_is_a_source_without_bytes(town):
    (town / "images/town_1.png").unlink()
    assert [s.image_bytes is None for s in layout(town).sources] == [False, True, False]


def test_hidden_files_are_no_images(town):
    (town / "train.txt").unlink()
    (town / "val.txt").unlink()
    (town / "images/._town_0.png").write_bytes(b"resource fork")
    assert [s.name for s in layout(town).sources] == ["town_0", "town_1", "town_2"]


def test_a_folder_without_labels_needs_neither_lists_nor_classes(tmp_path):
    png(tmp_path / "b.png")
    png(tmp_path / "a.png")
    found = layout(tmp_path)
    assert found.classes == ()
    assert [(s.name, s.split, s.label) for s in found.sources] == [("a", "train", None), ("b", "train", None)]


def test_openearthmaps_layout_has_its_classes_and_expects_every_label(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / f"san_tome/{part}").mkdir(parents=True)
        (tmp_path / f"san_tome/{part}/san_tome_3.tif").write_bytes(b"1234")
    (tmp_path / "san_tome/images/san_tome_4.tif").write_bytes(b"12345")
    with pytest.raises(UsageError, match=r"neither train\.txt nor val\.txt"):
        layout(tmp_path)
    (tmp_path / "train.txt").write_text("san_tome_3.tif\nsan_tome_4.tif\n")
    found = layout(tmp_path)
    assert (found.kind, len(found.classes)) == ("openearthmap", 8)
    assert [(s.region, s.image_bytes, s.label_bytes) for s in found.sources] == [
        ("san_tome", 4, 4),
        ("san_tome", 5, None),
    ]
    assert found.sources[1].label == "san_tome/labels/san_tome_4.tif"


def spoil_twin(town: Path) -> None:
    png(town / "images/town_1.jpg")


def spoil_list(town: Path) -> None:
    (town / "val.txt").write_bytes(b"\xff\xfe\x00")


def spoil_name(town: Path) -> None:
    (town / "val.txt").write_text("my town_2\n")


def spoil_length(town: Path) -> None:
    (town / "val.txt").write_text("x" * 192)


def spoil_classes(town: Path) -> None:
    (town / "classes.json").unlink()


def spoil_ids(town: Path) -> None:
    (town / "classes.json").write_text(CLASSES.replace("[0]", "[1]"))


def spoil_range(town: Path) -> None:
    (town / "classes.json").write_text(CLASSES.replace("[0]", "[256]"))


def spoil_json(town: Path) -> None:
    (town / "classes.json").write_bytes(b"\xff{")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (spoil_twin, "have the same name"),
        (spoil_list, r"val\.txt is no list of names"),
        (spoil_name, "id 'my town_2' is not"),
        (spoil_length, "has 192 characters, at most 187"),
        (spoil_classes, r"has labels but no classes\.json"),
        (spoil_ids, "must be different and in 0..255"),
        (spoil_range, "must be different and in 0..255"),
        (spoil_json, "not a class list"),
    ],
)
def test_what_makes_a_folder_ambiguous_is_refused_in_one_line(town, spoil, text):
    spoil(town)
    with pytest.raises(UsageError, match=text) as refused:
        layout(town)
    assert "\n" not in str(refused.value)


def test_the_longest_name_leaves_room_for_the_last_tile_of_the_longest_image():
    last = sources.MAX_WINDOWED // 16**2 - 1  # of 16 pixels a side, the smallest tiles that prepare cuts
    assert len(tile_id("x" * sources.MAX_NAME, 0, last)) == 200


@pytest.mark.parametrize(
    "keys", [{}, {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate"}]
)
@pytest.mark.parametrize("bucket", [False, True])
def test_a_geotiff_is_read_exactly_from_disk_and_from_a_bucket(tmp_path, monkeypatch, keys, bucket):
    tiff(tmp_path / "a.tif", PIXELS, crs="EPSG:32633", transform=rasterio.Affine(1, 0, 5, 0, -1, 9), **keys)
    if bucket:
        monkeypatch.setattr(Storage, "local_path", lambda *_: None)
    for limit in (1 << 20, 0):  # fetched whole, and by ranges
        monkeypatch.setattr(sources, "FETCHED", limit)
        raster = Raster(Storage(str(tmp_path)), "a.tif", (tmp_path / "a.tif").stat().st_size, 3)
        with raster.opened() as image:
            assert np.array_equal(image.read(0, 0, 300, 400), PIXELS)
            assert np.array_equal(image.read(40, 130, 200, 256), PIXELS[40:240, 130:386])
            assert (image.crs, image.transform) == ("EPSG:32633", (1, 0, 5, 0, -1, 9))


def test_a_large_geotiff_in_a_bucket_is_fetched_by_windows(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (2048, 2048, 3), np.uint8)
    tiff(tmp_path / "a.tif", pixels, tiled=True)
    size, fetched, original = (tmp_path / "a.tif").stat().st_size, [], Storage.read_ranges

    def counting(self, path, spans):
        fetched.extend(length for _, length in spans)
        return original(self, path, spans)

    monkeypatch.setattr(Storage, "local_path", lambda *_: None)
    monkeypatch.setattr(Storage, "read_ranges", counting)
    monkeypatch.setattr(Storage, "read", lambda *_: pytest.fail("fetched whole"))
    monkeypatch.setattr(sources, "FETCHED", size - 1)
    raster = Raster(Storage(str(tmp_path)), "a.tif", size, 3)
    with raster.opened(header=True) as image:
        assert (image.height, image.width) == (2048, 2048)
    assert sum(fetched) < size / 50
    with raster.opened() as image:
        assert np.array_equal(image.read(512, 256, 256, 256), pixels[512:768, 256:512])
    assert sum(fetched) < size / 10


@pytest.mark.parametrize(("name", "header", "good"), [("a.tif", False, 0), ("a.tif", False, 1), ("a.tif", False, 5),
                                                      ("a.tif", True, 1), ("a.png", True, 0)])  # fmt: skip
def test_storage_that_fails_is_no_fault_of_the_file(tmp_path, monkeypatch, name, header, good):
    """Decoders swallow what their file raises: an outage must not quarantine good sources."""
    (tiff if name == "a.tif" else png)(tmp_path / name, np.tile(PIXELS, (3, 2, 1)))
    calls, original = [], Storage.read_ranges

    def failing(self, path, spans):
        calls.append(spans)
        if len(calls) > good:
            raise StorageError("connection refused")
        return original(self, path, spans)

    monkeypatch.setattr(Storage, "local_path", lambda *_: None)
    monkeypatch.setattr(Storage, "read_ranges", failing)
    monkeypatch.setattr(sources, "FETCHED", 1000)
    raster = Raster(Storage(str(tmp_path)), name, (tmp_path / name).stat().st_size, 3)

    def use() -> None:
        with raster.opened(header=header) as image:
            image.read(0, 0, image.height, image.width)

    with pytest.raises(StorageError, match="connection refused"):
        use()
    assert len(calls) > good


def test_a_file_that_vanished_since_it_was_listed_is_missing(tmp_path):
    for name in ("a.png", "a.tif"):
        for header in (False, True):
            raster = Raster(Storage(str(tmp_path)), name, 100, 3)
            with pytest.raises(BadSource, match=f"{name} is missing"), raster.opened(header=header):
                pass


def damaged(kind: str, path: Path) -> Path:
    """A file of one kind of damage."""
    tif, whole = path / "x.tif", io.BytesIO()
    match kind:
        case "empty":
            tif.write_bytes(b"")
        case "cut in the header" | "cut in the pixels":
            tiff(tif, PIXELS)
            tif.write_bytes(tif.read_bytes()[: 60 if "header" in kind else 5000])
        case "spoilt":
            tiff(tif, PIXELS, compress="deflate")
            data = bytearray(tif.read_bytes())
            data[20_000:20_400] = bytes(400)
            tif.write_bytes(data)
        case "16 bits":
            tiff(tif, PIXELS.astype(np.uint16))
        case "16-bit png":
            cv2.imwrite(str(path / "x.png"), PIXELS.astype(np.uint16) * 16)
        case "4 bands":
            tiff(tif, np.dstack([PIXELS, PIXELS[..., :1]]))
        case "vrt":
            tif.write_text("<VRTDataset rasterXSize='8' rasterYSize='8'/>")
        case "cmyk":
            Image.fromarray(PIXELS).convert("CMYK").save(path / "x.jpg")
        case "png in jpg":
            Image.fromarray(PIXELS).save(whole, "PNG")
            (path / "x.jpg").write_bytes(whole.getvalue())
        case "cut jpeg":
            Image.fromarray(PIXELS).save(whole, "JPEG")
            (path / "x.jpg").write_bytes(whole.getvalue()[:9000])
    return next(path.iterdir())


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("empty", "is no readable GeoTIFF (it is empty)"),
        ("cut in the header", "is no readable GeoTIFF (it is TIFF, broken"),
        ("cut in the pixels", "cannot be decoded"),
        ("spoilt", "cannot be decoded"),
        ("16 bits", "has 3 bands of uint16, expected 3 of uint8"),
        ("16-bit png", "has 3 bands of uint16 (of which a PNG would give the upper halves"),
        ("4 bands", "has 4 bands of uint8, expected 3"),
        ("vrt", "is no readable GeoTIFF (it is text"),
        ("cmyk", "has 4 bands of CMYK"),
        ("png in jpg", "is no readable JPEG (it is PNG"),
        ("cut jpeg", "cannot be decoded"),
    ],
)
def test_a_bad_file_is_named_by_what_was_found_with_its_hash(tmp_path, monkeypatch, kind, text, bucket):
    file = damaged(kind, tmp_path)
    if bucket:
        monkeypatch.setattr(Storage, "local_path", lambda *_: None)
        monkeypatch.setattr(sources, "FETCHED", 1000)
    with pytest.raises(BadSource) as bad:
        read(file)
    assert text in str(bad.value)
    assert " at 0x" not in str(bad.value)  # the same file gives the same reason
    assert bad.value.sha256(Storage(str(file.parent))) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_jpeg_is_no_label_and_a_turned_image_is_refused(tmp_path):
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "label.jpg")
    with pytest.raises(BadSource, match="is a JPEG, which changes class codes"):
        read(tmp_path / "label.jpg", bands=1)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(PIXELS).save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(BadSource, match="is turned by its EXIF orientation 3"):
        read(tmp_path / "turned.jpg")
    exif[0x0112] = 1
    Image.fromarray(PIXELS).save(tmp_path / "upright.jpg", exif=exif)
    assert read(tmp_path / "upright.jpg").shape == PIXELS.shape


def test_names_that_do_not_match_are_said(town):
    (town / "labels/town_1.png").rename(town / "labels/Town_1.png")
    (town / "labels/town_2.png").unlink()
    (town / "images/left.png").write_bytes((town / "images/town_0.png").read_bytes())
    assert find(Storage(str(town))).notes == (
        "2 images have no label of their name, the first is images/town_1.png",
        "1 of these are listed for validation and go to training, the first is images/town_2.png",
        "1 labels have no image of their name, the first is labels/Town_1.png",
        "1 images are left aside, neither in images/ nor listed, the first is images/left.png",
    )


def bomb_png(side: int) -> bytes:
    """A PNG whose header promises side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )  # fmt: skip


def test_bombs_are_refused_from_their_headers(tmp_path):
    (tmp_path / "a.png").write_bytes(bomb_png(60_000))
    shape = {"driver": "GTiff", "count": 3, "dtype": "uint8", "tiled": True, "sparse_ok": True}
    rasterio.open(tmp_path / "b.tif", "w", width=200_000, height=200_000, BIGTIFF="YES", **shape).close()
    one_block = {"width": 20_480, "height": 20_480, "blockxsize": 20_480, "blockysize": 20_480}
    rasterio.open(tmp_path / "c.tif", "w", compress="deflate", **one_block, **shape).close()
    tracemalloc.start()
    for name, text in (
        ("a.png", "60000 x 60000"),
        ("b.tif", "200000 x 200000"),
        ("c.tif", "blocks of 20480 x 20480"),
    ):
        assert (tmp_path / name).stat().st_size < 10_000_000
        with pytest.raises(BadSource, match=text):
            read(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_reading_sources_needs_no_torch():
    code = "import sys, raysed.io.sources, raysed.io.store; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def ruled(path: Path, rule: Rule) -> np.ndarray:
    with Raster(Storage(str(path.parent)), path.name, path.stat().st_size, 3, rule=rule).opened() as image:
        return image.read(5, 7, 20, 30)


def test_a_rule_picks_bands_and_makes_8_bits_of_16(tmp_path):
    four = np.concatenate([PIXELS, PIXELS[..., :1] // 2], 2)
    window = PIXELS[5:25, 7:37]
    tiff(tmp_path / "four.tif", four)
    assert np.array_equal(ruled(tmp_path / "four.tif", Rule((3, 2, 1))), window[..., ::-1])
    png(tmp_path / "four.png", four)
    assert np.array_equal(ruled(tmp_path / "four.png", Rule((1, 2, 3))), window)
    tiff(tmp_path / "deep.tif", four.astype(np.uint16) * 10 + 100)
    assert np.array_equal(ruled(tmp_path / "deep.tif", Rule((1, 2, 3), (100, 2650))), window)
    clipped = ruled(tmp_path / "deep.tif", Rule((1, 2, 3), (600, 601)))
    assert np.array_equal(clipped, np.where(window > 50, 255, 0))
    png(tmp_path / "gray.png", PIXELS[..., 0])
    assert np.array_equal(ruled(tmp_path / "gray.png", Rule((1, 1, 1))), window[..., [0, 0, 0]])


@pytest.mark.parametrize(
    ("name", "rule", "text"),
    [
        (
            "three.tif",
            Rule((1, 2, 4)),
            r"has 3 bands of uint8, expected at least 4 of uint8 \(--bands 1,2,4\)",
        ),
        ("three.tif", Rule(stretch=(0, 9)), r"3 bands of uint8, expected 3 of uint16 \(--stretch 0,9\)"),
        ("deep.tif", Rule((1, 2, 3)), "has 3 bands of uint16, expected at least 3 of uint8"),
        ("palette.png", Rule((1, 1, 1)), "has 1 bands of P, expected at least 1 of uint8"),
    ],
)
def test_an_image_that_a_rule_does_not_take_is_named(tmp_path, name, rule, text):
    tiff(tmp_path / "three.tif", PIXELS)
    tiff(tmp_path / "deep.tif", PIXELS.astype(np.uint16))
    Image.fromarray(PIXELS).quantize(8).save(tmp_path / "palette.png")
    with pytest.raises(BadSource, match=text):
        ruled(tmp_path / name, rule)


@pytest.mark.parametrize(
    "rule", [{"bands": (0, 1, 2)}, {"bands": (1, 2)}, {"stretch": (9, 9)}, {"stretch": (0, 70000)}]
)
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(UsageError, match=f"--{next(iter(rule))} must be"):
        Rule(**rule)


WANTED = [{"id": 5, "name": "built", "color": "#FF0000"}, {"id": 9, "name": "water", "color": "#0000FF"}]


def remap(town: Path, mapping: object, **fields):
    three = [{"id": i, "name": n, "color": "#010203"} for i, n in ((1, "roof"), (2, "road"), (7, "sea"))]
    (town / "classes.json").write_text(json.dumps({"name": "t", "ignore": [0], "classes": three}))
    (town / "remap.json").write_text(json.dumps({"classes": WANTED, "map": mapping, **fields}))
    return remapped(layout(town), str(town / "remap.json"))


def test_a_remapping_makes_the_wanted_classes_of_the_sources(town):
    found = remap(town, {"roof": "built", "2": 5, "sea": "ignore"}, ignore=[255])
    assert [(c.source_id, c.name) for c in found.classes] == [(5, "built"), (9, "water")]
    assert found.ignore == (255,)
    assert found.remap == ((0, None), (1, 5), (2, 5), (7, None))
    table = found.lookup()
    assert table[[0, 1, 2, 7]].tolist() == [0, 1, 1, 0]
    assert set(np.delete(table, [0, 1, 2, 7])) == {-1}  # 5 and 9 are no values of the label files


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ({"roof": "built", "2": 5}, 'leaves out sea: say the class that it becomes, or "ignore"'),
        ({"roof": "built", "1": 5, "road": 5, "sea": 9}, "names class 1 of the source twice"),
        ({"rof": "built"}, "map names 'rof', the source's classes are 1 roof, 2 road, 7 sea"),
        ({"roof": "buildings"}, "map makes 'roof' 'buildings', the classes wanted are 5 built, 9 water"),
        (["roof"], '"map" must say what each class of the source becomes'),
    ],
)
def test_a_bad_remapping_is_named(town, mapping, text):
    with pytest.raises(UsageError) as refused:
        remap(town, mapping)
    assert text in str(refused.value)
    assert "remap.json" in str(refused.value)


def test_a_remapping_needs_classes_on_both_sides(town, tmp_path_factory):
    bare = tmp_path_factory.mktemp("bare")
    png(bare / "a.png")
    remap(town, {"roof": 5, "road": 5, "sea": 9})
    with pytest.raises(UsageError, match="the source has no classes to map"):
        remapped(layout(bare), str(town / "remap.json"))
    with pytest.raises(UsageError, match=r"--remap .*nowhere\.json: No such file"):
        remapped(layout(town), str(town / "nowhere.json"))
