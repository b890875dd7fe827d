"""A few tiles of a run: image, label, prediction and entropy map, by the last committed weights."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from raysed.core.tiles import VOID, palette, target_of
from raysed.io.checkpoint import unpack
from raysed.io.ledger import Ledger, Manifest
from raysed.io.store import Store, Tile, read_tiles

CANDIDATES = 48
"""Validation tiles among which worst, middle and best are shown."""


@dataclass(frozen=True)
class Judged:
    """A tile and what the network makes of it."""

    tile: Tile
    right: float
    """Share of the known pixels whose class is right."""
    guess: np.ndarray
    """(H, W) class indices."""
    entropy: np.ndarray
    """(H, W) nats."""


@dataclass(frozen=True)
class Picture:
    """One tile of the gallery; pictures are data URIs."""

    tile_id: str
    caption: str
    image: str
    label: str
    prediction: str
    entropy: str


def gallery(ledger: Ledger, last: Manifest, store: Store) -> list[Picture]:
    """Validation tiles spread from the worst to the best pixel accuracy, and the tiles selected first in the last cycle.

    Args:
        ledger: of the run.
        last: its last cycle, whose weights are kept.
        store: the tile store.
    """
    experiment, _ = ledger.config()
    net = _network(ledger, last, experiment.model.arch, len(store.dataset.classes), experiment.seed)
    val = store.split("val")
    ids = [
        t
        for t, at in zip(val["tile_id"].to_pylist(), val["label_offset"].to_pylist(), strict=True)
        if at is not None
    ]
    spread = [ids[i] for i in np.linspace(0, len(ids) - 1, min(CANDIDATES, len(ids))).astype(int)]
    judged = sorted(_predict(net, store, spread), key=lambda j: (j.right, j.tile.tile_id))
    wanted = [judged[i] for i in np.linspace(0, len(judged) - 1, min(5, len(judged))).astype(int)]
    pictures = [_picture(store, j, f"validation, {j.right:.0%} of its pixels right") for j in wanted]
    chosen = ledger.table(last, "selected.parquet").sort_by("rank")[:3]
    reasons = dict(zip(chosen["tile_id"].to_pylist(), chosen["reason"].to_pylist(), strict=True))
    return pictures + [
        _picture(store, j, f"selected in cycle {last.cycle + 1}: {reasons[j.tile.tile_id]}")
        for j in _predict(net, store, list(reasons))
    ]


def _network(ledger: Ledger, last: Manifest, arch: str, classes: int, seed: int) -> Any:
    from raysed.core.networks import build

    net = build(arch, classes, seed)
    net.load_state_dict(unpack(ledger.read(last, "model.safetensors"), "model.safetensors"))
    return net.eval()


def _predict(net: Any, store: Store, ids: Sequence[str]) -> list[Judged]:
    import torch

    from raysed.core.step import to_device

    found = []
    for tile in read_tiles(store.storage, store.locations(ids), store.dataset.tile_size):
        if not isinstance(tile, Tile) or tile.label is None:
            continue
        x, y = to_device(tile.image[None], tile.label[None], torch.device("cpu"))
        with torch.inference_mode():
            log_p = net(x).float().log_softmax(1)
        guess = log_p.argmax(1)[0]
        known = y[0] != VOID
        right = float((guess == y[0])[known].float().mean()) if known.any() else 0.0
        entropy = -(log_p.exp() * log_p).sum(1)[0]
        found.append(Judged(tile, right, guess.numpy(), entropy.numpy()))
    return found


def _picture(store: Store, judged: Judged, caption: str) -> Picture:
    tile, guess, entropy = judged.tile, judged.guess, judged.entropy
    assert tile.label is not None
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(store.dataset.classes)] = palette(store.dataset.classes)
    heat = np.clip(entropy / np.log(len(store.dataset.classes)) * 255, 0, 255).astype(np.uint8)
    return Picture(
        tile.tile_id,
        caption,
        _data_uri(tile.image),
        _data_uri(colors[target_of(tile.label)]),
        _data_uri(colors[guess]),
        _data_uri(np.stack([heat, heat, np.full_like(heat, 40)], -1)),
    )


def _data_uri(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).resize((160, 160)).save(out, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
