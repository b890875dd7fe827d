"""The page of a run whose store and weights are there: pictures, selection, damage."""

import base64
import io
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from tiny_run import ARCH, CLASSES, CYCLES, SIDE, record, write_arm

from raysed.config import DataConfig, Experiment, ModelConfig, SelectConfig
from raysed.core.networks import build
from raysed.core.splits import training_rows, validation_rows
from raysed.core.step import to_device
from raysed.core.tiles import VOID, palette, target_of
from raysed.io.ledger import Ledger, table_bytes
from raysed.io.storage import Storage
from raysed.io.store import Store, read_tiles
from raysed.report import html
from raysed.report.gallery import gallery
from raysed.report.ranking import rankings
from raysed.report.robustness import robustness


@pytest.fixture(scope="module")
def text(tiny_run):
    return html.page(Storage(tiny_run))


@pytest.fixture(scope="module")
def pictures(tiny_run, tiny_store):
    ledgers = {"uniform": Ledger(Storage(f"{tiny_run}/baseline")), "entropy": Ledger(Storage(tiny_run))}
    return gallery({k: (v, v.manifests()[-1]) for k, v in ledgers.items()}, Store.open(tiny_store))


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


@pytest.fixture(scope="module")
def judged(tiny_store):
    """Tile id -> prediction and target, by the network of the run."""
    opened = Store.open(tiny_store)
    ids = opened.index["tile_id"].to_pylist()
    tiles = read_tiles(opened.storage, opened.locations(ids), SIDE)
    labels = np.stack([t.label for t in tiles])
    x, _ = to_device(np.stack([t.image for t in tiles]), labels, torch.device("cpu"))
    with torch.inference_mode():
        guess = build(ARCH, 3, 0).eval()(x).argmax(1).numpy()
    return dict(zip(ids, zip(guess, target_of(labels), strict=True), strict=True))


def test_no_address_at_all_is_in_the_page(text):
    assert not re.search(r"https?://|//www", text)
    assert set(re.findall(r'(?<!xlink:)(?:src|href)="([^"]{5})', text)) == {"data:"}
    assert all(re.match(r"#\w+$", target) for target in re.findall(r'xlink:href="([^"]*)"', text))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_class_names_are_escaped_in_text_and_figures(text):
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4
    assert "cost $5 or $6" in text  # not taken for a formula
    assert len(text) < 10_000_000


def test_classes_have_their_colours(text):
    for land_class in CLASSES:
        assert f'style="background:{land_class.color}"' in text


def test_selection_is_described(text):
    found = re.search(r"uniform never selected ([\d.]+)% of 20 tiles; entropy never selected ([\d.]+)%", text)
    assert all(0 < float(v) <= 70 for v in found.groups())


def test_gallery_goes_from_the_worst_to_the_best_validation_tile(pictures, judged, tiny_store):
    shares = []
    for picture in pictures[:4]:
        guess, target = judged[picture.tile_id]
        shares.append((guess == target)[target != VOID].mean())
        assert f"{shares[-1]:.0%} right" in picture.caption
    assert shares == sorted(shares)
    every = [judged[t] for t in Store.open(tiny_store).split("val")["tile_id"].to_pylist()]
    right = [(g == t)[t != VOID].mean() for g, t in every]
    assert (shares[0], shares[-1]) == (min(right), max(right))


def test_gallery_shows_label_and_prediction_in_class_colours(pictures, judged):
    colors = np.zeros((256, 3), np.uint8)
    colors[:3] = palette(CLASSES)
    for picture in pictures:
        assert list(picture.images) == [
            "image",
            "label",
            "predicted: uniform",
            "predicted: entropy",
            "entropy map",
        ]
        guess, target = judged[picture.tile_id]
        assert (pixels(picture.images["label"]) == colors[target]).all()
        assert (pixels(picture.images["predicted: entropy"]) == colors[guess]).all()


def test_gallery_shows_the_most_and_least_uncertain_selected_tiles(pictures, tiny_run):
    ledger = Ledger(Storage(tiny_run))
    chosen = ledger.table(ledger.manifests()[-1], "selected.parquet").sort_by("rank")["tile_id"].to_pylist()
    assert [p.tile_id for p in pictures[4:]] == [*chosen[:2], *chosen[-2:]]
    assert "most uncertain" in pictures[4].caption
    assert "least uncertain" in pictures[7].caption


def test_damage_is_named_in_its_place_and_the_rest_is_shown(run_copy):
    (run_copy / "cycle_0002" / "model.safetensors").write_bytes(b"rotten")
    (run_copy / "cycle_0001" / "selected.parquet").unlink()
    text = html.page(Storage(str(run_copy)))
    assert re.search(r"Not shown: [^<]*model\.safetensors does not have the sha256", text)
    assert re.search(r"Not shown: [^<]*cycle_0001/selected\.parquet is missing", text)
    assert "data:image" not in text
    assert "iou_frequency_weighted" in text
    assert text.count("<svg") >= 10


def test_a_strategy_without_entropies_has_its_page_and_no_ranking(tiny_store, tmp_path):
    own = Experiment(
        run=str(tmp_path),
        cycles=CYCLES + 1,
        data=DataConfig(uri=tiny_store),
        model=ModelConfig(arch=ARCH),
        select=SelectConfig(strategy="uniform", tiles=6),
    )
    ledger = write_arm(Storage(str(tmp_path)), own, Store.open(tiny_store))
    last = ledger.manifests()[-1]
    losses = pa.table(
        {"tile_id": Store.open(tiny_store).split("train")["tile_id"], "entropy": pa.nulls(20, pa.float32())}
    )
    files = {name: ledger.read(last, name) for name in last.files} | {"scores.parquet": table_bytes(losses)}
    ledger.commit(CYCLES, files, lambda: record("uniform", CYCLES, 6))
    text = html.page(Storage(str(tmp_path)))
    assert "Not shown" not in text
    assert f"selected in cycle {CYCLES + 1}: " in text
    assert rankings(ledger, ledger.manifests(), Store.open(tiny_store)) == []


def test_the_pool_and_the_gallery_are_those_of_the_run(tiny_store, tmp_path):
    own = Experiment(
        run=str(tmp_path),
        cycles=CYCLES,
        data=DataConfig(uri=tiny_store, held_out="north"),
        model=ModelConfig(arch=ARCH),
        select=SelectConfig(strategy="uniform", tiles=6),
    )
    ledger = write_arm(Storage(str(tmp_path)), own, Store.open(tiny_store))
    store = Store.open(tiny_store)
    pool = training_rows(store.index, "north")
    assert f"% of {len(pool)} tiles" in html.page(Storage(str(tmp_path)))
    shown = gallery({"uniform": (ledger, ledger.manifests()[-1])}, store)
    assert all(p.tile_id.startswith("north") for p in shown[:4])
    judged = len(validation_rows(store.index, "all", "north"))
    assert robustness(ledger, ledger.manifests()[-1], store)["clean"]["tiles"] == judged
