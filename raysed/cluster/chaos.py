"""Faults injected into small runs, each judged against the calm run's ledger.

A fault strikes a process that is known to be busy: it waits at a gate (see `faulted.py`), or the proxy counts what it broke.  Then
the same command is given again, if the job has ended, and the two ledgers must be equal, verify, and show every selected tile
visited once.
"""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import pyarrow as pa

from raysed.cluster.faulted import GATE, SPEC, forked
from raysed.cluster.faultproxy import FaultProxy
from raysed.cluster.local import LocalCluster, ObjectServer
from raysed.core.synthetic import scene
from raysed.core.tiles import OPENEARTHMAP, pixel_counts, shard_path, tile_id
from raysed.errors import RaysedError
from raysed.io import codec, store
from raysed.io.ledger import Ledger, difference, verify
from raysed.io.storage import Storage
from raysed.io.store import Store

Verdict = Literal["survived", "lost", "not_promised"]
CYCLES = 4
SIDE = 64
"""Of a tile, pixels."""
NODES = 2
"""Besides the head."""
PATIENCE = 180.0
"""Seconds a job may take to reach its gate or its end: nothing may hang longer."""
JOB = ("--arch", "unet:tu-test_resnet", "--workers", "2", "--cycles", str(CYCLES), "--select.tiles", "24", "--select", "entropy", "--optim.batch", "8",
       "--optim.micro-batch", "4", "--optim.lr", "1e-3", "--cluster.chunk", "16", "--cluster.wait-nodes", "60",
       "--data.bad-tile-budget", "0.01", "--seed", "1")  # fmt: skip
FAST_SIGNS = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "15", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
"""How soon Ray Train gives a silent worker up, and hears of a node that will go; ten minutes and 5 s otherwise."""
Kind = Literal["walk", "active", "prepare", "tune"]
SWEEP = ("--arch", "unet:tu-test_resnet", "--trials", "2", "--cycles", "2", "--select.tiles", "24", "--optim.batch", "8",
         "--optim.micro-batch", "4", "--cluster.chunk", "16", "--cluster.wait-nodes", "60", "--seed", "1")  # fmt: skip
FREE_SECONDS = 60.0
"""Within which a job that has ended, however it ended, must have given everything back."""


class Lost(Exception):
    """A promise was not kept; the text says which."""


class Forked:
    """A walk, forked from a server that has done the imports; looks like a `Popen`."""

    def __init__(self, argv: list[str], environment: dict[str, str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["raysed.io.ledger", "raysed.io.store", forked.__module__])
        self.process = context.Process(target=forked, args=(argv, environment, str(log)))
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("walk", timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


Running = subprocess.Popen[bytes] | Forked


@dataclass(frozen=True)
class Row:
    """One fault and what became of it."""

    fault: str
    detected_s: float | None
    """From the injection until the job ended or its workers were started again; None if neither was needed."""
    recovered_s: float | None
    """From the injection until the cycle that was open then was committed, or a later one."""
    steps_lost: int
    """Training steps taken more than once."""
    tiles_repeated: int
    """Visits of tiles in those steps."""
    verdict: Verdict
    note: str


def small_store(uri: str, labels: Mapping[str, bytes] | None = None) -> None:
    """160 tiles of 64 pixels, cut from 40 synthetic scenes; a fifth is validation.

    Args:
        uri: where.
        labels: tile id -> bytes that stand where its label belongs.
    """
    storage, rows, side = Storage(uri), [], SIDE
    for number in range(40):
        made = scene(0, number, side=2 * side)
        name = f"{made.region}_{number}"
        for row, col in itertools.product(range(2), range(2)):
            window = slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)
            label = made.label[window]
            rows.append({
                "tile_id": tile_id(name, row, col), "region": made.region, "source": name, "row": row, "col": col,
                "split": "val" if number % 5 == 4 else "train", "pixels": pixel_counts(label, 8).tolist(), "crs": None,
                "transform": None, "scale": [1.0, 1.0], "image": codec.encode_image(made.image[window]),
                "label": (labels or {}).get(tile_id(name, row, col), codec.encode_label(label)),
            })  # fmt: skip
    parts = [rows[i : i + 64] for i in range(0, len(rows), 64)]
    shards = [store.write_shard(storage, shard_path(1, k), part) for k, part in enumerate(parts)]
    index = pa.concat_tables(shards)
    store.finish(storage, name="small", classes=OPENEARTHMAP, ignore=(0,), tile_size=side, index=index)


def small_images(uri: str, spoilt: Mapping[str, bytes]) -> dict[str, str]:
    """10 images of 128 pixels with their labels, for prepare.

    Args:
        uri: where.
        spoilt: path -> bytes that stand there instead.

    Returns:
        Tile id -> sha256 of the tiles of 64 pixels that a store of the unspoilt images must hold.
    """
    storage, expected = Storage(uri), {}
    classes = [{"id": k, **asdict(c)} for k, c in enumerate(OPENEARTHMAP, start=1)]
    files = {"classes.json": json.dumps({"name": "small", "ignore": [0], "classes": classes}).encode()}
    for number in range(10):
        made, name = scene(0, number, side=2 * SIDE), f"small_{number}"
        files[f"images/{name}.png"] = codec.encode_picture(made.image)
        files[f"labels/{name}.png"] = codec.encode_label(made.label)
        for row, col in itertools.product(range(2), range(2)):
            window = slice(row * SIDE, (row + 1) * SIDE), slice(col * SIDE, (col + 1) * SIDE)
            parts = codec.encode_image(made.image[window]), codec.encode_label(made.label[window])
            expected[tile_id(name, row, col)] = codec.tile_hash(*parts)
    for path, data in {**files, **spoilt}.items():
        storage.write(path, data)
    return expected


@dataclass
class Bench:
    """What the faults are tried on.

    Args:
        folder: for traces, logs and local runs.
        data: URI of the tile store.
        root: URI below which runs are made.
        environment: that leads jobs to the store through the proxy, if there is one.
    """

    folder: Path
    data: str
    root: str
    environment: dict[str, str]
    proxy: FaultProxy | None = None
    server: ObjectServer | None = None
    cluster: LocalCluster | None = None
    mutant: str | None = None
    calm: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Kind of job, place and flags -> its calm run."""
    new_cluster: Callable[[dict[str, str]], LocalCluster] | None = None
    """Starts a cluster like the one there is, with more in its environment."""

    def calm_run(self, kind: Kind, where: str | None = None, flags: tuple[str, ...] = ()) -> str:
        """The undisturbed run to compare with, made when first asked for and never with a mutant."""
        key = (kind, where or "", *flags)
        if key not in self.calm:
            trial = Trial(self, f"calm {kind}", kind, root=where, mutant=None, flags=flags)
            trial.start()
            trial.ends(0)
            self.calm[key] = trial.run
        return self.calm[key]


class Trial:
    """One faulted run: its processes, its trace, its ledger.

    Args:
        bench: what it is tried on.
        name: of the fault.
        kind: of job.
        root: URI below which the run is made, if not the bench's.
        mutant: guard to leave out.
        flags: of every job, besides those of its kind.
    """

    def __init__(
        self,
        bench: Bench,
        name: str,
        kind: Kind,
        *,
        root: str | None,
        mutant: str | None,
        flags: tuple[str, ...] = (),
    ) -> None:
        self.bench, self.kind, self.mutant, self.flags = bench, kind, mutant, flags
        number = len(list(bench.folder.glob("trial-*")))
        self.folder = bench.folder / f"trial-{number:03d}-{name.replace(' ', '-')}"
        self.folder.mkdir(parents=True)
        self.run = f"{root or bench.root}/{self.folder.name}"
        self.data = bench.data
        """URI of the tiles, or of the images of prepare."""
        self.struck: float | None = None
        self.ended: float | None = None
        self.in_place = True
        """False if it ended cleanly and was given again where that was not wanted, but may be."""
        self.compared = True
        """Whether the run can be equal to the calm one."""
        self.inside: dict[int, int] = {}
        """Cycle -> its steps that were committed before the workers were started again."""
        self.processes: list[Running] = []
        self.note = ""

    @property
    def ledger(self) -> Ledger:
        """Of the faulted run; only reads."""
        return Ledger(Storage(self.run))

    def start(self, *gates: tuple[str, int, int], flags: tuple[str, ...] = (), **inside: Any) -> Running:
        """Start the job; each gate (point, cycle, rank) stops it there once."""
        spec = {"folder": str(self.folder), "gates": list(gates), "mutant": self.mutant, **inside}
        argv = {
            "walk": ["walk", self.data, self.run, str(CYCLES)],
            "active": ["active", "--data", self.data, "--run", self.run, *JOB],
            "prepare": ["prepare", "--source", self.data, "--target", self.run],
            "tune": ["tune", "--data", self.data, "--run", self.run, *SWEEP],
        }[self.kind] + [*self.flags, *flags]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAYSED_", "RAY_"))}
        cluster = self.bench.cluster.environment if self.bench.cluster and self.kind != "walk" else {}
        environment |= {**cluster, **FAST_SIGNS, **self.bench.environment, SPEC: json.dumps(spec)}
        for number, kind in itertools.product(range(len(gates)), GATE):
            (self.folder / f"{kind}-{number}").unlink(missing_ok=True)
        log = self.folder / f"job-{len(self.processes)}.log"
        process: Running
        if self.kind == "walk":
            process = Forked(argv, environment, log)
        else:
            with log.open("wb") as out:
                process = subprocess.Popen(
                    [sys.executable, "-m", "raysed.cluster.faulted", *argv], env=environment, stdout=out,
                    stderr=subprocess.STDOUT, start_new_session=True, cwd=self.folder,
                )  # fmt: skip
        self.processes.append(process)
        return process

    def at_gate(self, number: int = 0) -> int:
        """Wait until a process waits at a gate; its pid."""
        reached = self.folder / f"reached-{number}"
        self.wait(reached.exists, "the gate was not reached")
        return int(reached.read_text())

    def wait(self, seen: Callable[[], Any], otherwise: str, *, every: float = 0.05) -> None:
        """Wait until something is so, while a job runs.

        Args:
            seen: whether it is.
            otherwise: what to say if it does not become so.
            every: seconds between two looks.

        Raises:
            Lost: it is not so within `PATIENCE`.
        """
        until = time.monotonic() + PATIENCE
        while not seen():
            if time.monotonic() > until or all(p.poll() is not None for p in self.processes):
                raise Lost(f"{otherwise}: {self.said()}")
            time.sleep(every)

    def strike(self) -> None:
        """Note the moment of the injection, while the target waits at the gate."""
        self.struck = time.time()

    def go(self, number: int = 0) -> None:
        """Open a gate."""
        (self.folder / f"go-{number}").touch()

    def kill(self, pid: int) -> None:
        """SIGKILL a process at the gate."""
        self.strike()
        os.kill(pid, signal.SIGKILL)

    def ends(self, code: int, process: Running | None = None) -> None:
        """Wait for the end of a job, which must be this exit code."""
        process = process or self.processes[-1]
        patience = PATIENCE * (2 if self.kind == "tune" else 1)
        try:
            found = process.wait(patience)
        except subprocess.TimeoutExpired:
            stop(process)
            raise Lost(f"the job still ran after {patience:.0f} s: {self.said()}") from None
        self.ended = self.ended or (time.time() if self.struck else None)
        if found != code:
            raise Lost(f"exit code {found} instead of {code}: {self.said()}")

    def said(self, number: int = -1) -> str:
        """The last lines of a job's log, or all of it that is an error."""
        lines = sorted(self.folder.glob("job-*.log"))[number].read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        return " ".join((errors or lines or ["nothing"])[-1].split())[:300]

    def log(self) -> str:
        """What all its jobs have printed."""
        return "".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("job-*.log")))

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The trace, in order of time."""
        path = self.folder / "trace.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return sorted((e for e in found if not kinds or e["event"] in kinds), key=lambda e: e["at"])

    def must(self, kept: bool, promise: str) -> None:
        """Check a promise.

        Raises:
            Lost: it was not kept.
        """
        if not kept:
            raise Lost(promise)

    def judged(self, fault: str, verdict: Verdict, note: str) -> Row:
        """The row of this trial."""
        steps = Counter(
            (e["rank"], e["cycle"], e["step"]) for e in self.events("step") if self.kind in ("walk", "active")
        )
        lost = sum(n - 1 for (rank, _, _), n in steps.items() if rank == 0)
        visits = Counter(
            (e["cycle"], t) for e in self.events("tiles") for t in e["ids"] if self.kind in ("walk", "active")
        )
        detected = recovered = None
        if self.struck:
            signs = [e["at"] for e in self.events("start") if e["at"] > self.struck]
            signs += [self.ended] if self.ended else []
            detected = round(min(signs) - self.struck, 1) if signs else None
            open_one = max((e["cycle"] for e in self.events("gate") if e["at"] <= self.struck), default=0)
            later = [e for e in self.events("committed", "commit") if e["at"] > self.struck]
            commits = [e["at"] for e in later if e["cycle"] >= open_one]
            recovered = round(min(commits) - self.struck, 1) if commits else None
        repeated = sum(n - 1 for n in visits.values())
        return Row(fault, detected, recovered, lost, repeated, verdict, note)

    def calm(self) -> str:
        """The undisturbed run of the same job."""
        root = self.run.rpartition("/")[0]
        return self.bench.calm_run(self.kind, root if root != self.bench.root else None, self.flags)

    def check(self) -> None:
        """Compare with the calm run, verify, count visits.

        Raises:
            Lost: with the first of what does not hold.
        """
        if self.kind in ("prepare", "tune"):
            return  # they have no ledger of their own: their faults compare what they made
        tiles = Store.open(self.data)
        wrong = verify(self.ledger, tiles.split("train"))
        if self.compared:
            wrong += difference(Ledger(Storage(self.calm())), self.ledger)
        trace: dict[str, list[dict[str, Any]]] = defaultdict(list)
        of_cycle: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        for e in self.events():  # once: a soak has a thousand cycles
            trace[e["event"]].append(e)
            of_cycle["commit" if e["event"] == "committed" else e["event"], e.get("cycle", -1)].append(e)
        for manifest in self.ledger.manifests():
            commit = of_cycle["commit", manifest.cycle][-1]
            group = {e["rank"]: e["pid"] for e in trace["start"] if e["at"] < commit["at"]}
            ranks = {
                **group,
                0: commit["pid"],
            }.values()  # those that made the commit, not one that was overtaken
            taken = of_cycle["tiles", manifest.cycle]
            back = {
                e["pid"]: e["at"] for e in trace["resumed"] if e["at"] < commit["at"]
            }  # training that diverged goes back
            mine = [e for e in taken if e["pid"] in ranks and e["at"] > back.get(e["pid"], 0.0)]
            steps = self.inside.get(manifest.cycle, 0)  # of each rank before, with one micro-batch a step
            for pid in {e["pid"] for e in taken} - set(ranks):
                mine += [e for e in taken if e["pid"] == pid][:steps]
            visits = sorted(t for e in mine for t in e["ids"])
            chosen = sorted(self.ledger.table(manifest, "selected.parquet")["tile_id"].to_pylist())
            if visits != chosen:
                wrong.append(f"cycle {manifest.cycle}: {len(visits)} visits of {len(chosen)} selected tiles")
        if wrong:
            raise Lost(f"{len(wrong)} differences, the first: {wrong[0]}")

    def close(self) -> None:
        """End what still runs."""
        for process in self.processes:
            stop(process)


def stop(process: Running) -> None:
    """SIGKILL a process and its descendants."""
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for member in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    member.kill()
        process.send_signal(signal.SIGKILL)
        process.wait(10)


@dataclass(frozen=True)
class Fault:
    """One fault."""

    act: Callable[[Trial], None]
    """Injects it and brings the run to its end; raises `Lost`."""
    kind: Kind
    flags: tuple[str, ...] = ()
    """Of its jobs, and of the calm one."""
    bucket: bool = False
    """Whether a walk needs the object store behind the proxy."""
    in_place: bool = True
    """False where raysed promises a clean end and a resubmission that continues, not survival in place."""


def attempt(bench: Bench, name: str, fault: Fault) -> Row:
    """Try one fault."""
    disk = str(bench.folder / "runs")
    trial = Trial(
        bench, name, fault.kind, root=disk if fault.kind == "walk" and not fault.bucket else None,
        mutant=bench.mutant, flags=fault.flags,
    )  # fmt: skip
    before = len(bench.proxy.injected) if bench.proxy else 0
    try:
        if bench.cluster and fault.kind != "walk":
            bench.cluster.complete(NODES)
        fault.act(trial)
        injected = bench.proxy.injected[before:] if bench.proxy else []
        if trial.struck is None and injected:
            trial.struck = injected[0].at
        trial.must(trial.struck is not None, "the fault did not strike")
        if bench.proxy:
            bench.proxy.clear()
        trial.check()
        broken = bench.proxy.counts() if injected and bench.proxy else {}
        note = "; ".join(filter(None, (trial.note, f"{len(injected)} requests broken" if broken else "")))
        return trial.judged(name, "survived" if fault.in_place and trial.in_place else "not_promised", note)
    except (Lost, RaysedError) as error:
        return trial.judged(name, "lost", str(error))
    except Exception as error:  # the other rows are still wanted
        return trial.judged(name, "lost", f"the harness failed: {type(error).__name__}: {error}")
    finally:
        if bench.proxy:
            bench.proxy.clear()
        trial.close()


def table(rows: list[Row]) -> str:
    """The rows as text."""
    width = max(len(r.fault) for r in rows)

    def seconds(value: float | None) -> str:
        return f"{value:8.1f}" if value is not None else f"{'-':>8}"

    head = f"{'fault':<{width}}  detected recovered  steps  tiles  verdict       note"
    return "\n".join(
        [head, *(f"{r.fault:<{width}}  {seconds(r.detected_s)}  {seconds(r.recovered_s)}  {r.steps_lost:>5}  {r.tiles_repeated:>5}  "
                 f"{r.verdict:<12}  {r.note}" for r in rows)]
    )  # fmt: skip
