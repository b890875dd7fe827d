"""Inject faults into small runs on this machine and see what is lost: a SeaweedFS behind a proxy that breaks requests, a Ray head
and two nodes, processes killed, stopped and starved while they are known to be busy.

    make chaos                              all faults, about forty minutes on two cores
    make chaos FAULTS="F1 F21"
    python jobs/chaos.py --soak 30 --seed 7       one run of so many minutes under about a fault a minute
    python jobs/chaos.py F20 F21 --mutant no-hash-check      leaves a guard out: its row must be lost

A row survives if the faulted run's ledger equals the calm one's, verifies, and shows every selected tile visited once.  Exit 0 if no
row is lost, 4 otherwise.  Rows go into results/chaos/latest.json, in place of those of the same name.  Needs the extra `local`.
"""

import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from raysed import cli
from raysed.cluster.chaos import NODES, Bench, Fault, Row, attempt, small_store, table
from raysed.cluster.faulted import MUTANTS
from raysed.cluster.faultproxy import FaultProxy
from raysed.cluster.faults import FAULTS, ORDER
from raysed.cluster.local import LocalCluster, ObjectServer
from raysed.cluster.soak import Soak
from raysed.errors import DataError, UsageError
from raysed.io.provenance import environment

OUT = Path(__file__).resolve().parents[1] / "results/chaos"


def job(argv: Sequence[str]) -> None:
    """Set up, try each fault, show."""
    listed = "\n".join(f"  {n:<4} {', '.join(FAULTS[n])}" for n in ORDER)
    parser = cli.Parser(f"{__doc__}\n{listed}\n  F30  --soak")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {' '.join(ORDER)} (default: all)")
    parser.add_argument(
        "--mutant", choices=sorted(MUTANTS), help="leave this guard out in the faulted processes"
    )
    parser.add_argument(
        "--soak", type=float, metavar="MINUTES", help="F30: draw faults for one run of so long"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws of --soak")
    args = parser.parse(argv)
    if args.soak is not None and (args.faults or args.soak <= 0):
        raise UsageError(f"--soak takes minutes and no faults, got {args.soak:g} and {args.faults}")
    names = args.faults or ([] if args.soak else list(ORDER))
    if unknown := [n for n in names if n not in FAULTS]:
        raise UsageError(f"no fault {unknown[0]}: there are {' '.join(ORDER)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    rows = chaos(names, mutant=args.mutant, soak=args.soak, seed=args.seed)
    lost = [r.fault for r in rows if r.verdict == "lost"]
    print(f"\n{table(rows)}\n\n{len(rows)} rows, {len(lost)} lost", flush=True)
    if lost:
        raise DataError(f"lost: {', '.join(lost)}: see the notes of their rows")


def keep(row: Row, mutant: str | None, soaked: dict[str, Any] | None = None) -> None:
    """Print a row and write it into `latest.json` in place of that of the same name, with the commit it was seen at."""
    print(f"{row.fault:<32} {row.verdict:<12} {row.note}", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / "latest.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    commit = environment().get("commit")
    list_of, own = ("mutants", {"mutant": mutant}) if mutant else ("rows", {})
    new = {**own, **asdict(row), "commit": commit}
    others = [r for r in found.get(list_of, []) if (r.get("mutant"), r["fault"]) != (mutant, row.fault)]
    found[list_of] = sorted([*others, new], key=lambda r: (int(r["fault"].split()[0][1:]), r["fault"]))
    if soaked:
        found["soak"] = {**soaked, "commit": commit}
    order = ("commit", "rows", "mutants", "soak")
    found["commit"] = commit
    file.write_text(json.dumps({k: found[k] for k in order if k in found}, indent=1) + "\n")


def chaos(names: Sequence[str], *, mutant: str | None, soak: float | None, seed: int) -> list[Row]:
    """Try faults one after the other, on what they need; each row is kept as soon as it is known."""

    def tried(bench: Bench, faults: dict[str, Fault]) -> list[Row]:
        rows = []
        for name, fault in faults.items():
            rows.append(attempt(bench, name, fault))
            keep(rows[-1], mutant)
        return rows

    chosen = {f"{n} {v}": fault for n in names for v, fault in FAULTS[n].items()}
    needs_bucket = soak or any(f.bucket or f.kind != "walk" for f in chosen.values())
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="raysed-chaos-", ignore_cleanup_errors=True)
            )
        )
        bench = Bench(folder, data := str(folder / "tiles"), str(folder / "runs"), {}, mutant=mutant)
        small_store(data)
        walks = {n: f for n, f in chosen.items() if f.kind == "walk" and not f.bucket}
        rows = tried(bench, walks)
        if not needs_bucket:
            return rows
        server = stack.enter_context(ObjectServer(folder / "s3"))
        server.bucket("raysed")
        proxy = stack.enter_context(FaultProxy(server.endpoint, seed))
        stack.enter_context(server.credentials())
        small_store("s3://raysed/tiles")
        through = {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        bench = Bench(
            folder / "remote", "s3://raysed/tiles", "s3://raysed/runs", through, proxy, server, mutant=mutant
        )
        rows += tried(bench, {n: f for n, f in chosen.items() if f.bucket})
        real = {n: f for n, f in chosen.items() if f.kind != "walk"}
        if not (real or soak):
            return rows

        def new_cluster(more: dict[str, str]) -> LocalCluster:
            folder_of_it = folder / f"ray-{time.monotonic_ns()}"
            return stack.enter_context(LocalCluster(folder_of_it, {**through, **more}, nodes=NODES))

        bench.cluster, bench.new_cluster = new_cluster({}), new_cluster
        if soak:
            row, facts = Soak(bench, soak, seed, partial(print, flush=True)).run()
            keep(row, mutant, facts)
            return [row]
        return rows + tried(bench, real)


if __name__ == "__main__":
    cli.main(job)
