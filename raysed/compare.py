"""The paper's comparison: its five runs, then tables and figures of all of them."""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence

from raysed import cli
from raysed.cluster.abreast import carry_out_all
from raysed.cluster.estimate import dry_run
from raysed.config import Experiment, with_overrides
from raysed.errors import EXIT_INTERRUPTED, DivergedError, UsageError
from raysed.experiments import COMPARED
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage
from raysed.io.store import Store
from raysed.report import runfile
from raysed.report.comparison import write_comparison
from raysed.report.runfile import RunFile
from raysed.runs import say, with_data

OWN = ("model.arch", "select.strategy", "seed", "baseline")
"""Fields that the runs of a comparison fix themselves."""


def compare(doc: str | None, argv: Sequence[str]) -> int:
    """Parse flags, do all runs that are left, report; the job's exit code."""
    parser = cli.experiment_parser(doc, Experiment())
    parser.add_argument("--seeds", default="0", metavar="N,N", help="seeds of every run (default: 0)")
    parser.add_argument("--only", metavar="NAME,NAME", help=f"of {', '.join(COMPARED)} (default: all five)")
    parser.add_argument(
        "--results", metavar="URI", help="folder of result files, tables and figures (default: RUN/results)"
    )
    args = parser.parse(argv)
    for name in OWN:
        if getattr(args, name) is not None:
            raise UsageError(f"{name} is what the runs differ in: choose with --only, and seeds with --seeds")
    if getattr(args, "model.init") is not None:
        raise UsageError(
            "--init is for jobs/train.py and jobs/active.py: the runs of a comparison have networks of their own"
        )
    names, seeds = _names(args.only), seeds_of(args.seeds)
    if args.tiles_per_second is not None and len({COMPARED[n].fields["model.arch"] for n in names}) > 1:
        raise UsageError("--tiles-per-second holds for one architecture: choose its runs with --only")
    base, preset = cli.parse_experiment(args, Experiment())
    if base.model.init is not None:
        raise UsageError(
            f"--config {args.config} has model.init: the runs of a comparison have networks of their own"
        )
    base = with_data(base, preset)
    root = Storage(base.run or f"runs/compare-{preset or 'paper'}")
    results = Storage(args.results) if args.results else root.at("results")
    store = Store.open(str(base.data.uri))
    say(f"runs {root.uri}  data {base.data.uri}  results {results.uri}")
    code = run_all(plan(base, root, names, seeds), args, results, store)
    if not args.dry_run and code not in EXIT_INTERRUPTED.values():
        say("\n" + write_comparison(results, COMPARED))
    return code


def run_all(
    runs: Iterable[tuple[str, Experiment]],
    args: argparse.Namespace,
    results: Storage,
    store: Store,
    *,
    evidence: bool = False,
) -> int:
    """Do the runs of a series that are left, as many at once as find room, and renew the result file of each.

    Args:
        runs: name, as in the file's, and experiment.
        args: --dry-run, --tiles-per-second and --price of the job.
        results: folder of result files.
        store: that all run on.
        evidence: the result files hold counts of source images instead of robustness.

    Returns:
        0; the exit code of a run that diverged; or that of the signal which ended the series.
    """
    left, unmeasured, ended_with = [], [], 0
    for name, experiment in runs:
        label = runfile.file_of(name, experiment.seed)
        run = Storage(str(experiment.run))
        found = known(results, label, run, store)
        if found and found.is_finished(experiment):
            lost = ""
            if not evidence and "robustness" not in found.facts:
                if run.exists("config.json"):
                    unmeasured.append((name, experiment))
                else:
                    lost = ", but never measured under noise, and its directory is gone"
            say(f"{label}: finished{lost}")
        elif found and found.ended_diverged:
            say(
                f"{label}: diverged in cycle {found.facts['diverged']['cycle'] + 1}, not tried again while its file is there"
            )
            ended_with = DivergedError.exit_code
        elif args.dry_run:
            say(f"\n{name}, seed {experiment.seed}")
            dry_run(experiment, tiles_per_second=args.tiles_per_second, price=args.price, say=say)
        else:
            left.append((name, experiment))

    def collected(name: str, experiment: Experiment, *, measured: bool) -> None:
        run = Storage(str(experiment.run))
        found = runfile.collect(run, name, experiment.seed, store, evidence=evidence, measured=measured)
        results.write(found.path, found.to_bytes())

    def ended(number: int) -> None:
        unmeasured.append(left[number])
        collected(*left[number], measured=False)

    named = [(f"{name}, seed {experiment.seed}", experiment) for name, experiment in left]
    code = carry_out_all(named, say=say, ended=ended, hold=os.environ.get("RAYSED_HOLD")) if left else 0
    if not (evidence or args.dry_run) and code not in EXIT_INTERRUPTED.values():
        for name, experiment in unmeasured:  # now that no other run takes from the time of its forward passes
            collected(name, experiment, measured=True)
    return code or ended_with


def plan(
    base: Experiment, root: Storage, names: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, Experiment]]:
    """(name, experiment) of each run, all names of a seed before the next seed."""
    for seed in seeds:
        for name in names:
            run = root.at(runfile.file_of(name, seed).removesuffix(".jsonl")).uri
            common = {"run": run, "seed": seed, "baseline": False, "select.strategy": "uniform"}
            yield name, with_overrides(base, {**common, **COMPARED[name].fields}, name)


def known(results: Storage, path: str, run: Storage, store: Store) -> RunFile | None:
    """The result file of a run, whatever is left of the run's directory; None if there is none.

    Raises:
        UsageError: file or directory are of another data set, or of a version of it before tiles were appended.
    """
    found = runfile.read(results, path) if results.exists(path) else None
    if found:
        where, ran_on = f"{results.uri}/{path}", found.facts["data"]["hash"]
    elif run.exists("config.json"):
        where, ran_on = run.uri, Ledger(run).config()[1]
    else:
        return None
    if ran_on != store.dataset.content_hash:
        raise UsageError(
            f"{where} ran on data set {ran_on[:12]}, the store is {store.dataset.content_hash[:12]}: all runs of a series have "
            "one data set, choose another --run and --results"
        )
    return found


def collect_all(root: Storage) -> Storage:
    """Renew the result files of all run directories below a comparison's root; where the result files are.

    A folder that holds no run directories is one of result files already.
    """
    found = []
    for name in COMPARED:
        for path in root.list():
            head, _, rest = path.partition("/")
            if (
                rest == "config.json"
                and head.startswith(f"{name}-seed")
                and head.rpartition("seed")[2].isdigit()
            ):
                found.append((name, head))
    if not found:
        return root
    results = root.at("results")
    for name, head in found:
        ledger = Ledger(root.at(head))
        experiment, dataset_hash = ledger.config()
        if results.exists(f"{head}.jsonl"):
            before = runfile.read(results, f"{head}.jsonl")
            is_measured = "robustness" in before.facts and len(before.cycles) == len(ledger.manifests())
            if is_measured and before.is_finished(experiment):
                continue
        seed = int(head.rpartition("seed")[2])
        record = runfile.collect(
            root.at(head), name, seed, Store.open(str(experiment.data.uri), dataset_hash)
        )
        results.write(record.path, record.to_bytes())
    return results


def _names(text: str | None) -> list[str]:
    names = text.split(",") if text else list(COMPARED)
    if len(set(names)) < len(names):
        raise UsageError(f"--only names a run twice: {text}")
    if unknown := [n for n in names if n not in COMPARED]:
        raise UsageError(f"--only takes {', '.join(COMPARED)}, got {unknown[0]!r}")
    return names


def seeds_of(text: str) -> list[int]:
    """The numbers of --seeds."""
    try:
        seeds = [int(s) for s in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds must be whole numbers with commas between, got {text!r}") from None
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds names a seed twice: {text}")
    return seeds
