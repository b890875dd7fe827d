import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data():
    """Folder of real tiles: RAYSED_REAL_DATA, or ../shared/data beside the checkout."""
    path = Path(os.environ.get("RAYSED_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "dubai" / "classes.json").exists():
        pytest.skip(f"no real tiles at {path} (set RAYSED_REAL_DATA)")
    return path


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for the whole session."""
    import ray

    from raysed.cluster.connect import connect

    connect()
    yield
    ray.shutdown()
