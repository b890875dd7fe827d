import shutil

import pyarrow as pa
import pytest

from raysed.cluster import chaos
from raysed.core.tiles import OPENEARTHMAP
from raysed.io import store
from raysed.io.storage import Storage


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


def changed(uri, folder, rows):
    """A copy of a store with other rows in its index; its URI."""
    shutil.copytree(uri, folder)
    index = pa.Table.from_pylist(rows, schema=store.INDEX)
    store.finish(
        Storage(str(folder)), name="small", classes=OPENEARTHMAP, ignore=(0,), tile_size=64, index=index
    )
    return str(folder)


@pytest.fixture(scope="session")
def unlabelled_store(small_store, tmp_path_factory):
    """The small store without a label in split train."""
    none = {"pixels": None, "label_offset": None, "label_length": None}
    rows = store.as_written(store.Store.open(small_store).index).to_pylist()
    rows = [row | (none if row["split"] == "train" else {}) for row in rows]
    return changed(small_store, tmp_path_factory.mktemp("stores") / "unlabelled", rows)


@pytest.fixture(scope="session")
def poor_store(small_store, tmp_path_factory):
    """The small store without the training tiles that hold water."""
    rows = store.as_written(store.Store.open(small_store).index).to_pylist()
    water = 1 + [c.name for c in OPENEARTHMAP].index("water")
    rows = [row for row in rows if row["split"] == "val" or not row["pixels"][water]]
    return changed(small_store, tmp_path_factory.mktemp("stores") / "poor", rows)
