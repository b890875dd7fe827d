"""The faults that `jobs/chaos.py` knows, by the numbers of the README."""

import json
import os
import signal
import time
from collections.abc import Callable

from raysed.cluster.chaos import CYCLES, Fault, Lost, Trial
from raysed.cluster.faultproxy import Rule
from raysed.io.ledger import DEAD_AFTER, folder, verify
from raysed.io.storage import Storage
from raysed.io.store import Store

COMMIT_SECONDS = 10.0
"""How long the commit of a small run may take."""


def resubmitted(trial: Trial, code: int = 0) -> None:
    """The same command again."""
    trial.start()
    trial.ends(code)


# The walk through the ledger: storage and state.


def upload_dies(trial: Trial) -> None:
    """F20: killed after the first file of a cycle."""
    trial.start("write", 2, 0)
    trial.kill(trial.at_gate())
    trial.ends(-signal.SIGKILL)
    half = verify(trial.ledger, Store.open(trial.bench.data).split("train"))
    trial.must(not half, f"a half-written cycle counts: {half[:1]}")
    trial.must(len(trial.ledger.manifests()) == 2, "the cycles before are not there")
    resubmitted(trial)


def killed_between_payload_and_manifest(trial: Trial) -> None:
    """F20: all files are there, the manifest is not."""
    trial.start("commit", 2, 0)
    trial.kill(trial.at_gate())
    trial.ends(-signal.SIGKILL)
    trial.must(len(trial.ledger.manifests()) == 2, "a cycle without manifest counts")
    resubmitted(trial)


def _damage(trial: Trial, name: str, change: Callable[[bytes], bytes]) -> None:
    trial.start("train", 3, 0)
    pid = trial.at_gate()
    storage, path = Storage(trial.run), f"{folder(2)}/{name}"
    trial.kill(pid)
    trial.ends(-signal.SIGKILL)
    storage.write(path, change(storage.read(path)))


def _fell_back(trial: Trial) -> None:
    resubmitted(trial)
    trial.must("cycle 2 is not used" in trial.log(), "the fallback was not said")


def flipped_weights(trial: Trial) -> None:
    """F21: one bit of the newest weights."""
    _damage(trial, "model.safetensors", lambda d: d[:100] + bytes([d[100] ^ 1]) + d[101:])
    _fell_back(trial)


def truncated_optimizer(trial: Trial) -> None:
    """F21: half of the newest optimiser state."""
    _damage(trial, "optimizer.safetensors", lambda d: d[: len(d) // 2])
    _fell_back(trial)


def torn_manifest(trial: Trial) -> None:
    """F21: half of the newest manifest."""
    _damage(trial, "manifest.json", lambda d: d[: len(d) // 2])
    trial.start()
    trial.ends(4)
    trial.must("is damaged" in trial.said() and "remove it" in trial.said(), f"no remedy: {trial.said()}")
    Storage(trial.run).remove(f"{folder(2)}/manifest.json")
    resubmitted(trial)
    trial.note = "exit 4 names the file; continues once it is removed"


def two_drivers(trial: Trial) -> None:
    """F22: both started at once; whoever wins waits at the gate and holds the run."""
    first, second = trial.start("train", 1, 0), trial.start("train", 1, 0)
    trial.at_gate()
    trial.strike()
    loser = second if trial.events("gate")[0]["pid"] == first.pid else first
    trial.ends(3, loser)
    said = trial.said(trial.processes.index(loser))
    trial.must(
        "held by process" in said or "taken by another driver" in said, f"the holder is not named: {said}"
    )
    trial.go()
    trial.ends(0, first if loser is second else second)


def dead_driver(trial: Trial) -> None:
    """F22: the holder of the lease is gone."""
    trial.start("train", 1, 0)
    trial.kill(trial.at_gate())
    trial.ends(-signal.SIGKILL)
    began = time.monotonic()
    resubmitted(trial)
    trial.must(time.monotonic() - began < DEAD_AFTER, "the lease of a dead process was waited for")


def paused_driver(trial: Trial) -> None:
    """F22: a driver stopped for longer than its lease lives, woken while another holds the run."""
    first = trial.start("train", 2, 0)
    pid = trial.at_gate()
    os.kill(pid, signal.SIGSTOP)
    trial.strike()
    second = trial.start("train", 2, 0)  # takes over, and stands before the same cycle
    trial.at_gate()
    trial.folder.joinpath("go").touch()
    os.kill(pid, signal.SIGCONT)
    trial.ends(3, first)
    trial.ends(0, second)


def clocks_apart(trial: Trial) -> None:
    """F23: the first driver's clock is an hour ahead, its successor's an hour behind."""
    trial.start("train", 2, 0, skew=3600)
    pid = trial.at_gate()
    trial.kill(pid)
    trial.struck = time.time()
    trial.ends(-signal.SIGKILL)
    trial.start(skew=-3600)
    trial.ends(0)
    trial.note = "Python's clock; no faketime here"


def changed_config(trial: Trial) -> None:
    """F24: another learning rate on resume."""
    trial.start("train", 2, 0)
    trial.kill(trial.at_gate())
    trial.ends(-signal.SIGKILL)
    trial.start(flags=("0.1",))
    trial.ends(2)
    trial.must(
        "optim.lr: 0.001 there, 0.1 now" in trial.said(), f"the difference is not named: {trial.said()}"
    )
    resubmitted(trial)


def changed_pool(trial: Trial) -> None:
    """F25: the store was prepared anew with one tile fewer; then a tile's bytes are replaced."""
    trial.start("train", 2, 0)
    trial.kill(trial.at_gate())
    trial.ends(-signal.SIGKILL)
    other = f"{trial.folder}/other"
    source, target = Storage(trial.bench.data), Storage(other)
    for path in source.list():
        target.write(path, source.read(path))
    fields = json.loads(target.read("dataset.json"))
    target.write("dataset.json", json.dumps({**fields, "content_hash": "0" * 64}).encode())
    trial.start(data=other)
    trial.ends(2)
    trial.must("data set:" in trial.said(), f"the other data set is not named: {trial.said()}")
    target.write("dataset.json", json.dumps(fields).encode())
    for path in target.list("shards"):
        data = target.read(path)
        target.write(path, data[:5000] + bytes(len(data) - 6000) + data[-1000:])
    trial.start(data=other)
    trial.ends(4)
    trial.must("sha256" in trial.said(), f"replaced bytes were not found: {trial.said()}")
    resubmitted(trial)


def disk_full(trial: Trial) -> None:
    """F19: from cycle 2 on no file may grow beyond 32 KiB."""
    trial.start(file_limit=32 << 10)
    trial.ends(6)
    trial.struck = trial.events("gate")[0]["at"]
    trial.ended = None
    trial.must("File too large" in trial.said(), f"the cause is not named: {trial.said()}")
    trial.must(len(trial.ledger.manifests()) == 2, "the cycles before are not there")
    resubmitted(trial)


def _with(*rules: Rule) -> Callable[[Trial], None]:
    """A run whose cycle 1 begins under these rules."""

    def act(trial: Trial) -> None:
        assert trial.bench.proxy
        trial.start(*(("train", 1, 0) if trial.kind == "walk" else ("select", 1, 0)))
        trial.at_gate()
        trial.strike()
        for rule in rules:
            trial.bench.proxy.add(rule)
        trial.go()
        trial.ends(0)
        trial.ended = None
        trial.must(len(trial.events("start")) <= (1 if trial.kind == "walk" else 2), "workers were restarted")

    return act


def expired(trial: Trial) -> None:
    """F14: credentials refused for five seconds."""
    assert trial.bench.proxy
    trial.start("train", 1, 0)
    trial.at_gate()
    trial.strike()
    trial.bench.proxy.add(Rule("expired", seconds=5))
    trial.go()
    trial.ends(6)
    trial.must("s3://" in trial.said(), f"the bucket is not named: {trial.said()}")
    trial.bench.proxy.clear()
    resubmitted(trial)
    trial.note = f"exit 6: {trial.said(0)[:120]}; the same command continued"


# Real runs on a cluster.


def worker_killed(trial: Trial) -> None:
    """F1: SIGKILL rank 1 in its second step."""
    trial.start("step", 1, 1)
    trial.kill(trial.at_gate())
    trial.ends(0)
    trial.ended = None


def worker_hangs(trial: Trial) -> None:
    """F2: SIGSTOP rank 1 in its second step."""
    trial.start("step", 1, 1)
    pid = trial.at_gate()
    trial.strike()
    os.kill(pid, signal.SIGSTOP)
    trial.go()
    trial.ends(0)
    trial.ended = None
    again = [e["at"] for e in trial.events("start") if e["at"] > (trial.struck or 0)]
    trial.must(bool(again), "the group was not restarted")


def scorer_killed(trial: Trial) -> None:
    """F3: SIGKILL a scorer that holds a chunk."""
    trial.start("scoring", 1, 0)
    trial.kill(trial.at_gate())
    trial.ends(0)
    trial.ended = None
    trial.must(len(trial.events("start")) == 2, "training workers were restarted for a scorer")


def node_dies(trial: Trial) -> None:
    """F5: a node with a rank and a scorer on it dies; another comes ten seconds later."""
    cluster = trial.bench.cluster
    assert cluster
    trial.start("step", 1, 1)
    pid = trial.at_gate()
    number = next(
        i for i, n in enumerate(cluster.nodes) if n.popen.poll() is None and pid in descendants(n.popen.pid)
    )
    trial.strike()
    cluster.kill_node(number)
    time.sleep(10)
    cluster.add_node()
    trial.ends(0)
    trial.ended = None
    trial.note = "waits for the new node; fewer ranks meanwhile are not supported"


def descendants(pid: int) -> set[int]:
    """Pids of a process's descendants."""
    import psutil

    return {p.pid for p in psutil.Process(pid).children(recursive=True)}


def driver_killed(trial: Trial) -> None:
    """F7: SIGKILL the driver in scoring, between select and training, in training and in the commit."""
    points = (("scoring", 0), ("select", 1), ("step", 2), ("commit", 3))
    for name, cycle in points:
        process = trial.start(name, cycle, 0)
        trial.at_gate()
        until = time.monotonic() + COMMIT_SECONDS  # the cycle before is committed while this one begins
        while len(trial.ledger.manifests()) < cycle and time.monotonic() < until:
            time.sleep(0.1)
        trial.strike()
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        trial.must(len(trial.ledger.manifests()) == cycle, f"killed in {name} of cycle {cycle}, which counts")
    trial.ended = time.time()
    resubmitted(trial)


def _new_cluster(trial: Trial) -> None:
    """End the cluster, whatever is left of it, and start another."""
    bench = trial.bench
    assert bench.cluster
    assert bench.new_cluster
    bench.cluster.__exit__()
    bench.cluster = bench.new_cluster()


def cluster_gone(trial: Trial) -> None:
    """F8: every node and the driver die; a new cluster, the same storage."""
    process = trial.start("step", 1, 0)
    trial.at_gate()
    trial.strike()
    os.kill(process.pid, signal.SIGKILL)
    _new_cluster(trial)
    process.wait(30)
    trial.ended = time.time()
    resubmitted(trial)


def head_dies(trial: Trial) -> None:
    """F9: the GCS dies; the job must end by itself with a code that says what to do."""
    import psutil

    assert trial.bench.cluster
    process = trial.start("step", 1, 0)
    trial.at_gate()
    gcs = [
        p
        for p in psutil.Process(trial.bench.cluster.nodes[0].popen.pid).children(recursive=True)
        if "gcs_server" in p.name()
    ]
    trial.must(bool(gcs), "no gcs_server was found")
    trial.strike()
    gcs[0].kill()
    trial.go()
    try:
        code = process.wait(120)
    except Exception as error:
        raise Lost("the job still ran 120 s after the head was lost") from error
    finally:
        trial.ended = time.time()
        _new_cluster(trial)
    said = trial.said()
    resubmitted(trial)
    trial.must(code == 7, f"exit code {code} instead of 7: {said}")
    trial.note = f"exit {code}: {said[:100]}; continued on a new cluster"


def stopped(trial: Trial) -> None:
    """F28: SIGTERM in training: the cycle is committed, the lease released."""
    process = trial.start("step", 1, 0)
    trial.at_gate()
    trial.strike()
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    trial.go()
    trial.ends(143)
    trial.must(len(trial.ledger.manifests()) == 2, "the open cycle was not committed")
    storage = Storage(trial.run)
    trial.must(b'"beat": -1' in storage.read(max(storage.list("leases"))), "the lease was not released")
    resubmitted(trial)


def too_much_asked(trial: Trial) -> None:
    """F29: more workers than the cluster will ever have."""
    trial.strike()
    trial.start(flags=("--workers", "8", "--optim.micro-batch", "1", "--cluster.wait-nodes", "5"))
    trial.ends(7)
    trial.must("8 workers" in trial.said() and "the cluster has" in trial.said(), trial.said())
    trial.compared = False
    trial.note = trial.said()[7:140]


def nan_in_a_step(trial: Trial) -> None:
    """F18: one NaN batch on one rank of two: no rank takes that step, and training goes on."""
    trial.start(nan=[1, 1])
    trial.ends(0)
    trial.struck = trial.events("nan")[0]["at"]
    trial.compared = False  # it has a step less
    trial.must("has no finite gradient and is left out" in trial.log(), "the step was not left out")


FAULTS: dict[str, dict[str, Fault]] = {
    "F1": {"worker killed": Fault(worker_killed, "active")},
    "F2": {"worker hangs": Fault(worker_hangs, "active")},
    "F3": {"scorer killed": Fault(scorer_killed, "active")},
    "F5": {"node dies": Fault(node_dies, "active")},
    "F7": {"driver killed four times": Fault(driver_killed, "active")},
    "F8": {"cluster gone": Fault(cluster_gone, "active")},
    "F9": {"head dies": Fault(head_dies, "active", in_place=False)},
    "F10": {
        "refused 10 s": Fault(_with(Rule("refuse", seconds=10)), "active"),
        "no answer 10 s": Fault(_with(Rule("stall", seconds=10)), "active"),
    },
    "F11": {
        "SlowDown 5 s": Fault(_with(Rule("slowdown", seconds=5)), "walk", bucket=True),
        "SlowDown 20 %": Fault(_with(Rule("slowdown", share=0.2, seconds=20)), "active"),
    },
    "F12": {
        "flipped and cut tiles": Fault(_with(Rule("flip", methods=("GET",), path="shards", count=2),
                                             Rule("cut", methods=("GET",), path="shards", count=2)), "walk", bucket=True),
    },
    "F13": {"slow reads": Fault(_with(Rule("slow", seconds=10)), "active")},
    "F14": {"expired 5 s": Fault(expired, "walk", bucket=True, in_place=False)},
    "F18": {"NaN": Fault(nan_in_a_step, "active")},
    "F19": {"disk full": Fault(disk_full, "walk")},
    "F20": {
        "upload dies": Fault(upload_dies, "walk"),
        "no manifest": Fault(killed_between_payload_and_manifest, "walk"),
    },
    "F21": {
        "flipped weights": Fault(flipped_weights, "walk"),
        "truncated optimizer": Fault(truncated_optimizer, "walk"),
        "torn manifest": Fault(torn_manifest, "walk", in_place=False),
    },
    "F22": {
        "two drivers": Fault(two_drivers, "walk"),
        "dead driver": Fault(dead_driver, "walk"),
        "paused driver": Fault(paused_driver, "walk"),
    },
    "F23": {"clocks apart": Fault(clocks_apart, "walk")},
    "F24": {"changed config": Fault(changed_config, "walk")},
    "F25": {"changed pool": Fault(changed_pool, "walk")},
    "F28": {"SIGTERM": Fault(stopped, "active")},
    "F29": {"too much asked": Fault(too_much_asked, "active")},
}  # fmt: skip
"""Number -> variants."""
ORDER = sorted(FAULTS, key=lambda name: int(name[1:]))
assert CYCLES >= 4  # the faults name cycles 0 to 3
