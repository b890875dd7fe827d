"""Train on tiles chosen anew before each cycle: half in epochs, half drawn by how unsure the network is of each class.

    python jobs/active.py                                     the demo: a synthetic world, the most uncertain tiles against uniform ones
    python jobs/active.py --data data/tiles --run runs/active --baseline
    python jobs/active.py --data data/tiles --run runs/paper --select entropy    the most uncertain fifth, as in the paper
    ray job submit --working-dir . -- python jobs/active.py   on a cluster whose RAYSED_DATA and RAYSED_RUN are set

The same command again continues the run after its last committed cycle.
"""

from collections.abc import Sequence

from raysed.cli import main
from raysed.config import Experiment, SelectConfig
from raysed.runs import run_experiment


def job(argv: Sequence[str]) -> int:
    return run_experiment(__doc__, argv, Experiment(select=SelectConfig(strategy="defensive-entropy")))


if __name__ == "__main__":
    main(job)
