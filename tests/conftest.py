import os
import uuid
from pathlib import Path

import pytest
from hypothesis import settings

from raysed.cluster.local import LocalCluster, ObjectServer

ROOT = Path(__file__).resolve().parents[1]
settings.register_profile("raysed", deadline=None)  # a busy machine is no fault
settings.load_profile("raysed")


@pytest.fixture(scope="session")
def real_data():
    """Folder of real tiles: RAYSED_REAL_DATA, or ../shared/data beside the checkout."""
    path = Path(os.environ.get("RAYSED_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "dubai" / "classes.json").exists():
        pytest.skip(f"no real tiles at {path} (set RAYSED_REAL_DATA)")
    return path


@pytest.fixture(scope="session")
def object_server(tmp_path_factory):
    """A real SeaweedFS that demands credentials, with the bucket `raysed`."""
    with ObjectServer(tmp_path_factory.mktemp("seaweed")) as server:
        server.bucket("raysed")
        yield server


@pytest.fixture
def bucket(object_server):
    """URI of a fresh prefix; this process has the credentials."""
    with object_server.credentials():
        yield f"s3://raysed/{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def ray_head(object_server, tmp_path_factory):
    """One Ray node for the whole session, with this machine's CPUs; `RAY_ADDRESS` leads this process and its jobs to it."""
    from raysed.cluster.connect import TUNABLES

    folder, cpus = tmp_path_factory.mktemp("ray"), len(os.sched_getaffinity(0))
    given = object_server.environment | {"GLIBC_TUNABLES": TUNABLES, "RAY_metrics_report_interval_ms": "1000"}
    with (
        # without a token: a process that has imported Ray before has made up its mind; test_twin has one
        LocalCluster(folder, given, head_cpus=cpus, authenticated=False) as head,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
            patch.setenv(name, head.environment[name])
        yield head


@pytest.fixture(scope="session")
def ray_session(ray_head):
    """The node; this process is connected to it."""
    import ray

    from raysed.cluster.connect import connect

    connect()
    yield ray_head
    ray.shutdown()
