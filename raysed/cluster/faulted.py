"""A process that chaos breaks: the real job, or a walk through the ledger without training, with a trace, a gate and perhaps a mutant.

    python -m raysed.cluster.faulted active --data ... --run ...      jobs/active.py, its workers and scorers prepared alike
    python -m raysed.cluster.faulted walk DATA RUN CYCLES [LR]        ledger, lease, store and selection; weights are a chain of hashes

What to do is in RAYSED_FAULTED (JSON): `folder` for trace and gate; `gate` (point, cycle, rank) where one process waits, once, for
whoever wants to break it there; `mutant`, the guard to leave out; `nan`, `file_limit` and `skew`, faults that come from inside.
Nothing of this is in the library: it is patched in before the job starts.
"""

import importlib.abc
import importlib.machinery
import itertools
import json
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPEC = "RAYSED_FAULTED"
_now = time.time  # of the trace, whatever a fault does to the clock
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
    """A named point of a cycle: wait here if this is the gate and nobody has waited yet."""
    if spec().get("gate") != [name, cycle, rank]:
        return
    folder = Path(spec()["folder"])
    try:
        os.close(os.open(folder / "taken", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    trace("gate", point=name, cycle=cycle)
    (folder / "reached.tmp").write_text(str(os.getpid()))
    os.replace(folder / "reached.tmp", folder / "reached")
    until = time.monotonic() + GATE_SECONDS
    while not (folder / "go").exists() and time.monotonic() < until:
        time.sleep(0.02)
    trace("left", point=name, cycle=cycle)


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
    ledger.Ledger._fence = lambda self: None


def _no_retry(storage: Any) -> None:
    storage._ATTEMPTS = 1


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
    "no-retry": ("raysed.io.storage", _no_retry),
    "no-reread": ("raysed.io.store", _no_reread),
    "seed-by-call": ("raysed.core.randomness", _seed_by_call),
}
"""Name -> module and the patch applied to it."""


# Trace and gate.


def _watch_storage(storage: ModuleType) -> None:
    """A gate after the first object of a cycle was written."""

    def watched(inner: Callable[[Any, str, bytes], Any]) -> Callable[[Any, str, bytes], Any]:
        def put(self: Any, path: str, data: bytes) -> Any:
            result = inner(self, path, data)
            if path.startswith("cycle_"):
                point("write", int(path[6:10]))
            return result

        return put

    storage.Storage.write, storage.Storage.create = map(
        watched, (storage.Storage.write, storage.Storage.create)
    )


def _watch_cycles(cycles: ModuleType) -> None:
    """Starts of ranks, steps, tiles and points of the cycle; NaN in a step."""
    at, begin, step, take = cycles.Worker._at, cycles.Worker.__init__, cycles.Learner.step, cycles.Stream.take
    rank = cycles.ray.train.get_context

    def began(self: Any, *args: Any) -> None:
        begin(self, *args)
        trace("start", rank=self.rank)

    def reached(self: Any, name: str, cycle: int) -> None:
        at(self, name, cycle)
        if self.rank == 0:
            trace(name, cycle=cycle)
            point(name, cycle)

    def stepped(self: Any, micro: Any, *, key: Any, **rest: Any) -> Any:
        own, cycle, number = rank().get_world_rank(), key[2], key[3]
        if number == 1:
            point("step", cycle, own)
        if spec().get("nan") == [cycle, own] and number == 1 and _first("nan"):
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

    cycles.Worker.__init__, cycles.Worker._at = began, reached
    cycles.Learner.step, cycles.Stream.take = stepped, taken


def _watch_scoring(scoring: ModuleType) -> None:
    """A gate in a scorer that holds a chunk."""
    score = scoring.Scorer.score

    def scored(self: Any, weights: Any, version: str, *rest: Any) -> Any:
        seen = self.__dict__.setdefault("versions_seen", [])
        seen += [version] if version not in seen else []
        point("scoring", len(seen) - 1)
        return score(self, weights, version, *rest)

    scoring.Scorer.score = scored


def _first(name: str) -> bool:
    try:
        os.close(os.open(Path(spec()["folder"]) / f"{name}-taken", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


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
