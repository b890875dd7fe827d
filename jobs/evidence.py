"""Does a strategy win?  Arms x seeds on one half of the validation images, paired by seed, with intervals.

    python jobs/evidence.py --data data/tiles --run runs/evidence --preset yardstick-stable --arms ceiling,uniform --seeds 0,1,2
    python jobs/evidence.py --data data/tiles --run runs/evidence --preset yardstick-stable \\
        --arms uniform,class-random,defensive,defensive-entropy:select.scores=byproduct --seeds 0,1
    python jobs/evidence.py ... --split report      the other half, read once: refused without a committed plan

An arm is a strategy with fields of its own after colons, such as `defensive:select.options=mixture=0.3+tail=1`; `ceiling` trains on all
tiles in every cycle.  All other fields hold for all arms, but `class-random` balances classes by its draws and so trains without
class weights (loss.alpha_power 0), unless its own fields say otherwise.  Runs of a seed start from the same weights (so --init is
refused), take tiles in orders and augmentations of the same keys and are validated on the same tiles.  As many run at once as find
room, all arms of a seed first; on CPUs a run without --cluster.threads has its node for itself.  Every run leaves a small file in
--results; the same command again skips what is finished and continues a broken run.

Arms are judged against the best passive arm by 95 % intervals of Student's t, over seeds and, where counts are known, source images.
The dev half is exploratory.  The report half gives each active arm one verdict, by the primary metric that the plan registers, with
Holm's correction for all of them; the plan pins arms, seeds, cycles, configuration and data set, and the refusal prints the JSON
to commit.  A seed that diverged is listed, and its arm is not tested.  time_ratio is that of all cycles, scoring and the first
included.  Arms that buy labels get miou@LABELS at the end of each round.  summary.json beside the folders of results/evidence has the
rows of all of them.

Cost: arms x seeds times one run of jobs/train.py; --dry-run reckons it.
"""

from collections.abc import Sequence

from raysed.cli import main
from raysed.evidence import evidence


def job(argv: Sequence[str]) -> int:
    return evidence(__doc__, argv)


if __name__ == "__main__":
    main(job)
