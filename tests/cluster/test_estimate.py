"""What a dry run says without a cluster: device, threads and bytes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from raysed.cluster import cycles, estimate, room
from raysed.cluster.checks import Offer
from raysed.config import ClusterConfig, DataConfig, Experiment, OptimConfig, SelectConfig
from raysed.io.store import Store


@pytest.fixture
def scaled(monkeypatch):
    """A cluster with an autoscaler and no GPU yet; called with what may be started (None: its file is not here) and whether
    there is room for a GPU worker; the list is what room is asked for.
    """
    asked = []

    def make(found, *, gpus):
        monkeypatch.setattr(room, "autoscaling", lambda: True)
        monkeypatch.setattr(room, "ray", SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0}))
        monkeypatch.setattr(estimate, "offers", lambda: (found or [], len(found) if found else None))

        def placed(bundles, patience, say, remedy):
            asked.extend(bundles)
            return gpus

        monkeypatch.setattr(estimate, "placed", placed)
        return asked

    return make


@pytest.mark.parametrize(
    ("types", "device"), [([{"CPU": 8.0}], "cpu"), ([{"CPU": 8.0}, {"GPU": 1.0}], "cuda")]
)
def test_the_device_follows_from_the_launchers_file_and_nothing_is_started(types, device, scaled):
    asked = scaled([Offer(f"type{i}", r, 2) for i, r in enumerate(types)], gpus=True)
    assert estimate._device(ClusterConfig(workers=2), print) == device
    assert asked == []


@pytest.mark.parametrize(("gpus", "device"), [(False, "cpu"), (True, "cuda")])
def test_another_autoscaler_is_asked_for_one_worker(gpus, device, scaled):
    asked = scaled(None, gpus=gpus)
    cluster = ClusterConfig(workers=2)
    assert estimate._device(cluster, print) == device
    assert asked == [cluster.worker("cuda")]


def test_a_device_that_is_named_is_not_asked_for(scaled):
    asked = scaled(None, gpus=False)
    assert estimate._device(ClusterConfig(device="cuda"), print) == "cuda"
    assert asked == []


@pytest.mark.parametrize(
    ("workers", "device", "nodes", "wanted"),
    [
        (1, "cpu", [{"CPU": 4.0}], 1),
        (3, "cpu", [{"CPU": 4.0}], 3),
        (4, "cpu", [{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 0.0}], 2),  # spread; none fits on the head
        (5, "cpu", [{"CPU": 4.0}, {"CPU": 4.0}], 3),
        (4, "cpu", [{"CPU": 1.0}], 1),  # the others are still to find their nodes
        (8, "cuda", [{"CPU": 48.0, "GPU": 4.0}, {"CPU": 48.0, "GPU": 4.0}], 4),  # packed
        (2, "cuda", [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], 1),
    ],
)
def test_one_worker_is_measured_with_the_threads_that_it_has_beside_others(workers, device, nodes, wanted):
    cluster = ClusterConfig(workers=workers)
    assert estimate.local_workers(cluster, device, nodes[0], nodes) == wanted


@pytest.mark.parametrize(("own", "wanted"), [(None, 2), (5, 5)])
def test_measuring_takes_a_workers_share_of_the_node(own, wanted, monkeypatch):
    class Measured(Exception):
        pass

    def stop(*_):
        raise Measured

    taken: list[int] = []
    many = Experiment(optim=OptimConfig(batch=16, micro_batch=4))
    here = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 8.0}}
    monkeypatch.setattr(estimate, "ray", SimpleNamespace(nodes=lambda: [here]))
    monkeypatch.setattr(cycles, "node_id", lambda: "a")
    monkeypatch.setattr(cycles, "node_cpus", lambda: 8)
    monkeypatch.setattr(estimate.torch, "set_num_threads", taken.append)
    monkeypatch.setattr(estimate.networks, "build", stop)
    with pytest.raises(Measured):
        estimate.measure(replace(many, cluster=ClusterConfig(workers=4, threads=own)), 8, 64, "cpu")
    assert taken == [wanted]


@pytest.mark.parametrize("scores", ["fresh", "byproduct"])
def test_bytes_are_those_of_distinct_tiles_whole(scores, small_store):
    store, said = Store.open(small_store), []
    exp = Experiment(
        cycles=10, data=DataConfig(uri=small_store), select=SelectConfig(strategy="entropy", tiles=20)
    )
    exp = replace(exp, select=replace(exp.select, scores=scores))
    work = estimate._work(exp, store, 0, 16)
    estimate._say_work("entropy", exp, store, work, said.append)
    columns = [store.index[f"{kind}_length"].to_pylist() for kind in ("image", "label")]
    tile = sum(sum(c) for c in columns) / store.index.num_rows
    assert (
        f"trains on {20 * tile / 1e6:.1f} MB a cycle, scores and validates {(128 + 32) * tile / 1e6:.1f} MB"
        in said[0]
    )
    assert work.score == pytest.approx(128 if scores == "fresh" else 0.25 * (128 + 9 * 12.8) / 10)
