"""A run becomes a folder that raysed, smp and onnxruntime load, with the same outputs."""

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from raysed import cli
from raysed.config import Experiment, ModelConfig
from raysed.core.networks import build
from raysed.core.tiles import LandClass
from raysed.errors import DataError, UsageError
from raysed.io import checkpoint, model, store
from raysed.io.ledger import Ledger
from raysed.io.sources import Rule, ground_size
from raysed.io.storage import Storage
from raysed.io.store import Store

ROOT = Path(__file__).resolve().parents[2]
CLASSES = (LandClass("grass", "#00FF00", 3), LandClass("roof", "#FF0000", 7))
SMALL = "unet:tu-test_resnet"


def write_run(root: Path, arch: str = SMALL, cycles: int = 2, side: int = 64, tiles=()) -> str:
    """A store and a run of `cycles` cycles whose weights are those of seeds 0, 1, ..."""
    target = Storage(str(root / "store"))
    index = pa.Table.from_pylist(list(tiles), schema=store.INDEX)
    store.finish(target, name="town", classes=CLASSES, ignore=(0,), tile_size=side, index=index)
    experiment = Experiment(run=str(root / "run"), model=ModelConfig(arch=arch), cycles=cycles)
    experiment = replace(experiment, data=replace(experiment.data, uri=target.uri))
    ledger = Ledger(Storage(str(root / "run")), epoch=0)
    ledger.open(experiment, Store.open(target.uri).dataset.content_hash)
    for cycle in range(cycles):
        weights = checkpoint.pack(build(arch, 2, seed=cycle).state_dict())
        val = {"miou": 0.5 + cycle / 10, "iou": {"grass": 0.4, "roof": None}, "tiles": 9}
        record = {"val": val, "environment": {"commit": "abc123"}}
        ledger.commit(cycle, {"model.safetensors": weights}, lambda record=record: record)
    return experiment.run


def export(*flags: str, monkeypatch, capsys) -> tuple[int, str]:
    """Exit code and output of the job."""
    job = runpy.run_path(str(ROOT / "jobs/export.py"))["job"]
    monkeypatch.setattr(sys, "argv", ["export.py", *flags])
    with pytest.raises(SystemExit) as ended:
        cli.main(job)
    text = "".join(capsys.readouterr())
    print(text)
    return ended.value.code, text


@pytest.mark.parametrize("arch", [SMALL, "unet", "efficientunet-b0"])
def test_an_exported_network_gives_the_logits_of_the_run(tmp_path, monkeypatch, capsys, arch):
    run, target = write_run(tmp_path, arch), str(tmp_path / "model")
    code, said = export(run, "--target", target, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, said) == (0, f"{target}: {arch} after cycle 1, mIoU 0.600\n")
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    loaded = model.load(target)
    with torch.inference_mode():
        expected = build(arch, 2, seed=1).eval()(image)
        assert torch.equal(loaded.network()(image), expected)
        if arch != "unet":
            import segmentation_models_pytorch as smp

            scaled = (image - torch.tensor(loaded.record.mean).reshape(3, 1, 1)) / torch.tensor(
                loaded.record.std
            ).reshape(3, 1, 1)
            assert torch.equal(smp.from_pretrained(target).eval()(scaled), expected)
    assert loaded.record.classes == CLASSES
    assert loaded.record.environment["commit"] == "abc123"
    text = (tmp_path / "model/README.md").read_text()
    for part in (
        arch,
        "| 3 | grass | #00FF00 | 0.4 |",
        "| miou | 0.6 |",
        "abc123",
        "licence",
        loaded.record.dataset_hash,
    ):
        assert part in text


def test_a_named_cycle_a_damaged_one_and_one_that_is_gone(tmp_path):
    run = write_run(tmp_path, cycles=3)
    assert model.of_run(run, cycle=0).record.cycle == 0
    with open(f"{run}/cycle_0002/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert model.of_run(run).record.cycle == 1  # the newest that verifies
    with pytest.raises(DataError, match="sha256"):
        model.of_run(run, cycle=2)
    Path(f"{run}/cycle_0001/model.safetensors").unlink()
    with pytest.raises(UsageError, match="no weights of cycle 1, it has those of 0, 2"):
        model.of_run(run, cycle=1)


def test_nothing_is_overwritten_unless_asked(tmp_path, monkeypatch, capsys):
    run, target = write_run(tmp_path), tmp_path / "model"
    flags = (run, "--target", str(target))
    assert export(*flags, monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    before = (target / "config.json").read_bytes()
    code, said = export(*flags, "--cycle", "0", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "exists" in said
    assert (target / "config.json").read_bytes() == before
    assert export(*flags, "--cycle", "0", "--overwrite", monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    assert model.load(str(target)).record.cycle == 0
    (target / "thesis.txt").write_text("not a model")
    code, said = export(*flags, "--overwrite", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, "thesis.txt" in said) == (2, True)


def test_a_damaged_or_foreign_folder_is_no_model(tmp_path):
    run, target = write_run(tmp_path), tmp_path / "model"
    model.save(model.of_run(run), str(target), "", overwrite=False)
    weights = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(weights[:-1] + b"\1")
    with pytest.raises(DataError, match="sha256"):
        model.load(str(target))
    (target / "config.json").write_text(json.dumps({"_model_class": "Unet"}))
    with pytest.raises(DataError, match="not a raysed model"):
        model.load(str(target))
    with pytest.raises(UsageError, match="neither a run nor a model"):
        model.load_any(str(tmp_path))


def test_scale_and_metres_come_from_the_tiles(tmp_path):
    place = {"crs": "EPSG:32633", "transform": [0.6, 0, 5e5, 0, -0.6, 4e6], "scale": [2.0, 2.0]}
    other = {"crs": "EPSG:4326", "transform": [1e-5, 0, 15, 0, -1e-5, 50], "scale": [2.0, 2.0]}
    same = {
        "region": "r",
        "source": "s",
        "row": 0,
        "col": 0,
        "split": "train",
        "sha256": "0" * 64,
        "shard": "x",
    }
    tiles = [{**same, "tile_id": f"t{i}", **(place if i < 2 else other)} for i in range(5)]
    record = model.of_run(write_run(tmp_path, tiles=tiles)).record
    assert record.scale == (2.0, 2.0)
    assert record.metres == pytest.approx(0.6)
    assert ground_size("EPSG:2263", [3, 0, 0, 0, -3, 0]) == pytest.approx((0.9144, 0.9144), rel=1e-5)  # feet
    north = 6378137 * math.log(math.tan(math.radians(75)))  # 60 degrees, where Mercator draws a metre as two
    assert ground_size("EPSG:3857", [2, 0, 0, 0, -2, north]) == pytest.approx((1, 1), rel=1e-6)
    assert model.of_run(write_run(tmp_path / "bare")).record.metres is None


def test_onnx_agrees_with_torch_for_any_batch(tmp_path, monkeypatch, capsys):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'raysed[onnx]'")
    run, target = write_run(tmp_path), tmp_path / "model"
    code, said = export(run, "--target", str(target), "--onnx", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert float(said.split()[-1]) < 1e-4
    import onnxruntime

    session = onnxruntime.InferenceSession(str(target / "model.onnx"), providers=["CPUExecutionProvider"])
    [out] = session.run(None, {"image": np.zeros((5, 3, 64, 64), np.float32)})
    assert out.shape == (5, 2, 64, 64)


def test_onnx_without_its_packages_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run, target = write_run(tmp_path), tmp_path / "model"
    code, said = export(run, "--target", str(target), "--onnx", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, "raysed[onnx]" in said) == (2, True)
    assert not target.exists()


def exported(tmp_path: Path, arch: str = SMALL, **changes) -> tuple[str, model.Model]:
    made = model.of_run(write_run(tmp_path / "origin", arch))
    made = replace(made, record=replace(made.record, **changes))
    return model.save(made, str(tmp_path / "model"), "", overwrite=False), made


@pytest.mark.parametrize("arch", [SMALL, "unet"])
def test_a_network_starts_from_a_model_whole_or_without_its_head(tmp_path, arch):
    _, made = exported(tmp_path, arch)
    same = build(arch, 2, seed=5)
    recoloured = tuple(replace(c, color="#123456", source_id=c.source_id + 1) for c in CLASSES)
    model.start_from(same, made, recoloured)
    assert all(torch.equal(t, made.weights[n]) for n, t in same.net.state_dict().items())
    for classes in (CLASSES[::-1], (*CLASSES, LandClass("sea", "#0000FF", 1))):
        other, fresh = (build(arch, len(classes), seed=5) for _ in range(2))
        model.start_from(other, made, classes)
        state = other.net.state_dict()
        head = [n for n in state if n.startswith(("head.", "segmentation_head."))]
        assert len(head) == 2
        assert all(torch.equal(state[n], fresh.net.state_dict()[n]) for n in head)
        assert all(torch.equal(t, made.weights[n]) for n, t in state.items() if n not in head)


def test_a_model_of_another_network_or_other_weights_starts_no_run(tmp_path):
    uri, made = exported(tmp_path)
    assert model.load_init(ModelConfig(arch=SMALL, init=uri, sha256=made.record.sha256)).record == made.record
    with pytest.raises(UsageError, match=f"is a model of {SMALL}, --arch says unet: give --arch {SMALL}"):
        model.load_init(ModelConfig(arch="unet", init=uri))
    with pytest.raises(UsageError, match=r"holds weights \w{12}, model.sha256 says 000000000000"):
        model.load_init(ModelConfig(arch=SMALL, init=uri, sha256="0" * 64))
    with pytest.raises(UsageError, match=r"is a run: make a model folder of it with jobs/export\.py"):
        model.load_init(ModelConfig(arch=SMALL, init=str(tmp_path / "origin/run")))


def test_what_differs_between_model_and_store_is_said_in_a_line_each(tmp_path):
    _, made = exported(tmp_path)
    opened = Store.open(str(tmp_path / "origin/store"))
    assert model.init_notes(made.record, opened) == []
    names = tuple(LandClass(n, "#000000", i) for i, n in enumerate("ab"))
    other = replace(made.record, classes=names, scale=(2.0, 2.0), metres=0.5, rule=Rule((3, 2, 1)))
    assert model.init_notes(other, opened) == [
        "note: --init: the classes were a, b and are grass, roof: the last layer begins anew",
        "note: --init: it was trained on 2 source pixels a pixel, the store has 1",
        "note: --init: it was trained on --bands 3,2,1, the store was made with 8-bit RGB",
    ]


def test_encoder_weights_come_from_a_bucket_too(bucket):
    one, other = (build("unet:resnet18", 4, seed) for seed in (0, 1))
    Storage(bucket).write("weights/w.safetensors", checkpoint.pack(one.net.encoder.state_dict()))
    checkpoint.load_encoder(other.net.encoder, f"{bucket}/weights/w.safetensors")
    assert torch.equal(other.net.encoder.conv1.weight, one.net.encoder.conv1.weight)
    with pytest.raises(UsageError, match=f"no file {bucket}/weights/none.pth"):
        checkpoint.load_encoder(other.net.encoder, f"{bucket}/weights/none.pth")
