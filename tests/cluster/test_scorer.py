"""What a scorer and the keeper of its scores give, most of it without a cluster."""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from processes import environment

from raysed.cluster import scorekeeping, scoring
from raysed.cluster.scorekeeping import SAMPLE, Scorekeeper
from raysed.cluster.scoring import CHUNK, Network, Scorer, ScorerPool, Scores, Work, score_pool
from raysed.config import SelectConfig
from raysed.core.networks import build
from raysed.core.pool import names_of, sorted_names
from raysed.core.scores import ScoreTable
from raysed.core.step import to_device
from raysed.core.uncertainty import log_probabilities, tile_scores
from raysed.io.store import INDEX, LOCATION, Locations, Store, packed, read_tiles, unpacked

ARCH = "unet:tu-test_resnet"


class LocalScorer(Scorer):
    """In this process."""

    def node(self) -> str:
        return "here"


@pytest.fixture(scope="module")
def store(small_store) -> Store:
    return Store.open(small_store)


def test_loss_and_features_are_those_of_a_plain_forward_pass(store):
    ids = store.index["tile_id"].to_pylist()[:20]
    net = build(ARCH, 8, 4).eval()
    weights = {n: t.numpy() for n, t in net.state_dict().items()}
    scorer = LocalScorer(Network(ARCH, 8, "cpu"), store.storage.uri, 64, 1 << 30)
    asked = packed(store.located(ids).rows(slice(None)))
    for _ in range(2):  # the second time the images are kept already
        found = scorer.score(weights, "v", asked, 64, threads=1, precision="fp32", features=True, loss=True)
    bare = scorer.score(weights, "v", asked, 64, threads=1, precision="fp32")
    assert bare["features"].shape == (20, 0)
    assert np.array_equal(bare["scores"], found["scores"])
    tiles = read_tiles(store.storage, store.locations(ids), 64)
    x, y = to_device(
        np.stack([t.image for t in tiles]), np.stack([t.label for t in tiles]), torch.device("cpu")
    )
    with torch.inference_mode():
        logits, features = net.with_features(x)
        log_p = log_probabilities(logits)
        loss = torch.nn.functional.cross_entropy(logits, y.long(), ignore_index=255, reduction="none")
    known = (y != 255).sum((1, 2)).clamp_min(1)
    assert found["loss"] == pytest.approx((loss.sum((1, 2)) / known).numpy(), rel=1e-4)
    assert found["scores"] == pytest.approx(tile_scores(log_p).numpy(), rel=1e-3, abs=1e-6)
    assert found["features"].astype(float) == pytest.approx(features.numpy(), rel=1e-2, abs=1e-3)


def test_scores_are_of_single_precision_whatever_the_forward_pass_computes_in(store):
    ids = store.index["tile_id"].to_pylist()[:20]
    weights = {n: t.numpy() for n, t in build(ARCH, 8, 4).state_dict().items()}
    scorer = LocalScorer(Network(ARCH, 8, "cpu"), store.storage.uri, 64, 1 << 30)
    asked = packed(store.located(ids).rows(slice(None)))
    full, half = (
        scorer.score(weights, "v", asked, 64, threads=1, precision=p)["scores"] for p in ("fp32", "bf16")
    )
    assert not np.array_equal(full, half)
    assert half[:, 2:].sum(1) == pytest.approx(half[:, 0], rel=1e-5)  # the masses sum to the entropy
    assert len(np.unique(half[:, 2:])) > 0.9 * half[:, 2:].size


def test_the_irreducible_loss_is_found_once_a_run_and_goes_on_from_the_ledger(store, monkeypatch):
    ids = names_of(sorted(store.split("train")["tile_id"].to_pylist()))
    passes = []

    def score_pool(
        scorers, threads, weights, version, locations, *, side, features=False, loss=False, precision, renew
    ):
        passes.append((version, side, loss))
        own = locations.ids[1:]  # one cannot be read
        n = len(own)
        return Scores(
            own, np.zeros((n, 10), np.float32), np.zeros((n, 0)), np.arange(n, dtype=np.float32), [], {}
        )

    class NoScorers:
        renew = None

        def ready(self, patience, grace, taken):
            return [], []

    def references(asked: pa.StringArray) -> list:
        return [(asked, lambda: ({}, "reference"))]

    def keeper() -> Scorekeeper:
        select = SelectConfig(strategy="reducible-loss", reference="r")
        return Scorekeeper(
            NoScorers(), 1.0, store, select, multiple=32, taken={}, precision="fp32", reference=references
        )

    monkeypatch.setattr(scorekeeping, "score_pool", score_pool)
    first, nothing = keeper(), lambda: pytest.fail("no weights are asked for")
    one = first.scores(ids, nothing, nothing)
    two = first.scores(ids, nothing, nothing)
    assert passes == [("reference", 64, True)]
    assert [one.tiles, two.tiles] == [len(ids) - 1, 0]
    assert one.table["irreducible"].to_pylist()[:3] == [None, 0.0, 1.0]
    again = keeper()
    again.restore(two.table, None)
    three = again.scores(ids, nothing, nothing)
    assert len(passes) == 1
    assert three.table["irreducible"] == one.table["irreducible"]


def test_the_first_pass_of_overlapped_scores_serves_the_second_cycle_too(store, monkeypatch):
    select, ids = SelectConfig(strategy="entropy", scores="overlapped"), sorted_names(store.index["tile_id"])
    passes = []

    def passed(self, own, weights, version, **how):
        passes.append(version)
        rows = np.ones((len(own), 2 + self.classes), np.float32)
        return Scores(own, rows, np.zeros((len(own), 0)), np.zeros(len(own), np.float32), [], {})

    def first() -> tuple[dict, str]:
        return {}, "first"

    monkeypatch.setattr(Scorekeeper, "_passed", passed)
    keeper = Scorekeeper(None, 1.0, store, select, multiple=32, taken={}, precision="fp32")
    told = keeper.scores(ids, first, None)
    keeper.begin_ahead(ids, first)
    again = keeper.scores(ids, lambda: ({}, "second"), first)
    assert [told.weights, again.weights] == ["first", "first"]
    assert passes == ["first"]


@pytest.mark.parametrize("mode", ["fresh", "overlapped", "byproduct"])
def test_a_selection_that_looks_at_no_scores_has_none_made(store, monkeypatch, mode):
    """By-product scores are taken down all the same, a few tiles scored to bring them onto the scorers' scale."""
    select, ids = SelectConfig(strategy="entropy", scores=mode), sorted_names(store.index["tile_id"])
    passes = []

    def passed(self, own, weights, version, **how):
        passes.append((version, len(own)))
        rows = np.ones((len(own), 2 + self.classes), np.float32)
        return Scores(own, rows, np.zeros((len(own), 0)), np.zeros(len(own), np.float32), [], {})

    monkeypatch.setattr(Scorekeeper, "_passed", passed)
    keeper = Scorekeeper(None, 1.0, store, select, multiple=32, taken={}, precision="fp32")

    def scores(cycle: int, *, is_read: bool):
        before = (lambda: ({}, f"of {cycle - 1}")) if cycle else None
        return keeper.scores(ids, lambda: ({}, f"of {cycle}"), before, is_read=is_read)

    first = scores(0, is_read=False)
    assert passes == []
    visited = ids.to_pylist()[:40]
    keeper.visits = visited, np.ones((len(visited), 3 + 2 * keeper.classes), np.float32)
    second = scores(1, is_read=False)
    if mode == "byproduct":
        assert first.table["entropy"].null_count == len(ids)
        assert second.table["entropy"].null_count == len(ids) - 40
        assert passes == [("of 1", SAMPLE)]
        keeper.visits = keeper.visits[0][:0], keeper.visits[1][:0]
    else:
        assert (first, second, passes) == (None, None, [])
    passes.clear()
    third = scores(2, is_read=True)
    assert third.table["entropy"].null_count == 0
    assert passes == [("of 1" if mode == "overlapped" else "of 2", len(ids))]


def test_fresh_scores_of_a_run_that_goes_on_are_those_of_one_that_was_not_killed(store, monkeypatch):
    """A tile that a pass could not read has no score, whatever the pass before told."""
    select, ids = SelectConfig(strategy="entropy"), sorted_names(store.index["tile_id"])
    left_out = [0]

    def passed(self, own, weights, version, **how):
        own = own[left_out[0] :]
        rows = np.ones((len(own), 2 + self.classes), np.float32)
        return Scores(own, rows, np.zeros((len(own), 0)), np.zeros(len(own), np.float32), [], {})

    def keeper() -> Scorekeeper:
        return Scorekeeper(None, 1.0, store, select, multiple=32, taken={}, precision="fp32")

    monkeypatch.setattr(Scorekeeper, "_passed", passed)
    calm, torn, weights = keeper(), keeper(), lambda: ({}, "weights")
    torn.restore(calm.scores(ids, weights, weights).table, None)
    left_out[0] = 1
    one, other = (k.scores(ids, weights, weights).table for k in (calm, torn))
    assert one.equals(other)
    assert one["entropy"].null_count == 1


def test_what_a_diverged_attempt_left_behind_is_forgotten(store):
    select = SelectConfig(strategy="entropy", scores="overlapped")
    keeper = Scorekeeper(None, 1.0, store, select, multiple=32, taken={}, precision="fp32")
    running = Future()
    keeper._ahead = running, "weights of the attempt"
    keeper.visits = ["a"], np.zeros((1, 3 + 2 * keeper.classes), np.float32)
    keeper.table = ScoreTable.unknown(["a"], keeper.classes)
    running.set_exception(RuntimeError("a scorer died"))
    keeper.forget()
    assert keeper._ahead is None
    assert (keeper.visits[0], len(keeper.visits[1]), len(keeper.table.ids)) == ([], 0, 0)


def test_scorers_rest_only_when_they_will_be_idle_for_long(store):
    released = []

    class Pool:
        def release(self, occupied):
            released.append(occupied)
            return 2

    def rest(mode: str, seconds: float) -> int:
        select = SelectConfig(strategy="entropy", scores=mode)
        return Scorekeeper(Pool(), 1.0, store, select, multiple=32, taken={}, precision="fp32").rest(
            seconds, {"trainer"}
        )

    assert [rest("fresh", 59), rest("fresh", 61), rest("byproduct", 61), rest("overlapped", 1e6)] == [
        0,
        2,
        2,
        0,
    ]
    assert released == [{"trainer"}] * 2


NOWHERE = dict.fromkeys(LOCATION)


def located(rows: list[dict]) -> Locations:
    table = pa.Table.from_pylist(rows, pa.schema([INDEX.field(name) for name in LOCATION]))
    return Locations(table, pa.array(range(len(rows))), names_of(table["tile_id"]))


def test_a_chunk_that_two_scorers_did_not_outlive_is_asked_tile_by_tile():
    locations = [{**NOWHERE, "tile_id": f"t{i:03d}", "sha256": f"hash {i}"} for i in range(2 * CHUNK + 1)]
    work = Work(located(locations), 2)
    assert [work.next(0), work.next(1), work.next(0)] == [0, 1, 2]
    work.died(0, [0, 2])
    assert work.next(1) == 0  # as a whole, its scores the same
    work.died(1, [0])
    asked = [work.next(0) for _ in range(CHUNK + 1)]
    assert asked[0] == 2  # what the first one held besides
    assert [work.tiles(k).to_pylist() for k in asked[1:]] == [[at] for at in locations[:CHUNK]]
    assert work.next(0) is None
    for _ in range(2):
        work.died(0, [asked[6]])
        assert work.deadly or work.next(1) == asked[6]
    assert [(b.tile_id, b.sha256) for b in work.deadly] == [("t005", "hash 5")]
    assert work.next(0) is None


def test_a_chunk_has_its_tiles_whatever_is_asked_before():
    locations = [
        {**NOWHERE, "tile_id": f"t{i:04d}", "sha256": f"hash {i}"}
        for i in range(2 * scoring.BLOCK + CHUNK + 5)
    ]
    work = Work(located(locations), 1)
    work.died(0, [work.whole - 2])
    work.died(0, [work.whole - 2])  # its tiles are chunks of their own now, across no border of a block
    for k in np.random.default_rng(0).permutation(len(work.chunks)).tolist():
        assert unpacked(packed(work.tiles(k))) == [locations[i] for i in work.chunks[k]]
    assert len(work.chunks) == work.whole + CHUNK


def test_answers_stand_in_the_order_of_the_tiles_whatever_came_first():
    work = Work(located([{"tile_id": f"t{i:03d}", "sha256": "h"} for i in range(2 * CHUNK)]), 2)
    answers = scoring.Answers(work)

    def answer(numbers: list[int], bad: list[int]) -> dict:
        rows = np.array([[i] * 3 for i in numbers], np.float32).reshape(len(numbers), 3)
        return {
            "ids": [f"t{i:03d}" for i in numbers],
            "scores": rows if numbers else np.zeros((0, 2), np.float32),
            "features": rows.astype(np.float16),
            "loss": -np.array(numbers, np.float32),
            "bad": [{"tile_id": f"t{i:03d}", "reason": "rotten", "sha256": ""} for i in bad],
            "node": "here",
        }

    late = [i for i in range(CHUNK, 2 * CHUNK) if i != CHUNK + 3]
    answers.take(1, answer(late, [CHUNK + 3]))
    answers.take(0, answer(list(range(2, CHUNK)), [0, 1]))
    found, numbers = answers.scores(), [*range(2, CHUNK), *late]
    assert found.ids.to_pylist() == [f"t{i:03d}" for i in numbers]
    assert found.rows[:, 2].tolist() == found.features[:, 0].tolist() == (-found.loss).tolist() == numbers
    assert [b.tile_id for b in found.bad] == ["t000", "t001", f"t{CHUNK + 3:03d}"]
    assert found.nodes == {"here": 2 * CHUNK - 3}
    none = scoring.Answers(work)
    none.take(0, answer([], list(range(CHUNK))))
    assert len(none.scores().ids) == 0


@pytest.mark.ray
def test_a_tile_that_kills_scorers_is_left_out_and_all_others_have_one_score(ray_session):
    class Mortal:
        """Scores by number; dies over tile 40."""

        def node(self) -> str:
            return "here"

        def score(self, weights, version, tiles, side, *, threads, precision):
            ids = [at["tile_id"] for at in unpacked(tiles)]
            if "t040" in ids:
                os._exit(9)
            rows = np.array([[int(t[1:])] * 3 for t in ids], np.float32)
            none = np.zeros(len(ids), np.float32)
            return {"ids": ids, "scores": rows, "features": none[:, None], "loss": none, "bad": [], "node": "here"}  # fmt: skip

    locations = [{"tile_id": f"t{i:03d}", "sha256": "h"} for i in range(100)]
    pool = ScorerPool(2, (), {"num_cpus": 0.1}, Mortal)
    found = score_pool(
        *pool.ready(60, 60), {}, "v", located(locations), side=64, precision="fp32", renew=pool.renew
    )
    pool.kill()
    assert found.ids.to_pylist() == [at["tile_id"] for at in locations if at["tile_id"] != "t040"]
    assert found.rows[:, 0].tolist() == [i for i in range(100) if i != 40]
    assert [(b.tile_id, b.reason) for b in found.bad] == [("t040", "2 scorers died over it alone")]


@pytest.mark.ray
def test_what_a_silent_scorer_holds_is_asked_of_idle_ones(ray_session, monkeypatch):
    class Hanging:
        """Scores by number; the one that is asked for tile 0 first hangs."""

        def __init__(self, flag: str) -> None:
            self.flag = Path(flag)

        def node(self) -> str:
            return "here"

        def score(self, weights, version, tiles, side, *, threads, precision):
            ids = [at["tile_id"] for at in unpacked(tiles)]
            if "t000" in ids and not self.flag.exists():
                self.flag.touch()
                time.sleep(600)
            rows = np.array([[int(t[1:])] * 3 for t in ids], np.float32)
            none = np.zeros(len(ids), np.float32)
            return {"ids": ids, "scores": rows, "features": none[:, None], "loss": none, "bad": [], "node": "here"}  # fmt: skip

    monkeypatch.setattr(scoring, "HUNG_SECONDS", 3.0)
    locations = [{"tile_id": f"t{i:03d}", "sha256": "h"} for i in range(150)]
    with tempfile.TemporaryDirectory() as folder:
        pool = ScorerPool(2, (f"{folder}/flag",), {"num_cpus": 0.1}, Hanging)
        began = time.monotonic()
        found = score_pool(
            *pool.ready(60, 60), {}, "v", located(locations), side=64, precision="fp32", renew=pool.renew
        )
        pool.kill()
    assert time.monotonic() - began < 120
    assert found.rows[:, 0].tolist() == list(range(150))


PACKING = """
import ray
from ray.util.placement_group import placement_group
from raysed.cluster.scoring import ScorerPool
from raysed.config import ClusterConfig

class Stub:
    def node(self):
        return ray.get_runtime_context().get_node_id()
    def gpus(self):
        return ray.get_gpu_ids()

ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False)
cluster = ClusterConfig(workers=4)
pool = ScorerPool(4, (), {"num_cpus": 0, "num_gpus": cluster.scorer_gpus}, Stub)
pool.start()
taken = sorted(ray.get([s.gpus.remote() for s in pool.scorers]))
group = placement_group([cluster.worker("cuda")] * cluster.workers)
print(taken, group.wait(20))
pool.renew(pool.scorers[0])
print(sorted(ray.get([s.gpus.remote() for s in pool.scorers])))
"""


@pytest.mark.ray
def test_scorers_take_a_gpu_each_and_leave_every_worker_its_own():
    """Ray believes in the four GPUs that it is told of; nothing here uses one."""
    done = subprocess.run(
        [sys.executable, "-c", PACKING], env=environment(RAY_ADDRESS=""), capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    taken, after = done.stdout.splitlines()[-2:] or ("", done.stderr[-2000:])
    assert taken == "[[0], [1], [2], [3]] True"
    assert after == "[[0], [1], [2], [3]]"
