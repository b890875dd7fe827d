"""The stream, the scorers and the loop on a real local Ray."""

import copy
import json
import os
import re
import shutil
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

import raysed
from raysed.cluster import scoring
from raysed.cluster.cycles import STOP_SECONDS, Worker
from raysed.cluster.estimate import _scored, dry_run
from raysed.cluster.launch import store_of
from raysed.cluster.preflight import check_data
from raysed.cluster.scorekeeping import scored_side
from raysed.cluster.scoring import BATCH, Network, Scorer, ScorerPool, score_pool
from raysed.cluster.stream import Stream
from raysed.cluster.telemetry import GAUGES, RESTARTS, Monitor
from raysed.config import AugmentConfig, ClusterConfig, Experiment, ModelConfig, PoolConfig, SelectConfig
from raysed.core.augment import augment, to_uint8
from raysed.core.losses import class_weights
from raysed.core.networks import build
from raysed.core.plan import plan
from raysed.core.randomness import keyed_rng
from raysed.core.step import to_device
from raysed.core.uncertainty import log_probabilities, tile_scores
from raysed.errors import ResourcesError, StorageError
from raysed.io.ledger import Ledger, Manifest
from raysed.io.storage import Storage
from raysed.io.store import Store, finish, read_tiles

pytestmark = pytest.mark.ray
SIDE = 64
LIMITS = AugmentConfig()


def stream(
    store: Store, wanted: list[tuple[int, str]], chunk: int, *, reader_cpus: float = 0.25, alone: bool = False
) -> Stream:
    more = {"name": "test", "keys": (3, 5), "limits": LIMITS}
    return Stream(store, wanted, chunk=chunk, reader_cpus=reader_cpus, alone=alone, **more)


def test_a_worker_whose_read_tasks_find_no_cpu_reads_its_tiles_itself(ray_session, small_store):
    def starved(ids):
        """In a process of its own: nothing but its end stops an execution of Ray Data that waits for a CPU."""
        raysed.cluster.stream.STARVED_SECONDS = 2.0
        more = {"name": "test", "keys": (3, 5), "limits": LIMITS, "chunk": 20, "reader_cpus": 1000}
        source = Stream(Store.open(small_store), list(enumerate(ids)), **more)
        rows = source.take(range(len(ids)))
        source.close()
        return rows, source.starved

    store = Store.open(small_store)
    ids = store.split("train")["tile_id"].to_pylist()[:60]
    rows, told = ray.get(ray.remote(num_cpus=0, max_calls=1)(starved).remote(ids), timeout=60)
    assert told
    assert all((r.image == expected(store, r.tile_id)[0]).all() for r in rows)
    assert [r.tile_id for r in rows] == ids
    alone = stream(store, list(enumerate(ids)), 20, reader_cpus=1000, alone=True)
    assert [r.tile_id for r in alone.take(range(60))] == ids
    assert not alone.starved


def expected(store: Store, tile_id: str) -> tuple[np.ndarray, np.ndarray]:
    tile = read_tiles(store.storage, store.locations([tile_id]), store.dataset.tile_size)[0]
    pixels, label = augment(tile.image, tile.label, keyed_rng("augment", 3, 5, tile_id))
    return to_uint8(pixels), label


@pytest.mark.parametrize(("workers", "chunk"), [(1, 256), (2, 20), (3, 7)])
def test_stream_is_exact_for_any_worker_count_and_chunk(ray_session, small_store, workers, chunk):
    store = Store.open(small_store)
    ids = store.split("train")["tile_id"].to_pylist()[:37]  # divides by none of the worker counts
    order = plan(ids, 0, 1, 12, 4)
    seen = {}
    for rank in range(workers):
        source = stream(store, [(p, order.order[p]) for p in order.share(rank, workers)], chunk)
        for step in range(order.steps):
            for _, positions in order.micro_batches(step, rank, workers):
                for row in source.take(positions):
                    assert row.position not in seen
                    seen[row.position] = row
        source.close()
        assert not source.bad
        assert source.nodes.total() == len(order.share(rank, workers))
    assert [seen[p].tile_id for p in range(37)] == list(order.order)
    for row in list(seen.values())[::5]:
        image, label = expected(store, row.tile_id)
        assert np.array_equal(row.image, image)
        assert np.array_equal(row.label, label)


def test_a_bad_tile_is_black_and_void_and_reported(ray_session, damaged_store):
    uri, victim = damaged_store
    store = Store.open(uri)
    ids = [t for t in store.split("train")["tile_id"].to_pylist() if t != victim][:5]
    source = stream(store, list(enumerate([*ids, victim])), 256)
    rows = source.take(range(6))
    source.close()
    assert [b.tile_id for b in source.bad] == [victim]
    assert rows[5].image.max() == 0
    assert rows[5].label.max() == 0
    assert rows[4].label.max() > 0


@pytest.fixture
def shardless_store(small_store, tmp_path):
    """A copy of the small store with a folder where a shard must be: the storage refuses, no tile is at fault."""
    uri = tmp_path / "refusing"
    shutil.copytree(small_store, uri)
    for shard in (uri / "shards").iterdir():
        shard.unlink()
        shard.mkdir()
    return str(uri)


def test_a_storage_that_refuses_comes_out_of_stream_and_scorer_as_itself(
    ray_session, shardless_store, weights
):
    store = Store.open(shardless_store)
    ids = store.split("train")["tile_id"].to_pylist()[:5]
    source = stream(store, list(enumerate(ids)), 256)
    with pytest.raises(StorageError, match=r"shards/part-00000\.parquet: .*directory") as failed:
        source.take(range(5))
    source.close()
    assert "\n" not in str(failed.value)
    network = Network("unet:tu-test_resnet", 8, "cpu")
    scorer = ray.remote(Scorer).remote(network, shardless_store, store.dataset.tile_size, 1 << 30)
    with pytest.raises(StorageError, match=r"shards/part-00000\.parquet: .*directory"):
        score_pool(
            [scorer], [1], weights, "v1", store.located(ids), side=SIDE, precision="fp32", renew=pytest.fail
        )
    ray.kill(scorer)


def test_scorers_that_die_again_and_again_end_the_scoring(ray_session, small_store, weights, monkeypatch):
    class Doomed(Scorer):
        def score(self, weights, version, locations, side, *, threads, precision):
            os._exit(9)

    monkeypatch.setattr(scoring, "PATIENCE", 8.0)
    store = Store.open(small_store)
    network = Network("unet:tu-test_resnet", 8, "cpu")
    make = network, small_store, store.dataset.tile_size, 1 << 30
    made = ScorerPool(2, make, {"num_cpus": 0.1}, Doomed)
    doomed, _ = made.ready(60, 60)
    at = store.located(store.index["tile_id"].to_pylist()[:40])
    with pytest.raises(ResourcesError, match=r"no scorer has given a score for 8 s, 0 of 2 chunks .*memory"):
        score_pool(doomed, [1, 1], weights, "v1", at, side=SIDE, precision="fp32", renew=made.renew)
    made.kill()


def ask_until_it_is_gone(scorer) -> None:
    """Ray kills an actor a moment after it was asked to, and it may answer until then."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        ray.get(scorer.node.remote(), timeout=30)


def test_scorers_given_back_are_made_anew_and_score_the_same(ray_session, small_store, weights):
    store = Store.open(small_store)
    network = Network("unet:tu-test_resnet", 8, "cpu")
    pool = ScorerPool(2, (network, small_store, store.dataset.tile_size, 1 << 30), {"num_cpus": 0.1})
    [node] = {n["NodeID"] for n in ray.nodes() if n["Alive"]}

    def scores() -> np.ndarray:
        up, threads = pool.ready(60, 60)
        assert len(up) == 2
        assert threads == [max(1, int(ray.cluster_resources()["CPU"] // 2))] * 2
        at = store.located(store.index["tile_id"].to_pylist()[:40])
        return score_pool(up, [1, 1], weights, "v1", at, side=SIDE, precision="fp32", renew=pool.renew).rows

    other = copy.copy(pool)  # a worker that takes the place of one that has given them back
    pool.start()
    other.scorers = list(pool.scorers)
    before, first = scores(), list(pool.scorers)
    assert pool.release({node}) == 0  # a trainer is there: nothing would be won
    assert pool.release({"another"}) == 2
    for scorer in first:
        with pytest.raises(ray.exceptions.RayActorError):
            ask_until_it_is_gone(scorer)
    assert np.array_equal(scores(), before)
    assert not set(first) & set(pool.scorers)
    assert other.scorers == first
    assert len(other.ready(60, 60)[0]) == 2
    assert not set(first) & set(other.scorers)
    for made in (pool, other):
        made.kill()


@pytest.fixture(scope="module")
def pool(ray_session, small_store):
    class MortalScorer(Scorer):
        """Dies once, while it holds its second chunk of the weights `deadly`."""

        def score(self, weights, version, locations, side, *, threads, precision):
            self.calls = getattr(self, "calls", 0) + (version == "deadly")
            marker = Path(self.storage.uri, "died")
            if self.calls == 2 and not marker.exists():
                marker.touch()
                os._exit(9)
            return super().score(weights, version, locations, side, threads=threads, precision=precision)

    network = Network("unet:tu-test_resnet", 8, "cpu")
    side = Store.open(small_store).dataset.tile_size
    made = ScorerPool(2, (network, small_store, side, 1 << 30), {"num_cpus": 0.1}, MortalScorer)
    yield made
    made.kill()


@pytest.fixture(scope="module")
def weights():
    return {n: t.numpy() for n, t in build("unet:tu-test_resnet", 8, 4).state_dict().items()}


def test_scores_of_the_pool_equal_a_plain_loop_though_a_scorer_dies(pool, weights, small_store):
    store = Store.open(small_store)
    ids = sorted(store.index["tile_id"].to_pylist())

    def scored(version: str, order: list[str]) -> scoring.Scores:
        up, _ = pool.ready(60, 60)
        assert len(up) == 2
        return score_pool(
            up,
            [1, 1],
            weights,
            version,
            store.located(order),
            side=SIDE,
            precision="fp32",
            renew=pool.renew,
        )

    calm = scored("v1", ids)
    assert calm.ids.to_pylist() == ids
    assert sum(calm.nodes.values()) == len(ids)

    net = build("unet:tu-test_resnet", 8, 4).to(memory_format=torch.channels_last).eval()
    plain = []
    with torch.inference_mode():
        for i in range(0, len(ids), BATCH):
            tiles = read_tiles(store.storage, store.locations(ids[i : i + BATCH]), store.dataset.tile_size)
            x, _ = to_device(
                np.stack([t.image for t in tiles]), np.zeros((0,), np.uint8), torch.device("cpu")
            )
            plain.append(tile_scores(log_probabilities(net(x))).numpy())
    plain = np.concatenate(plain)
    assert calm.rows[:, 0] == pytest.approx(plain[:, 0], rel=1e-5)
    assert calm.rows[:, 2:] == pytest.approx(plain[:, 2:], rel=1e-3, abs=1e-6)

    faulted = scored("deadly", ids)
    assert Path(small_store, "died").exists()
    assert np.array_equal(faulted.rows, calm.rows)
    assert np.array_equal(scored("v3", ids).rows, calm.rows)  # another is there for the dead one


def test_a_bad_tile_is_left_out_of_the_scores_and_named(ray_session, weights, damaged_store):
    uri, victim = damaged_store
    store = Store.open(uri)
    scorer = (
        ray.remote(Scorer)
        .options(num_cpus=0.1)
        .remote(Network("unet:tu-test_resnet", 8, "cpu"), uri, store.dataset.tile_size, 1 << 30)
    )
    at = store.located(store.index["tile_id"].to_pylist()[:40])
    scores = score_pool([scorer], [1], weights, "v1", at, side=SIDE, precision="fp32", renew=pytest.fail)
    ray.kill(scorer)
    assert [b.tile_id for b in scores.bad] == [victim]
    assert len(scores.ids) == 39
    assert victim not in scores.ids.to_pylist()


def test_a_class_absent_from_training_is_said_and_weighs_nothing(small_store):
    opened = Store.open(small_store)
    pixels = {"train": [0, 5, 0, 5, 5, 5, 5, 5, 0], "val": [0, 5, 5, 5, 5, 5, 5, 5, 0]}
    said = []
    check_data(Experiment(), replace(opened, dataset=replace(opened.dataset, pixels=pixels)), said.append)
    assert [line.split()[2] for line in said] == ["rangeland", "building"]
    assert "counts in validation" in said[0]
    assert "nor in validation" in said[1]
    assert class_weights(np.array(pixels["train"][1:]), 0.5)[[1, 7]].tolist() == [0, 0]


def test_a_committed_cycle_is_on_the_metrics_port(ray_session):
    record = {
        "seconds": {"score": 2.0, "train": 4.0, "stall": 1.0, "evaluate": 2.0, "total": 10.0},
        "train": {"loss": 0.5},
        "val": {"loss": 0.75, "miou": 0.625, "tiles": 20},
        "scores": {"tiles": 100},
        "tiles": 24,
    }
    monitor = ray.remote(Monitor).options(num_cpus=0).remote()
    event = {"kind": "cycle", "arm": "entropy", "manifest": Manifest(6, {}, record), "scorers": 3}
    ray.get(monitor.post.remote(event))
    port, until = ray.nodes()[0]["MetricsExportPort"], time.monotonic() + 60
    found: dict[tuple[str, str], float] = {}
    while len(found) < len(GAUGES) + 2 and time.monotonic() < until:
        time.sleep(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            for line in page.read().decode().splitlines():
                if line.startswith("ray_raysed_") and 'arm="entropy"' in line:
                    name, labels = line.split("{")
                    phase = re.search(r'phase="(\w*)"', labels)
                    found[name.removeprefix("ray_"), phase[1] if phase else ""] = float(line.split()[-1])
    ray.kill(monitor)
    assert found == {
        ("raysed_cycle", ""): 7,
        ("raysed_train_loss", ""): 0.5,
        ("raysed_val_loss", ""): 0.75,
        ("raysed_val_miou", ""): 0.625,
        ("raysed_stall_share", ""): 0.1,
        ("raysed_scorers", ""): 3,
        ("raysed_tiles_per_second", "score"): 50,
        ("raysed_tiles_per_second", "train"): 6,
        ("raysed_tiles_per_second", "evaluate"): 10,
    }


def test_the_grafana_dashboard_shows_every_gauge():
    text = (Path(raysed.__file__).parent / "report/grafana.json").read_text()
    shown = {t["expr"] for p in json.loads(text)["panels"] for t in p["targets"]}
    assert shown == {f"ray_{name}" for name in GAUGES}


@pytest.mark.parametrize(
    ("select", "pool", "side", "wanted"),
    [
        (SelectConfig(strategy="uniform"), {}, 128, 0),
        (SelectConfig(strategy="entropy"), {}, 128, 100),
        (SelectConfig(strategy="entropy", scores="overlapped", side="half"), {}, 128, 25),
        (SelectConfig(strategy="entropy", scores="byproduct"), {}, 128, 0.25 * (100 + 9 * 10) / 10),
        (SelectConfig(strategy="entropy", scores="byproduct"), {}, 64, 19),  # half of it is too small
        (SelectConfig(strategy="defensive-entropy"), {}, 128, 10),  # neither the first round nor the tail
        (SelectConfig(strategy="defensive-entropy", options="tail=1", scores="byproduct"), {}, 128, 0.25 * 5),
        (SelectConfig(strategy="reducible-loss", reference="run"), {}, 128, 10),
        (
            SelectConfig(strategy="entropy", protocol="pool"),
            {"cycles": 5},
            128,
            10,
        ),  # a round by chance, and one by scores
    ],
)
def test_a_dry_run_counts_the_passes_that_a_run_makes(select, pool, side, wanted):
    cost = (scored_side(select.side, select.scores, side, 32) / side) ** 2
    found = _scored(Experiment(cycles=10, select=select, pool=PoolConfig(**pool)), 100, 0, cost)
    assert found == pytest.approx(wanted)


def test_a_group_that_makes_room_for_a_larger_one_has_not_failed():
    monitor = Monitor()
    assert all(monitor.begin(workers) for workers in (1, 2, 3, 4, 5, 6))
    assert [bool(monitor.begin(1)) for _ in range(RESTARTS + 1)] == [True] * RESTARTS + [False]


def test_ray_counts_one_worker_a_gpu():
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    def counted(*gpus: int) -> int:
        worker = ClusterConfig().worker("cuda")
        config = ray.train.ScalingConfig(num_workers=(1, 64), use_gpu=True, resources_per_worker=worker)
        nodes = {f"node{k}": {"CPU": 64.0, "GPU": float(n)} for k, n in enumerate(gpus)}
        return ElasticScalingPolicy(config)._count_possible_workers(nodes)

    assert [counted(n) for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert counted(4, 4) == 8


def test_a_dry_run_reckons_and_writes_nothing(ray_session, small_store, tmp_path):
    base = Experiment(
        run=str(tmp_path / "run"), cycles=10, baseline=True, model=ModelConfig(arch="unet:tu-test_resnet")
    )
    experiment = replace(
        base, data=replace(base.data, uri=small_store), select=SelectConfig(strategy="entropy", tiles=20)
    )
    said: list[str] = []
    dry_run(experiment, tiles_per_second=10, price=36, say=said.append)
    text = "\n".join(said)
    seconds = 10 * (2 * 20 / 10 + (128 + 32 + 32) / 30)  # both arms train and validate, one scores
    assert f"{seconds / 3600:.2f} h, {seconds / 3600 * 36:.2f} at 36 an hour" in text
    assert "entropy  10 cycles: each trains 20 tiles in 2 steps, scores 128, validates 32" in text
    assert "1 on cpu, 2 scorers" in text
    said.clear()
    dry_run(experiment, tiles_per_second=None, price=None, say=said.append)
    assert "3 steps measured on one cpu worker" in said[-1]
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_version_of_the_store_that_it_began_with(small_store, tmp_path):
    uri, said = str(tmp_path / "store"), []
    shutil.copytree(small_store, uri)
    before = Store.open(uri)
    exp = Experiment(run=str(tmp_path / "run"))
    exp = replace(exp, data=replace(exp.data, uri=uri))
    Ledger(Storage(str(exp.run)), epoch=0).open(exp, before.dataset.content_hash)
    known = before.dataset
    finish(
        before.storage, name="small", classes=known.classes, ignore=(0,), tile_size=known.tile_size,
        index=before.index.slice(1), version=2,
    )  # fmt: skip
    assert store_of(exp, said.append).dataset == known
    assert "goes on with version 1 of the store, 160 tiles" in said.pop()
    for other in (
        replace(exp, run=str(tmp_path / "new")),
        replace(exp, allow_config_change=True),
    ):
        assert store_of(other, said.append).dataset.version == 2
    assert not said


def test_a_run_that_is_to_stop_commits_inside_a_cycle_that_is_long(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(Worker, "_say", lambda self, text: said.append(text))
    worker = object.__new__(Worker)
    worker.rank, worker.workers, worker.beat = 0, 1, SimpleNamespace(stopping=True)
    part = SimpleNamespace(began=time.perf_counter() - 8, losses=[torch.zeros(3)] * 8)  # a second a step
    assert not worker._stops(part, 8, 8 + int(STOP_SECONDS) - 5)
    assert not said
    assert worker._stops(part, 8, 8 + int(STOP_SECONDS) + 5)
    assert said == [f"stopping: committing after step 8 of {8 + int(STOP_SECONDS) + 5}"]
    assert not worker._stops(part, 9, 1000)  # ranks look at the same steps
    worker.beat.stopping = False
    assert not worker._stops(part, 8, 1000)


def test_events_that_the_driver_has_heard_are_forgotten():
    monitor = Monitor()
    for n in range(3):
        monitor.post({"kind": "say", "text": str(n)})
    assert [e["text"] for e in monitor.wait(0, 0.0)] == ["0", "1", "2"]
    monitor.post({"kind": "failed", "error": "X", "text": "3"})
    assert [e["text"] for e in monitor.wait(2, 0.0)] == ["2", "3"]  # an answer that was lost is given again
    assert monitor.wait(4, 0.0) == monitor.events == []
    assert monitor.has_failed()
