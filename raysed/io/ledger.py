"""The run directory: what a run has done, and all that is needed to go on, verify and replay it.

config.json                 the experiment and the data set it runs on, and from which cycle on
leases/000001.json          who holds the run; the highest number does, and its number is the fencing token
cycle_0007/                 model.safetensors optimizer.safetensors scores.parquet selected.parquet state.json
                            bought.parquet of a round that buys labels, sources.parquet of the last cycles
labelling/ labelled/        picks that went out to people, labels that came back: see io/people.py
cycle_0007/by_02_01/        the same files where the first lease's first workers were not those that wrote the cycle
cycle_0007/manifest.json    sizes and hashes of the files, metrics, seconds: written last and only once, the commit
cycle_0007/step_000120/     a commit inside the cycle, of the same kind; gone when the cycle is committed
quarantine.parquet          tiles that could not be used, why, and their sha256, found and in the index; none if all were good
diverged.json               where training diverged last, and on which tiles; none if it never did
cycles.jsonl summary.json tensorboard/ report.html     derived from the manifests, can be rebuilt
"""

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysed.config import Experiment
from raysed.core import metrics
from raysed.core.acquisition import Selection, Strategy, strategy_of
from raysed.core.draws import has_gone_round
from raysed.core.labelling import by_chance, pool_cycle
from raysed.core.randomness import keyed_rng
from raysed.core.splits import selectable
from raysed.errors import DataError, RunHeldError, StorageError, UsageError
from raysed.io.storage import Storage, digest

FORMAT = 2
KEEP_EVERY = 10
"""Weights of every tenth cycle are kept, besides those of the newest three; optimiser state of the newest two only."""
_NEEDED = ("model.safetensors", "optimizer.safetensors", "state.json")
MAY_CHANGE = (
    *("run", "cluster.", "data.uri", "data.bad_tile_budget", "model.init", "baseline"),
    "allow_config_change",
)
"""Fields that may differ when a run is continued; data set and initial model are compared by their hashes instead."""


@dataclass(frozen=True)
class Manifest:
    """One committed cycle."""

    cycle: int
    files: dict[str, dict[str, Any]]
    """File name -> {bytes, sha256}, and `by`, the folder it is in if it is not the cycle's own."""
    record: dict[str, Any]
    """Metrics, seconds, hashes, nodes: see `cluster/cycles.py`."""
    step: int | None = None
    """Steps of the cycle that are done, in a commit inside it."""

    @property
    def folder(self) -> str:
        """Where its files are."""
        return folder(self.cycle, self.step)

    def path(self, name: str) -> str:
        """Where a file of it is."""
        return "/".join(filter(None, (self.folder, self.files[name].get("by"), name)))


class Ledger:
    """The run directory at a storage root.

    Args:
        storage: the run directory.
        epoch: fencing token of the lease under which this process writes; None only reads.
        start: how many groups of workers have begun under that lease, with this one.
    """

    def __init__(self, storage: Storage, epoch: int | None = None, start: int = 1) -> None:
        self.storage = storage
        self.epoch = epoch
        # one that was paused or cut off, and overtaken, may write for a moment when it wakes: never where others have
        self._by = f"by_{epoch:02d}_{start:02d}" if epoch and (epoch, start) != (1, 1) else ""

    def open(self, experiment: Experiment, dataset_hash: str) -> None:
        """Start a run, or check that a begun one may be continued.

        Raises:
            UsageError: config, data set or format differ from the run's, with the difference.
        """
        own = {"from_cycle": 0, "experiment": experiment.to_dict(), "dataset_hash": dataset_hash}
        if self.storage.create("config.json", _config_bytes([own])):
            return
        begun, begun_hash = self.config()
        differs = {k: v for k, v in begun.differences(experiment).items() if not k.startswith(MAY_CHANGE)}
        lines = [f"{k}: {old!r} there, {new!r} now" for k, (old, new) in differs.items()]
        if begun_hash != dataset_hash:
            lines.append(f"data set: {begun_hash[:12]} there, {dataset_hash[:12]} now")
        if not lines:
            return
        committed = len(self.manifests())
        if committed and not experiment.allow_config_change:
            raise UsageError(
                f"run {self.storage.uri} was begun with another configuration ({'; '.join(lines)}): "
                "choose another --run, or go on with the new one with --allow-config-change"
            )
        kept_ones = [c for c in self._configs() if c["from_cycle"] < committed]
        self.storage.write("config.json", _config_bytes([*kept_ones, {**own, "from_cycle": committed}]))

    def config(self, cycle: int | None = None) -> tuple[Experiment, str]:
        """The experiment and the content hash of the data set that a cycle ran under; without a cycle, the newest.

        Raises:
            UsageError: no run here.
            DataError: another format.
        """
        found = [c for c in self._configs() if cycle is None or c["from_cycle"] <= cycle][-1]
        return Experiment.from_dict(found["experiment"], f"{self.storage.uri}/config.json"), found[
            "dataset_hash"
        ]

    def _configs(self) -> list[dict[str, Any]]:
        where = f"{self.storage.uri}/config.json"
        try:
            config = json.loads(self.storage.read("config.json"))
        except FileNotFoundError as error:
            raise UsageError(f"no run at {self.storage.uri} (no config.json)") from error
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if config.get("format") != FORMAT:
            raise DataError(f"{where}: run format {config.get('format')}, this version reads {FORMAT}")
        return config["configs"]

    def manifests(self) -> list[Manifest]:
        """All committed cycles in order: those from 0 on without a gap.

        Raises:
            DataError: a manifest that is not one.
        """
        paths = self.storage.list()
        found: list[Manifest] = []
        while f"{folder(len(found))}/manifest.json" in paths:
            found.append(self._manifest(len(found)))
        return found

    def first(self) -> Manifest | None:
        """Cycle 0, if it is committed."""
        return self._manifest(0) if self.storage.exists(f"{folder(0)}/manifest.json") else None

    def _manifest(self, cycle: int) -> Manifest:
        path = f"{folder(cycle)}/manifest.json"
        try:
            fields = json.loads(self.storage.read(path))
            return Manifest(fields["cycle"], fields["files"], fields["record"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.storage.uri}/{path} is damaged ({error!r}): put a copy of it back; or, if it is the newest, remove it, and the run continues "
                "before that cycle"
            ) from error

    def beyond_gap(self) -> list[str]:
        """Manifests that do not count, because a cycle before them has none."""
        committed = {f"{folder(m.cycle)}/manifest.json" for m in self.manifests()}
        found = (p for p in self.storage.list() if re.fullmatch(r"cycle_\d+/manifest\.json", p))
        return sorted(p for p in found if p not in committed)

    def commit(
        self,
        cycle: int,
        files: dict[str, bytes],
        record: Callable[[], dict[str, Any]],
        step: int | None = None,
    ) -> Manifest:
        """Write a cycle, or the state of a cycle after some of its steps: its files, then the manifest that makes them count.

        Args:
            cycle: number.
            files: name -> bytes.
            record: called when the files are written; what it returns goes into the manifest.
            step: steps of the cycle that are done; None is all.

        Raises:
            RunHeldError: another driver has taken over, or has committed this.
        """
        self._fence()
        where = folder(cycle, step)
        taken = f"{self.storage.uri}: {where} was committed by another driver"
        if self.storage.exists(f"{where}/manifest.json"):
            raise RunHeldError(taken)
        by = {"by": self._by} if self._by else {}
        facts = {name: {"bytes": len(data), "sha256": digest(data), **by} for name, data in files.items()}
        written = Manifest(cycle, facts, {}, step)
        for name, data in files.items():
            self.storage.write(written.path(name), data)
        manifest = replace(written, record=record())
        fields = {"format": FORMAT, "token": uuid.uuid4().hex, **asdict(manifest)}
        self._fence()
        if not self.storage.create(f"{where}/manifest.json", (json.dumps(fields, indent=1) + "\n").encode()):
            raise RunHeldError(taken)
        return manifest

    def begun(self, cycle: int, config: str, say: Callable[[str], None]) -> Manifest | None:
        """The newest commit inside a cycle that verifies and was made under this configuration; later ones are discarded.

        Args:
            cycle: that is not committed.
            config: its `config_hash`.
            say: prints a line.
        """
        pattern = re.compile(rf"{folder(cycle)}/step_(\d+)/manifest\.json")
        steps = [int(m[1]) for p in self.storage.list(folder(cycle)) if (m := pattern.fullmatch(p))]
        for step in sorted(steps, reverse=True):
            path = f"{folder(cycle, step)}/manifest.json"
            try:
                fields = json.loads(self.storage.read(path))
                manifest = Manifest(cycle, fields["files"], fields["record"], step)
                if manifest.record["config_hash"] == config:
                    for name in manifest.files:
                        self.read(manifest, name)
                    return manifest
                reason = "another configuration"
            except (DataError, ValueError, KeyError, TypeError) as error:
                reason = f"{error!r}"
            say(f"step {step} of cycle {cycle} is not used: {reason}")
            self._fence()
            self.storage.remove(path)
        return None

    def read(self, manifest: Manifest, name: str) -> bytes:
        """A committed file, verified.

        Raises:
            DataError: missing, or its bytes are not those committed.
        """
        where = manifest.path(name)
        for _ in range(2):  # bytes that changed on the way are right the second time
            try:
                data = self.storage.read(where)
            except FileNotFoundError as error:
                raise DataError(f"{self.storage.uri}/{where} is missing") from error
            if digest(data) == manifest.files[name]["sha256"]:
                return data
        raise DataError(f"{self.storage.uri}/{where} does not have the sha256 that was committed")

    def table(self, manifest: Manifest, name: str) -> pa.Table:
        """A committed Parquet file."""
        return pq.read_table(io.BytesIO(self.read(manifest, name)))

    def resume_point(self, say: Callable[[str], None]) -> Manifest | None:
        """The newest cycle that verifies; later ones are discarded, and said so.  What attempts that came to nothing have left in
        the folders of committed cycles is removed.

        Raises:
            DataError: there are cycles but none verifies; nothing is removed then.
        """
        committed = self.manifests()
        last = len(committed) - 1
        bad: list[Manifest] = []
        for manifest in reversed(committed):
            try:
                for name in manifest.files:
                    if name in _NEEDED or kept(name, manifest.cycle, last):
                        self.read(manifest, name)
            except DataError as error:
                say(f"cycle {manifest.cycle} is not used: {error}")
                bad.append(manifest)
                continue
            break
        if committed and len(bad) == len(committed):
            raise DataError(
                f"{self.storage.uri}: none of its {len(committed)} committed cycles has weights and optimiser state that verify; "
                "nothing was changed: choose another --run"
            )
        for manifest in bad:
            self._fence()
            self.storage.remove(f"{folder(manifest.cycle)}/manifest.json")
        good = committed[: len(committed) - len(bad)]
        if good:
            self._fence()
            paths = list(self.storage.list())
            for manifest in good:  # a driver that died after a commit had no time to
                inside = f"{folder(manifest.cycle)}/"
                self._clear(manifest, good[-1].cycle, [p for p in paths if p.startswith(inside)])
        return good[-1] if good else None

    def prune_steps(self, cycle: int, before: int | None = None) -> None:
        """Remove the commits inside a cycle: all, or those before a step; manifests first."""
        at = re.compile(rf"{folder(cycle)}/step_(\d+)/.*")
        paths = [
            p
            for p in self.storage.list(folder(cycle))
            if (m := at.fullmatch(p)) and (before is None or int(m[1]) < before)
        ]
        for path in sorted(paths, key=lambda p: (not p.endswith("/manifest.json"), p)):
            self.storage.remove(path)

    def prune(self, last: int) -> None:
        """Remove what retention no longer keeps once cycle `last` is committed, and what attempts at it have left."""
        for cycle in range(max(0, last - 3), last - 1):
            self._clear(self._manifest(cycle), last, self.storage.list(folder(cycle)))

    def _clear(self, manifest: Manifest, last: int, paths: Iterable[str]) -> None:
        """Remove of these files in the folder of a committed cycle those that do not belong to it or are no longer kept."""
        wanted = {manifest.path(n) for n in manifest.files if kept(n, manifest.cycle, last)}
        wanted.add(f"{folder(manifest.cycle)}/manifest.json")
        for path in paths:
            if path not in wanted:
                self.storage.remove(path)

    def write_lines(self, manifests: list[Manifest]) -> None:
        """`cycles.jsonl`: one line a committed cycle."""
        lines = [json.dumps({"cycle": m.cycle, **m.record}) + "\n" for m in manifests]
        self.storage.write("cycles.jsonl", "".join(lines).encode())

    def diverged(self) -> dict[str, Any] | None:
        """cycle and steps (first, end) in which training diverged last, rollbacks before that and config_hash then, of a run that may
        have gone back and come through since; None if it never did."""
        try:
            found = json.loads(self.storage.read("diverged.json"))
        except FileNotFoundError:
            return None
        return {k: found[k] for k in ("cycle", "steps", "rollbacks", "config_hash")}

    def _fence(self) -> None:
        if self.epoch is None or _newest_lease(self.storage) > self.epoch:
            raise RunHeldError(
                f"{self.storage.uri}: {_holder(self.storage)} has taken this run over; this one stops"
            )


def _config_bytes(configs: list[dict[str, Any]]) -> bytes:
    return (json.dumps({"format": FORMAT, "configs": configs}, indent=1) + "\n").encode()


def folder(cycle: int, step: int | None = None) -> str:
    """Folder of a cycle, or of a commit after so many of its steps."""
    return f"cycle_{cycle:04d}" + ("" if step is None else f"/step_{step:06d}")


def kept(name: str, cycle: int, last: int) -> bool:
    """Whether retention keeps a file of a cycle once cycle `last` is committed."""
    if name == "optimizer.safetensors":
        return cycle > last - 2
    # one model more than optimiser states: who falls back by a cycle may need the weights of the cycle two before
    return name != "model.safetensors" or cycle > last - 3 or cycle % KEEP_EVERY == 0


def table_bytes(table: pa.Table) -> bytes:
    """A table as Parquet; the same table gives the same bytes."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="ZSTD")
    return out.getvalue()


def selection_table(selection: Selection) -> pa.Table:
    """`selected.parquet`: tile_id, rank (0 is best), weight, reason."""
    return pa.table(
        {
            "tile_id": pa.array(selection.tile_ids, pa.string()),
            "rank": pa.array(range(len(selection.tile_ids)), pa.int32()),
            "weight": pa.array(selection.weights, pa.float32()),
            "reason": pa.array(selection.reasons, pa.string()),
        }
    )


def source_table(sources: list[str], counts: np.ndarray) -> pa.Table:
    """`sources.parquet`: source image, counts (C x C confusion matrix in rows of truth) on its validation tiles.

    Args:
        sources: names of M source images.
        counts: (M, C, C) int64.
    """
    rows = counts.reshape(len(sources), -1)
    return pa.table(
        {"source": pa.array(sources, pa.string()), "counts": pa.array(list(rows), pa.list_(pa.int64()))}
    )


def reads_scores(
    experiment: Experiment, cycle: int, ids: pa.StringArray | pa.ChunkedArray, state: dict[str, Any]
) -> bool:
    """Whether the selection of a cycle looks at scores; for the others nothing has to be scored.

    Args:
        experiment: for strategy, protocol and progress.
        cycle: number.
        ids: the tiles that can be selected.
        state: the strategy's state after the cycle before.
    """
    strategy = strategy_of(experiment.select.strategy, experiment.select.options)
    if not strategy.needs or not experiment.scores_before(cycle):
        return False
    if strategy.reads is None or experiment.buys_labels:
        return True
    return strategy.reads(experiment.progress(cycle), partial(has_gone_round, ids, state.get("queue")))


def choose(
    experiment: Experiment,
    cycle: int,
    *,
    scores: pa.Table | None,
    index: pa.Table,
    state: dict[str, Any],
    excluded: set[str],
) -> Selection:
    """The selection of a cycle: a pure function of what the ledger keeps, so it can be replayed.

    Args:
        experiment: for strategy, budget and seed.
        cycle: number.
        scores: one row a tile, or None if the strategy needs none.
        index: the store's rows of split train.
        state: the strategy's state after the cycle before.
        excluded: quarantined tile ids.

    Raises:
        UsageError: the strategy needs scores that this run does not have.
    """
    strategy = strategy_of(experiment.select.strategy, experiment.select.options)
    pool = selectable(index, experiment.data.held_out, unlabelled=experiment.asks_people)
    if excluded:
        bad = pa.array(sorted(excluded), pa.string())
        pool = pool.filter(pc.invert(pc.is_in(pool["tile_id"], bad)))
    if (missing := strategy.missing(scores)) and reads_scores(experiment, cycle, pool["tile_id"], state):
        raise UsageError(
            f"strategy {experiment.select.strategy} needs the scores {', '.join(missing)}, which this run does not record: "
            "choose another --select"
        )
    budget = experiment.select.budget(len(pool))
    if experiment.buys_labels:
        return _buy_and_choose(
            experiment, cycle, strategy, scores=scores, pool=pool, state=state, budget=budget
        )
    facts = {"protocol": "reselect", "progress": experiment.progress(cycle)}
    rng = keyed_rng("select", experiment.seed, cycle)
    return strategy.select(scores, pool, {**state, **facts}, budget, rng)


def _buy_and_choose(
    experiment: Experiment,
    cycle: int,
    strategy: Strategy,
    *,
    scores: pa.Table | None,
    pool: pa.Table,
    state: dict[str, Any],
    budget: int,
) -> Selection:
    number, rounds = cycle // experiment.pool.cycles, -(-experiment.cycles // experiment.pool.cycles)
    facts = {"protocol": "pool", "progress": (number - 1) / max(rounds - 2, 1)}  # round 0 is by chance

    rng = keyed_rng("select", experiment.seed, cycle)

    def by_strategy(left: pa.Table, own: dict[str, Any], buys: int) -> Selection:
        return strategy.select(scores, left, {**own, **facts}, buys, rng)

    return pool_cycle(
        pool,
        state,
        number=number,
        buys=experiment.pool.buys(cycle, len(pool)),
        choice=by_strategy if cycle else by_chance(keyed_rng("start", experiment.seed)),
        budget=budget,
        rng=keyed_rng("labelled", experiment.seed, cycle),
    )


def verify(ledger: Ledger, index: pa.Table) -> list[str]:
    """Check every hash that retention still keeps, replay every selection, recompute every metric from its counts.

    Args:
        ledger: of the run.
        index: the store's rows of split train.

    Returns:
        What does not hold, one line each; empty if all is well.
    """
    wrong, manifests = [], ledger.manifests()
    state: dict[str, Any] | None = {}
    models: list[str] = []
    for manifest in manifests:
        experiment, _ = ledger.config(manifest.cycle)
        wrong += [f"cycle {manifest.cycle}: {line}" for line in _contradictions(manifest, experiment, models)]
        models.append(manifest.files["model.safetensors"]["sha256"])
        try:
            for name in manifest.files:
                if kept(name, manifest.cycle, manifests[-1].cycle):
                    ledger.read(manifest, name)
            own, before = json.loads(ledger.read(manifest, "state.json")), state
            state = own["strategy"]
            scores = ledger.table(manifest, "scores.parquet") if "scores.parquet" in manifest.files else None
            if before is None:
                wrong.append(f"cycle {manifest.cycle}: not replayed, the state before it is lost")
                continue
            again = choose(
                experiment,
                manifest.cycle,
                scores=scores,
                index=index,
                state=before,
                excluded=set(own["excluded"]),
            )
            if again.bought and selection_table(again.bought) != ledger.table(manifest, "bought.parquet"):
                wrong.append(f"cycle {manifest.cycle}: the labels bought differ from those of the replay")
            if selection_table(again) != ledger.table(manifest, "selected.parquet"):
                wrong.append(f"cycle {manifest.cycle}: the replayed selection differs from the committed one")
        except DataError as error:
            wrong.append(f"cycle {manifest.cycle}: {error}")
            if "state.json" in str(error):
                state = None
    return wrong + [f"{path} does not count: a cycle before it is missing" for path in ledger.beyond_gap()]


def _contradictions(manifest: Manifest, experiment: Experiment, models: list[str]) -> list[str]:
    """What a cycle's record says that its configuration, the models of the cycles before it or its own counts deny."""
    record, val = manifest.record, manifest.record["val"]
    lines = []
    if record["config_hash"] != config_hash(experiment):
        lines.append("the hash of its configuration is not that of config.json")
    back = 2 if experiment.select.scores == "overlapped" else 1
    if len(models) >= back and record["scoring_weights"] not in (None, models[-back]):
        lines.append(f"it was scored with weights that are not those of the cycle {back} before")
    visits = sum(record["nodes"]["visit"].values())
    if visits != record["tiles"]:
        lines.append(f"{visits} visits of {record['tiles']} selected tiles")
    if "counts" in val:
        again = metrics.scores(np.array(val["counts"]), list(val["iou"]))
        lines += [
            f"val.{k} is {val.get(k)!r}, its counts say {v!r}" for k, v in again.items() if val.get(k) != v
        ]
    return lines


def difference(one: Ledger, other: Ledger) -> list[str]:
    """How two runs differ, one line each: config, selections, scores, weights, metrics; not seconds, nodes or names."""
    (a, a_hash), (b, b_hash) = one.config(), other.config()
    lines = [
        f"config {k}: {x!r} and {y!r}"
        for k, (x, y) in a.differences(b).items()
        if not k.startswith(MAY_CHANGE)
    ]
    if a_hash != b_hash:
        lines.append(f"data set: {a_hash[:12]} and {b_hash[:12]}")
    mine, theirs = one.manifests(), other.manifests()
    if len(mine) != len(theirs):
        lines.append(f"cycles: {len(mine)} and {len(theirs)}")
    for x, y in zip(mine, theirs, strict=False):
        for name in sorted(x.files.keys() | y.files.keys()):
            if x.files.get(name, {}).get("sha256") != y.files.get(name, {}).get("sha256"):
                lines.append(f"cycle {x.cycle}: {name} differs{_how(one, x, other, y, name)}")
        for group in ("train", "val"):
            left, right = x.record[group], y.record[group]
            lines += [
                f"cycle {x.cycle}: {group}.{k} {left.get(k)!r} and {right.get(k)!r}"
                for k in sorted(left.keys() | right.keys())
                if left.get(k) != right.get(k)
            ]
    return lines


def _how(one: Ledger, x: Manifest, other: Ledger, y: Manifest, name: str) -> str:
    """In which columns and rows two tables of a cycle differ; nothing of what is no table, or not in both."""
    if not name.endswith(".parquet") or name not in x.files or name not in y.files:
        return ""
    a, b = one.table(x, name), other.table(y, name)
    if a.schema != b.schema:
        return f": columns {', '.join(a.column_names)} and {', '.join(b.column_names)}"
    if len(a) != len(b):
        return f": {len(a)} and {len(b)} rows"
    found = []
    for column in a.column_names:
        pairs = zip(a[column].to_pylist(), b[column].to_pylist(), strict=True)
        rows = [i for i, (left, right) in enumerate(pairs) if left != right]
        if rows:
            first = rows[0]
            found.append(f"{column} of {len(rows)} rows, first {a[column][first]} and {b[column][first]}")
    return f": {'; '.join(found)}" if found else ""


BEAT_SECONDS = 3.0
DEAD_AFTER = 15.0
"""A lease whose counter has stood still for so long, by the observer's own clock, is taken over."""


def _lease(epoch: int) -> str:
    return f"leases/{epoch:06d}.json"


def _newest_lease(storage: Storage) -> int:
    numbers = [int(m[1]) for p in storage.list("leases") if (m := re.fullmatch(r"leases/(\d{6})\.json", p))]
    return max(numbers, default=0)


def _holder(storage: Storage) -> str:
    """Who holds the newest lease."""
    holder = json.loads(storage.read(_lease(_newest_lease(storage))))
    return f"process {holder['pid']} on {holder['host']}"


class Lease:
    """The right to write a run directory.  Taking over creates the next number, which only one can; the old holder, should it
    wake up, sees the higher number and stops.

    Raises (on entering):
        RunHeldError: a living driver holds the run; the message names it.
        StorageError: the storage does not honour the conditional put that all of this rests on.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.epoch = 0
        self._me = {
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pids": _pid_namespace(),
            "pid": os.getpid(),
            "token": uuid.uuid4().hex,
        }
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        last = _newest_lease(self.storage)
        if last:
            self._await_death(last)
        if not self.storage.create(_lease(last + 1), self._body(0)):
            raise RunHeldError(
                f"run {self.storage.uri} was taken just now and is held by {_holder(self.storage)}: wait for it, stop it, or choose "
                "another --run"
            )
        if self.storage.create(_lease(last + 1), b"a second put of what exists"):
            raise StorageError(
                f"{self.storage.uri} overwrites what a conditional put (If-None-Match) must not: two drivers could commit the same "
                "cycle; use a bucket that honours it"
            )
        self.epoch = last + 1
        for old in range(1, last):
            self.storage.remove(_lease(old))
        self._thread = threading.Thread(target=self._beat, daemon=True, name="raysed-lease")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(BEAT_SECONDS * 2)
        if _newest_lease(self.storage) == self.epoch:
            self.storage.write(_lease(self.epoch), self._body(-1))

    def _body(self, beat: int) -> bytes:
        return json.dumps({**self._me, "beat": beat}).encode()

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_SECONDS):
            beat += 1
            with contextlib.suppress(StorageError):  # one that cannot be written is missed, the next may be
                self.storage.write(_lease(self.epoch), self._body(beat))

    def _await_death(self, epoch: int) -> None:
        began, first = time.monotonic(), None
        while True:
            holder = json.loads(self.storage.read(_lease(epoch)))
            if holder["beat"] < 0 or self._is_dead_here(holder):
                return
            first = holder if first is None else first
            if holder["beat"] != first["beat"]:
                raise RunHeldError(
                    f"run {self.storage.uri} is held by process {holder['pid']} on {holder['host']}: wait for it, stop it, "
                    "or choose another --run"
                )
            if time.monotonic() - began > DEAD_AFTER:
                return
            time.sleep(0.5)

    def _is_dead_here(self, holder: dict[str, Any]) -> bool:
        """A holder of this very machine whose process is gone needs no waiting.  Containers may share host name and boot, but
        each counts its processes by itself.
        """
        if any(holder.get(key) != self._me[key] for key in ("host", "boot", "pids")):
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def _pid_namespace() -> str:
    path = "/proc/self/ns/pid"
    return os.readlink(path) if os.path.exists(path) else ""


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def config_hash(experiment: Experiment) -> str:
    """sha256 of what determines the run: all fields but those that may change, as config.json gives them back (10 is 10.0)."""
    read_back = Experiment.from_dict(experiment.to_dict())
    fields = {
        k: v for k, (v, _) in read_back.differences(Experiment()).items() if not k.startswith(MAY_CHANGE)
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
