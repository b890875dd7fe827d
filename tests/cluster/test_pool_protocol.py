"""Labels bought round by round on a real local Ray: killed, continued, replayed."""

import json

import pytest
from processes import FAST, error_line, kill_at, run

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


@pytest.fixture
def unlabelled_store(small_store, tmp_path):
    """The small store without the labels of its training tiles, and these labels as class codes by tile."""
    store_, storage = Store.open(small_store), Storage(str(tmp_path / "pool"))
    rows, labels = [], {}
    ids = store_.index["tile_id"].to_pylist()
    tiles = read_tiles(store_.storage, store_.locations(ids), store_.dataset.tile_size)
    for row, tile in zip(store_.index.to_pylist(), tiles, strict=True):
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_picks_go_out_to_people_and_the_same_command_continues(unlabelled_store, tmp_path):
    uri, truth = unlabelled_store
    out, folder = tmp_path / "run", tmp_path / "labels"
    folder.mkdir()
    flags = ["--data", uri, "--run", str(out), "--cycles", "2", "--select.protocol", "pool", "--pool.start", "0.1",
             "--pool.buy", "0.1", "--pool.cycles", "1", "--pool.labels", str(folder), *FAST]  # fmt: skip
    for number in range(2):
        waiting = run("active", *flags, code=8)
        assert f"round {number} waits for 12 of 12 labels" in error_line(waiting)
        again = run("active", *flags, code=8, timeout=60)
        assert "Started a local Ray" not in again.stderr  # nobody holds a cluster to find that out
        assert len(Ledger(Storage(str(out))).manifests()) == number
        request = json.loads((out / f"labelling/round_{number:04d}/request.json").read_text())
        for tile_id in request["tile_ids"]:
            (folder / f"{tile_id}.png").write_bytes(truth[tile_id])
    run("active", *flags)
    manifests = Ledger(Storage(str(out))).manifests()
    assert [m.record["labelled"] for m in manifests] == [12, 24]
    assert verify(Ledger(Storage(str(out))), Store.open(uri).split("train")) == []
