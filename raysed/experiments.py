"""Named presets.  Each says its command, what it costs and what it reaches; figures stand in results/ with their runs."""

from dataclasses import replace

from raysed.config import AugmentConfig, Experiment, ModelConfig, OptimConfig, SelectConfig

PAPER = Experiment(select=SelectConfig(strategy="entropy"))
"""The paper's active run on OpenEarthMap: EfficientUNet-b0 from scratch, 100 cycles of the most uncertain fifth, Adam 5e-5.
The paper reports 36.5 % mean IoU in 30 h, against 44.6 % in 2.5 h for random choice (its own mean, see README)."""

DEMO = Experiment(
    cycles=6,
    baseline=True,
    select=SelectConfig(strategy="entropy", tiles=64),
    optim=OptimConfig(lr=1e-3, schedule="cosine", batch=8),
    augment=AugmentConfig(max_noise_variance=0.0025, max_hue_shift=10),
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
On the Dubai tiles at 128 px, uniform selection reaches about 0.60 mIoU in 30 cycles of a fifth."""

PRESETS = {
    "demo": DEMO,
    "paper": PAPER,
    "paper-passive": replace(PAPER, select=SelectConfig()),
    "yardstick": YARDSTICK,
}
