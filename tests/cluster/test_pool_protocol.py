"""Labels bought round by round on a real local Ray: killed, continued, replayed."""

import json
import os

import numpy as np
import pytest
from processes import FAST, ROOT, STABLE, error_line, kill_at, run, run_here

from raysed.io import codec, store
from raysed.io.ledger import Ledger, difference, verify
from raysed.io.storage import Storage
from raysed.io.store import Store, read_tiles

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_head")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rounds_that_buy_labels_survive_a_kill(small_store, tmp_path):
    flags = ["--data", small_store, "--cycles", "4", "--select.protocol", "pool", "--pool.start", "0.1", "--pool.buy", "0.1",
             "--pool.cycles", "2", "--pool.retrain", "--optim.schedule", "cosine", "--optim.ema", "0.99", *FAST]  # fmt: skip
    calm, torn = str(tmp_path / "calm"), str(tmp_path / "torn")
    run("train", *flags, "--select", "k-center", "--run", calm)
    kill_at("train@2", "train", *flags, "--select", "k-center", "--run", torn)
    run("train", *flags, "--select", "k-center", "--run", torn)
    assert difference(Ledger(Storage(calm)), Ledger(Storage(torn))) == []
    assert verify(Ledger(Storage(torn)), Store.open(small_store).split("train")) == []
    manifests = Ledger(Storage(torn)).manifests()
    assert [m.record["labelled"] for m in manifests] == [12, 12, 24, 24]
    assert [m.record["tiles"] for m in manifests] == [12, 12, 24, 24]
    assert [bool(m.record["scores"]) for m in manifests] == [False, False, True, False]
    refused = run("train", *flags, "--select", "defensive", "--run", str(tmp_path / "r"), code=2)
    assert "looks at labels, which select.protocol pool has yet to buy" in error_line(refused)


def relabelled(uri: str, target: str, kept: set[str]) -> str:
    """A copy of a store in which every training tile but these is of the first class all over."""
    source, storage = Store.open(uri), Storage(target)
    tiles = read_tiles(
        source.storage, source.locations(source.index["tile_id"].to_pylist()), source.dataset.tile_size
    )
    rows = []
    for row, tile in zip(store.as_written(source.index).to_pylist(), tiles, strict=True):
        own = {f.name: row[f.name] for f in store.TILES if f.name in row}
        label = tile.label
        if row["split"] == "train" and tile.tile_id not in kept:
            label = np.ones_like(label)
            own["pixels"] = [0, label.size, *[0] * (len(row["pixels"]) - 2)]
        rows.append(own | {"image": codec.encode_image(tile.image), "label": codec.encode_label(label)})
    index = store.write_shard(storage, "shards/part-00000.parquet", rows)
    about = source.dataset
    store.finish(
        storage, name="p", classes=about.classes, ignore=about.ignore, tile_size=about.tile_size, index=index
    )
    return storage.uri


def test_nothing_follows_from_labels_that_were_not_bought(
    ray_session, small_store, tmp_path, monkeypatch, capsys
):
    """Class weights and batch norm included: with all other labels changed, the weights are the same bits."""
    flags = ["--cycles", "2", "--select.protocol", "pool", "--pool.start", "0.1", "--pool.buy", "0.1",
             "--pool.cycles", "1", "--select", "defensive-entropy", "--cluster.threads", "1", *STABLE, *FAST]  # fmt: skip
    runs = []
    for name in ("known", "hidden"):
        if runs:
            bought = {
                t
                for m in runs[0].manifests()
                for t in runs[0].table(m, "bought.parquet")["tile_id"].to_pylist()
            }
            assert len(bought) == 24
        data = relabelled(small_store, str(tmp_path / name / "data"), bought) if runs else small_store
        run_here(
            monkeypatch,
            capsys,
            "train",
            "--data",
            data,
            "--run",
            str(tmp_path / name / "run"),
            *flags,
            code=0,
        )
        runs.append(Ledger(Storage(str(tmp_path / name / "run"))))
    for one, other in zip(*(r.manifests() for r in runs), strict=True):
        for file in ("bought.parquet", "selected.parquet"):
            assert runs[0].table(one, file).equals(runs[1].table(other, file))
        assert one.files["model.safetensors"]["sha256"] == other.files["model.safetensors"]["sha256"]


@pytest.fixture
def unlabelled_store(small_store, tmp_path):
    """The small store without the labels of its training tiles, and these labels as class codes by tile."""
    store_, storage = Store.open(small_store), Storage(str(tmp_path / "pool"))
    rows, labels = [], {}
    ids = store_.index["tile_id"].to_pylist()
    tiles = read_tiles(store_.storage, store_.locations(ids), store_.dataset.tile_size)
    for row, tile in zip(store.as_written(store_.index).to_pylist(), tiles, strict=True):
        own = {f.name: row[f.name] for f in store.TILES if f.name in row} | {
            "image": codec.encode_image(tile.image)
        }
        if row["split"] == "train":
            labels[tile.tile_id] = codec.encode_picture(tile.label)  # class codes are 1..C there
            own |= {"label": None, "pixels": None}
        else:
            own["label"] = codec.encode_label(tile.label)
        rows.append(own)
    index = store.write_shard(storage, "shards/part-00000.parquet", rows)
    about = store_.dataset
    store.finish(
        storage, name="p", classes=about.classes, ignore=about.ignore, tile_size=about.tile_size, index=index
    )
    return storage.uri, labels


def test_picks_go_out_to_people_and_the_same_command_continues(
    ray_session, unlabelled_store, tmp_path, monkeypatch, capsys
):
    uri, truth = unlabelled_store
    out, folder = tmp_path / "run", tmp_path / "labels"
    folder.mkdir()
    flags = ["--data", uri, "--run", str(out), "--cycles", "2", "--select.protocol", "pool", "--pool.start", "0.1",
             "--pool.buy", "0.1", "--pool.cycles", "1", "--pool.labels", os.path.relpath(folder, ROOT), *FAST]  # fmt: skip
    monkeypatch.chdir(ROOT)  # the workers of a run stand elsewhere
    for number in range(2):
        waiting = run_here(monkeypatch, capsys, "active", *flags, code=8)
        assert f"round {number} waits for 12 of 12 labels" in error_line(waiting)
        run("active", *flags, code=8, RAY_ADDRESS="127.0.0.1:1")  # nobody needs a cluster to find that out
        assert len(Ledger(Storage(str(out))).manifests()) == number
        request = json.loads((out / f"labelling/round_{number:04d}/request.json").read_text())
        for tile_id in request["tile_ids"]:
            (folder / f"{tile_id}.png").write_bytes(truth[tile_id])
    run_here(monkeypatch, capsys, "active", *flags, code=0)
    manifests = Ledger(Storage(str(out))).manifests()
    assert [m.record["labelled"] for m in manifests] == [12, 24]
    assert verify(Ledger(Storage(str(out))), Store.open(uri).split("train")) == []


def spoil(uri: str, tile_id: str) -> None:
    """Change bytes of a tile's image in its shard."""
    opened = Store.open(uri)
    [at] = opened.locations([tile_id])
    data, start = bytearray(opened.storage.read(at["shard"])), at["image_offset"]
    data[start : start + 8] = bytes(8)
    opened.storage.write(at["shard"], bytes(data))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bad_tile_is_never_asked_for_and_is_remembered_while_people_label(unlabelled_store, tmp_path):
    """One would have been picked by chance, another is found by the scoring, after which the job ends and nothing is committed."""
    uri, truth = unlabelled_store
    out, folder = tmp_path / "run", tmp_path / "labels"
    folder.mkdir()
    flags = ["--data", uri, "--cycles", "2", "--select.protocol", "pool", "--pool.start", "0.1", "--select", "power-entropy",
             "--pool.buy", "0.1", "--pool.cycles", "1", "--pool.labels", str(folder), "--data.bad-tile-budget", "0.05", *FAST]  # fmt: skip
    asked = lambda run_, number: json.loads((run_ / f"labelling/round_{number:04d}/request.json").read_text())  # noqa: E731
    run("active", *flags, "--run", str(tmp_path / "calm"), code=8)
    picked = asked(tmp_path / "calm", 0)["tile_ids"]
    unpicked = min(truth.keys() - set(picked))
    spoil(uri, picked[0])
    waiting = run("active", *flags, "--run", str(out), code=8)
    assert f"tile {picked[0]} is quarantined" in waiting.stdout
    first = asked(out, 0)
    assert (len(first["tile_ids"]), [b["tile_id"] for b in first["quarantine"]]) == (12, [picked[0]])
    assert picked[0] not in first["tile_ids"]
    if unpicked in first["tile_ids"]:
        unpicked = min(truth.keys() - {*picked, *first["tile_ids"]})
    spoil(uri, unpicked)
    for number in (0, 1):
        for tile_id in asked(out, number)["tile_ids"]:
            (folder / f"{tile_id}.png").write_bytes(truth[tile_id])
        run("active", *flags, "--run", str(out), code=0 if number else 8)
    second = asked(out, 1)
    assert sorted(b["tile_id"] for b in second["quarantine"]) == sorted([picked[0], unpicked])
    ledger = Ledger(Storage(str(out)))
    assert [m.record["labelled"] for m in ledger.manifests()] == [12, 24]
    assert [m.record["quarantined"] for m in ledger.manifests()] == [1, 2]
    assert verify(ledger, Store.open(uri).split("train")) == []
