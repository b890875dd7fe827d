"""How well the scores that a run selected by rank its pool, against fresh scores by the same weights, on this machine's CPU."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from raysed.core import networks
from raysed.core.step import to_images
from raysed.core.uncertainty import log_probabilities, tile_scores
from raysed.io.checkpoint import unpack
from raysed.io.ledger import Ledger, Manifest
from raysed.io.store import Store, Tile, read_tiles

BATCH = 16
"""Tiles a forward pass."""


def rankings(ledger: Ledger, manifests: list[Manifest], store: Store) -> list[dict[str, Any]]:
    """Of every cycle that selected by entropies, and whose weights at its beginning are kept (every tenth are): cycle, tiles, `spearman`
    (rank correlation with fresh entropies), `overlap` (share of as many highest entropies that both have), and the mean age of scores.

    Raises:
        DataError: weights or scores are missing or not those committed.
    """
    experiment, _ = ledger.config()
    net = networks.build(experiment.model.arch, len(store.dataset.classes), experiment.seed)
    net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    found = []
    for before, cycle in pairwise(manifests):
        kept = ledger.storage.exists(before.path("model.safetensors"))
        if not kept or "scores.parquet" not in cycle.files:
            continue
        scores = ledger.table(cycle, "scores.parquet")
        scores = scores.filter(scores["entropy"].is_valid())
        if not len(scores):
            continue
        net.load_state_dict(unpack(ledger.read(before, "model.safetensors"), "model.safetensors"))
        fresh = entropies(net, store, scores["tile_id"].to_pylist())
        used = scores["entropy"].to_numpy().astype(float)
        readable = ~np.isnan(fresh)
        budget = cycle.record["tiles"]
        found.append(
            {
                "cycle": cycle.cycle,
                "tiles": int(readable.sum()),
                "spearman": float(np.corrcoef(_ranks(used[readable]), _ranks(fresh[readable]))[0, 1]),
                "overlap": len(_top(used, budget) & _top(np.nan_to_num(fresh), budget)) / budget,
                "age": float(np.mean(scores["age"].to_numpy())) if "age" in scores.column_names else 0.0,
            }
        )
    return found


@torch.inference_mode()
def entropies(net: torch.nn.Module, store: Store, ids: list[str]) -> np.ndarray:
    """(N,) mean pixel entropy of stored tiles at their full side; nan for a tile that cannot be read."""
    found = dict.fromkeys(ids, np.nan)
    for start in range(0, len(ids), BATCH):
        read = read_tiles(store.storage, store.locations(ids[start : start + BATCH]), store.dataset.tile_size)
        tiles = [t for t in read if isinstance(t, Tile)]
        if tiles:
            images = to_images(np.stack([t.image for t in tiles]), torch.device("cpu"))
            rows = tile_scores(log_probabilities(net(images)))[:, 0].tolist()
            found |= dict(zip((t.tile_id for t in tiles), rows, strict=True))
    return np.array([found[t] for t in ids])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes + 1) / 2)[group]


def _top(values: np.ndarray, budget: int) -> set[int]:
    return set(np.argsort(-values, kind="stable")[:budget].tolist())


def as_table(found: list[dict[str, Any]]) -> str:
    """Lines of text: a cycle each."""
    lines = ["cycle  tiles  spearman  overlap   age"]
    return "\n".join(
        lines
        + [
            f"{r['cycle'] + 1:5d}  {r['tiles']:5d}  {r['spearman']:8.3f}  {r['overlap']:7.3f}  {r['age']:4.1f}"
            for r in found
        ]
    )
