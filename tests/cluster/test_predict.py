"""Images to maps: place and size kept, valid Cloud Optimized GeoTIFFs, no seams, kills, bad files, scores."""

import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import rasterio
import ray
import torch
from PIL import Image as Pillow
from rasterio.transform import Affine
from torch.nn.functional import cross_entropy

from raysed import cli
from raysed.cluster import mapper
from raysed.cluster.local import LocalCluster
from raysed.cluster.mapper import (
    BlockMapper,
    Plan,
    Settings,
    Task,
    ahead,
    assemble,
    grid_of,
    open_image,
    plan_image,
)
from raysed.cluster.predict import predict, unmade
from raysed.cluster.prepare import Settings as PrepareSettings
from raysed.cluster.prepare import prepare, synthetic
from raysed.config import ClusterConfig
from raysed.core.counts import confusion
from raysed.core.metrics import scores
from raysed.core.networks import build
from raysed.core.step import DTYPES, Precision, resolve_precision
from raysed.core.tiles import VOID, LandClass, target_of
from raysed.core.windows import Axis, Block, axis, seam_score
from raysed.errors import DataError, ResourcesError, UsageError
from raysed.io import checkpoint, maps, model
from raysed.io.imagery import find_images, find_labels
from raysed.io.sources import BadSource, Rule
from raysed.io.storage import Storage, digest

ROOT = Path(__file__).resolve().parents[2]
CLASSES = (
    LandClass("land", "#8429F6", 1),
    LandClass("building", "#3C1098", 2),
    LandClass("road", "#6EC1E4", 3),
    LandClass("vegetation", "#FEDD3A", 4),
    LandClass("water", "#E2A929", 5),
)
SIDE, ARCH = 64, "unet:tu-test_resnet"
PLACE = {"crs": "EPSG:32640", "transform": Affine(0.5, 0.1, 325000.25, 0.1, -0.5, 2785000.5)}


def quiet(_: str) -> None:
    pass


def small_model(arch: str = ARCH, **changes) -> model.Model:
    net = build(arch, len(CLASSES), seed=3)
    weights = {n: t.clone() for n, t in net.net.state_dict().items()}
    weights["segmentation_head.0.weight"] *= 30  # untrained, but not undecided
    record = model.Record(
        arch=arch,
        classes=CLASSES,
        ignore=(0,),
        tile_size=SIDE,
        scale=(1.0, 1.0),
        metres=None,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        sha256=digest(checkpoint.pack(weights)),
        dataset="dubai",
        dataset_hash="0" * 64,
        cycle=0,
        metrics={"miou": 0.1, "iou": {}},
        experiment={"seed": 0, "select": {"strategy": "uniform"}},
    )
    return model.Model(replace(record, **changes), weights)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    coarse = Pillow.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8))
    return np.array(coarse.resize((width, height), Pillow.Resampling.BICUBIC))


def write_tiff(path: Path, array: np.ndarray, **keys) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = array.transpose(2, 0, 1) if array.ndim == 3 else array[None]
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **keys) as file:
        file.write(bands)


def run(
    folder: Path, target: Path, net: model.Model | None = None, *, labels: Path | None = None, **flags
) -> dict:
    net = net or small_model()
    images = find_images(str(folder))
    found = find_labels(str(labels), images, net.record.classes) if labels else None
    options = {k: flags.pop(k) for k in ("overwrite", "workers", "wait_nodes") if k in flags}
    say = flags.pop("say", quiet)
    return predict(net, images, str(target), Settings(**flags), labels=found, say=say, **options)


def check_cog(path: Path) -> None:
    try:
        from rio_cogeo.cogeo import cog_validate
    except ImportError:
        with rasterio.open(path) as file:
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        return
    valid, faults, _ = cog_validate(str(path), strict=True)
    assert valid, faults


def direct(net: model.Model, image: np.ndarray, precision: Precision) -> np.ndarray:
    """(H, W) class ids of an image of whole tiles, tile by tile."""
    network, out = net.network(), np.zeros(image.shape[:2], np.uint8)
    dtype = DTYPES[precision]
    for y in range(0, image.shape[0], SIDE):
        for x in range(0, image.shape[1], SIDE):
            tile = torch.from_numpy(image[y : y + SIDE, x : x + SIDE].copy()).permute(2, 0, 1)[None] / 255
            with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
                out[y : y + SIDE, x : x + SIDE] = network(tile)[0].float().argmax(0).numpy() + 1
    return out


@pytest.mark.ray
def test_a_geotiff_becomes_a_cloud_optimized_one_at_the_same_place(ray_session, tmp_path):
    image = pixels(300, 610)
    image[:40] = 0
    write_tiff(tmp_path / "in/a/town_1.tif", image, nodata=0, **PLACE)
    write_tiff(tmp_path / "in/town_2.tif", pixels(30, 700))
    Pillow.fromarray(pixels(150, 200)).save(tmp_path / "in/town_3.jpg")
    said: list[str] = []
    flags = {"entropy": True, "probabilities": True}
    result = run(tmp_path / "in", tmp_path / "one", say=said.append, **flags)
    assert (result["maps"], result["bad"]) == (3, {})
    assert any("2 images have no CRS (town_2)" in line for line in said)
    with rasterio.open(tmp_path / "one/a/town_1.tif") as made:
        assert made.crs == rasterio.crs.CRS.from_string(PLACE["crs"])
        assert made.transform == PLACE["transform"]
        assert (made.height, made.width, made.nodata) == (300, 610, 0)
        assert made.colormap(1)[2] == (0x3C, 0x10, 0x98, 255)
        assert json.loads(made.tags()["CLASSES"])["5"] == "water"
        classes = made.read(1)
    assert "<Category>road</Category>" in (tmp_path / "one/a/town_1.tif.aux.xml").read_text()
    assert (classes[:40] == 0).all()
    assert set(np.unique(classes[40:])) <= {1, 2, 3, 4, 5}
    assert len(np.unique(classes[40:])) > 1
    with rasterio.open(tmp_path / "one/a/town_1.probabilities.tif") as made:
        assert made.descriptions == tuple(c.name for c in CLASSES)
        shares = made.read()
        assert (shares[:, :40] == made.nodata).all()
        assert np.abs(shares[:, 40:].astype(int).sum(0) - 254).max() <= 3
        best = shares[:, 40:].max(0)  # where rounding leaves a single best class, it is the map's
        alone = (shares[:, 40:] == best).sum(0) == 1
        assert (shares[:, 40:].argmax(0) + 1 == classes[40:])[alone].all()
    with rasterio.open(tmp_path / "one/a/town_1.entropy.tif") as made:
        assert made.scales[0] * 254 == pytest.approx(np.log(5))
    for path in (tmp_path / "one").rglob("*.tif"):
        check_cog(path)
    with Pillow.open(tmp_path / "one/town_3.png") as made:
        assert (made.mode, made.size) == ("P", (200, 150))
        assert json.loads(made.text["CLASSES"])["1"] == "land"


def test_a_map_without_overlap_is_that_of_its_tiles_to_the_pixel(tmp_path, monkeypatch):
    """In fp32 whatever this machine would take: what bf16 adds depends on how many tiles are in a batch."""
    monkeypatch.setattr(mapper, "resolve_precision", lambda *_: "fp32")
    net, image = small_model("unet:tu-test_efficientnet"), pixels(128, 192)
    write_tiff(tmp_path / "in/x.tif", image)
    found, _ = layers_of(net, tmp_path / "in", overlap=0.0)
    assert np.array_equal(found[0], direct(net, image, "fp32"))


@pytest.mark.ray
def test_maps_without_overlap_are_those_of_the_tiles_and_so_are_the_scores(ray_session, tmp_path):
    precision = resolve_precision("auto", torch.device("cpu"))
    net, counts = small_model("unet:tu-test_efficientnet"), np.zeros((5, 5), np.int64)
    for i in range(2):
        image = pixels(128, 192, seed=i)
        label = np.random.default_rng(i).integers(0, 6, (128, 192)).astype(np.uint8)
        write_tiff(tmp_path / f"in/images/town_{i}.tif", image)
        (tmp_path / "in/labels").mkdir(exist_ok=True)
        Pillow.fromarray(label).save(tmp_path / f"in/labels/town_{i}.png")
        expected = direct(net, image, precision)
        counts += confusion(
            torch.from_numpy(expected - 1)[None], torch.from_numpy(target_of(label))[None], 5
        ).numpy()
    result = run(tmp_path / "in", tmp_path / "out", net, labels=tmp_path / "in/labels", overlap=0.0)
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert found == result["metrics"]
    told = np.array(found["counts"])
    assert found == {"images": 2, **scores(told, [c.name for c in CLASSES]), "counts": told.tolist()}
    with rasterio.open(tmp_path / "out/town_1.tif") as made:
        same = np.mean(made.read(1) == expected)
    if precision == "bf16":  # a batch of tiles and one alone differ in the last of eight bits
        assert same > 0.99
        assert found["counts"] == pytest.approx(counts, rel=0.05, abs=20)
        return
    assert same == 1
    assert told.tolist() == counts.tolist()


def plans_of(folder: Path, task: Task) -> list[Plan]:
    return [plan_image(image, None, task) for image in find_images(str(folder))]


def make_blocks(task: Task, plan: Plan, net: model.Model, last: int | None = None) -> None:
    """Map blocks up to `last` (exclusive) without Ray."""
    blocks = BlockMapper(task, net.weights, "cpu")
    for block in plan.blocks[:last]:
        blocks.make(plan.image, block, whole=len(plan.blocks) == 1)


def test_a_map_of_pieces_is_that_of_one_block(tmp_path):
    image, net = pixels(200, 300), small_model()
    image[:64] = 0
    write_tiff(tmp_path / "in/x.tif", image, nodata=0, **PLACE)
    for name, block in (("one", 10**6), ("many", 20_000)):
        task = Task(net.record, Settings(entropy=True, probabilities=True, block=block), str(tmp_path / name))
        [plan] = plans_of(tmp_path / "in", task)
        make_blocks(task, plan, net)
        if name == "many":
            assert len(plan.blocks) > 6
            assert not (tmp_path / name / "x.tif").exists()
            assemble(task, plan.image, plan.pieces)
    for path in (tmp_path / "one").glob("*.tif"):
        with rasterio.open(path) as a, rasterio.open(tmp_path / "many" / path.name) as b:
            assert (np.abs(a.read().astype(int) - b.read()) > 1).mean() < 1e-3  # sums in another order


def test_threads_of_compression_change_no_byte(tmp_path, monkeypatch):
    net, rng = small_model(), np.random.default_rng(0)
    place, piece = maps.Place(700, 1200, None, None), rng.integers(1, 4, (1, 700, 1200), np.uint8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    made, asked = [], []
    environment = rasterio.Env
    monkeypatch.setattr(rasterio, "Env", lambda **k: asked.append(k["GDAL_NUM_THREADS"]) or environment(**k))
    for pixels_a_thread in (maps.THREADED, 300_000, 1):
        monkeypatch.setattr(maps, "THREADED", pixels_a_thread)
        maps.write_map(Storage(str(tmp_path)), "x.tif", place, [(0, 0, piece)], net.record)
        made.append((tmp_path / "x.tif").read_bytes())
    assert asked == [1, 2, 4]
    assert made[0] == made[1] == made[2]


@pytest.mark.ray
def test_what_was_interrupted_is_finished_and_what_is_finished_is_left(ray_session, tmp_path):
    net, made = small_model(), []
    for i in range(4):
        write_tiff(tmp_path / f"in/town_{i}.tif", pixels(200 if i < 3 else 150, 150, seed=i), **PLACE)
        made.append(tmp_path / f"out/town_{i}.tif")
    settings = Settings(entropy=True, block=40_000)
    task, calm = (Task(net.record, settings, str(tmp_path / n)) for n in ("out", "calm"))
    plans = plans_of(tmp_path / "in", task)
    assert [len(p.blocks) > 1 for p in plans] == [True, True, True, False]
    for plan in plans:
        make_blocks(calm, plan, net)
        if len(plan.blocks) > 1:
            assemble(calm, plan.image, plan.pieces)
    make_blocks(task, plans[0], net)  # finished
    assemble(task, plans[0].image, plans[0].pieces)
    make_blocks(task, plans[1], net)  # all pieces there
    make_blocks(task, plans[2], net, last=1)  # one piece there
    write = Storage(task.target).write
    write(task.marker(plans[3].image), b"")  # about to be written
    write("town_3.entropy.tif", b"from before")
    finished = made[0].stat().st_mtime_ns
    said: list[str] = []
    result = run(tmp_path / "in", tmp_path / "out", net, entropy=True, block=40_000, say=said.append)
    assert (result["maps"], result["there before"], result["bad"]) == (3, 1, {})
    here = sum(len(p.blocks) for p in plans[1:3])
    assert any(f"{here - len(plans[2].blocks) + 1} are there already" in line for line in said)
    assert made[0].stat().st_mtime_ns == finished
    for path in sorted((tmp_path / "calm").glob("*.tif")):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        check_cog(path)
    assert not [p for p in (tmp_path / "out/pieces").rglob("*") if p.is_file()]
    times = [p.stat().st_mtime_ns for p in made]
    again = run(tmp_path / "in", tmp_path / "out", net, entropy=True, block=40_000)
    assert (again["maps"], again["there before"]) == (0, 4)
    assert times == [p.stat().st_mtime_ns for p in made]


def test_outputs_of_others_are_refused_before_anything_starts(tmp_path):
    write_tiff(tmp_path / "in/town_1.tif", pixels(70, 70))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/town_1.tif").write_bytes(b"of somebody else")
    with pytest.raises(
        UsageError, match=r"town_1.tif exists and was not made from this image .* --overwrite"
    ):
        run(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/town_1.tif").read_bytes() == b"of somebody else"
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="would replace an image"):
            run(tmp_path / "in", tmp_path / "in", overwrite=overwrite)


def make_map(net: model.Model, folder: Path, target: Path, **settings) -> Task:
    """Map the one small image of a folder without Ray."""
    task = Task(net.record, Settings(**settings), str(target))
    [plan] = plans_of(folder, task)
    make_blocks(task, plan, net)
    return task


def test_another_image_of_the_same_name_and_size_is_not_taken_for_the_one_mapped(tmp_path):
    for seed, month in enumerate(("may", "june")):
        write_tiff(tmp_path / month / "scene.tif", pixels(70, 70, seed=seed))
    [may], [june] = (find_images(str(tmp_path / month)) for month in ("may", "june"))
    assert (may.name, may.size) == (june.name, june.size)
    task = make_map(small_model(), tmp_path / "may", tmp_path / "out")
    target, map_file = Storage(task.target), tmp_path / "out/scene.tif"
    assert unmade(target, task, [may], overwrite=False) == []
    with pytest.raises(UsageError, match=r"scene.tif exists, with 1 more, and was not made from this image"):
        unmade(target, task, [june], overwrite=False)
    assert task.pieces(may) != task.pieces(june)
    write_tiff(tmp_path / "may/scene.tif", pixels(70, 70, seed=2))
    [may_again] = find_images(str(tmp_path / "may"))
    assert may_again.size == may.size
    with pytest.raises(UsageError, match="was not made from this image"):
        unmade(target, task, [may_again], overwrite=False)
    assert map_file.exists()
    assert unmade(target, task, [june], overwrite=True) == [june]
    assert not map_file.exists()
    make_map(small_model(), tmp_path / "june", tmp_path / "out")
    assert unmade(target, task, [june], overwrite=False) == []


def test_the_map_of_another_model_is_not_taken_for_ones_own_that_was_deleted(tmp_path):
    write_tiff(tmp_path / "in/scene.tif", pixels(70, 70))
    images = find_images(str(tmp_path / "in"))
    one, other = small_model(), small_model(sha256="0" * 64)
    task = make_map(one, tmp_path / "in", tmp_path / "out")
    (tmp_path / "out/scene.tif").unlink()
    (tmp_path / "out/scene.tif.aux.xml").unlink()
    target = Storage(task.target)
    assert unmade(target, Task(other.record, Settings(), target.uri), images, overwrite=False) == list(images)
    make_map(other, tmp_path / "in", tmp_path / "out")
    with pytest.raises(UsageError, match="was not made from this image by this model"):
        unmade(target, task, images, overwrite=False)


def test_overwrite_makes_finished_maps_again_and_goes_on_without_it(tmp_path):
    write_tiff(tmp_path / "in/scene.tif", pixels(70, 70))
    images = find_images(str(tmp_path / "in"))
    task = make_map(small_model(), tmp_path / "in", tmp_path / "out")
    target = Storage(task.target)
    assert unmade(target, task, images, overwrite=True) == list(images)
    assert unmade(target, task, images, overwrite=False) == list(images)
    make_map(small_model(), tmp_path / "in", tmp_path / "out")
    assert unmade(target, task, images, overwrite=False) == []


def _bad_folder(root: Path) -> dict[str, str]:
    """One image of each kind that gives no map; name -> what must be said of it."""
    write_tiff(root / "one.tif", pixels(80, 80)[..., 0])
    write_tiff(root / "four.tif", np.concatenate([pixels(80, 80), pixels(80, 80)[..., :1]], 2))
    write_tiff(root / "deep.tif", pixels(80, 80).astype(np.uint16) * 100)
    write_tiff(root / "void.tif", np.full((80, 80, 3), 9, np.uint8), nodata=9)
    write_tiff(root / "torn.tif", pixels(300, 300), tiled=True, blockxsize=64, blockysize=64)
    data = (root / "torn.tif").read_bytes()
    (root / "torn.tif").write_bytes(data[: len(data) // 2])
    (root / "fake.tif").write_text('<VRTDataset rasterXSize="9" rasterYSize="9"></VRTDataset>')
    write_tiff(root / "far.tif", pixels(80, 80), crs="EPSG:32640", transform=Affine(30, 0, 0, 0, -30, 0))
    return {
        "one": "has 1 bands of uint8, expected 3 of uint8: give 8-bit RGB",
        "four": "has 4 bands of uint8, expected 3 of uint8: give 8-bit RGB",
        "deep": "has 3 bands of uint16, expected 3 of uint8: give 8-bit RGB",
        "void": "holds no data",
        "torn": "cannot be decoded",
        "fake": "is no readable GeoTIFF (it is text",
        "far": "has pixels of 30 m, the model was trained on 0.5 m",
    }


@pytest.mark.ray
def test_every_kind_of_bad_image_is_named_and_the_others_are_mapped(
    ray_session, tmp_path, monkeypatch, capsys
):
    expected = _bad_folder(tmp_path / "in")
    write_tiff(tmp_path / "in/good.tif", pixels(80, 80))
    target, net = tmp_path / "out", small_model(metres=0.5)
    model.save(net, str(tmp_path / "model"), "", overwrite=False)
    job = runpy.run_path(str(ROOT / "jobs/predict.py"))["job"]
    flags = [str(tmp_path / "model"), "--source", str(tmp_path / "in"), "--target", str(target), "--json"]
    monkeypatch.setattr(sys, "argv", ["predict.py", *flags])
    with pytest.raises(SystemExit) as ended:
        cli.main(job)
    out, err = capsys.readouterr()
    assert ended.value.code == 4
    assert "7 of 8 images cannot be used, the first is deep: deep.tif has 3 bands of uint16" in err
    result = json.loads(out)
    assert result["bad"].keys() == expected.keys()
    for name, reason in result["bad"].items():
        assert expected[name] in reason
        assert "\n" not in reason
    assert sorted(p.name for p in target.glob("*.tif")) == ["good.tif"]


@pytest.mark.ray
def test_cpus_that_another_job_has_are_waited_for_a_stated_time(ray_session, tmp_path, monkeypatch):
    write_tiff(tmp_path / "in/town_1.tif", pixels(70, 70))
    taken = ray.util.placement_group([{"CPU": 1.0}] * int(ray.cluster_resources()["CPU"]))
    ray.get(taken.ready())
    try:
        with pytest.raises(ResourcesError, match=r"no room for 1 x \(0.9 CPU\) within 2 s, .* --wait-nodes"):
            run(tmp_path / "in", tmp_path / "out", wait_nodes=2)
        monkeypatch.setattr(ClusterConfig, "patience", lambda self, *, autoscaling: 2.0)
        with pytest.raises(ResourcesError, match=r"no room for 1 x \(0.5 CPU\) within 2 s"):
            prepare(None, synthetic(5), str(tmp_path / "tiles"), PrepareSettings(tile=64), say=quiet)
    finally:
        ray.util.remove_placement_group(taken)
    assert run(tmp_path / "in", tmp_path / "out", wait_nodes=60)["maps"] == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_autoscaler_starts_the_nodes_that_maps_ask_for(tmp_path):
    for i in range(3):
        write_tiff(tmp_path / f"in/town_{i}.tif", pixels(70, 70, seed=i))
    model.save(small_model(), str(tmp_path / "model"), "", overwrite=False)
    types = {
        "head": {"resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0},
        "pair": {"resources": {"CPU": 2}, "min_workers": 0, "max_workers": 2},
    }
    flags = [str(tmp_path / "model"), "--source", str(tmp_path / "in"), "--target", str(tmp_path / "out")]
    flags += ["--shared-filesystem", "--json", "--overwrite"]
    with LocalCluster(tmp_path / "ray", {}, types, authenticated=False) as cluster:
        where = {name: cluster.environment[name] for name in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
        done = processes.run("predict", *flags, **where)
        assert json.loads(done.stdout)["maps"] == 3
        assert cluster.alive() >= 2
        done = processes.run("predict", *flags, "--workers", "3", **where)
        assert json.loads(done.stdout)["maps"] == 3
        assert cluster.alive() == 3
        for i in range(3, 6):
            write_tiff(tmp_path / f"in/town_{i}.tif", pixels(70, 70, seed=i))
        done = processes.run("predict", *flags, "--workers", "6", code=7, **where)
        said = processes.error_line(done)
        assert "6 workers ask for a CPU each, no node that the autoscaler may start has room for that" in said
        assert "2 x pair (2 CPU)" in said


def test_overwrite_leaves_no_layer_of_another_model_beside_the_new_map(tmp_path):
    write_tiff(tmp_path / "in/scene.tif", pixels(70, 70))
    images = find_images(str(tmp_path / "in"))
    make_map(small_model(), tmp_path / "in", tmp_path / "out", entropy=True)
    target = Storage(str(tmp_path / "out"))
    target.write("pieces/other/scene@1/0", b"unfinished")
    target.write("pieces/other/elsewhere@1/0", b"of another job")
    target.write("scene.probabilities.csv", b"somebody's")
    assert "scene.entropy.tif" in target.list()
    task = Task(small_model().record, Settings(), target.uri)
    assert unmade(target, task, images, overwrite=True) == list(images)
    assert sorted(target.list()) == ["pieces/other/elsewhere@1/0", "scene.probabilities.csv"]


def test_maps_replace_no_image_no_label_and_no_other_map(tmp_path):
    write_tiff(tmp_path / "in/scene.tif", pixels(70, 70))
    write_tiff(tmp_path / "in/scene.entropy.tif", pixels(70, 70))
    write_tiff(tmp_path / "labels/scene.tif", pixels(70, 70)[..., :1])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    images = find_images(str(tmp_path / "in"))
    labels = find_labels(str(tmp_path / "labels"), images, CLASSES).values()
    for target in ("in", "link", "labels"):
        task = Task(small_model().record, Settings(), str(tmp_path / target))
        with pytest.raises(UsageError, match="would replace an image or a label"):
            unmade(Storage(task.target), task, images, labels, overwrite=True)
    task = Task(small_model().record, Settings(entropy=True), str(tmp_path / "out"))
    with pytest.raises(
        UsageError, match=r"scene.entropy.tif and scene.tif would both give .*out/scene.entropy.tif"
    ):
        unmade(Storage(task.target), task, images, overwrite=False)


def test_maps_below_the_images_are_no_images(tmp_path):
    write_tiff(tmp_path / "in/scene.tif", pixels(70, 70))
    write_tiff(tmp_path / "in/maps/scene.tif", pixels(70, 70))
    names = lambda *given: [i.name for i in find_images(*given)]  # noqa: E731
    assert names(str(tmp_path / "in"), str(tmp_path / "in/maps")) == ["scene"]
    assert names(str(tmp_path / "in"), str(tmp_path / "out")) == ["maps/scene", "scene"]
    assert names(str(tmp_path / "in/maps"), str(tmp_path / "in/maps")) == ["scene"]


def test_bad_arguments_are_told_before_anything_starts(tmp_path):
    write_tiff(tmp_path / "in/town_1.tif", pixels(80, 80))
    (tmp_path / "vrt").mkdir()
    (tmp_path / "vrt/all.vrt").write_text("<VRTDataset/>")
    for given in ("vrt", "vrt/all.vrt", "vrt/*.vrt"):
        with pytest.raises(UsageError, match="is a VRT, which may name any file or address"):
            find_images(str(tmp_path / given))
    with pytest.raises(UsageError, match="is a VRT"):
        find_images("s3://bucket/scenes/all.vrt")
    for given in ("none", "none.tif", "in/*.png", "none.txt"):
        with pytest.raises(UsageError, match=r"does not exist|holds no image"):
            find_images(str(tmp_path / given))
    (tmp_path / "in/labels").mkdir()
    Pillow.fromarray(np.zeros((80, 80), np.uint8)).save(tmp_path / "in/labels/town_1.png")
    (tmp_path / "in/classes.json").write_text(json.dumps({"classes": [{"id": 1, "name": "sea"}]}))
    images = find_images(str(tmp_path / "in"))
    assert [i.name for i in images] == ["town_1"]
    with pytest.raises(
        UsageError,
        match=r"the labels have other classes than the model: .* says 1 sea, the model knows 1 land",
    ):
        find_labels(str(tmp_path / "in/labels"), images, CLASSES)
    with pytest.raises(UsageError, match=r"--overlap must lie in 0..0.75, got 1"):
        Settings(overlap=1)
    with pytest.raises(UsageError, match="--workers must be at least 1, got 0"):
        predict(small_model(), images, str(tmp_path / "out"), Settings(), workers=0, say=print)
    write_tiff(tmp_path / "latin/cafe.tif", pixels(80, 80))
    (tmp_path / "latin/cafe.tif").rename(tmp_path / "latin" / os.fsdecode(b"caf\xe9.tif"))
    with pytest.raises(UsageError, match=r"the name 'caf.udce9.tif' is no UTF-8"):
        find_images(str(tmp_path / "latin"))


def test_a_glob_and_a_list_name_images(tmp_path):
    for path in ("a/x_1.tif", "a/b/x_2.tif", "a/b/y.png", "a/notes.md"):
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(b"12345")
    names = lambda given: [i.name for i in find_images(str(tmp_path / "in" / given))]  # noqa: E731
    assert names("**/x_*.tif") == ["a/b/x_2", "a/x_1"]
    assert names("a/*.tif") == ["x_1"]
    assert names("a/*/?.png") == ["b/y"]
    assert names("a") == ["b/x_2", "b/y", "x_1"]
    (tmp_path / "in/list.txt").write_text(f"a/x_1.tif\n\n{tmp_path}/in/a/b/y.png\n")
    assert names("list.txt") == ["x_1", "y"]
    assert find_images(str(tmp_path / "in/a/x_1.tif"))[0].size == 5
    (tmp_path / "in/list.txt").write_text("a/x_1.tif\na/b/../x_1.tif\n")
    with pytest.raises(UsageError, match="would give the same map"):
        names("list.txt")


def layers_of(net: model.Model, folder: Path, **settings) -> tuple[np.ndarray, list[Axis]]:
    """Layers of the one image of a folder, mapped as one block without Ray, and its axes."""
    [image] = find_images(str(folder))
    task = Task(net.record, Settings(**settings), str(folder))
    blocks = BlockMapper(task, net.weights, "cpu")
    with open_image(image, task).opened() as raster, torch.inference_mode():
        rows, cols, _ = grid_of(raster, task)
        whole = Block((0, len(rows.starts)), (0, len(cols.starts)))
        return blocks.map(raster, rows, cols, whole)[2], [rows, cols]


def test_the_scale_of_training_is_kept_in_metres_or_source_pixels(tmp_path):
    fine = pixels(128, 128)
    coarse = fine.reshape(64, 2, 64, 2, 3).mean((1, 3)).round().astype(np.uint8)
    write_tiff(tmp_path / "coarse/x.tif", coarse)
    truth, _ = layers_of(small_model(), tmp_path / "coarse")
    twice = truth.repeat(2, 1).repeat(2, 2)
    half = Affine(0.25, 0, 3e5, 0, -0.25, 2e6)
    write_tiff(tmp_path / "metres/x.tif", fine, crs="EPSG:32640", transform=half)
    write_tiff(tmp_path / "degrees/x.tif", fine, crs="EPSG:4326", transform=Affine(1e-5, 0, 55, 0, -1e-5, 25))
    write_tiff(tmp_path / "nowhere/x.tif", fine)
    for folder in ("metres", "degrees", "nowhere"):
        found, axes = layers_of(small_model(metres=0.5, scale=(2.0, 2.0)), tmp_path / folder)
        assert [a.length for a in axes] == [64, 64]
        assert np.array_equal(found, twice)
    found, axes = layers_of(small_model(metres=0.25, scale=(2.0, 2.0)), tmp_path / "metres")
    assert [a.length for a in axes] == [128, 128]  # what the raster says goes before the pixels


def test_the_rule_of_training_is_that_of_prediction(tmp_path):
    plain = pixels(80, 100)
    deep = np.concatenate([plain[..., ::-1], plain[..., :1]], 2).astype(np.uint16) * 4 + 50
    write_tiff(tmp_path / "plain/x.tif", plain)
    write_tiff(tmp_path / "deep/x.tif", deep)
    wanted, _ = layers_of(small_model(), tmp_path / "plain")
    net = small_model(rule=Rule((3, 2, 1), (50, 50 + 4 * 255)))
    assert model.Record.from_json(net.record.to_json(), "x") == net.record
    assert np.array_equal(layers_of(net, tmp_path / "deep")[0], wanted)
    [image] = find_images(str(tmp_path / "plain"))
    with pytest.raises(
        BadSource, match=r"has 3 bands of uint8, expected at least 3 of uint16 \(--bands 3,2,1"
    ):
        plan_image(image, None, Task(net.record, Settings(), str(tmp_path)))


def seams(shares: np.ndarray, rows: Axis, cols: Axis) -> float:
    """Seam score of (C, H, W) probabilities, over rows and columns of windows."""
    shares, ratios = shares.astype(float), []
    for along, values in ((cols, shares), (rows, shares.transpose(0, 2, 1))):
        borders = {s for start in along.starts for s in (start, start + SIDE)} - {0, along.length}
        rest = [k for k in range(1, along.length) if min(abs(k - b) for b in borders) > 1]
        others = np.random.default_rng(0).choice(rest, 200)
        ratios.append(seam_score(values, borders, others))
    return float(np.mean(ratios))


def untrained_seams(folder: Path, overlap: float) -> float:
    """Seam score of the one image of a folder under an untrained network."""
    found, axes = layers_of(small_model(), folder, probabilities=True, overlap=overlap)
    return seams(found[1:], *axes)


@pytest.mark.real
def test_no_seam_shows_on_real_tiles(real_data, tmp_path):
    for name in sorted((real_data / "dubai/images").glob("*.jpg"))[::24]:
        (tmp_path / name.stem).mkdir()
        with Pillow.open(name) as image:
            image.crop((0, 0, 500, 500)).save(tmp_path / name.stem / "x.png")
    folders = sorted(tmp_path.iterdir())
    assert np.mean([untrained_seams(f, 0.25) for f in folders]) <= 1.05
    assert np.mean([untrained_seams(f, 0.0) for f in folders]) > 1.5  # what blending is for


def trained_briefly(data: Path) -> model.Model:
    """A model of sixty steps on crops of six images."""
    rng, net = np.random.default_rng(0), build(ARCH, len(CLASSES), seed=3).train()
    optimizer, pairs = torch.optim.Adam(net.parameters(), 1e-3), []
    for name in (data / "train.txt").read_text().split()[:6]:
        with (
            Pillow.open(data / f"images/{name}.jpg") as image,
            Pillow.open(data / f"labels/{name}.png") as label,
        ):
            pairs.append((np.array(image), target_of(np.array(label))))
    for _ in range(60):
        images, targets = [], []
        for image, target in (pairs[k] for k in rng.integers(0, len(pairs), 8)):
            y, x = (rng.integers(0, size - SIDE) for size in target.shape)
            images.append(image[y : y + SIDE, x : x + SIDE])
            targets.append(target[y : y + SIDE, x : x + SIDE])
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        loss = cross_entropy(net(x), torch.from_numpy(np.stack(targets)).long(), ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {n: t.detach().clone() for n, t in net.net.state_dict().items()}
    return model.Model(replace(small_model().record, sha256=digest(checkpoint.pack(weights))), weights)


@pytest.mark.ray
@pytest.mark.real
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("every", [30, pytest.param(1, marks=pytest.mark.slow)])
def test_whole_real_images_become_valid_maps_at_their_place_without_a_seam(  # noqa: PLR0917
    ray_session, real_data, tmp_path, monkeypatch, capsys, every
):
    model.save(trained_briefly(real_data / "dubai"), str(tmp_path / "model"), "", overwrite=False)
    files, places = sorted((real_data / "dubai/images").glob("*.jpg"))[::every], {}
    for number, file in enumerate(files):
        places[file.stem] = PLACE["transform"] @ Affine.translation(2500 * number, 0)
        with Pillow.open(file) as image:
            keys = {"crs": PLACE["crs"], "transform": places[file.stem]}
            write_tiff(tmp_path / f"in/{file.stem}.tif", np.array(image), **keys)
    flags = [str(tmp_path / "model"), "--source", str(tmp_path / "in"), "--target", str(tmp_path / "out")]
    done = processes.run_here(monkeypatch, capsys, "predict", *flags, "--probabilities", "--json", code=0)
    assert json.loads(done.stdout)["maps"] == len(files)
    found = []
    for name, transform in places.items():
        paths = [tmp_path / f"out/{name}.tif", tmp_path / f"out/{name}.probabilities.tif"]
        for path in paths:
            check_cog(path)
            with rasterio.open(tmp_path / f"in/{name}.tif") as source, rasterio.open(path) as made:
                assert (made.crs, made.transform, made.shape) == (source.crs, transform, source.shape)
                layers = made.read()
        found.append(seams(layers, *(axis(size, 1.0, SIDE, 0.25) for size in layers.shape[1:])))
    assert np.mean(found) <= 1.05


def test_ahead_gives_all_and_raises_what_the_thread_raised():
    def items():
        yield from range(5)
        raise DataError("gone")

    found = ahead(items(), 2)
    assert [next(found) for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="gone"):
        next(found)
    endless = ahead(iter(int, 1), 2)
    assert next(endless) == 0
    endless.close()  # ends the thread
