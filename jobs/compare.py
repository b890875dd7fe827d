"""The paper's comparison: U-Net without and with augmentation, EfficientUNet-b0 and -b4 passive, EfficientUNet-b0 active.

    python jobs/compare.py --data s3://bucket/openearthmap --run s3://bucket/runs/paper         the paper's protocol
    python jobs/compare.py --data data/tiles --run runs/small --cycles 60 --optim.lr 1e-3 --only b0,b0-active --seeds 0,1,2
    python jobs/compare.py --data data/tiles --run runs/small --dry-run                         hours of each run

Every run lies in RUN/<name>-seed<k>; all of one seed and architecture start from the same weights.  As many run at once as find
room, each with the workers and scorers it was given; on CPUs a run without --cluster.threads has its node for itself.  Any other
field is common to all, but what a run fixes itself stands.
The same command again skips finished runs (their result files are enough) and continues a broken one.
"""

from collections.abc import Sequence

from raysed.cli import main
from raysed.compare import compare


def job(argv: Sequence[str]) -> int:
    return compare(__doc__, argv)


if __name__ == "__main__":
    main(job)
