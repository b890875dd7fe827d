"""Train one network: passive by default, any strategy by --select.

    python jobs/train.py --data data/tiles --run runs/first
    ray job submit --working-dir . -- python jobs/train.py --data s3://bucket/tiles --run s3://bucket/runs/first

The same command again continues the run after its last committed cycle.
"""

from collections.abc import Sequence

from raysed.cli import main
from raysed.config import Experiment
from raysed.runs import run_experiment


def job(argv: Sequence[str]) -> int:
    return run_experiment(__doc__, argv, Experiment())


if __name__ == "__main__":
    main(job)
