"""What a finished run's network is and how it bears noise and other colours, on this machine's CPU."""

import time
from typing import Any

import numpy as np
import torch

from raysed.config import Experiment
from raysed.core import metrics, networks
from raysed.core.augment import disturb, to_uint8
from raysed.core.counts import confusion
from raysed.core.randomness import keyed_rng
from raysed.core.splits import validation_rows
from raysed.core.step import to_device
from raysed.io.checkpoint import unpack
from raysed.io.ledger import Ledger, Manifest
from raysed.io.store import Store, Tile, read_tiles

TILES = 300
"""Validation tiles that are looked at, evenly spread; all of them if there are no more."""
BATCH = 8
"""Tiles a forward pass."""
CONDITIONS: dict[str, dict[str, float]] = {
    "clean": {},
    "noise": {"noise_variance": 0.02},
    "colour": {"hue": 20.0, "saturation": 0.1, "value": 0.1},
    "noise and colour": {"noise_variance": 0.02, "hue": 20.0, "saturation": 0.1, "value": 0.1},
}
"""Condition -> strength, within what the paper's augmentation draws from."""
TIMED = 5
"""Forward passes that are timed, after one that is not."""


def robustness(ledger: Ledger, last: Manifest, store: Store) -> dict[str, Any]:
    """Condition -> tiles and scores of the weights of a cycle on disturbed validation tiles.

    Raises:
        DataError: the weights are missing or not those committed.
    """
    experiment, _ = ledger.config()
    names = [c.name for c in store.dataset.classes]
    net = networks.build(experiment.model.arch, len(names), experiment.seed)
    net.load_state_dict(unpack(ledger.read(last, "model.safetensors"), "model.safetensors"))
    net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    data = experiment.data
    ids = sorted(validation_rows(store.index, data.validation, data.held_out)["tile_id"].to_pylist())
    shown = [ids[i] for i in np.linspace(0, len(ids) - 1, min(TILES, len(ids))).astype(int)]
    counts = {name: np.zeros((len(names), len(names)), np.int64) for name in CONDITIONS}
    for start in range(0, len(shown), BATCH):
        locations = store.locations(shown[start : start + BATCH])
        read = read_tiles(store.storage, locations, store.dataset.tile_size)
        tiles = [t for t in read if isinstance(t, Tile) and t.label is not None]
        if not tiles:
            continue
        labels = np.stack([t.label for t in tiles if t.label is not None])
        for name, strength in CONDITIONS.items():
            images = np.stack([_disturbed(t, strength) for t in tiles])
            x, target = to_device(images, labels, torch.device("cpu"))
            with torch.inference_mode():
                guess = net(x).argmax(1)
            counts[name] += confusion(guess, target, len(names)).numpy()
    return {n: {"tiles": len(shown), **metrics.scores(c, names)} for n, c in counts.items()}


def _disturbed(tile: Tile, strength: dict[str, float]) -> np.ndarray:
    if not strength:
        return tile.image
    return to_uint8(disturb(tile.image, keyed_rng("disturb", tile.tile_id), **strength))


def network_facts(experiment: Experiment, store: Store) -> dict[str, Any]:
    """Parameters, and milliseconds of a forward pass of one tile on this CPU, the median of a few."""
    side = store.dataset.tile_size
    net = networks.build(experiment.model.arch, len(store.dataset.classes), experiment.seed)
    net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    image = torch.from_numpy(keyed_rng("latency").random((1, 3, side, side), np.float32))
    image = image.to(memory_format=torch.channels_last)
    took = []
    with torch.inference_mode():
        for _ in range(TIMED + 1):
            began = time.perf_counter()
            net(image)
            took.append(time.perf_counter() - began)
    return {
        "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "forward_ms": 1000 * float(np.median(took[1:])),
        "forward_on": f"CPU, threads {torch.get_num_threads()}, fp32, one tile of {side} px",
    }
