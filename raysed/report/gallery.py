"""A few tiles of a run: image, label, what each arm predicts and where it is unsure, by the last committed weights, on the CPU."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from raysed.core.splits import validation_rows
from raysed.core.tiles import VOID, palette, target_of
from raysed.io.checkpoint import unpack
from raysed.io.ledger import Ledger, Manifest
from raysed.io.store import Store, Tile, read_tiles

CANDIDATES = 16
"""Validation tiles among which worst, middle and best are shown."""
SHOWN = 4
"""Validation tiles shown, and selected tiles shown."""
BATCH = 8
"""Tiles a forward pass."""
SIDE = 192
"""Longest side of a picture, pixels."""


@dataclass(frozen=True)
class Judged:
    """A tile and what a network makes of it."""

    tile: Tile
    right: float
    """Share of the known pixels whose class is right."""
    guess: np.ndarray
    """(H, W) class indices."""
    entropy: np.ndarray
    """(H, W) nats."""


@dataclass(frozen=True)
class Picture:
    """One tile of the gallery."""

    tile_id: str
    caption: str
    images: dict[str, str]
    """What is shown -> data URI."""


def gallery(arms: dict[str, tuple[Ledger, Manifest]], store: Store) -> list[Picture]:
    """Validation tiles from the worst to the best pixel accuracy of the last arm, then tiles that its last cycle selected: the
    most and the least uncertain of them, or the first where it has no scores.

    Args:
        arms: name -> ledger and last committed cycle, whose weights are kept.
        store: the tile store.

    Raises:
        DataError: weights or selection are missing or not those committed.
    """
    nets = {name: _network(ledger, last, len(store.dataset.classes)) for name, (ledger, last) in arms.items()}
    own, (ledger, last) = list(arms.items())[-1]
    data = ledger.config()[0].data
    ids = sorted(validation_rows(store.index, data.validation, data.held_out)["tile_id"].to_pylist())
    judged = sorted(
        _judge(nets[own], store, _spread(ids, CANDIDATES)), key=lambda j: (j.right, j.tile.tile_id)
    )
    shown = [(j, f"validation, {own} has {j.right:.0%} right") for j in _spread(judged, SHOWN)]
    reasons = _selected(ledger, last)
    shown += [(j, reasons[j.tile.tile_id]) for j in _judge(nets[own], store, list(reasons))]
    ids = [j.tile.tile_id for j, _ in shown]
    others = {name: _judge(net, store, ids) for name, net in nets.items() if name != own}
    return [
        _picture(store, {**{name: found[k] for name, found in others.items()}, own: j}, own, caption)
        for k, (j, caption) in enumerate(shown)
    ]


def _selected(ledger: Ledger, last: Manifest) -> dict[str, str]:
    """Tile id -> caption."""
    chosen = ledger.table(last, "selected.parquet").sort_by("rank")
    ids, reasons = chosen["tile_id"].to_pylist(), chosen["reason"].to_pylist()
    where = f"selected in cycle {last.cycle + 1}"
    entropy: dict[str, float] = {}
    if "scores.parquet" in last.files:
        scores = ledger.table(last, "scores.parquet")
        scores = scores.filter(scores["entropy"].is_valid())  # strategies that read losses have none
        entropy = dict(zip(scores["tile_id"].to_pylist(), scores["entropy"].to_pylist(), strict=True))
    order = sorted((t for t in ids if t in entropy), key=lambda t: (-entropy[t], t))
    if len(order) <= SHOWN:
        return {t: f"{where}: {r}" for t, r in zip(ids[:SHOWN], reasons, strict=False)}
    most, least = order[: SHOWN // 2], order[-(SHOWN // 2) :]
    return {t: f"{where}, among its most uncertain: entropy {entropy[t]:.3f}" for t in most} | {
        t: f"{where}, among its least uncertain: entropy {entropy[t]:.3f}" for t in least
    }


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many items at even distances, first and last included."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def _network(ledger: Ledger, last: Manifest, classes: int) -> Any:
    from raysed.core.networks import build

    experiment, _ = ledger.config()
    net = build(experiment.model.arch, classes, experiment.seed)
    net.load_state_dict(unpack(ledger.read(last, "model.safetensors"), "model.safetensors"))
    return net.eval()


def _judge(net: Any, store: Store, ids: Sequence[str]) -> list[Judged]:
    import torch

    from raysed.core.step import to_device

    side, found = store.dataset.tile_size, []
    read = read_tiles(store.storage, store.locations(ids), side)
    tiles = [t for t in read if isinstance(t, Tile) and t.label is not None]
    for start in range(0, len(tiles), BATCH):
        batch = tiles[start : start + BATCH]
        labels = [t.label for t in batch if t.label is not None]
        x, target = to_device(np.stack([t.image for t in batch]), np.stack(labels), torch.device("cpu"))
        with torch.inference_mode():
            log_p = net(x).float().log_softmax(1)
        guess, entropy = log_p.argmax(1), -(log_p.exp() * log_p).sum(1)
        for tile, g, y, h in zip(batch, guess, target, entropy, strict=True):
            known = y != VOID
            right = float((g == y)[known].float().mean()) if known.any() else 0.0
            found.append(Judged(tile, right, g.numpy(), h.numpy()))
    return found


def _picture(store: Store, judged: dict[str, Judged], own: str, caption: str) -> Picture:
    tile, entropy = judged[own].tile, judged[own].entropy
    assert tile.label is not None
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(store.dataset.classes)] = palette(store.dataset.classes)
    unsure = mpl.colormaps["viridis"](entropy / np.log(len(store.dataset.classes)), bytes=True)[..., :3]
    images = {"image": _data_uri(tile.image, Image.Resampling.BOX, lossless=False)}
    flat = {"label": colors[target_of(tile.label)]} | {
        f"predicted: {a}": colors[j.guess] for a, j in judged.items()
    }
    images |= {k: _data_uri(v, Image.Resampling.NEAREST, lossless=True) for k, v in flat.items()}
    images["entropy map"] = _data_uri(unsure, Image.Resampling.BOX, lossless=False)
    return Picture(tile.tile_id, caption, images)


def _data_uri(pixels: np.ndarray, resampling: Image.Resampling, *, lossless: bool) -> str:
    image, out = Image.fromarray(pixels), io.BytesIO()
    side = min(SIDE, image.width)
    image.resize((side, side), resampling).save(out, "WEBP", quality=80, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
