"""The whole cluster path on this machine: a SeaweedFS bucket, a Ray head that trains nothing and further nodes, token
authentication on; a tile store is prepared into the bucket and `ray job submit -- python jobs/active.py` trains from it.

    make twin                two nodes, about four minutes on two cores
    make twin KEEP=1         leaves it up and prints where the dashboard and TensorBoard are
    make twin DISK=1         then the same run from and to disk, and the tiles a second of both
    make twin ELASTIC=1      one worker; a node joins, has notice and is killed while it trains
    make twin AUTOSCALE=1    the node types of cluster.yaml as local processes, started and ended by Ray's autoscaler

Needs the extra `local`. What it starts it stops, by process id; what the run left is copied to runs/twin*.
"""

import json
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from raysed import cli
from raysed.cluster import twin
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage
from raysed.report.figures import timeline
from raysed.report.results import result_files
from raysed.runs import say

PLAYS = {
    "two-nodes": (twin.two_nodes, {"nodes": 2}),
    "disk": (twin.bucket_and_disk, {"nodes": 2}),
    "elastic": (twin.elastic, {"nodes": 1}),
    "autoscaled": (twin.autoscaled, {"cluster_file": twin.ROOT / "cluster.yaml"}),
}


def job(argv: Sequence[str]) -> None:
    """Start, play, show, stop."""
    parser = cli.Parser(__doc__)
    parser.add_argument("play", nargs="?", choices=sorted(PLAYS), default="two-nodes", help="what happens")
    parser.add_argument("--keep", action="store_true", help="leave everything up until Ctrl-C")
    args = parser.parse(argv)
    play, setting = PLAYS[args.play]
    out = twin.ROOT / "runs" / ("twin" if args.play == "two-nodes" else f"twin-{args.play}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    say("starting SeaweedFS and Ray")
    with twin.Twin(say, **setting) as up:  # type: ignore[arg-type]
        facts = play(up)
        keep(up, args.play, facts, out)
        if args.keep:
            up.keep()


def keep(up: twin.Twin, play: str, facts: dict[str, Any], out: Path) -> None:
    """Copy what the run left into a folder, with what happened on the cluster."""
    run = Storage(twin.RUN)
    out.mkdir(parents=True, exist_ok=True)
    cycles = [
        (datetime.fromisoformat(m.record["started"]).timestamp() - up.began, m.record["seconds"]["total"], m.record["tiles"])
        for place in (twin.RUN, f"{twin.RUN}/baseline")
        for m in Ledger(Storage(place)).manifests()
    ]  # fmt: skip
    (out / "timeline.json").write_text(json.dumps(up.seen, indent=1) + "\n")
    (out / "timeline.svg").write_text(timeline(up.seen, cycles))
    (out / f"{play}.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "report.html").write_bytes(run.read("report.html"))
    for name, text in result_files(run).items():
        (out / name).write_text(text)
    say(f"result {twin.RUN}/report.html, copied to {out}")


if __name__ == "__main__":
    cli.main(job)
