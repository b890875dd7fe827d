"""Sweep learning rate, gamma and alpha_power over short runs of the same loop, with Ray Tune and early stopping.

    python jobs/tune.py --data data/tiles --run runs/sweep --arch efficientunet-b0 --trials 16 --cycles 12
    python jobs/train.py --data data/tiles --run runs/best --config runs/sweep/results/best.json --cycles 60

Trial 0 is the experiment as it stands and is never stopped; the others draw optim.lr log-uniformly in 1e-5..1e-2, loss.gamma in
0..4 and loss.alpha_power in 0..1.  ASHA looks after a quarter of the cycles and at each doubling, and lets the better half go on.  As many
trials run at once as the cluster holds.  The same command again runs unfinished trials only; more --trials extend a sweep.
"""

from collections.abc import Sequence
from dataclasses import replace

from raysed import cli
from raysed.cli import main
from raysed.cluster.sweep import state_of, sweep, trial_of
from raysed.config import Experiment
from raysed.errors import RaysedError, UsageError
from raysed.io.storage import Storage
from raysed.report.sweep import TrialResult, sweep_files
from raysed.runs import say, with_data, with_init

TRIALS, CYCLES = 16, 12


def job(argv: Sequence[str]) -> int:
    parser = cli.experiment_parser(__doc__, Experiment(cycles=CYCLES))
    parser.add_argument("--trials", type=int, default=TRIALS, help=f"trials in all (default: {TRIALS})")
    parser.add_argument(
        "--results", metavar="URI", help="folder of table, picture and best.json (default: RUN/results)"
    )
    args = parser.parse(argv)
    if args.trials < 2:
        raise UsageError(
            f"--trials must be at least 2, the experiment as it stands and one to compare with, got {args.trials}"
        )
    if args.dry_run or args.baseline:
        raise UsageError(
            "--dry-run and --baseline are for jobs/train.py; a sweep costs at most trials x cycles of its cycles"
        )
    base, preset = cli.parse_experiment(args, Experiment())
    base = with_data(replace(base, baseline=False, cycles=base.cycles if args.cycles else CYCLES), preset)
    base = with_init(base, arch=getattr(args, "model.arch"), config=args.config)
    run = Storage(base.run or f"runs/tune-{base.model.arch}".replace(":", "-"))
    base = replace(base, run=run.uri)
    results = Storage(args.results) if args.results else run.at("results")
    say(f"sweep {run.uri}  data {base.data.uri}  results {results.uri}")
    code = sweep(base, args.trials, say=say)
    trials = [TrialResult(s.number, trial_of(base, s.number), s.values, s.outcome, s.returned, s.manifests) for s in (state_of(base, n) for n in range(args.trials))]  # fmt: skip
    unfinished = [t.number for t in trials if t.outcome is None]
    if code:
        return code
    if unfinished:
        raise RaysedError(
            f"trials {', '.join(map(str, unfinished))} ended without a result: the same command tries them again"
        )
    files = sweep_files(trials)
    for name, text in files.items():
        results.write(name, text.encode())
    say(f"\n{files['table.md']}\nresults {results.uri}: {' '.join(files)}")
    say(f"next    python jobs/train.py --config {results.uri}/best.json --data {base.data.uri} --run ...")
    return 0


if __name__ == "__main__":
    main(job)
