"""A real cluster of three nodes with token authentication, and jobs submitted to it as a user submits them."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import FAST, ROOT, environment, error_line

from raysed.cluster import local, twin
from raysed.cluster.chaos import small_store as small_store_at
from raysed.cluster.local import LocalCluster, terminated
from raysed.errors import ResourcesError
from raysed.io.ledger import Ledger, verify
from raysed.io.storage import Storage
from raysed.io.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
STOP_SECONDS = 60
DATA, RUN = "s3://raysed/twin/tiles", "s3://raysed/twin/run"


@pytest.fixture(scope="module")
def cluster(object_server, tmp_path_factory):
    """A head without CPUs and two nodes of one CPU each; the environment of all of them names data and run, as cluster.yaml's does."""
    named = {"RAYSED_DATA": DATA, "RAYSED_RUN": RUN}
    with (
        object_server.credentials(),
        LocalCluster(
            tmp_path_factory.mktemp("cluster"), {**object_server.environment, **named}, nodes=2
        ) as made,
    ):
        small_store_at(DATA)
        yield made


def test_a_cluster_that_does_not_come_up_is_started_once_more(tmp_path, monkeypatch):
    ray = local._ray()
    given = iter(["false"])
    monkeypatch.setattr(local, "_ray", lambda: next(given, ray))
    cluster = LocalCluster(tmp_path, {})
    try:
        with pytest.warns(UserWarning, match="started once more"):
            cluster.__enter__()
        assert cluster.alive() == 1
    finally:
        cluster.__exit__()


def test_a_cluster_that_never_comes_up_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_ray", lambda: "false")
    cluster = LocalCluster(tmp_path, {})
    with (
        pytest.warns(UserWarning, match="started once more"),
        pytest.raises(ResourcesError, match="did not start"),
    ):
        cluster.__enter__()
    assert not cluster.session.exists()
    assert all(node.popen.poll() is not None for node in cluster.nodes)


def job(cluster: LocalCluster, *argv: str, name: str | None = None) -> subprocess.Popen[str]:
    return cluster.submit("python", *argv, working_dir=ROOT, name=name)


def status(cluster: LocalCluster, name: str) -> dict:
    return cluster.state(f"/api/jobs/{name}")


def test_stopped_resubmitted_and_submitted_twice(cluster):
    flags = [
        "jobs/active.py",
        "--workers",
        "2",
        "--cycles",
        "12",
        "--select",
        "entropy",
        *FAST,
        *(
            "--scorers",
            "2",
            "--cluster.reader-cpus",
            "0.25",
        ),  # one scorer a node, and room for reading beside a worker
    ]
    ledger = Ledger(Storage(RUN))
    first = job(cluster, *flags, name="first")
    with terminated(first):
        assert first.stdout
        while not ledger.storage.list("leases"):  # it starts while the first one does
            assert first.poll() is None
            time.sleep(0.5)
        second = job(cluster, *flags, name="second")
        out = second.communicate(timeout=120)[0]
        assert f"run {RUN} is held by process" in out
        assert "failed with exit code 3" in status(cluster, "second")["message"]
        if not ledger.manifests() and not any(" 1/12 " in line for line in first.stdout):
            pytest.fail("the job ended before its first cycle")
        began = time.monotonic()
        stopped = subprocess.run(
            [str(Path(sys.executable).parent / "ray"), "job", "stop", "--address", cluster.dashboard, "first"],
            env=cluster.environment, capture_output=True, text=True, timeout=STOP_SECONDS, check=True,
        )  # fmt: skip
        assert time.monotonic() - began < STOP_SECONDS, stopped.stdout
    committed = len(ledger.manifests())
    assert 1 <= committed < 12
    leases = ledger.storage.list("leases")
    assert b'"beat": -1' in ledger.storage.read(max(leases))  # released, not left to be taken over
    again = job(cluster, *flags, name="again")
    out = again.communicate(timeout=300)[0]
    assert again.returncode == 0, out[-3000:]
    assert f"continues after cycle {committed} of 12" in out
    assert status(cluster, "again")["status"] == "SUCCEEDED"
    manifests = ledger.manifests()
    assert len(manifests) == 12
    assert verify(ledger, Store.open(DATA).split("train")) == []
    nodes = {n["node_id"] for n in cluster.state("/api/v0/nodes")["data"]["result"]["result"]}
    for phase in ("read", "train", "score"):
        worked = {node for m in manifests for node in m.record["nodes"][phase]}
        assert len(worked) == 2
        assert worked <= nodes
    seen = cluster.state("/api/train/v2/runs/v1")["train_runs"]
    assert [(r["status"], len(r["attempts"][0]["workers"])) for r in seen] == [("FINISHED", 2)] * 2


def test_a_local_path_on_a_cluster_is_refused_with_what_to_set(cluster, bucket, small_store):
    refused = job(
        cluster, "jobs/train.py", "--data", small_store, "--run", f"{bucket}/run", *FAST, name="local"
    )
    out = refused.communicate(timeout=120)[0]
    assert f"--data {small_store} is a local path, but the cluster has 3 nodes" in out
    assert "RAYSED_DATA" in out
    assert "failed with exit code 2" in status(cluster, "local")["message"]


@pytest.mark.parametrize("token", [None, pytest.param("0" * 64, marks=pytest.mark.slow)])
def test_without_the_right_token_nothing_is_submitted_or_reached(cluster, bucket, tmp_path, token):
    small_store_at(f"{bucket}/tiles")
    keyless = {**cluster.environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "HOME": str(tmp_path)}
    if token:
        (tmp_path / "token").write_text(token)
    submit = [
        str(Path(sys.executable).parent / "ray"),
        "job",
        "submit",
        "--address",
        cluster.dashboard,
        "--",
        "true",
    ]
    done = subprocess.run(submit, env=keyless, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()
    flags = ["jobs/train.py", "--data", f"{bucket}/tiles", "--run", f"{bucket}/run", "--cycles", "1", *FAST]
    done = subprocess.run(
        [sys.executable, *flags], env={**environment(), **keyless}, capture_output=True, text=True, timeout=90, cwd=ROOT, check=False
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "token" in error_line(done)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("play", "setting"),
    [
        (twin.two_nodes, {"nodes": 2}),
        (twin.elastic, {"nodes": 1}),
        (twin.autoscaled, {"cluster_file": twin.ROOT / "cluster.yaml"}),
    ],
    ids=["two nodes", "elastic", "autoscaled"],
)
def test_what_make_twin_plays(play, setting):
    """As `make twin`, `ELASTIC=1` and `AUTOSCALE=1`: the plays raise if a node does nothing, workers do not follow the nodes, or
    visits are lost.
    """
    said: list[str] = []
    with twin.Twin(said.append, **setting) as up:
        facts = play(up)
    if play is twin.elastic:
        assert facts["workers"] == [1, 2, 1]
        assert all(sum(c["visits"].values()) == c["tiles"] for c in facts["cycles"])
    elif play is twin.two_nodes:
        assert all(len(nodes) == 2 for nodes in facts["work_by_node"].values())
    else:
        assert facts["most_nodes"] >= 3
        assert facts["seconds_from_last_worker_to_head_alone"] <= twin.GONE_SECONDS
