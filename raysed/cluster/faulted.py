"""A process that chaos breaks: the real job, or a walk through the ledger without training, with a trace, a gate and perhaps a mutant.

    python -m raysed.cluster.faulted active --data ... --run ...      jobs/active.py or another, all its processes prepared alike
    python -m raysed.cluster.faulted walk DATA RUN CYCLES [LR]        ledger, lease, store and selection; weights are a chain of hashes

What to do is in RAYSED_FAULTED (JSON): `folder` for trace and gates; `gates`, each a (point, cycle, rank) where one process waits,
once, for whoever wants to break it there; `mutant`, the guard to leave out; `nan` (cycle, rank, first step, times), `file_limit`, `skew`, `salt` (other weights) and
`poison` (a tile that kills the scorer which decodes it), faults that come from inside.
Nothing of this is in the library: it is patched in before the job starts.
"""

import importlib.abc
import importlib.machinery
import itertools
import json
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPEC = "RAYSED_FAULTED"
_now = time.time  # of the trace, whatever a fault does to the clock
GATE = ("taken", "reached", "go")
"""Files of a gate: somebody waits, who it is, and that it may go on."""
GATE_SECONDS = 90.0
"""Until a process that waits at the gate goes on by itself."""


@cache
def spec() -> dict[str, Any]:
    """What this process is to do."""
    return json.loads(os.environ.get(SPEC, "{}"))


def trace(event: str, **fields: Any) -> None:
    """Append an event to the trace, in one write."""
    line = json.dumps({"at": _now(), "pid": os.getpid(), "event": event, **fields}) + "\n"
    with suppress(OSError), open(f"{spec()['folder']}/trace.jsonl", "ab", buffering=0) as file:
        file.write(line.encode())


def point(name: str, cycle: int, rank: int = 0) -> None:
    """A named point of a cycle: wait here if this is a gate and nobody has waited at it yet."""
    gates = spec().get("gates", [])
    if [name, cycle, rank] not in gates:
        return
    number = gates.index([name, cycle, rank])
    taken, reached, go = (Path(spec()["folder"], f"{kind}-{number}") for kind in GATE)
    if not _first(taken):
        return
    trace("gate", point=name, cycle=cycle)
    (partial := reached.with_suffix(".tmp")).write_text(str(os.getpid()))
    os.replace(partial, reached)
    until = time.monotonic() + GATE_SECONDS
    while not go.exists() and time.monotonic() < until:
        time.sleep(0.02)
    trace("left", point=name, cycle=cycle)


def _poisoned(times: int) -> bool:
    """Whether one of so many poisonings, over all processes, is left; takes it."""
    return any(_first(Path(spec()["folder"], f"nan-{k}")) for k in range(times))


def _first(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


# Mutants: each leaves out one guard.


def _manifest_first(ledger: ModuleType) -> None:
    def commit(self: Any, cycle: int, files: dict[str, bytes], record: Callable[[], dict[str, Any]]) -> Any:
        sizes = {n: {"bytes": len(d), "sha256": ledger.digest(d)} for n, d in files.items()}
        manifest = ledger.Manifest(cycle, sizes, record())
        where = ledger.folder(cycle)
        self.storage.create(f"{where}/manifest.json", json.dumps(ledger.asdict(manifest)).encode())
        for name, data in files.items():
            self.storage.write(f"{where}/{name}", data)
        return manifest

    ledger.Ledger.commit = commit


def _no_hash_check(ledger: ModuleType) -> None:
    def read(self: Any, manifest: Any, name: str) -> bytes:
        return self.storage.read(manifest.path(name))

    ledger.Ledger.read = read


def _no_fencing(ledger: ModuleType) -> None:
    """Neither the look at the lease nor the token in the paths, each of which keeps a driver that was overtaken from harm."""
    begin = ledger.Ledger.__init__
    ledger.Ledger._fence = lambda self: None

    def begun(self: Any, storage: Any, epoch: int | None = None, start: int = 1) -> None:
        begin(self, storage, epoch)
        self._by = ""

    ledger.Ledger.__init__ = begun


def _no_blame(scoring: Any) -> None:
    scoring.DEATHS, scoring.PATIENCE = 1 << 30, 60.0


def _no_notice(cycles: ModuleType) -> None:
    cycles.ray.train.get_preemption_info = lambda: None


def _no_budget(cycles: ModuleType) -> None:
    def keep(self: Any, bad: Any) -> None:
        self.quarantine |= {tile.tile_id: tile for tile in bad}

    cycles.Worker._quarantine = keep


def _any_label(store: Any) -> None:
    decode = store._decode
    store._decode = lambda at, part, side, classes: decode(at, part, side, 255)


def _no_retry(storage: Any) -> None:
    storage._ATTEMPTS, storage._PATIENCE = 1, 0.0


def _seed_by_call(randomness: ModuleType) -> None:
    import numpy as np

    calls = itertools.count()
    keyed = randomness.keyed_rng
    for module in [m for n, m in sys.modules.items() if n.startswith("raysed.")]:
        if module.__dict__.get("keyed_rng") is keyed:  # whoever has imported the name already
            module.keyed_rng = lambda *key: np.random.default_rng(next(calls))  # type: ignore[attr-defined]


def _no_reread(store: Any) -> None:
    store.REREADS = 0


MUTANTS: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "manifest-first": ("raysed.io.ledger", _manifest_first),
    "no-hash-check": ("raysed.io.ledger", _no_hash_check),
    "no-fencing": ("raysed.io.ledger", _no_fencing),
    "no-blame": ("raysed.cluster.scoring", _no_blame),
    "no-notice": ("raysed.cluster.cycles", _no_notice),
    "no-budget": ("raysed.cluster.cycles", _no_budget),
    "any-label": ("raysed.io.store", _any_label),
    "no-retry": ("raysed.io.storage", _no_retry),
    "no-reread": ("raysed.io.store", _no_reread),
    "seed-by-call": ("raysed.core.randomness", _seed_by_call),
}
"""Name -> module and the patch applied to it."""


# Trace and gate.


def _watch_storage(storage: ModuleType) -> None:
    """Gates before and after the first object of a cycle is written."""

    def watched(inner: Callable[[Any, str, bytes], Any]) -> Callable[[Any, str, bytes], Any]:
        def put(self: Any, path: str, data: bytes) -> Any:
            if not path.startswith("cycle_"):
                return inner(self, path, data)
            point("payload", int(path[6:10]))
            result = inner(self, path, data)
            point("write", int(path[6:10]))
            return result

        return put

    storage.Storage.write, storage.Storage.create = map(
        watched, (storage.Storage.write, storage.Storage.create)
    )


def _watch_cycles(cycles: ModuleType) -> None:
    """Starts of ranks, steps, tiles and points of the cycle; NaN in a step."""
    at, begin, step, take = cycles.Worker._at, cycles.Worker.__init__, cycles.Learner.step, cycles.Stream.take
    condemn, resume = cycles.Worker._quarantine, cycles.Worker._resume
    rank = cycles.ray.train.get_context

    def began(self: Any, *args: Any) -> None:
        begin(self, *args)
        trace("start", rank=self.rank)

    def resumed(self: Any) -> Any:
        trace("resumed", rank=self.rank)
        return resume(self)

    def reached(self: Any, name: str, cycle: int) -> None:
        at(self, name, cycle)
        if self.rank == 0:
            trace(name, cycle=cycle, run=self.arm.experiment.run)
            point(name, cycle)

    def stepped(self: Any, micro: Any, *, key: Any, **rest: Any) -> Any:
        own, cycle, number = rank().get_world_rank(), key[2], key[3]
        point(f"step {number}", cycle, own)
        at_cycle, at_rank, from_step, times = spec().get("nan", (-1, -1, 0, 0))
        if (cycle, own) == (at_cycle, at_rank) and number >= from_step and _poisoned(times):
            trace("nan", cycle=cycle)
            micro[0].images.fill_(float("nan"))
        result = step(self, micro, key=key, **rest)
        trace("step", rank=own, cycle=cycle, step=number)
        return result

    def taken(self: Any, positions: Any) -> Any:
        rows = take(self, positions)
        if self._name.endswith("-train"):
            trace("tiles", cycle=self._arguments["keys"][1], ids=[r.tile_id for r in rows])
        return rows

    def condemned(self: Any, bad: Any) -> None:
        condemn(self, bad)
        if bad:
            trace("quarantine", rank=self.rank, ids=sorted(self.quarantine))

    cycles.Worker.__init__, cycles.Worker._at, cycles.Worker._quarantine = began, reached, condemned
    cycles.Worker._resume = resumed
    cycles.Learner.step, cycles.Stream.take = stepped, taken


def _watch_scoring(scoring: Any) -> None:
    """A gate in a scorer that holds a chunk, and the tile that kills."""
    score, read = scoring.Scorer.score, scoring.read_tiles

    def decoded(storage: Any, locations: Any, *rest: Any) -> Any:
        ids = [at["tile_id"] for at in locations]
        if spec().get("poison") in ids:
            trace("poisoned", ids=ids)
            os.kill(os.getpid(), signal.SIGKILL)
        return read(storage, locations, *rest)

    def scored(self: Any, weights: Any, version: str, *rest: Any, **more: Any) -> Any:
        seen = self.__dict__.setdefault("versions_seen", [])
        seen += [version] if version not in seen else []
        point("scoring", len(seen) - 1)
        return score(self, weights, version, *rest, **more)

    scoring.Scorer.score, scoring.read_tiles = scored, decoded


def _watch_store(store: Any) -> None:
    """Bad tiles, and how much memory it took to find them bad."""
    decode = store._decode

    def decoded(*args: Any) -> Any:
        before = _forget_peak()
        found = decode(*args)
        if isinstance(found, store.BadTile):
            trace("bad", id=found.tile_id, reason=found.reason, risen=_memory("VmHWM") - before)
        return found

    store._decode = decoded


def _watch_sources(sources: ModuleType) -> None:
    """Files that are refused when they are opened, and how much memory that took."""
    opened = sources.Raster.opened

    @contextmanager
    def watched(self: Any, **rest: Any) -> Iterator[Any]:
        before = _forget_peak()
        try:
            with opened(self, **rest) as raster:
                yield raster
        except sources.BadSource as error:
            trace("refused", path=self.path, reason=str(error), risen=_memory("VmHWM") - before)
            raise

    sources.Raster.opened = watched


def _watch_sweep(sweep: ModuleType) -> None:
    """Processes of trials."""
    setup = sweep.Trial.setup

    def begun(self: Any, config: dict[str, Any], *args: Any, **rest: Any) -> None:
        trace("trial", number=config["trial"])
        setup(self, config, *args, **rest)

    sweep.Trial.setup = begun


def _forget_peak() -> int:
    """Begin the peak of this process's memory anew; the bytes that it has now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    """Bytes that Linux counts under this name."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


class _Patched(importlib.abc.MetaPathFinder):
    """Patches modules right after they are imported, so that a process that never needs one does not pay for it."""

    def __init__(self, patches: Sequence[tuple[str, Callable[[ModuleType], None]]]) -> None:
        self.patches = patches

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        wanted = [patch for module, patch in self.patches if module == name]
        found = PathFinder.find_spec(name, path, target) if wanted else None
        if found is None or found.loader is None:
            return None
        run: Any = found.loader.exec_module

        def patched(module: ModuleType) -> None:
            run(module)
            for patch in wanted:
                patch(module)

        found.loader.exec_module = patched  # type: ignore[method-assign]
        return found


def arm() -> None:
    """Prepare this process; Ray calls it in every worker process of the job before anything else."""
    patches = [
        ("raysed.io.storage", _watch_storage),
        ("raysed.cluster.cycles", _watch_cycles),
        ("raysed.cluster.scoring", _watch_scoring),
        ("raysed.cluster.sweep", _watch_sweep),
        ("raysed.io.sources", _watch_sources),
        ("raysed.io.store", _watch_store),
    ]
    if mutant := spec().get("mutant"):
        patches.append(MUTANTS[mutant])
    for module, patch in patches:
        if module in sys.modules:
            patch(sys.modules[module])
    sys.meta_path.insert(0, _Patched([p for p in patches if p[0] not in sys.modules]))
    if skew := spec().get("skew"):
        real = time.time
        time.time = lambda: real() + skew  # the clock of this process


def _recorded(record: dict[str, Any], cycle: int) -> dict[str, Any]:
    """The record of a walk's cycle, whose files are written by now."""
    point("commit", cycle)
    return record


def walk(data: str, run: str, cycles: int, lr: float = 1e-3) -> None:
    """A run without networks: everything that the ledger promises, in a second.

    Weights of a cycle follow from those before and the bytes of the selected tiles, so a wrong resume or a wrong tile shows.
    """
    import numpy as np
    import pyarrow as pa

    from raysed.config import Experiment, OptimConfig, SelectConfig
    from raysed.core import metrics
    from raysed.errors import DataError
    from raysed.io.ledger import Lease, Ledger, choose, config_hash, selection_table, table_bytes
    from raysed.io.storage import Storage, digest
    from raysed.io.store import BadTile, Store, read_tiles

    select = SelectConfig(strategy="power-entropy", tiles=24)
    experiment = Experiment(run=run, cycles=cycles, select=select, optim=OptimConfig(lr=lr))
    store = Store.open(data)
    index = store.split("train")
    with Lease(Storage(run)) as lease:
        ledger = Ledger(Storage(run), lease.epoch)
        ledger.open(experiment, store.dataset.content_hash)
        last = ledger.resume_point(partial(print, flush=True))
        weights = ledger.read(last, "model.safetensors") if last else b"begin"
        moments = ledger.read(last, "optimizer.safetensors") if last else b"begin"
        trace("start", rank=0)
        for cycle in range(last.cycle + 1 if last else 0, cycles):
            rng = np.random.default_rng(list(weights[:32]))
            scores = pa.table({"tile_id": index["tile_id"], "entropy": rng.random(len(index))})
            chosen = choose(experiment, cycle, scores=scores, index=index, state={}, excluded=set())
            point("train", cycle)
            if limit := cycle == 2 and spec().get("file_limit"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                trace("gate", point="limit", cycle=cycle)
            tiles = read_tiles(store.storage, store.locations(chosen.tile_ids), store.dataset.tile_size)
            for tile in tiles:
                if isinstance(tile, BadTile):
                    raise DataError(f"tile {tile.tile_id}: {tile.reason}")
            trace("tiles", cycle=cycle, ids=chosen.tile_ids)
            trace("step", rank=0, cycle=cycle, step=0)
            before = digest(weights) if last or cycle else None
            seen = b"".join(t.image.tobytes() for t in tiles)  # type: ignore[union-attr]
            if cycle == 2:
                seen += spec().get("salt", "").encode()  # as if its sums had been added in another order
            weights = bytes.fromhex(digest(weights + moments + seen)) * 2048
            moments = bytes.fromhex(digest(weights + moments)) * 2048
            counts = np.array([[8, 1], [cycle, 5]])
            files = {
                "model.safetensors": weights, "optimizer.safetensors": moments, "scores.parquet": table_bytes(scores),
                "selected.parquet": table_bytes(selection_table(chosen)),
                "state.json": json.dumps({"strategy": {}, "excluded": [], "quarantine": []}).encode(),
            }  # fmt: skip
            record = {
                "config_hash": config_hash(experiment), "scoring_weights": before, "train": {"loss": 1 / (cycle + 1)},
                "val": {**metrics.scores(counts, ["field", "road"]), "counts": counts.tolist()},
                "tiles": len(chosen.tile_ids), "nodes": {"visit": {"walk": len(tiles)}},
            }  # fmt: skip
            ledger.commit(cycle, files, partial(_recorded, record, cycle))
            ledger.prune(cycle)
            trace("committed", cycle=cycle)


def main(argv: Sequence[str]) -> None:
    """Run the job or the walk with everything patched in."""
    arm()
    job, *rest = argv
    if job == "walk":
        from raysed.errors import RaysedError

        try:
            walk(rest[0], rest[1], int(rest[2]), *map(float, rest[3:]))
        except RaysedError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        return
    import ray

    setup = {"worker_process_setup_hook": "raysed.cluster.faulted.arm", "env_vars": {SPEC: os.environ[SPEC]}}
    ray.init = partial(ray.init, runtime_env=setup)  # type: ignore[assignment]
    sys.argv = [f"{job}.py", *rest]
    runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")


def forked(argv: Sequence[str], environment: dict[str, str], log: str) -> None:
    """`main` in a process that was forked from one where the imports are done."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.clear()
    os.environ.update(environment)
    spec.cache_clear()
    main(argv)


if __name__ == "__main__":
    # under its own name, by which workers find what Ray pickles
    importlib.import_module("raysed.cluster.faulted").main(sys.argv[1:])
