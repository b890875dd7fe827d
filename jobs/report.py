"""Look at runs: rebuild the report, verify a run, compare two.

python jobs/report.py RUN                 rebuild cycles.jsonl, summary.json and report.html from the manifests
python jobs/report.py RUN --verify        replay every selection, check every hash (exit 4 if something does not hold)
python jobs/report.py --diff RUN OTHER    exit 0 if they are equal but for seconds and names, 1 if not
python jobs/report.py RUN --results DIR   small text and figure files of the run, for keeping in a repository
"""

import json
from collections.abc import Sequence
from pathlib import Path

from raysed.cli import Parser, main
from raysed.errors import DataError, UsageError
from raysed.io.ledger import difference, verify
from raysed.io.storage import Storage
from raysed.io.store import Store
from raysed.report import figures
from raysed.report.html import CURVES, write_report
from raysed.report.summary import arms_of, table, write_summary


def job(argv: Sequence[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="run directory")
    parser.add_argument("--verify", action="store_true", help="check hashes and replay selections")
    parser.add_argument("--diff", nargs=2, metavar=("RUN", "OTHER"), help="compare two runs")
    parser.add_argument("--results", metavar="DIR", help="folder for summary, cycles, table and figures")
    parser.add_argument("--data", metavar="URI", help="tile store, if it has moved since the run")
    args = parser.parse(argv)
    if args.diff:
        return compare(*args.diff)
    if not args.run:
        raise UsageError("give a run directory, or --diff and two of them")
    run = Storage(args.run)
    if args.verify:
        check(run, args.data)
        return 0
    rebuild(run)
    if args.results:
        write_results(run, Path(args.results))
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
    """Verify all arms; raise if something does not hold."""
    for name, (ledger, manifests) in arms_of(run).items():
        uri = data or str(ledger.config()[0].data.uri)
        faults = verify(ledger, Store.open(uri).split("train"))
        if faults:
            raise DataError(f"{run.uri}, {name}: {len(faults)} faults: {'; '.join(faults[:5])}")
        print(f"{name}: verified, {len(manifests)} cycles: all hashes hold, all selections replay")


def rebuild(run: Storage) -> None:
    """Everything that is derived from the manifests."""
    for ledger, manifests in arms_of(run).values():
        ledger.write_lines(manifests)
    print(table(write_summary(run)))
    print(f"\nsummary  {run.uri}/summary.json\nreport   {write_report(run)}")


def write_results(run: Storage, folder: Path) -> None:
    """The files of a reported experiment."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = write_summary(run)
    arms = {name: manifests for name, (_, manifests) in arms_of(run).items() if manifests}
    summary["config"]["run"] = summary["config"]["data"]["uri"] = None  # paths of one machine
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for name, manifests in arms.items():
        lines = [json.dumps({"cycle": m.cycle, **m.record}) for m in manifests]
        (folder / f"cycles-{name}.jsonl").write_text("\n".join(lines) + "\n")
    for name, svg in (
        ("curves", figures.metric_curves(arms, CURVES)),
        ("classes", figures.class_curves(arms)),
        ("seconds", figures.seconds_bars(arms)),
    ):
        (folder / f"{name}.svg").write_text(svg)
    hardware = ", ".join(f"{k} {v}" for k, v in summary["hardware"].items())
    (folder / "table.md").write_text(
        f"Command: `{summary['command']}`  \nCommit: {summary['commit']}  \nHardware: {hardware}\n\n```\n{table(summary)}\n```\n"
    )
    print(f"results  {folder}")


if __name__ == "__main__":
    main(job)
