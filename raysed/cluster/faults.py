"""The faults that `jobs/chaos.py` knows, by the numbers of the README."""

import json
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raysed.cluster.chaos import (
    CYCLES,
    FAST_SIGNS,
    FREE_SECONDS,
    SIDE,
    Fault,
    Lost,
    Trial,
    small_images,
    small_store,
)
from raysed.cluster.faultproxy import Rule
from raysed.cluster.local import LocalCluster
from raysed.cluster.scoring import DEATHS
from raysed.core.plan import plan
from raysed.io import codec
from raysed.io.ledger import DEAD_AFTER, Ledger, folder, verify
from raysed.io.storage import Storage, digest
from raysed.io.store import Store, as_written

COMMIT_SECONDS = 10.0
"""How long the commit of a small run may take."""
NOTICE_SECONDS = 30.0
"""Between the notice that a node will go and its end; AWS gives 120."""
EVERY_STEPS = 2
"""Steps between the commits inside a cycle, where there are any."""
HEARD_SECONDS = 3.0
"""For a notice to reach the workers."""
ORDERED = (1, 1, 8, 4)
"""Seed, cycle, batch and micro-batch of the plan of a run's second cycle."""
BOMB_BYTES = 50 << 20
"""Memory that refusing a decompression bomb may take."""
CALLS = (
    *(f"NodeManagerService.grpc_client.{n}" for n in ("RequestWorkerLease", "ReturnWorkerLease", "PinObjectIDs")),
    *(f"NodeManagerService.grpc_client.{n}" for n in ("PrepareBundleResources", "CommitBundleResources")),
    *(f"ObjectManagerService.grpc_client.{n}" for n in ("Pull", "Push")),
    *(f"CoreWorkerService.grpc_client.{n}" for n in ("GetObjectStatus", "UpdateObjectLocationBatch")),
    *(f"ray::rpc::ActorInfoGcsService.grpc_client.{n}" for n in ("RegisterActor", "CreateActor", "GetActorInfo")),
    *(f"ray::rpc::InternalKVGcsService.grpc_client.{n}" for n in ("InternalKVGet", "InternalKVPut")),
    *(f"ray::rpc::PlacementGroupInfoGcsService.grpc_client.{n}" for n in ("CreatePlacementGroup", "GetPlacementGroup")),
    "ray::rpc::NodeInfoGcsService.grpc_client.GetAllNodeInfo",
)  # fmt: skip
"""Calls between Ray's processes that Ray says it repeats when they fail; a call of an actor is not among them."""


def resubmitted(trial: Trial, code: int = 0, flags: tuple[str, ...] = ()) -> None:
    """The same command again."""
    trial.start(flags=flags)
    trial.ends(code)


# The walk through the ledger: storage and state.


def upload_dies(trial: Trial) -> None:
    """F20: killed after the first file of a cycle."""
    trial.start(("write", 2, 0))
    trial.kill(trial.at_gate())
    trial.ends(-signal.SIGKILL)
    half = verify(trial.ledger, Store.open(trial.bench.data).split("train"))
    trial.must(not half, f"a half-written cycle counts: {half[:1]}")
    trial.must(len(trial.ledger.manifests()) == 2, "the cycles before are not there")
    resubmitted(trial)


def killed_between_payload_and_manifest(trial: Trial) -> None:
    """F20: all files are there, the manifest is not."""
    trial.start(("commit", 2, 0))
    trial.kill(trial.at_gate())
    trial.ends(-signal.SIGKILL)
    trial.must(len(trial.ledger.manifests()) == 2, "a cycle without manifest counts")
    resubmitted(trial)


def _damage(trial: Trial, name: str, change: Callable[[bytes], bytes]) -> None:
    trial.start(("train", 3, 0))
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
    first, second = trial.start(("train", 1, 0)), trial.start(("train", 1, 0))
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
    trial.start(("train", 1, 0))
    trial.kill(trial.at_gate())
    trial.ends(-signal.SIGKILL)
    began = time.monotonic()
    resubmitted(trial)
    trial.must(time.monotonic() - began < DEAD_AFTER, "the lease of a dead process was waited for")


def paused_driver(trial: Trial) -> None:
    """F22: a driver stopped for longer than its lease lives, woken while another holds the run."""
    first = trial.start(("train", 2, 0))
    pid = trial.at_gate()
    os.kill(pid, signal.SIGSTOP)
    trial.strike()
    second = trial.start(("train", 2, 0))  # takes over, and stands before the same cycle
    trial.at_gate()
    trial.go()
    os.kill(pid, signal.SIGCONT)
    trial.ends(3, first)
    trial.ends(0, second)


def overtaken_before_payload(trial: Trial) -> None:
    """F22: a driver stopped after it has seen that the run is its own and before it writes; another runs to the end meanwhile."""
    first = trial.start(("payload", 2, 0), salt="the same cycle in other bits, as a GPU may give it")
    pid = trial.at_gate()
    os.kill(pid, signal.SIGSTOP)
    trial.strike()
    second = trial.start()
    trial.ends(0, second)
    trial.go()
    os.kill(pid, signal.SIGCONT)
    trial.ends(3, first)


def clocks_apart(trial: Trial) -> None:
    """F23: the first driver's clock is an hour ahead, its successor's an hour behind."""
    trial.start(("train", 2, 0), skew=3600)
    pid = trial.at_gate()
    trial.kill(pid)
    trial.struck = time.time()
    trial.ends(-signal.SIGKILL)
    trial.start(skew=-3600)
    trial.ends(0)
    trial.note = "Python's clock; no faketime here"


def changed_config(trial: Trial) -> None:
    """F24: another learning rate on resume."""
    trial.start(("train", 2, 0))
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
    trial.start(("train", 2, 0))
    trial.kill(trial.at_gate())
    trial.ends(-signal.SIGKILL)
    other = f"{trial.folder}/other"
    source, target = Storage(trial.bench.data), Storage(other)
    for path in source.list():
        target.write(path, source.read(path))
    fields = json.loads(target.read("dataset.json"))
    target.write("dataset.json", json.dumps({**fields, "content_hash": "0" * 64}).encode())
    trial.data = other
    trial.start()
    trial.ends(2)
    trial.must("data set:" in trial.said(), f"the other data set is not named: {trial.said()}")
    target.write("dataset.json", json.dumps(fields).encode())
    for path in target.list("shards"):
        data = target.read(path)
        target.write(path, data[:5000] + bytes(len(data) - 6000) + data[-1000:])
    trial.start()
    trial.ends(4)
    trial.must("sha256" in trial.said(), f"replaced bytes were not found: {trial.said()}")
    trial.data = trial.bench.data
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
        trial.start(("train" if trial.kind == "walk" else "select", 1, 0))
        trial.at_gate()
        before = len(trial.bench.proxy.injected)
        trial.strike()
        for rule in rules:
            trial.bench.proxy.add(rule)
        trial.go()
        trial.ends(0)
        trial.ended = None
        if (
            rules[0].kind == "refuse"
        ):  # a closed port counts nothing, but the open cycle cannot be committed before it opens
            committed = min(e["at"] for e in trial.events("commit", "committed") if e["cycle"] >= 1)
            trial.must(
                committed > (trial.struck or 0) + (rules[0].seconds or 0), "nobody needed the store meanwhile"
            )
        else:
            trial.must(len(trial.bench.proxy.injected) > before, "no request was broken")
        trial.must(len(trial.events("start")) <= (1 if trial.kind == "walk" else 2), "workers were restarted")

    return act


def expired(trial: Trial) -> None:
    """F14: credentials refused for five seconds."""
    assert trial.bench.proxy
    trial.start(("train", 1, 0))
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
    trial.start(("step 1", 1, 1))
    trial.kill(trial.at_gate())
    trial.ends(0)
    trial.ended = None


def worker_killed_inside(trial: Trial) -> None:
    """F1: SIGKILL rank 1 one step after a commit inside the cycle: no more than the steps since then are taken again."""
    done = EVERY_STEPS
    trial.start((f"step {done + 1}", 1, 1))
    pid = trial.at_gate()
    storage, path = Storage(trial.run), f"{folder(1, done)}/manifest.json"
    trial.wait(lambda: storage.exists(path), "there was no commit inside the cycle", every=0.2)
    trial.kill(pid)
    trial.ends(0)
    trial.ended = None
    trial.inside[1] = done
    lost = trial.judged("", "survived", "").steps_lost
    trial.must(lost <= EVERY_STEPS, f"{lost} steps were taken again")
    trial.must(f"and step {done} of cycle 2" in trial.log(), "the commit was not continued from")


def worker_hangs(trial: Trial) -> None:
    """F2: SIGSTOP rank 1 in its second step."""
    trial.start(("step 1", 1, 1))
    pid = trial.at_gate()
    trial.strike()
    os.kill(pid, signal.SIGSTOP)
    trial.go()
    trial.ends(0)
    trial.ended = None
    again = [e["at"] for e in trial.events("start") if e["at"] > (trial.struck or 0)]
    trial.must(bool(again), "the group was not restarted")
    trial.note = f"worker health timeout {FAST_SIGNS['RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S']} s here"


def scorer_killed(trial: Trial) -> None:
    """F3: SIGKILL a scorer that holds a chunk."""
    trial.start(("scoring", 1, 0))
    trial.kill(trial.at_gate())
    trial.ends(0)
    trial.ended = None
    trial.must(len(trial.events("start")) == 2, "training workers were restarted for a scorer")


def node_dies(trial: Trial) -> None:
    """F5: a node with a rank and a scorer on it dies; another comes ten seconds later."""
    cluster = trial.bench.cluster
    assert cluster
    trial.start(("step 1", 1, 1))
    pid = trial.at_gate()
    number = _node_of(cluster, pid)
    trial.strike()
    cluster.kill_node(number)
    time.sleep(10)
    cluster.add_node()
    trial.ends(0)
    trial.ended = None
    trial.note = "waits for the new node; with --cluster.min-workers it would go on without"


def _node_of(cluster: LocalCluster, pid: int) -> int:
    """Number of the node that a process is on."""
    return next(
        i for i, n in enumerate(cluster.nodes) if n.popen.poll() is None and pid in descendants(n.popen.pid)
    )


def descendants(pid: int) -> set[int]:
    """Pids of a process's descendants."""
    import psutil

    return {p.pid for p in psutil.Process(pid).children(recursive=True)}


def notice_then_death(trial: Trial) -> None:
    """F6: rank 1's node has notice while it trains; it dies after the commit that this leads to, before the deadline."""
    from raysed.cluster.cycles import NOTICE_STEPS

    cluster = trial.bench.cluster
    assert cluster
    trial.start(("step 1", 1, 1), (f"step {NOTICE_STEPS}", 1, 1))
    number = _node_of(cluster, trial.at_gate())
    trial.strike()
    cluster.drain_node(cluster.node_ids[number], NOTICE_SECONDS)
    time.sleep(HEARD_SECONDS)
    trial.go()
    trial.at_gate(1)
    storage, path = Storage(trial.run), f"{folder(1, NOTICE_STEPS)}/manifest.json"
    trial.wait(lambda: storage.exists(path), "the notice led to no commit", every=0.2)
    before = (trial.struck or 0) + NOTICE_SECONDS - time.time()
    trial.must(before > 0, f"the commit came {-before:.1f} s after the deadline")
    cluster.kill_node(number)
    cluster.add_node()
    trial.ends(0)
    trial.ended = None
    said = f"continues after cycle 1 of {CYCLES} and step {NOTICE_STEPS} of cycle 2"
    trial.must(said in trial.log(), "the commit was not continued from")
    trial.inside[1] = NOTICE_STEPS
    lost = trial.judged("", "survived", "").steps_lost
    trial.must(not lost, f"{lost} steps were taken again")
    groups = len({e["pid"] for e in trial.events("start")}) // 2
    trial.must(groups == 2, f"{groups} groups of workers instead of 2")
    trial.note = (
        f"commit {before:.0f} s before the deadline; later steps would be lost back to the last commit"
    )


def poison(trial: Trial) -> None:
    """F4: a tile whose bytes kill every scorer that decodes it."""
    tile = Store.open(trial.data).split("train")["tile_id"].to_pylist()[40]
    trial.compared = False  # it has a tile less
    trial.start(poison=tile)
    trial.ends(0)
    deaths = trial.events("poisoned")
    trial.must(bool(deaths), "no scorer died")
    trial.struck, trial.ended = deaths[0]["at"], None
    trial.must(len(deaths) <= 2 * DEATHS, f"{len(deaths)} scorers died")
    _skipped(trial, [tile], after=0)
    trial.must(len(trial.events("start")) == 2, "training workers were restarted for a tile")
    trial.note = f"{len(deaths)} deaths, then quarantined"


def _skipped(trial: Trial, tiles: list[str], after: int) -> None:
    """These tiles and no others are quarantined, and from a cycle on no rank has trained on them.

    Raises:
        Lost: they are not.
    """
    for manifest in trial.ledger.manifests()[after:]:
        state = json.loads(trial.ledger.read(manifest, "state.json"))
        found = sorted(b["tile_id"] for b in state["quarantine"])
        trial.must(
            found == sorted(tiles), f"cycle {manifest.cycle}: {found} are quarantined, not {sorted(tiles)}"
        )
    visited = [e for e in trial.events("tiles") if e["cycle"] > after and set(e["ids"]) & set(tiles)]
    trial.must(
        not visited, f"quarantined tiles were visited in cycle {visited[0]['cycle']}" if visited else ""
    )


def _spoil(trial: Trial) -> list[str]:
    """Before cycle 1 trains, the first tile of each rank's share of it changes in a copy of the store; which they are."""
    calm, trial.data = Ledger(Storage(trial.calm())), f"{trial.run}-tiles"
    source, copy = Storage(trial.bench.data), Storage(trial.data)
    for path in source.list():
        copy.write(path, source.read(path))
    chosen = calm.table(calm.manifests()[1], "selected.parquet")["tile_id"].to_pylist()
    order = plan(chosen, *ORDERED)
    tiles = [order.order[order.share(rank, 2)[0]] for rank in range(2)]
    trial.start(("score", 1, 0))  # rank 1 waits for what rank 0 will select; scorers hold their tiles already
    trial.at_gate()
    trial.strike()
    for at in Store.open(trial.data).locations(tiles):
        data = copy.read(at["shard"])
        cut = at["image_offset"] + 30
        copy.write(at["shard"], data[:cut] + bytes(b ^ 255 for b in data[cut : cut + 9]) + data[cut + 9 :])
    trial.go()
    return tiles


def corrupt_under_budget(trial: Trial) -> None:
    """F15: two tiles change while the run trains; three may be bad."""
    tiles = _spoil(trial)
    trial.compared = False  # they are black in cycle 1, and left out of those after
    trial.ends(0)
    trial.ended = None
    _skipped(trial, tiles, after=1)
    told = {e["rank"]: e["ids"] for e in trial.events("quarantine")}
    trial.must(told == {0: sorted(tiles), 1: sorted(tiles)}, f"ranks disagree: {told}")
    trial.must(len(trial.events("start")) == 2, "workers were restarted for bad tiles")


def corrupt_above_budget(trial: Trial) -> None:
    """F15: the same where none may be bad."""
    _spoil(trial)
    trial.ends(4)
    trial.must("tiles are unusable" in trial.said(), f"the tiles are not named: {trial.said()}")
    trial.must(len(trial.ledger.manifests()) == 1, "the cycle before is not there, or the spoilt one counts")
    trial.note = f"exit 4: {trial.said()[7:90]}; repaired, the same command continued"
    trial.data = trial.bench.data
    resubmitted(trial)


def _bad_label(trial: Trial, label: bytes, reason: str) -> dict[str, Any]:
    """A run on a store with one label like this; what was found of it."""
    tile = Store.open(trial.data).split("train")["tile_id"].to_pylist()[40]
    trial.data, trial.compared = f"{trial.run}-tiles", False
    small_store(trial.data, {tile: label})
    trial.start()
    trial.ends(0)
    found = trial.events("bad")
    trial.must(bool(found), "nobody has found it")
    trial.struck, trial.ended = found[0]["at"], None
    trial.must(reason in found[0]["reason"], f"found something else: {found[0]['reason']}")
    _skipped(trial, [tile], after=0)
    return found[0]


def no_class_in_a_store(trial: Trial) -> None:
    """F16: a stored label of 8 classes holds 9."""
    label = np.ones((SIDE, SIDE), np.uint8)
    label[3, 4] = 9
    _bad_label(trial, codec.encode_label(label), "its label holds 9, the store has 8 classes")


def bomb_in_a_store(trial: Trial) -> None:
    """F17: a stored label that says it has 900 million pixels."""
    found = _bad_label(trial, bomb(30_000), "its header says 30000 x 30000")
    _small(trial, found["risen"])


def _small(trial: Trial, risen: int) -> None:
    trial.must(risen < BOMB_BYTES, f"it took {risen >> 20} MiB to refuse it")
    trial.note = f"refused from its header, memory rose by {risen / 2**20:.1f} MiB"


def bomb(side: int) -> bytes:
    """A PNG of 45 bytes that says it has side x side pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT")
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _prepared(trial: Trial, spoilt: dict[str, bytes], reasons: dict[str, str]) -> list[dict[str, Any]]:
    """Prepare a store of images of which some are spoilt, below the budget and above it; what was refused.

    Args:
        trial: this one.
        spoilt: path -> bytes.
        reasons: path of what must be refused -> what must be said of it.
    """
    trial.data = f"{trial.run}-images"
    expected = small_images(trial.data, spoilt)
    trial.start(flags=("--bad-budget", "0.05"))
    trial.ends(4)
    trial.must("sources are unusable" in trial.said(), f"the sources are not named: {trial.said()}")
    trial.must(not Storage(trial.run).exists("dataset.json"), "a store above the budget is finished")
    resubmitted(trial, flags=("--bad-budget", "0.5"))
    refused = trial.events("refused")
    for path, reason in reasons.items():
        trial.must(
            any(e["path"] == path and reason in e["reason"] for e in refused),
            f"{path} was not refused: {refused}",
        )
    trial.struck, trial.ended = min(e["at"] for e in refused), None
    bad = {path.rpartition("/")[2].removesuffix(".png") for path in reasons}
    index = as_written(Store.open(trial.run).index)
    found = dict(zip(index["tile_id"].to_pylist(), index["sha256"].to_pylist(), strict=True))
    wanted = {t: h for t, h in expected.items() if t.rpartition("-")[0] not in bad}
    trial.must(found == wanted, "the store is not that of the good images")
    return refused


def no_class_in_a_source(trial: Trial) -> None:
    """F16: label files with codes that are no class, 9 and 255."""
    label = np.ones((2 * SIDE, 2 * SIDE), np.uint8)
    codes = {f"labels/small_{code % 7}.png": code for code in (9, 255)}
    spoilt = {path: codec.encode_label(np.where(np.eye(2 * SIDE, dtype=bool), code, label).astype(np.uint8)) for path, code in codes.items()}  # fmt: skip
    _prepared(trial, spoilt, {path: f"holds label code {code}" for path, code in codes.items()})
    trial.note = "exit 4 above the budget; below it the store is that of the good images"


def bomb_as_a_source(trial: Trial) -> None:
    """F17: an image file of 45 bytes that says it has 900 million pixels."""
    refused = _prepared(trial, {"images/small_3.png": bomb(30_000)}, {"images/small_3.png": "has 30000 x 30000 pixels"})  # fmt: skip
    _small(trial, max(e["risen"] for e in refused))


def _trials(trial: Trial) -> dict[tuple[int, int], str]:
    """(trial, cycle) of a sweep -> hash of its manifest, of those committed."""
    runs = {k: Storage(f"{trial.run}/trial-{k:04d}") for k in range(2)}
    return {
        (k, m.cycle): digest(run.read(f"{m.folder}/manifest.json")) for k, run in runs.items() for m in Ledger(run).manifests()
    }  # fmt: skip


def _swept_on(trial: Trial) -> None:
    """The cluster is free again, and the same command trains what is missing and nothing else."""
    assert trial.bench.cluster
    free = trial.bench.cluster.free_after(FREE_SECONDS)
    trial.must(free is not None, f"something is still held {FREE_SECONDS:.0f} s after the job")
    before, commits = _trials(trial), len(trial.events("commit"))
    resubmitted(trial)
    after = _trials(trial)
    trial.must(before.items() <= after.items(), "a committed cycle was trained again")
    again = len(trial.events("commit")) - commits
    trial.must(again == len(after) - len(before), f"{again} cycles were trained for {len(after) - len(before)} missing ones")  # fmt: skip
    trial.must("all resources are free" in trial.log(), "not all resources came back after the sweep")
    trial.must(trial.bench.cluster.free_after(FREE_SECONDS) is not None, "the sweep left something behind")
    trial.note = f"all free {free:.0f} s after the death; {again} cycles were left"


def sweep_killed(trial: Trial) -> None:
    """F26: SIGKILL the driver of a sweep while a trial trains its second cycle."""
    process = trial.start(("train", 1, 0))
    trial.at_gate()
    trial.wait(lambda: _trials(trial), "the cycle before was not committed", every=0.5)
    trial.strike()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    trial.ended = time.time()
    _swept_on(trial)


def trial_killed(trial: Trial) -> None:
    """F26: SIGKILL the process of a trial that trains its second cycle; the others go on."""
    trial.start(("train", 1, 0))
    pid = trial.at_gate()
    [run] = {e["run"] for e in trial.events("train") if e["pid"] == pid}
    victims = [e["pid"] for e in trial.events("trial") if e["number"] == int(run[-4:])]
    trial.kill(victims[-1])
    trial.go()
    trial.ends(1)
    trial.must("the same command tries them again" in trial.said(), f"no remedy: {trial.said()}")
    _swept_on(trial)


def calls_lost(trial: Trial) -> None:
    """F27: a tenth of the requests and a twentieth of the answers of Ray's own calls get lost, from the start of the cluster on.

    Ray may then keep a reservation for nobody: the job says that there is no room, and the same command goes on from another cluster.
    """
    trial.calm()
    loss = {"num_failures": -1, "req_failure_prob": 10, "resp_failure_prob": 5, "in_flight_failure_prob": 0}
    _new_cluster(trial, RAY_testing_rpc_failure=json.dumps(dict.fromkeys(CALLS, loss)))
    assert trial.bench.cluster
    logs = trial.bench.cluster.session
    try:
        trial.start(("select", 1, 0))
        try:
            trial.at_gate()
        except Lost:
            trial.strike()
            trial.ends(7)
            trial.note, trial.in_place = f"exit 7: {trial.said()[7:]}; continued on a new cluster", False
            _new_cluster(trial)
            resubmitted(trial)
            return
        before = _injected(logs)
        trial.strike()
        trial.go()
        trial.ends(0)
        trial.ended = None
        lost = _injected(logs) - before
    finally:
        _new_cluster(trial)
    trial.must(lost > 0, "no call was lost while cycles ran")
    trial.note = f"{before} calls lost until the run trained, {lost} while it did"


def _injected(session: Path) -> int:
    """Calls that Ray's processes say were lost on purpose."""
    logs = [p for p in session.glob("session_*/logs/*") if p.is_file() and not p.parents[1].is_symlink()]
    return sum(p.read_text(errors="replace").count("Inject RPC") for p in logs)


def driver_killed(trial: Trial) -> None:
    """F7: SIGKILL the driver in scoring, between select and training, in training and in the commit."""
    points = (("scoring", 0), ("select", 1), ("step 1", 2), ("commit", 3))
    for name, cycle in points:
        process = trial.start((name, cycle, 0))
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


def _new_cluster(trial: Trial, **more: str) -> None:
    """End the cluster, whatever is left of it, and start another, with more in its environment."""
    bench = trial.bench
    assert bench.cluster
    assert bench.new_cluster
    bench.cluster.__exit__()
    bench.cluster = bench.new_cluster(more)


def cluster_gone(trial: Trial) -> None:
    """F8: every node and the driver die; a new cluster, the same storage."""
    process = trial.start(("step 1", 1, 0))
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
    process = trial.start(("step 1", 1, 0))
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
    process = trial.start(("step 1", 1, 0))
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
    trial.must("8 x (0.6 CPU)" in trial.said() and "the cluster has" in trial.said(), trial.said())
    trial.compared = False
    trial.note = trial.said()[7:140]


def nan_in_a_step(trial: Trial) -> None:
    """F18: one NaN batch on one rank of two: no rank takes that step, and training goes on."""
    trial.start(nan=[1, 1, 1, 1])
    trial.ends(0)
    trial.struck = trial.events("nan")[0]["at"]
    trial.compared = False  # it has a step less
    trial.must("has no finite gradient and is left out" in trial.log(), "the step was not left out")


def nan_in_a_row(trial: Trial) -> None:
    """F18: more NaN batches in a row than may be left out, once: back to the last commit, at half the rate, and on to the end."""
    from raysed.cluster.cycles import SKIPPED_STEPS

    trial.start(nan=[1, 1, 1, SKIPPED_STEPS + 1])
    trial.ends(0)
    trial.struck, trial.ended = trial.events("nan")[0]["at"], None
    trial.compared = False  # half the learning rate
    trial.must("half the learning rate" in trial.log(), "the run did not go back")
    trial.must(len(trial.ledger.manifests()) == CYCLES, "it did not reach its end")


def nan_for_ever(trial: Trial) -> None:
    """F18: the same again after the run has gone back: it ends with code 5 and names the tiles."""
    from raysed.cluster.cycles import SKIPPED_STEPS

    trial.start(nan=[1, 1, 1, 2 * (SKIPPED_STEPS + 1)])
    trial.ends(5)
    trial.struck = trial.events("nan")[0]["at"]
    trial.must(len(trial.ledger.manifests()) == 1, "the last good cycle does not stand alone")
    named = json.loads(Storage(trial.run).read("diverged.json"))["tile_ids"]
    begun = {t for e in trial.events("tiles") if e["cycle"] == 1 for t in e["ids"]}
    trial.must(bool(named) and set(named) <= begun, f"other tiles are named than those of the steps: {named}")
    trial.note = f"exit 5, {len(named)} tiles named; without the NaN the same command continued"
    resubmitted(trial)


FAULTS: dict[str, dict[str, Fault]] = {
    "F1": {
        "worker killed": Fault(worker_killed, "active"),
        "worker killed, commits inside": Fault(
            worker_killed_inside, "active", ("--select.tiles", "48", "--cluster.commit-every-steps", str(EVERY_STEPS))
        ),
    },
    "F2": {"worker hangs": Fault(worker_hangs, "active")},
    "F3": {"scorer killed": Fault(scorer_killed, "active")},
    "F4": {"poison tile": Fault(poison, "active")},
    "F5": {"node dies": Fault(node_dies, "active")},
    "F6": {"notice, then death": Fault(notice_then_death, "active", ("--select.tiles", "96"))},
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
    "F15": {
        "corrupt, under budget": Fault(corrupt_under_budget, "active", ("--data.bad-tile-budget", "0.02")),
        "corrupt, above budget": Fault(corrupt_above_budget, "active", ("--data.bad-tile-budget", "0")),
    },
    "F16": {
        "label of no class, source": Fault(no_class_in_a_source, "prepare", ("--tile", str(SIDE))),
        "label of no class, store": Fault(no_class_in_a_store, "active"),
    },
    "F17": {
        "bomb, source": Fault(bomb_as_a_source, "prepare", ("--tile", str(SIDE))),
        "bomb, store": Fault(bomb_in_a_store, "active"),
    },
    "F18": {
        "NaN": Fault(nan_in_a_step, "active"),
        "NaN in a row": Fault(nan_in_a_row, "active", ("--select.tiles", "48")),
        "NaN for ever": Fault(nan_for_ever, "active", ("--select.tiles", "48"), in_place=False),
    },
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
        "overtaken before it writes": Fault(overtaken_before_payload, "walk"),
    },
    "F23": {"clocks apart": Fault(clocks_apart, "walk")},
    "F24": {"changed config": Fault(changed_config, "walk")},
    "F25": {"changed pool": Fault(changed_pool, "walk")},
    "F26": {
        "sweep's driver killed": Fault(sweep_killed, "tune"),
        "trial killed": Fault(trial_killed, "tune"),
    },
    "F27": {"calls lost": Fault(calls_lost, "active")},
    "F28": {"SIGTERM": Fault(stopped, "active")},
    "F29": {"too much asked": Fault(too_much_asked, "active")},
}  # fmt: skip
"""Number -> variants."""
ORDER = sorted(FAULTS, key=lambda name: int(name[1:]))
assert CYCLES >= 4  # the faults name cycles 0 to 3
