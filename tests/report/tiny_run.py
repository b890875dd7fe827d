"""A run of two arms over a tiny store, written with the ledger itself: selections, scores and weights are real."""

import json

import numpy as np
import pyarrow as pa

from raysed.config import Experiment
from raysed.core.metrics import scores
from raysed.core.networks import build
from raysed.core.tiles import LandClass, pixel_counts, tile_id
from raysed.io import codec, store
from raysed.io.checkpoint import pack
from raysed.io.ledger import Ledger, choose, config_hash, selection_table, table_bytes
from raysed.io.storage import Storage, digest
from raysed.io.store import Store

SIDE, CYCLES, ARCH = 32, 3, "unet:tu-test_resnet"
CLASSES = (
    LandClass("<script>alert(1)</script>", "#112233", 1),
    LandClass("cost $5 or $6", "#445566", 2),
    LandClass("water", "#7788AA", 3),
)
NAMES = [c.name for c in CLASSES]


def write_store(uri: str, first: int = 0) -> None:
    """30 tiles of 32 pixels in two regions, 20 of them to train on; `first` gives another data set."""
    rows = []
    for i in range(30):
        rng = np.random.default_rng(first + i)
        label = rng.integers(0, 4, (SIDE, SIDE), np.uint8)
        rows.append(
            {
                "tile_id": tile_id(f"{'north' if i % 3 else 'south'}_{i}", 0, 0),
                "region": "north" if i % 3 else "south",
                "source": f"s_{i}",
                "row": 0,
                "col": 0,
                "split": "train" if i < 20 else "val",
                "pixels": pixel_counts(label, 3).tolist(),
                "crs": None,
                "transform": None,
                "scale": None,
                "image": codec.encode_image(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)),
                "label": codec.encode_label(label),
            }
        )
    storage = Storage(uri)
    index = store.write_shard(storage, "shards/part-00000.parquet", rows)
    store.finish(storage, name="tiny", classes=CLASSES, ignore=(0,), tile_size=SIDE, index=index)


def record(strategy: str, cycle: int, tiles: int) -> dict:
    """What a cycle commits; validation counts follow from strategy and cycle."""
    rng = np.random.default_rng([cycle, len(strategy)])
    counts = rng.integers(1, 90, (3, 3))
    active = strategy == "entropy"
    return {
        "strategy": strategy,
        "tiles": tiles,
        "quarantined": 0,
        "train": {"loss": 1 / (cycle + 1), "lr": 1e-3},
        "val": {
            "loss": 0.5,
            "soft_iou": 0.1,
            "tiles": 10,
            **scores(counts, NAMES),
            "counts": counts.tolist(),
        },
        "scores": {"tiles": 20, "entropy_mean": 1.0} if active else None,
        "nodes": {"read": {"n": tiles + 10}, "train": {"n": 1}, "visit": {"n": tiles}, "score": {}},
        "seconds": {"score": 3.0 * active, "train": 2.0, "total": 2.5 + 3 * active},
        "workers": 1,
        "threads": 1,
        "precision": "fp32",
        "device": "cpu",
        "environment": {
            "commit": "abc123",
            "command": "python jobs/active.py",
            "cpu": "c",
            "cores": 2,
            "torch": "2",
        },
    }


def write_arm(run: Storage, experiment: Experiment, tiles: Store, cycles: int = CYCLES) -> Ledger:
    """Commit cycles of one arm; scores and weights follow from the seed."""
    ledger = Ledger(run, epoch=0)
    ledger.open(experiment, tiles.dataset.content_hash)
    weights = pack(build(ARCH, 3, experiment.seed).state_dict())
    index = tiles.split("train")
    strategy, state = experiment.select.strategy, {}
    for cycle in range(cycles):
        files, table = {}, None
        if strategy == "entropy":
            entropy = np.random.default_rng([experiment.seed, cycle]).random(len(index))
            table = pa.table({"tile_id": index["tile_id"], "entropy": entropy})
            files["scores.parquet"] = table_bytes(table)
        chosen = choose(experiment, cycle, scores=table, index=index, state=state, excluded=set())
        state = chosen.state
        files |= {
            "selected.parquet": table_bytes(selection_table(chosen)),
            "state.json": json.dumps({"strategy": state, "excluded": [], "quarantine": []}).encode(),
        }
        if chosen.bought:
            files["bought.parquet"] = table_bytes(selection_table(chosen.bought))
        files["model.safetensors"] = weights
        made = record(strategy, cycle, len(chosen.tile_ids)) | {
            "config_hash": config_hash(experiment),
            "scoring_weights": digest(weights) if table else None,
        }
        ledger.commit(cycle, files, lambda made=made: made)
    return ledger
