"""The whole cluster path on this machine: a SeaweedFS bucket, a Ray head that trains nothing and two more nodes, token
authentication on; a tile store is prepared into the bucket and `ray job submit -- python jobs/active.py` trains from it.

    make twin             about five minutes on two cores
    make twin KEEP=1      leaves it up and prints where the dashboard and TensorBoard are

Needs the extra `local`. What it starts it stops, by process id; what the run left is copied to runs/twin.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raysed import cli
from raysed.cluster.local import LocalCluster, ObjectServer, free_ports
from raysed.errors import ResourcesError
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage
from raysed.report.results import result_files
from raysed.runs import say

ROOT = Path(__file__).resolve().parents[1]
CHATTER = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\s+(INFO|WARNING|SUCC)\b")
OUT = ROOT / "runs/twin"
DATA, RUN = "s3://raysed/tiles", "s3://raysed/runs/twin"
PREPARE = (
    "python",
    "jobs/prepare.py",
    "--source",
    "synthetic",
    "--scenes",
    "60",
    "--tile",
    "128",
    "--target",
    DATA,
)
ACTIVE = (
    "python",
    "jobs/active.py",
    "--preset",
    "demo",
    "--cycles",
    "3",
    "--workers",
    "2",
    "--optim.micro-batch",
    "4",
)


def job(argv: Sequence[str]) -> None:
    """Start, prepare, train, show, stop."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--keep", action="store_true", help="leave everything up until Ctrl-C")
    args = parser.parse(argv)
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="raysed-twin-", ignore_cleanup_errors=True)
            )
        )
        say("starting SeaweedFS and three Ray nodes")
        server = stack.enter_context(ObjectServer(folder / "s3"))
        server.bucket("raysed")
        environment = {**server.environment, "RAYSED_DATA": DATA, "RAYSED_RUN": RUN}
        cluster = stack.enter_context(LocalCluster(folder / "ray", environment))
        cluster.add_node()
        cluster.add_node()
        say(f"dashboard {cluster.dashboard}  token in {cluster.environment['RAY_AUTH_TOKEN_PATH']}")
        with observed(cluster) as seen:
            follow(cluster, *PREPARE)
            follow(cluster, *ACTIVE)
        with server.credentials():
            show(cluster, seen)
            if args.keep:
                keep(cluster, folder)


def follow(cluster: LocalCluster, *command: str) -> None:
    """Submit a job and print what it prints."""
    say(f"ray job submit --working-dir . -- {' '.join(command)}")
    process = cluster.submit(*command, working_dir=ROOT)
    assert process.stdout
    for line in process.stdout:
        if not CHATTER.match(line):
            say(f"  {line.rstrip()}")
    if process.wait():
        raise ResourcesError(f"the job failed: {' '.join(command)}")


@contextlib.contextmanager
def observed(cluster: LocalCluster) -> Iterator[list[dict[str, Any]]]:
    """Nodes and actors by the second, until the end of the block."""
    seen: list[dict[str, Any]] = []
    over, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not over.wait(2):
            with contextlib.suppress(OSError, ValueError, KeyError):
                actors = cluster.state("/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
                living = [(a["node_id"], a["class_name"]) for a in actors if a["state"] == "ALIVE"]
                seen.append({
                    "second": round(time.monotonic() - began, 1),
                    "nodes": cluster.alive(),
                    "actors": {f"{node[:8]} {name}": living.count((node, name)) for node, name in sorted(set(living))},
                })  # fmt: skip

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield seen
    over.set()
    thread.join(30)


def show(cluster: LocalCluster, seen: list[dict[str, Any]]) -> None:
    """Check that work happened on both nodes; copy what the run left."""
    run = Storage(RUN)
    names = {
        n["node_id"]: n["node_id"][:8] for n in cluster.state("/api/v0/nodes")["data"]["result"]["result"]
    }
    for phase in ("read", "train", "score"):
        counts: dict[str, int] = {}
        for manifest in Ledger(run).manifests():
            for node, count in manifest.record["nodes"][phase].items():
                counts[names[node]] = counts.get(names[node], 0) + count
        say(f"{phase:<6} by node: {counts}")
        if len(counts) < 2:
            raise ResourcesError(f"all {phase} work happened on one node, two were there: {counts}")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "timeline.json").write_text(json.dumps(seen, indent=1) + "\n")
    (OUT / "report.html").write_bytes(run.read("report.html"))
    for name, text in result_files(run).items():
        (OUT / name).write_text(text)
    say(f"result {RUN}/report.html, copied to {OUT}")


def keep(cluster: LocalCluster, folder: Path) -> None:
    """TensorBoard on the run's files, until Ctrl-C."""
    run, logs = Storage(RUN), folder / "tensorboard"
    for path in run.list("tensorboard"):
        (logs / path).parent.mkdir(parents=True, exist_ok=True)
        (logs / path).write_bytes(run.read(path))
    port = free_ports(1)[0]
    board = shutil.which("tensorboard", path=str(Path(sys.executable).parent)) or "tensorboard"
    process = subprocess.Popen([board, "--logdir", str(logs), "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL)  # fmt: skip
    say(f"dashboard {cluster.dashboard}\ntensorboard http://127.0.0.1:{port}\nCtrl-C stops everything")
    try:
        process.wait()
    except KeyboardInterrupt:
        say("stopping")
    finally:
        process.kill()


if __name__ == "__main__":
    cli.main(job)
