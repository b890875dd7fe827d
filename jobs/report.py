"""Look at runs: rebuild the report, verify a run, compare two.

python jobs/report.py RUN                 rebuild cycles.jsonl, summary.json and report.html from the manifests
python jobs/report.py RUN --verify        replay every selection, check every hash (exit 4 if something does not hold)
python jobs/report.py --diff RUN OTHER    exit 0 if they are equal but for seconds and names, 1 if not
python jobs/report.py RUN --ranking       score the pool afresh with the weights that are kept: do the scores it selected by rank alike?
python jobs/report.py RUN --results DIR   small text and figure files of the run, for keeping in a repository
python jobs/report.py --compare DIR       tables, figures and summary.json of jobs/compare.py: its RUN, or its folder of result files

RUN is a local path or s3://bucket/prefix; a run with a baseline is taken with both arms.
"""

from collections.abc import Sequence

from raysed.cli import Parser, main
from raysed.compare import collect_all
from raysed.errors import DataError, UsageError
from raysed.experiments import COMPARED
from raysed.io.ledger import difference, verify
from raysed.io.storage import Storage
from raysed.io.store import Store
from raysed.report.comparison import write_comparison
from raysed.report.html import write_report
from raysed.report.ranking import as_table, rankings
from raysed.report.results import result_files
from raysed.report.summary import arms_of, table, write_summary


def job(argv: Sequence[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="run directory")
    parser.add_argument("--verify", action="store_true", help="check hashes and replay selections")
    parser.add_argument(
        "--ranking", action="store_true", help="compare the scores it selected by with fresh ones"
    )
    parser.add_argument("--diff", nargs=2, metavar=("RUN", "OTHER"), help="compare two runs")
    parser.add_argument("--results", metavar="DIR", help="folder for summary, cycles, table and figures")
    parser.add_argument("--compare", metavar="DIR", help="report the paper's comparison")
    parser.add_argument(
        "--data", metavar="URI", help="tile store to verify with, if it has moved since the run"
    )
    args = parser.parse(argv)
    if args.diff and (args.run or args.verify or args.results or args.compare or args.ranking):
        raise UsageError("--diff takes two runs and goes with nothing else")
    if args.compare and (args.run or args.verify or args.results or args.ranking):
        raise UsageError("--compare takes the folder of a comparison and goes with nothing else")
    if args.compare:
        print(write_comparison(collect_all(Storage(args.compare)), COMPARED))
        return 0
    if args.diff:
        return compare(*args.diff)
    if not args.run:
        raise UsageError("give a run directory, or --diff and two of them")
    run = Storage(args.run)
    if args.verify:
        check(run, args.data)
        return 0
    if args.ranking:
        rank(run, args.data)
        return 0
    rebuild(run)
    if args.results:
        write_results(run, Storage(args.results))
    return 0


def compare(one: str, other: str) -> int:
    """Print how two runs differ."""
    mine, theirs = arms_of(Storage(one)), arms_of(Storage(other))
    lines = [f"arm {name} is only in one of them" for name in sorted(mine.keys() ^ theirs.keys())]
    for name in [n for n in mine if n in theirs]:
        lines += [f"{name}: {line}" for line in difference(mine[name][0], theirs[name][0])]
    print("\n".join(lines) or f"{one} and {other} are equal")
    return 1 if lines else 0


def check(run: Storage, data: str | None) -> None:
    """Verify all arms; print what does not hold and raise."""
    faults, cycles = [], 0
    for name, (ledger, manifests) in arms_of(run).items():
        experiment, dataset_hash = ledger.config()
        store = Store.open(data or str(experiment.data.uri), dataset_hash)
        faults += [f"{name}: {fault}" for fault in verify(ledger, store.split("train"))]
        cycles += len(manifests)
    if faults:
        print("\n".join(faults))
        raise DataError(f"{run.uri} does not verify: {len(faults)} faults, the first is {faults[0]}")
    print(f"verified: {cycles} cycles, all hashes hold, all selections replay")


def rank(run: Storage, data: str | None) -> None:
    """Print how the scores of each arm that has some rank its pool.

    Raises:
        UsageError: there is nothing to compare.
    """
    told = False
    for name, (ledger, manifests) in arms_of(run).items():
        experiment, dataset_hash = ledger.config()
        store = Store.open(data or str(experiment.data.uri), dataset_hash)
        if found := rankings(ledger, manifests, store):
            print(f"{name}, scores {experiment.select.scores}\n{as_table(found)}")
            told = True
    if not told:
        raise UsageError(f"{run.uri} has no cycle that selected by entropies and whose weights are kept")


def rebuild(run: Storage) -> None:
    """Everything that is derived from the manifests."""
    for ledger, manifests in arms_of(run).values():
        ledger.write_lines(manifests)
    print(table(write_summary(run)))
    print(f"\ncycles   {run.uri}/cycles.jsonl\nsummary  {run.uri}/summary.json\nreport   {write_report(run)}")


def write_results(run: Storage, results: Storage) -> None:
    """The files of a reported experiment."""
    files = result_files(run)
    for name, text in files.items():
        results.write(name, text.encode())
    print(f"results  {results.uri}: {' '.join(files)}")


if __name__ == "__main__":
    main(job)
