"""Named presets.  Each says its command, what it costs and what it reaches; figures stand in results/ with their runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raysed.config import (
    AugmentConfig,
    ClusterConfig,
    Experiment,
    ModelConfig,
    OptimConfig,
    SelectConfig,
    with_overrides,
)

PAPER = Experiment(select=SelectConfig(strategy="entropy"))
"""The paper's active run on OpenEarthMap: EfficientUNet-b0 from scratch, 100 cycles of the most uncertain fifth, Adam 5e-5.
The paper reports 36.5 % mean IoU in 30 h, against 44.6 % in 2.5 h for random choice (its own mean, see README)."""

DEMO = Experiment(
    cycles=6,
    baseline=True,
    select=SelectConfig(strategy="entropy", tiles=64),
    optim=OptimConfig(lr=1e-3, schedule="cosine", batch=8),
    augment=AugmentConfig(max_noise_variance=0.0025, max_hue_shift=10),
    cluster=ClusterConfig(scorers=1),  # a second one takes 0.7 GiB of the 6 that the demo may
)
"""What `make active` runs: six cycles on the synthetic world, entropy selection against uniform, a few minutes on two cores.
Far too short a run to judge a strategy by; it shows the system."""

YARDSTICK = Experiment(
    cycles=30,
    model=ModelConfig(arch="unet:tu-tf_efficientnet_lite0", encoder_weights="efficientnet-lite0"),
    optim=OptimConfig(lr=5e-4, schedule="cosine"),
    augment=AugmentConfig(
        max_noise_variance=0.0025, max_hue_shift=0, max_saturation_shift=0, max_value_shift=0
    ),
)
"""A strong short recipe for small data sets: ImageNet weights that come as a Python package, cosine decay from 5e-4.
    python jobs/train.py --preset yardstick --data STORE --run RUN
On the Dubai tiles at 128 px, uniform selection reaches 0.63 mIoU in 30 cycles of a fifth (results/first-run)."""

PAPER_SHORT = Experiment(
    cycles=60,
    optim=OptimConfig(lr=1e-3, schedule="cosine", batch=4, micro_batch=4),
)
"""The paper's comparison on a few hundred tiles and a few CPUs: its loss, augmentation and share of a cycle, 60 cycles, from scratch.
    python jobs/prepare.py --source dubai --resize none --tile 512 --store 128 --target STORE
    python jobs/compare.py --preset paper-short --data STORE --run RUN --seeds 0,1,2 --only b0,b0-active
    python jobs/tune.py --preset paper-short --data STORE --run RUN --trials 16 --cycles 12
The paper's learning rate needs its 11500 steps; these are 600, so it is 20 times as high and decays.
Cost of a run of 203 tiles of 128 px on one core: 8 minutes for b0, 15 for b0 active, 25 for b4, 24 to 72 for U-Net."""

PAPER_SYNTHETIC = Experiment(
    cycles=60,
    optim=OptimConfig(lr=2e-3, schedule="cosine", batch=8, micro_batch=8),
    augment=AugmentConfig(
        max_noise_variance=0.0025, max_hue_shift=0, max_saturation_shift=0.05, max_value_shift=0.05
    ),
)
"""The same on the synthetic world, whose classes are told apart by colour more than real ones: no hue shift, a sixteenth of the noise.
    python jobs/prepare.py --source synthetic --scenes 96 --tile 64 --target STORE
    python jobs/compare.py --preset paper-synthetic --data STORE --run RUN --seeds 0,1,2 --only b0,b0-active
b0 reaches 0.26 to 0.28 mIoU (results/paper); with the paper's augmentation it learnt next to nothing in as many steps (results/LOG.md).
Cost of a run of 1232 tiles of 64 px on one core: 12 minutes for b0, 23 for b0 active, 27 for b4, 50 for U-Net in bf16."""

STABILISERS: Mapping[str, Any] = {
    "optim.schedule": "cosine",
    "optim.ema": 0.999,
    "optim.norm_tiles": 256,
    "optim.weight_decay": 0.01,
    "optim.clip": 1.0,
}
"""What the paper's protocol lacks to keep a curve from swinging, the same for every arm.
    python jobs/train.py --preset stable --select defensive --data STORE --run RUN
With them a higher rate is better: on the Dubai tiles at 64 px the yardstick with uniform draws reaches 0.648 at 5e-4 and 0.679 at 2e-3.
Cost a cycle: forward passes of 256 tiles, and one pass over the weights a step."""

PRESETS = {
    "demo": DEMO,
    "paper": PAPER,
    "paper-short": PAPER_SHORT,
    "paper-synthetic": PAPER_SYNTHETIC,
    "paper-passive": replace(PAPER, select=SelectConfig()),
    "stable": with_overrides(Experiment(), STABILISERS, "stable"),
    "yardstick": YARDSTICK,
    "yardstick-stable": with_overrides(YARDSTICK, {**STABILISERS, "optim.lr": 2e-3}, "yardstick-stable"),
}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One of the paper's five runs: what it fixes, and what the paper reports of it on OpenEarthMap after 100 cycles."""

    fields: Mapping[str, Any]
    """Dotted fields that make this run; everything else is common to all five."""
    headline: float
    """Mean IoU as the paper's text gives it.  The mean of its table 2 is another number, so which mean it is stays open."""
    hours: float | None = None
    """Training time; the hardware is not stated."""
    iou: Mapping[str, float] = field(default_factory=dict)
    """IoU of each class, by the paper's table 2."""


UNET_PLAIN = Compared(
    fields={
        "model.arch": "unet",
        "augment.turns": False,
        "augment.max_noise_variance": 0.0,
        "augment.max_hue_shift": 0.0,
        "augment.max_saturation_shift": 0.0,
        "augment.max_value_shift": 0.0,
    },
    headline=0.360,
)
"""The classic U-Net on the tiles as they are.  The paper: 36.0 %.
    python jobs/compare.py --data STORE --run RUN --only unet-plain
Cost: that of `unet`."""

UNET = Compared(fields={"model.arch": "unet"}, headline=0.387, hours=5.5)
"""The classic U-Net with augmentation.  The paper: 38.7 % in about 5.5 h.
    python jobs/compare.py --data STORE --run RUN --only unet
Cost: the dearest of the passive runs, 31 million parameters at full resolution; --dry-run of jobs/train.py reckons it."""

B0 = Compared(
    fields={"model.arch": "efficientunet-b0"},
    headline=0.446,
    hours=2.5,
    iou={
        "bareland": 0.1455,
        "rangeland": 0.3546,
        "developed": 0.3392,
        "road": 0.3813,
        "tree": 0.4645,
        "water": 0.2426,
        "agriculture": 0.4694,
        "building": 0.5372,
    },
)
"""EfficientUNet-b0 with augmentation, passive: the baseline.  The paper: 44.6 % in about 2.5 h, and 36.68 % by its table 2.
    python jobs/compare.py --data STORE --run RUN --only b0
Cost: 0.45 of the U-Net's time by the paper."""

B4 = Compared(fields={"model.arch": "efficientunet-b4"}, headline=0.453, hours=5.0)
"""EfficientUNet-b4 with augmentation, passive.  The paper: 45.3 % in about 5 h.
    python jobs/compare.py --data STORE --run RUN --only b4
Cost: twice that of b0 by the paper."""

B0_ACTIVE = Compared(
    fields={"model.arch": "efficientunet-b0", "select.strategy": "entropy"},
    headline=0.365,
    hours=30.0,
    iou={
        "bareland": 0.0935,
        "rangeland": 0.2850,
        "developed": 0.2869,
        "road": 0.2579,
        "tree": 0.4173,
        "water": 0.2052,
        "agriculture": 0.3873,
        "building": 0.4030,
    },
)
"""EfficientUNet-b0, trained on the most uncertain fifth.  The paper: 36.5 % in about 30 h, and 29.20 % by its table 2.
    python jobs/compare.py --data STORE --run RUN --only b0-active
Cost: 12 times that of b0 by the paper; about 1.5 to 2.5 times when scored in parallel."""

COMPARED = {"unet-plain": UNET_PLAIN, "unet": UNET, "b0": B0, "b4": B4, "b0-active": B0_ACTIVE}
"""The paper's comparison, in its order."""
