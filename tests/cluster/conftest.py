import shutil

import pyarrow as pa
import pytest

from raysed.core.synthetic import scene
from raysed.core.tiles import OPENEARTHMAP, pixel_counts, tile_id
from raysed.io import codec, store
from raysed.io.storage import Storage

SIDE = 64


def write_small_store(uri: str) -> None:
    """160 tiles of 64 pixels, cut from 40 synthetic scenes; a fifth is validation."""
    storage, pieces, rows = Storage(uri), [], []
    for number in range(40):
        made = scene(0, number, side=2 * SIDE)
        name = f"{made.region}_{number}"
        for row in range(2):
            for col in range(2):
                window = slice(row * SIDE, (row + 1) * SIDE), slice(col * SIDE, (col + 1) * SIDE)
                label = made.label[window]
                rows.append(
                    {
                        "tile_id": tile_id(name, row, col),
                        "region": made.region,
                        "source": name,
                        "row": row,
                        "col": col,
                        "split": "val" if number % 5 == 4 else "train",
                        "pixels": pixel_counts(label, 8).tolist(),
                        "crs": None,
                        "transform": None,
                        "scale": [1.0, 1.0],
                        "image": codec.encode_image(made.image[window]),
                        "label": codec.encode_label(label),
                    }
                )
    for k in range(0, len(rows), 64):
        pieces.append(store.write_shard(storage, f"shards/part-{k // 64:05d}.parquet", rows[k : k + 64]))
    index = pa.concat_tables(pieces)
    store.finish(storage, name="small", classes=OPENEARTHMAP, ignore=(0,), tile_size=SIDE, index=index)


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("store"))
    write_small_store(uri)
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
