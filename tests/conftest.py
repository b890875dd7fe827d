import os
import uuid
from pathlib import Path

import pytest

from raysed.cluster.local import ObjectServer

ROOT = Path(__file__).resolve().parents[1]


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
def ray_session():
    """One local Ray for the whole session."""
    import ray

    from raysed.cluster.connect import connect

    connect()
    yield
    ray.shutdown()
