import shutil

import pytest

from raysed.cluster import chaos
from raysed.io import store


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("store"))
    chaos.small_store(uri)
    return uri


@pytest.fixture
def damaged_store(small_store, tmp_path):
    """A copy of the small store with three bytes of one tile overwritten; (uri, id of that tile)."""
    uri = str(tmp_path / "damaged")
    shutil.copytree(small_store, uri)
    at = store.Store.open(uri).index.slice(3, 1).to_pylist()[0]
    with open(f"{uri}/{at['shard']}", "r+b") as file:
        file.seek(at["image_offset"] + 30)
        file.write(b"\x00\xff\x00")
    return uri, at["tile_id"]
