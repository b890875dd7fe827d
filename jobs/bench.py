"""Ratios of raysed to what the hardware and plain PyTorch can do, each measured in one run.

python jobs/bench.py                         all rows, about half an hour on two cores; writes results/bench/latest.json
python jobs/bench.py --rows stall commit     some rows
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from raysed import cli
from raysed.cluster.bench import ROWS, result_json, run_rows
from raysed.cluster.connect import TUNABLES
from raysed.cluster.prepare import prepare_synthetic
from raysed.errors import RaysedError, UsageError
from raysed.io.provenance import environment
from raysed.io.store import Store
from raysed.runs import DEMO_SCENES, DEMO_STORE, DEMO_TILE, say

OUT = Path("results/bench/latest.json")


def job(argv: Sequence[str]) -> int:
    """Measure, print, write if all rows were measured; goals that are not met are told and are no error."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--rows", nargs="*", metavar="ROW", help=f"of: {', '.join(ROWS)}")
    names = parser.parse(argv).rows or list(ROWS)
    for name in names:
        if name not in ROWS:
            raise UsageError(f"unknown row {name!r}, known are {', '.join(ROWS)}")

    def prepare() -> Store:
        prepare_synthetic(DEMO_STORE, scenes=DEMO_SCENES, tile=DEMO_TILE, say=say)
        return Store.open(DEMO_STORE)

    measured = environment()
    rows, failed = run_rows(names, prepare, say)
    if len(rows) == len(ROWS):
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(result_json(rows, measured))
        say(f"written {OUT}")
    missed = [r.row for r in rows if r.met is False]
    say(f"goals not met: {', '.join(missed) or 'none'}")
    if failed:
        raise RaysedError(f"not measured: {', '.join(failed)}")
    return 0


if __name__ == "__main__":
    # read at the start of a process; the rivals are to have it too
    wanted = {**os.environ, "GLIBC_TUNABLES": TUNABLES}
    if os.environ != wanted:
        os.execve(sys.executable, [sys.executable, "-u", *sys.argv], wanted)
    cli.main(job)
