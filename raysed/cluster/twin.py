"""The whole cluster path on one machine: a SeaweedFS bucket, Ray nodes that are raylets of their own with token authentication, and
jobs submitted as a user submits them.  Three plays: two fixed nodes; a worker more and a worker less while it trains; and
the node types of cluster.yaml, started and ended by Ray's autoscaler.
"""

import contextlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from raysed.cluster.local import LocalCluster, ObjectServer, free_ports
from raysed.errors import ResourcesError
from raysed.io.ledger import Ledger, verify
from raysed.io.storage import Storage
from raysed.io.store import Store

ROOT = Path(__file__).resolve().parents[2]
CHATTER = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\s+(INFO|WARNING|SUCC)\b")
DATA, RUN = "s3://raysed/tiles", "s3://raysed/runs/twin"
PREPARE = (
    *("python", "jobs/prepare.py", "--source", "synthetic", "--scenes", "60", "--tile", "128"),
    *("--target", DATA),
)  # fmt: skip
ACTIVE = ("python", "jobs/active.py", "--preset", "demo", "--workers", "2", "--optim.micro-batch", "4")
TWO_NODES = (*ACTIVE, "--cycles", "3", "--scorers", "2")
ELASTIC = (
    *(*ACTIVE, "--baseline", "false", "--cycles", "8", "--cluster.min-workers", "1", "--cluster.threads", "1"),
    *("--select.tiles", "160"),
)  # fmt: skip
NOTICE_SECONDS = 30.0
"""Between the notice that a node will go and its end; AWS gives 120."""
COMMIT_SECONDS = 3.0
"""For a commit in the background to reach the bucket."""
AUTOSCALED = (
    *(*ACTIVE, "--baseline", "false", "--cycles", "2", "--cluster.device", "cpu", "--cluster.threads", "1"),
    *("--cluster.worker-cpus", "9", "--cluster.reader-cpus", "2", "--scorers", "2"),
)  # fmt: skip
"""More than half of a node's 16 CPUs for a worker, so that two nodes are needed."""
IDLE_MINUTES = 0.25
GONE_SECONDS = 120.0
"""How long idle nodes may take to go away."""

Say = Callable[[str], None]


class Twin:
    """A bucket and a cluster, up while the block lasts; what happens on it is noted every two seconds.

    Args:
        say: prints a line.
        nodes: besides the head, of one CPU each.
        cluster_file: whose node types an autoscaler may start instead.
    """

    def __init__(self, say: Say, nodes: int = 0, cluster_file: Path | None = None) -> None:
        self.say, self._nodes, self._file = say, nodes, cluster_file
        self.seen: list[dict[str, Any]] = []
        """second, nodes, actors: {"<node> <class>": count}."""
        self.submitted = 0.0
        """Unix time of the last submission."""

    def __enter__(self) -> "Twin":
        with contextlib.ExitStack() as stack:
            self.folder = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="raysed-twin-", ignore_cleanup_errors=True)
                )
            )
            self.server = stack.enter_context(ObjectServer(self.folder / "s3"))
            self.server.bucket("raysed")
            environment = {**self.server.environment, "RAYSED_DATA": DATA, "RAYSED_RUN": RUN}
            types = yaml.safe_load(self._file.read_text())["available_node_types"] if self._file else None
            self.cluster = stack.enter_context(
                LocalCluster(
                    self.folder / "ray", environment, types, idle_minutes=IDLE_MINUTES, nodes=self._nodes
                )
            )
            token = self.cluster.environment["RAY_AUTH_TOKEN_PATH"]
            self.say(f"{self._nodes + 1} Ray nodes  dashboard {self.cluster.dashboard}  token in {token}")
            stack.enter_context(self._observed())
            stack.enter_context(self.server.credentials())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def follow(self, *command: str, on_line: Callable[[str], None] = lambda line: None) -> None:
        """Submit a job and print what it prints.

        Raises:
            ResourcesError: it failed.
        """
        self.say(f"ray job submit --working-dir . -- {' '.join(command)}")
        self.submitted = time.time()
        process = self.cluster.submit(*command, working_dir=ROOT)
        assert process.stdout
        for line in process.stdout:
            if not CHATTER.match(line):
                self.say(f"  {line.rstrip()}")
                on_line(line)
        if process.wait():
            raise ResourcesError(f"the job failed: {' '.join(command)}")

    def work_by_node(self) -> dict[str, dict[str, int]]:
        """Tiles read, steps, visits and scores by the end of the node's id, over the committed cycles."""
        found: dict[str, Counter[str]] = {}
        for manifest in Ledger(Storage(RUN)).manifests():
            for kind, counts in manifest.record["nodes"].items():
                found.setdefault(kind, Counter()).update({n[-8:]: c for n, c in counts.items()})
        return {kind: dict(counts) for kind, counts in found.items()}

    def keep(self) -> None:
        """TensorBoard on the run's files, until Ctrl-C."""
        run, logs = Storage(RUN), self.folder / "tensorboard"
        for path in run.list("tensorboard"):
            (logs / path).parent.mkdir(parents=True, exist_ok=True)
            (logs / path).write_bytes(run.read(path))
        port = free_ports(1)[0]
        board = shutil.which("tensorboard", path=str(Path(sys.executable).parent)) or "tensorboard"
        process = subprocess.Popen([board, "--logdir", str(logs), "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL)  # fmt: skip
        self.say(
            f"dashboard {self.cluster.dashboard}\ntensorboard http://127.0.0.1:{port}\nCtrl-C stops everything"
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            self.say("stopping")
        finally:
            process.kill()

    @contextlib.contextmanager
    def _observed(self) -> Iterator[None]:
        over, began = threading.Event(), time.time()
        self.began = began

        def watch() -> None:
            while not over.wait(2):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    actors = self.cluster.state("/api/v0/actors?limit=1000&detail=1")["data"]["result"][
                        "result"
                    ]
                    living = Counter(
                        f"{a['node_id'][-8:]} {a['class_name']}" for a in actors if a["state"] == "ALIVE"
                    )
                    self.seen.append(
                        {
                            "second": round(time.time() - began, 1),
                            "nodes": self.cluster.alive(),
                            "actors": dict(sorted(living.items())),
                        }
                    )

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(30)


def two_nodes(twin: Twin) -> dict[str, Any]:
    """Prepare and train on two nodes; work must happen on both.

    Raises:
        ResourcesError: it did not.
    """
    twin.follow(*PREPARE)
    twin.follow(*TWO_NODES)
    work = twin.work_by_node()
    for kind in ("read", "train", "score"):
        twin.say(f"{kind:<6} by node: {work[kind]}")
        if len(work[kind]) < 2:
            raise ResourcesError(f"all {kind} work happened on one node, two were there: {work[kind]}")
    return {"work_by_node": work}


def bucket_and_disk(twin: Twin) -> dict[str, Any]:
    """The same store and run twice on the same two nodes: from and to the bucket, then from and to this machine's disk."""
    facts = two_nodes(twin)
    tiles, run = str(twin.folder / "tiles"), str(twin.folder / "run")
    twin.follow(*PREPARE[:-1], tiles, "--shared-filesystem")
    twin.follow(*TWO_NODES, "--data", tiles, "--run", run, "--cluster.shared-filesystem", "true")
    speeds = {"bucket": _speeds(RUN), "disk": _speeds(run)}
    for place, found in speeds.items():
        twin.say(f"{place:<7} {'  '.join(f'{k} {v:g}' for k, v in found.items())}")
    return {**facts, "tiles_per_second": speeds}


def _speeds(run: str) -> dict[str, float]:
    """Median tiles a second by phase, and seconds of waiting for tiles, of the warm cycles of both arms."""
    found: dict[str, list[float]] = {}
    for place in (run, f"{run}/baseline"):
        for manifest in Ledger(Storage(place)).manifests()[1:]:
            record, seconds = manifest.record, manifest.record["seconds"]
            scored = record["scores"]["tiles"] if record["scores"] else 0
            for phase, tiles, took in (
                ("train", record["tiles"], seconds["train"] + seconds["stall"]),
                ("evaluate", record["val"]["tiles"], seconds["evaluate"]),
                ("score", scored, seconds.get("score", 0.0)),
            ):
                if tiles and took:
                    found.setdefault(phase, []).append(tiles / took)
            found.setdefault("stall_seconds", []).append(seconds["stall"])
    return {k: round(statistics.median(v), 2) for k, v in found.items()}


def elastic(twin: Twin) -> dict[str, Any]:
    """One worker; a node joins after two cycles, gets notice that it will go once it has trained for a cycle, and is killed after the
    commit that the notice leads to, or at the deadline; every selected tile is visited once a cycle all the same.

    Raises:
        ResourcesError: a change was not followed, the notice led to no commit, or the ledger does not verify.
    """
    events: list[dict[str, Any]] = []
    workers, cycles, joined = [0], [0], [0]
    before = set(twin.cluster.living())
    committed, resumed = threading.Event(), [0]

    def note(what: str) -> None:
        events.append({"second": round(time.time() - twin.began, 1), "what": what})

    def give_notice() -> None:
        [node] = set(twin.cluster.living()) - before
        note(f"the node has notice that it will go in {NOTICE_SECONDS:.0f} s")
        twin.cluster.drain_node(node, NOTICE_SECONDS)
        if committed.wait(NOTICE_SECONDS):
            time.sleep(COMMIT_SECONDS)
        note("the node is killed")
        twin.cluster.kill_node(2)

    def on_line(line: str) -> None:
        if found := re.search(r"(\d+) workers train", line):
            note(f"{found[1]} workers train")
            workers.append(int(found[1]))
            joined[0] = cycles[0]
        elif "a node will be taken away: committing" in line:
            note("the run commits inside the cycle")
            committed.set()
        elif found := re.search(r"continues after .*step (\d+) of cycle", line):
            note(f"the run continues after step {found[1]} of the cycle")
            resumed[0] = int(found[1])
        elif found := re.search(r"\s(\d+)/\d+\s+loss", line):
            cycles[0] = int(found[1])
            note(f"cycle {cycles[0]} is committed")
            if cycles[0] == 2:
                note("a node joins")
                threading.Thread(target=twin.cluster.add_node, daemon=True).start()
            elif workers[-1] == 2 and cycles[0] == joined[0] + 1 and len(twin.cluster.nodes) == 3:
                threading.Thread(target=give_notice, daemon=True).start()

    twin.follow(*PREPARE)
    twin.follow(*ELASTIC, on_line=on_line)
    ledger = Ledger(Storage(RUN))
    wrong = verify(ledger, Store.open(DATA).split("train"))
    visits = [
        {"cycle": m.cycle, "workers": m.record["workers"], "tiles": m.record["tiles"], "visits": m.record["nodes"]["visit"]}
        for m in ledger.manifests()
    ]  # fmt: skip
    if workers[1:] != [1, 2, 1] or wrong or not resumed[0]:
        raise ResourcesError(
            f"workers {workers[1:]}, expected 1, 2, 1; continued after step {resumed[0]} of a cycle; ledger: {wrong or 'verifies'}"
        )
    return {"workers": workers[1:], "events": events, "cycles": visits, "ledger": "verifies"}


def autoscaled(twin: Twin) -> dict[str, Any]:
    """From the head alone: demand starts nodes, the end of the job ends them.

    Raises:
        ResourcesError: nodes that are idle stay.
    """
    twin.follow(*PREPARE)
    twin.follow(*AUTOSCALED)
    ended, most = time.time(), max(s["nodes"] for s in twin.seen)
    while twin.cluster.alive() > 1:
        if time.time() - ended > GONE_SECONDS:
            raise ResourcesError(
                f"{twin.cluster.alive() - 1} idle nodes are still there after {GONE_SECONDS:.0f} s"
            )
        time.sleep(1)
    time.sleep(5)  # the last of what is seen
    idle = max(s["second"] for s in twin.seen if any("Worker" in name for name in s["actors"]))
    alone = min(s["second"] for s in twin.seen if s["second"] > idle and s["nodes"] == 1)
    first = Ledger(Storage(RUN)).manifests()[0].record
    began = datetime.fromisoformat(first["started"]).timestamp()
    until_step = began + first["seconds"].get("score", 0) + first["seconds"].get("select", 0) - twin.submitted
    return {
        "most_nodes": most,
        "seconds_from_submission_to_first_step": round(until_step, 1),
        "seconds_from_last_worker_to_head_alone": round(alone - idle, 1),
        "idle_timeout_seconds": IDLE_MINUTES * 60,
        "work_by_node": twin.work_by_node(),
    }
