"""The one loop: select, stream, train, evaluate, commit.  Passive, active and tuned runs are this with other numbers.

Every worker of one long-lived Ray Train group executes `run`; rank 0 owns the cycle: it asks the scorers, selects, broadcasts
the plan and commits.  A restarted group reads the ledger and goes on.
"""

import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.train.collective import broadcast_from_rank_zero

from raysed.cluster.arms import Arm, Setup
from raysed.cluster.connect import quiet_data
from raysed.cluster.opencycle import SELECTED, WORK, Clock, OpenCycle, Part
from raysed.cluster.scorekeeping import Scored, Scorekeeper, Weights
from raysed.cluster.stream import STARVED_SECONDS, Row, Stream
from raysed.core import metrics, networks
from raysed.core.acquisition import strategy_of
from raysed.core.counts import iou_of_sums
from raysed.core.labelling import bought, rows_bought
from raysed.core.losses import class_weights
from raysed.core.plan import Plan, norm_plan, plan
from raysed.core.pool import Selection, matrix, names_of, sorted_names, without
from raysed.core.splits import training_rows, validation_rows
from raysed.core.statistics import LAST
from raysed.core.step import (
    Learner,
    MicroBatch,
    Precision,
    Totals,
    common_precision,
    learning_rate,
    resolve_precision,
    to_device,
    to_images,
    weights_of,
)
from raysed.core.tiles import palette, target_of
from raysed.errors import DataError, DivergedError, RaysedError
from raysed.io import checkpoint, people
from raysed.io.codec import encode_picture
from raysed.io.ledger import (
    Ledger,
    Manifest,
    choose,
    config_hash,
    reads_scores,
    selection_table,
    source_table,
    table_bytes,
)
from raysed.io.model import load_init, start_from, weights_of_run
from raysed.io.people import Request
from raysed.io.reference import judged_by, ledgers_of
from raysed.io.storage import Storage, digest
from raysed.io.store import INDEX, LOCATION, POOL, TRAINING, BadTile, Store, as_written, quarantine_table

EXAMPLES, EXAMPLES_EVERY = 4, 5
"""Validation tiles that are pictured with label and prediction, and the cycles between pictures."""
NOTICE_STEPS = 8
"""Steps between two looks for a notice that a node is about to be taken away, or for a wish that the run stops, and between two
commits once there is a notice."""
STOP_SECONDS = 30.0
"""A run that is to stop trains its cycle to the end if that takes no longer; else it commits inside the cycle."""
BEAT_SECONDS = 2.0
"""Between two signs of life of rank 0."""
SKIPPED_STEPS = 3
"""Steps in a row without a finite gradient that are left out; one more, and training has diverged."""
HOLD_SECONDS = 60.0
"""How long a run waits at the point named by RAYSED_HOLD, for whoever wants to kill it there."""


def run(setup: Setup) -> None:
    """The training function of every rank: all arms, one after the other."""
    context = ray.train.get_context()
    first = context.get_world_rank() == 0
    start: int = broadcast_from_rank_zero(_begun(setup.monitor) if first else None)
    if not start:
        return  # Ray restarts a group whose ranks raised; the error that was posted would only come again
    quiet_data()
    beat = Beat(setup.monitor) if first else None
    try:
        if first and setup.arms[0].experiment.cluster.min_workers:
            setup.monitor.post.remote({"kind": "say", "text": f"{context.get_world_size()} workers train"})
        for arm in setup.arms:
            if not Worker(setup, arm, start, beat).run():
                break
    except RaysedError as error:
        failed = {"kind": "failed", "error": type(error).__name__, "text": str(error)}
        ray.get(setup.monitor.post.remote(failed))
        if context.get_world_size() > 1:
            raise  # other ranks may wait for this one in a collective: only an error frees them
        return
    except Exception as error:
        ray.get(setup.monitor.lost.remote(f"{type(error).__name__}: {error}".split("\n", 1)[0]))
        raise
    if first:
        ray.get(setup.monitor.post.remote({"kind": "done"}))


def _begun(monitor: ActorHandle) -> int:
    """Number of this group of workers; 0 if it is not to begin, or the run has ended and nobody has told Ray Train."""
    try:
        asked: Any = monitor.begin.remote(ray.train.get_context().get_world_size())
        return ray.get(asked)
    except ray.exceptions.RayActorError:
        return 0


class Beat:
    """Signs of life of rank 0 to the monitor, from a thread; the answer says whether the run is to stop."""

    def __init__(self, monitor: ActorHandle) -> None:
        self._monitor, self.stopping = monitor, False
        threading.Thread(target=self._go_on, daemon=True, name="raysed-beat").start()

    def _go_on(self) -> None:
        with suppress(ray.exceptions.RayError):  # the monitor is gone: the run is over
            while True:
                asked: Any = self._monitor.beat.remote()
                self.stopping = ray.get(asked)
                time.sleep(BEAT_SECONDS)


class StoppedInside(Exception):
    """The run was to stop, and is committed inside a cycle."""


class Worker:
    """One rank of one arm, in the group of workers of this number; rank 0 has a beat."""

    _packed: Future[tuple[bytes, str]] | None = None
    """The weights of the cycle before, if this worker has trained it, and their SHA-256."""

    def __init__(self, setup: Setup, arm: Arm, start: int, beat: Beat | None) -> None:
        self.setup, self.arm, self.exp, self.beat = setup, arm, arm.experiment, beat
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device() if setup.device == "cuda" else torch.device("cpu")
        self.threads = self.exp.cluster.threads or max(1, node_cpus() // context.get_local_world_size())
        torch.set_num_threads(self.threads)
        data, people_see = self.exp.data, self.exp.asks_people  # who are shown where tiles lie
        store = Store.open(str(data.uri), arm.dataset, INDEX.names if people_see else TRAINING)
        self.store = store if people_see else store.only(LOCATION)
        self.pool = training_rows(store.only(POOL).index, data.held_out, unlabelled=people_see)
        judged = validation_rows(store.only(POOL).index, data.validation, data.held_out).sort_by("tile_id")
        del store
        self.taught = self.store
        """The store that training reads from."""
        self.candidates = sorted_names(self.pool["tile_id"])
        self.ledger = Ledger(Storage(str(self.exp.run)), arm.epoch, start)
        dataset = self.store.dataset
        self.names = [c.name for c in dataset.classes]
        self.learner = self._learner()
        self.nodes: Counter[str] = Counter()
        """Threads that the ranks use, by node."""
        for node, threads in self._everyone((node_id(), self.threads)):
            self.nodes[node] += threads
        self.keeper: Scorekeeper | None = None
        self.collects = False
        self._busy = 0.0
        """Seconds of the last cycle in which nothing was scored."""
        self.strategy = strategy_of(self.exp.select.strategy, self.exp.select.options)
        self.leaky: int | None = None
        """Tiles whose irreducible loss is told by a network that has trained on them."""
        if self.rank == 0 and self._needs("irreducible"):
            self.leaky = len(judged_by(ledgers_of(str(self.exp.select.reference)), self.pool)[1])
        if self.strategy.needs:
            self.keeper = Scorekeeper(
                setup.scorers,
                setup.patience,
                self.store,
                self.exp.select,
                multiple=int(self.learner.net.multiple),  # type: ignore[arg-type]
                taken=self.nodes,
                precision=self.learner.precision,
                reference=self._references if self._needs("irreducible") else None,
            )
            self.collects = self.keeper.collects
        self.quarantine: dict[str, BadTile] = {}
        self.state: dict[str, Any] = {}
        self.validation: list[str] = judged["tile_id"].to_pylist()
        self.sources: list[str] = sorted(set(judged["source"].to_pylist()))
        at = {source: number for number, source in enumerate(self.sources)}
        self.source_of = [at[source] for source in judged["source"].to_pylist()]
        self.validation_rows: list[list[Row]] | None = None
        self.examples: list[Row] = []
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="raysed-commit")
        self._pending: Future[None] | None = None
        self._open: OpenCycle | None = None
        self._noticed = False
        self.starved = False
        """Whether this rank reads its tiles itself."""
        self.rollbacks = 0
        """Times that this run has gone back to a commit because it diverged; each halves the learning rate."""

    def run(self) -> bool:
        """All cycles that are left; False if the run was asked to stop."""
        start, self.weights_hash = self._resume()
        stop = False
        try:
            for cycle in range(start, self.exp.cycles):
                stop = self._first(lambda c=cycle: ray.get(self.setup.monitor.should_stop.remote(c)))
                if stop:
                    break
                if self._pending and self._pending.done():
                    self._settle()  # a commit that failed ends the run before another cycle is trained
                self._survived(cycle)
        except StoppedInside:
            stop = True
        except Exception:
            with suppress(Exception):  # the first error counts; what was trained before it is committed
                self._settle()
            raise
        self._settle()
        return not stop

    def _survived(self, cycle: int) -> None:
        """Run a cycle; one that diverges is run again from the last commit, at half the learning rate, as often as is allowed."""
        while True:
            try:
                return self._cycle(cycle)
            except DivergedError as error:
                if self.rollbacks >= self.exp.optim.rollbacks:
                    raise
                if self.rank == 0:
                    self._say(f"{error}: going back to the last commit, at half the learning rate")
            self._settle()
            before = self.rollbacks
            self.learner = self._learner()
            self._open, self._packed, self.state = None, None, {}
            if self.rank == 0:
                self.ledger.prune_steps(cycle)  # what diverges at the end may have begun to before
            if self.keeper:
                self.keeper.forget()
            start, self.weights_hash = self._resume()
            if start != cycle:
                raise DataError(
                    f"{self.ledger.storage.uri}: going back from cycle {cycle} found that the cycle before does not verify any more; "
                    f"the same command continues after cycle {start}"
                )
            self.rollbacks = before + 1

    def _network(self) -> networks.Network:
        """The network as the run begins it; only rank 0's counts, the others receive its weights."""
        exp, classes = self.exp, self.store.dataset.classes
        spec = exp.model.encoder_weights if self.rank == 0 else None
        from_file = checkpoint.is_file_spec(spec)
        net = networks.build(exp.model.arch, len(classes), exp.seed, None if from_file else spec)
        if from_file and spec:
            checkpoint.load_encoder(net.net.encoder, spec)  # type: ignore[union-attr, arg-type]
        if exp.model.init and self.rank == 0:
            start_from(net, load_init(exp.model), classes)
        return net

    def _learner(self) -> Learner:
        exp, dataset = self.exp, self.store.dataset
        net = self._network().to(self.device)
        return Learner(
            net,
            alpha=class_weights(pixels_of(self.pool, len(dataset.classes)), exp.loss.alpha_power),
            gamma=exp.loss.gamma,
            batch=exp.optim.batch,
            precision=self._precision(),
            ordered_sums=exp.optim.ordered_sums,
            weight_decay=exp.optim.weight_decay,
            clip=exp.optim.clip,
            ema=exp.optim.ema,
        )

    def _precision(self) -> Precision:
        """What all ranks compute in; a run that is continued on devices of its kind stays with its own."""
        first: Manifest | None = self._first(self.ledger.first)
        alike = first and torch.device(first.record["device"]).type == self.device.type
        begun = first.record["precision"] if first and alike else None
        found = common_precision(
            self._everyone(resolve_precision(self.exp.optim.precision, self.device, begun))
        )
        if first and first.record["precision"] != found and self.rank == 0:
            self._say(f"computes in {found}, begun in {first.record['precision']}")
        return found

    def _first(self, action: Any) -> Any:
        """The result of an action that rank 0 takes, on every rank."""
        return broadcast_from_rank_zero(action() if self.rank == 0 else None)

    def _say(self, text: str) -> None:
        self.setup.monitor.post.remote({"kind": "say", "text": f"{self.arm.name}: {text}"})

    def _at(self, point: str, cycle: int) -> None:
        """Announce a point of the cycle; wait there if the run was told to."""
        if self.rank:
            return
        holding = self.setup.hold == f"{point}@{cycle}"
        if holding and point != "commit":
            self._settle()  # whoever kills the run here finds what came before committed
        posted: Any = self.setup.monitor.post.remote(
            {"kind": "phase", "phase": point, "cycle": cycle, "holding": holding}
        )
        if holding:
            ray.get(posted)
            time.sleep(HOLD_SECONDS)

    def _resume(self) -> tuple[int, str]:
        """First cycle to run and the hash of the weights it starts from; state is loaded from the ledger."""
        last: Manifest | None = self._first(lambda: self.ledger.resume_point(self._say))
        start = last.cycle + 1 if last else 0
        begun: Manifest | None = None
        if start < self.exp.cycles:
            begun = self._first(lambda: self.ledger.begun(start, config_hash(self.exp), self._say))
        if begun or last:
            self._load(begun or last)  # type: ignore[arg-type]
        told = self._first(self.ledger.diverged)
        if (
            told
            and told["cycle"] >= start
            and told["config_hash"] == config_hash(self.exp)
            and told["rollbacks"]
            < self.exp.optim.rollbacks  # else the run ended there, and this one begins anew
        ):
            self.rollbacks = told["rollbacks"] + 1
        if last and self.rank == 0:
            self.ledger.prune_steps(last.cycle)
            if start < self.exp.cycles:
                inside = f" and step {begun.step} of cycle {start + 1}" if begun else ""
                self._say(f"continues after cycle {start} of {self.exp.cycles}{inside}")
        elif begun and self.rank == 0:
            self._say(f"continues after step {begun.step} of cycle 1 of {self.exp.cycles}")
        if last is None:
            weights = self.learner.weights() if begun is None else weights_of(self._network())
            return 0, digest(checkpoint.pack(weights))
        return start, last.files["model.safetensors"]["sha256"]

    def _load(self, commit: Manifest) -> None:
        """The state after a cycle, or after some steps of one."""
        for name, load in (
            ("model.safetensors", self.learner.load_weights),
            ("optimizer.safetensors", self.learner.load_optimizer_state),
        ):
            load(checkpoint.unpack(self.ledger.read(commit, name), name))
        state = json.loads(self.ledger.read(commit, "state.json"))
        self.state = state["strategy"]
        self.rollbacks = state["rollbacks"]
        self.quarantine = {b["tile_id"]: BadTile(**b) for b in state["quarantine"]}
        inside = commit.step is not None
        if self.keeper and self.rank == 0:
            visits = self.ledger.table(commit, "visits.parquet") if "visits.parquet" in commit.files else None
            if "scores.parquet" in commit.files:  # a round that buys labels scores once
                self.keeper.restore(self.ledger.table(commit, "scores.parquet"), None if inside else visits)
        if inside:
            selected = self.ledger.table(commit, "selected.parquet").to_pydict()
            record, seconds = commit.record, commit.record["seconds"]
            rows = []
            if "visits.parquet" in commit.files:
                table = self.ledger.table(commit, "visits.parquet")
                rows = list(zip(table["position"].to_pylist(), matrix(table["row"]), strict=True))
            self._open = OpenCycle(
                commit.cycle,
                Selection(selected["tile_id"], selected["weight"], selected["reason"], state["strategy"]),
                state["excluded"],
                {n: self.ledger.read(commit, n) for n in SELECTED if n in commit.files},
                record["scores"],
                Clock(dict(seconds), time.perf_counter() - sum(seconds.values())),
                commit.step or 0,
                record["losses"],
                rows,
                {k: Counter(v) for k, v in record["nodes"].items()},
            )

    def _cycle(self, cycle: int) -> None:
        started = datetime.now(UTC).isoformat(timespec="milliseconds")
        opened, self._open = self._open or self._begin(cycle), None
        clock, selection = opened.clock, opened.selection
        if self.exp.buys_labels:
            self._take_labels(selection)
        order = plan(
            selection.tile_ids, self.exp.seed, cycle, self.exp.optim.batch, self.exp.optim.micro_batch
        )
        norm = self._norm_plan(opened)
        train = self._train(opened, order, norm)
        self._at("evaluate", cycle)
        with clock.phase("evaluate"):
            val, read, found = self._evaluate()
        self._check(cycle, order, train, val)
        if self.rank == 0:
            began = time.perf_counter()
            self._settle()
            self._list_quarantine()
            weights, optimizer = self.learner.weights(), self.learner.optimizer_state()
            files = {**opened.files, "state.json": self._state_bytes(opened)}
            if self.keeper and self.collects:
                files["visits.parquet"] = table_bytes(self.keeper.visits_table())
            if cycle >= self.exp.cycles - LAST:
                files["sources.parquet"] = table_bytes(source_table(self.sources, self.by_source))
            pictures = None
            if cycle % EXAMPLES_EVERY == 0 or cycle == self.exp.cycles - 1:
                pictures = self._pictured(found)
            scores = opened.scores
            record = {
                "strategy": self.exp.select.strategy,
                "seed": self.exp.seed,
                "config_hash": config_hash(self.exp),
                "dataset_hash": self.store.dataset.content_hash,
                "scoring_weights": scores and scores["weights"],
                "tiles": len(order.order),
                "labelled": len(bought(selection.state)) if self.exp.buys_labels else len(self.candidates),
                "steps": order.steps,
                "quarantined": len(self.quarantine),
                "estimated": len(norm.order),
                "leaky": self.leaky,
                "train": train,
                "val": val,
                "scores": scores and {k: scores[k] for k in ("tiles", "side", "entropy_mean")},
                "nodes": {
                    **{k: dict(c) for k, c in opened.nodes.items()},
                    "read": dict(opened.nodes["read"] + read),
                    "score": scores["nodes"] if scores else {},
                },
                "workers": self.workers,
                "threads": self.threads,
                "precision": self.learner.precision,
                "device": str(self.device),
                "environment": self.setup.environment,
                "started": started,
            }
            clock.add("commit", time.perf_counter() - began)
            record["seconds"] = seconds = clock.closed()
            self._busy = seconds["total"] - seconds.get("score", 0.0)
            # not sooner: beside the copies it would share the interpreter with them
            self._packed = self._committer.submit(packed, weights)
            self._pending = self._committer.submit(
                self._commit, cycle, files, record, model=self._packed, optimizer=optimizer, pictures=pictures
            )
        self.state = opened.selection.state
        ray.train.report({"cycle": cycle, "loss": train["loss"], "miou": val["miou"]})

    def _begin(self, cycle: int) -> OpenCycle:
        """Score and select."""
        clock = Clock()
        self._at("score", cycle)
        if self.keeper and self.device.type == "cuda":
            torch.cuda.empty_cache()  # a scorer may share the GPU
        is_read = self._reads(cycle, self.state)
        may_score = self.keeper and self.exp.scores_before(cycle)
        scores = self._score(cycle, clock, is_read=is_read) if may_score else None
        with clock.phase("select"):
            selection, excluded = self._first(lambda: self._select(cycle, scores))
        self._labels(cycle, selection, scores)
        self._at("select", cycle)
        if self.exp.begins_anew(cycle):
            self.learner = self._learner()
        if self.keeper and self.rank == 0:
            is_ahead = self.exp.select.scores == "overlapped" and cycle + 1 < self.exp.cycles
            if is_ahead and self._reads(cycle + 1, selection.state):
                self.keeper.begin_ahead(self._selectable(), self._weights)
            if is_read or self.exp.buys_labels:
                self._rest(cycle, selection.state)
        files, about = {}, None
        if self.rank == 0:
            files["selected.parquet"] = table_bytes(selection_table(selection))
            if selection.bought:
                files["bought.parquet"] = table_bytes(selection_table(selection.bought))
        if scores and self.keeper:
            files["scores.parquet"] = table_bytes(scores.table)
            mean = pc.mean(scores.table["entropy"]).as_py()
            about = {
                "tiles": scores.tiles,
                "side": self.keeper.side,
                "entropy_mean": mean,
                "weights": scores.weights,
                "nodes": scores.nodes,
            }
        return OpenCycle(cycle, selection, excluded, files, about, clock)

    def _reads(self, cycle: int, state: dict[str, Any]) -> bool:
        """Whether the selection of a cycle looks at scores, on rank 0; the other ranks have no say."""
        is_mine = self.rank == 0 and self.keeper is not None
        return is_mine and reads_scores(self.exp, cycle, self._selectable(), state)

    def _rest(self, cycle: int, state: dict[str, Any]) -> None:
        """Give back scorers that will be idle on nodes that nothing else keeps."""
        assert self.keeper is not None
        ids, later = self._selectable(), range(cycle + 1, self.exp.cycles)
        scoring = (c for c in later if reads_scores(self.exp, c, ids, state))
        idle = self._busy * (next(scoring, self.exp.cycles) - cycle)
        if self.setup.shrinks and (given := self.keeper.rest(idle, self.nodes)):
            self._say(f"{given} idle scorers are given back for about {idle:.0f} s")

    def _score(self, cycle: int, clock: Clock, *, is_read: bool) -> Scored | None:
        """Scores of the pool, on rank 0; the other ranks wait for the selection."""
        if self.rank or self.keeper is None:
            return None
        if request := self._asked(cycle):
            table = people.seen(self.ledger.storage, request.number)
            return Scored(table, request.scored, {}, [], request.weights)
        before = partial(self._weights_before, cycle) if cycle else None
        with clock.phase("score"):
            scores = self.keeper.scores(self._selectable(), self._weights, before, is_read=is_read)
        self._quarantine(scores.bad if scores else [])
        return scores

    def _asked(self, cycle: int) -> Request | None:
        """What people were asked for before this run of the job, if the cycle begins a round."""
        if not (self.exp.asks_people and self.exp.pool.begins(cycle)):
            return None
        return people.asked(self.ledger.storage, cycle // self.exp.pool.cycles)

    def _selectable(self) -> pa.StringArray:
        owned = {} if self.keeper and self.keeper.features else bought(self.state)  # they are centers
        return without(self.candidates, [*self.quarantine, *owned])

    def _weights(self) -> tuple[dict[str, np.ndarray], str]:
        if self._packed:
            self.weights_hash = self._packed.result()[1]
        return {n: t.numpy() for n, t in self.learner.weights().items()}, self.weights_hash

    def _needs(self, column: str) -> bool:
        return column in self.strategy.needs

    def _references(self, ids: pa.StringArray) -> list[tuple[pa.StringArray, Weights]]:
        """Of the tiles, those that each run of the reference judges, and its newest weights."""

        def newest(ledger: Ledger) -> tuple[dict[str, np.ndarray], str]:
            manifest, data = weights_of_run(ledger, None)
            weights = checkpoint.unpack(data, "model.safetensors")
            return {n: t.numpy() for n, t in weights.items()}, manifest.files["model.safetensors"]["sha256"]

        ledgers = ledgers_of(str(self.exp.select.reference))
        rows = self.pool.filter(pc.is_in(self.pool["tile_id"], ids))
        shares, _ = judged_by(ledgers, rows)
        return [
            (sorted_names(own["tile_id"]), partial(newest, ledger))
            for ledger, own in zip(ledgers, shares, strict=True)
            if len(own)
        ]

    def _weights_before(self, cycle: int) -> tuple[dict[str, np.ndarray], str]:
        """The weights that the cycle before started from: those of the cycle before that, or the initial ones."""
        if cycle < 2:
            weights = weights_of(self._network())
            return {n: t.numpy() for n, t in weights.items()}, digest(checkpoint.pack(weights))
        manifest = self.ledger.manifests()[cycle - 2]
        weights = checkpoint.unpack(self.ledger.read(manifest, "model.safetensors"), "model.safetensors")
        return {n: t.numpy() for n, t in weights.items()}, manifest.files["model.safetensors"]["sha256"]

    def _select(self, cycle: int, scores: Scored | None) -> tuple[Selection, list[str]]:
        """The selection, and the tiles in quarantine, of which scorers have told rank 0 alone."""
        before = self._asked(cycle)
        if before:
            self._quarantine(list(before.quarantine))
        while True:
            excluded = sorted(self.quarantine)
            selection = choose(
                self.exp,
                cycle,
                scores=scores.table if scores else None,
                index=self.pool,
                state=self.state,
                excluded=set(excluded),
            )
            to_show = selection.bought.tile_ids if selection.bought and self.exp.asks_people else []
            if before or not (bad := people.unreadable(self.store, to_show)):
                return selection, excluded
            self._quarantine(bad)

    def _labels(self, cycle: int, selection: Selection, scores: Scored | None) -> None:
        """Labels by people: ask for those just picked, or take them; training reads them from the run's own store.

        Raises:
            WaitingForLabels: on rank 0, when they have yet to come.
        """
        if not self.exp.asks_people:
            return
        run = self.ledger.storage

        def take() -> None:
            number, picks = cycle // self.exp.pool.cycles, selection.bought
            if picks is None:
                return
            if (before := people.asked(run, number)) is None:
                self._settle()  # what is trained so far is committed before the run ends
                weights, scored, table = (
                    (scores.weights, scores.tiles, scores.table) if scores else (None, 0, None)
                )
                bad = tuple(self.quarantine[t] for t in sorted(self.quarantine))
                people.ask(
                    run, Request(number, picks.tile_ids, weights, scored, bad), picks, self.store, table
                )
            elif before.tile_ids != picks.tile_ids:
                raise DataError(
                    f"{run.uri}/{people.place(number)} asks for other tiles than the ledger gives: it was changed, or is of another run"
                )
            folder = str(self.exp.pool.labels)
            people.take(
                run,
                number,
                self.store,
                people.require(run, number, picks.tile_ids, folder, self.store.dataset),
            )

        self._first(take)

    def _take_labels(self, selection: Selection) -> None:
        """Class weights follow from the labels bought so far; those by people are read from the run's own store."""
        if self.exp.asks_people:
            self.taught = Store.open(self.ledger.storage.at(people.LABELLED).uri)
        rows = self.taught.index if self.exp.asks_people else self.pool
        pixels = pixels_of(rows_bought(rows, selection.state), len(self.names))
        alpha = class_weights(pixels, self.exp.loss.alpha_power)
        self.learner.alpha = torch.from_numpy(alpha).to(self.device)

    def _norm_plan(self, opened: OpenCycle) -> Plan:
        """Tiles that batch norm is estimated from, out of all that are labelled: the same for every strategy."""
        optim, owned = self.exp.optim, bought(opened.selection.state)
        labelled = names_of(sorted(owned)) if self.exp.buys_labels else self.candidates
        return norm_plan(
            without(labelled, opened.excluded) if optim.norm_tiles else labelled[:0],
            optim.norm_tiles,
            seed=self.exp.seed,
            cycle=opened.cycle,
            batch=optim.batch,
            micro_batch=optim.micro_batch,
        )

    def _train(self, opened: OpenCycle, order: Plan, norm: Plan) -> dict[str, float]:
        """All steps that are left, and batch norm from tiles that come behind them; loss and learning rate of the cycle."""
        exp, cycle = self.exp, opened.cycle
        own = order.share(self.rank, self.workers)
        share = [(p, order.order[p]) for p in own if p >= opened.done * exp.optim.batch]
        behind = [(len(order.order) + p, norm.order[p]) for p in norm.share(self.rank, self.workers)]
        with closing(self._stream("train", share + behind, keys=(exp.seed, cycle))) as stream:
            lr = self._steps(opened, order, norm, stream)
        if self.keeper and self.collects and self.rank == 0:
            visits = sorted(opened.visits, key=lambda v: v[0])
            black = self.quarantine
            visits = [v for v in visits if order.order[v[0]] not in black and np.isfinite(v[1]).all()]
            rows = np.stack([row for _, row in visits]) if visits else self.keeper.visits[1][:0]
            self.keeper.visits = [order.order[p] for p, _ in visits], rows
        loss, known, *sums = (math.fsum(column) for column in zip(*opened.losses, strict=True))
        if sums:
            seen = {**opened.selection.state, "class_iou": iou_of_sums(sums)}
            opened.selection = replace(opened.selection, state=seen)
        return {"loss": loss / max(known, 1), "lr": lr}

    def _steps(self, opened: OpenCycle, order: Plan, norm: Plan, stream: Stream) -> float:
        """The steps that are left and batch norm, counted in the open cycle; the last learning rate."""
        exp, cycle, selection = self.exp, opened.cycle, opened.selection
        part = Part(stream)
        lr = exp.optim.lr
        weighted = any(w != 1 for w in selection.weights)
        weight_of = dict(zip(selection.tile_ids, selection.weights, strict=True))
        first, length = exp.schedule_span(cycle)
        for step in range(opened.done, order.steps):
            if step == order.steps // 2:
                self._at("train", cycle)
            micro: list[MicroBatch] = []
            for number, positions in order.micro_batches(step, self.rank, self.workers):
                images, labels = self._arrays(stream.take(positions))
                weights = [weight_of[order.order[p]] for p in positions] or [1.0]
                weight = torch.tensor(weights, device=self.device) if weighted else None
                micro.append(MicroBatch(number, *to_device(images, labels, self.device), weight))
                part.positions.append(positions)
            at = (cycle - first) * order.steps + step
            lr = learning_rate(exp.optim.lr / 2**self.rollbacks, exp.optim.schedule, at, length * order.steps)
            part.losses.append(
                self.learner.step(
                    micro,
                    lr=lr,
                    key=("drop", exp.seed, cycle, step),
                    total=self._micro_batches(order, step),
                    visits=part.visits if self.collects else None,
                    by_class=self.strategy.reads_iou,
                )
            )
            if self.learner.skipped:
                self._left_out(opened, order, step)
            if step + 1 == order.steps:
                break
            stopping = self._stops(part, step + 1, order.steps)
            if self._is_due(step + 1) or stopping:
                self._count(opened, part, step + 1)
                if self.rank == 0:
                    self._commit_inside(opened)
                part = Part(stream)
            if stopping:
                raise StoppedInside
        self.learner.estimate(
            (
                [
                    (number, self._images(stream.take([len(order.order) + p for p in positions])))
                    for number, positions in norm.micro_batches(step, self.rank, self.workers)
                ],
                self._micro_batches(norm, step),
            )
            for step in range(norm.steps)
        )
        self._count(opened, part, order.steps)
        return lr

    def _left_out(self, opened: OpenCycle, order: Plan, step: int) -> None:
        """A step had no finite gradient: say so, and give up if there are too many in a row."""
        row = self.learner.skipped
        if self.rank == 0:
            self._say(f"step {step + 1} of cycle {opened.cycle + 1} has no finite gradient and is left out")
        if row > SKIPPED_STEPS:
            self._name_tiles(opened.cycle, order, max(0, step + 1 - row), step + 1)
            raise DivergedError(
                f"training diverged in cycle {opened.cycle}: {row} steps in a row have no finite gradient; their tiles are in "
                "diverged.json, the last good cycle is committed: lower optim.lr"
            )

    def _name_tiles(self, cycle: int, order: Plan, first: int, end: int) -> None:
        """Write the tiles of the steps first to end - 1, in which training diverged, to `diverged.json`."""
        if self.rank == 0:
            tiles = order.order[first * order.batch : end * order.batch]
            dump = {
                "cycle": cycle,
                "steps": [first, end],
                "rollbacks": self.rollbacks,
                "config_hash": config_hash(self.exp),
                "tile_ids": tiles,
            }
            self.ledger.storage.write("diverged.json", (json.dumps(dump, indent=1) + "\n").encode())

    def _micro_batches(self, order: Plan, step: int) -> int:
        """Micro-batches of a step that hold tiles, over all ranks."""
        batch = self.exp.optim.batch
        return -(-min(batch, len(order.order) - step * batch) // self.exp.optim.micro_batch)

    def _stops(self, part: "Part", done: int, steps: int) -> bool:
        """Whether the run is to stop after so many steps of a cycle, on every rank alike."""
        if done % NOTICE_STEPS:
            return False
        left = (time.perf_counter() - part.began) / max(len(part.losses), 1) * (steps - done)
        stopping = self.beat is not None and self.beat.stopping and left > STOP_SECONDS
        if self.workers > 1:
            said = torch.tensor([int(stopping)], device=self.device)
            dist.broadcast(said, 0)
            stopping = bool(said.item())
        if stopping and self.rank == 0:
            self._say(f"stopping: committing after step {done} of {steps}")
        return stopping

    def _is_due(self, done: int) -> bool:
        """Whether to commit inside the cycle after so many steps: asked for, or a node is about to be taken away."""
        every = self.exp.cluster.commit_every_steps
        due = bool(every) and done % every == 0  # type: ignore[operator]
        if done % NOTICE_STEPS == 0 and ray.train.get_preemption_info() is not None:  # until it is gone
            if self.rank == 0 and not self._noticed:
                self._say("a node will be taken away: committing")
            self._noticed = due = True
        return due

    def _count(self, opened: OpenCycle, part: "Part", done: int) -> None:
        """Add to the cycle what all ranks have done since the last time."""
        stall, nodes, bad = part.stream.told()
        self._tell_starved(part.stream)
        opened.clock.add("train", time.perf_counter() - part.began - stall)
        opened.clock.add("stall", stall)
        visits = [
            (p, row)
            for positions, rows in zip(part.positions, part.visits, strict=False)
            for p, row in zip(positions, rows.cpu().numpy(), strict=False)
        ]
        losses = torch.stack(part.losses).tolist() if part.losses else []
        here = node_id()
        visited = Counter({here: sum(map(len, part.positions))})
        work = {"read": nodes, "train": Counter({here: len(losses)}), "visit": visited}
        for own_losses, own_visits, own_work, own_bad in self._everyone((losses, visits, work, bad)):
            opened.losses += own_losses
            opened.visits += own_visits
            for kind in WORK:
                opened.nodes[kind] += own_work[kind]
            self._quarantine(own_bad)
        opened.done = done

    def _commit_inside(self, opened: OpenCycle) -> None:
        """Commit the state after some steps, in a thread."""
        with opened.clock.phase("commit"):
            self._settle()
            self._list_quarantine()
            files = {**opened.files, "state.json": self._state_bytes(opened)}
            if opened.visits:
                positions, rows = zip(*opened.visits, strict=True)
                files["visits.parquet"] = table_bytes(
                    pa.table({"position": positions, "row": pa.array(list(rows), pa.list_(pa.float32()))})
                )
            model, optimizer = self.learner.weights(), self.learner.optimizer_state()
        record = {
            "config_hash": config_hash(self.exp),
            "scores": opened.scores,
            "losses": list(opened.losses),
            "nodes": {k: dict(v) for k, v in opened.nodes.items()},
            "seconds": dict(opened.clock.seconds),
        }
        cycle, step, every = opened.cycle, opened.done, self.exp.cluster.commit_every_steps

        def commit() -> None:
            files["model.safetensors"] = checkpoint.pack(model)
            files["optimizer.safetensors"] = checkpoint.pack(optimizer)
            self.ledger.commit(cycle, files, lambda: record, step)
            self.setup.monitor.post.remote({"kind": "inside"})
            # the one before stays, should this one rot
            self.ledger.prune_steps(cycle, before=step - (every or 0))

        self._pending = self._committer.submit(commit)

    def _arrays(self, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of a micro-batch; one black, void tile if there is none."""
        side = self.store.dataset.tile_size
        if not rows:
            return np.zeros((1, side, side, 3), np.uint8), np.zeros((1, side, side), np.uint8)
        return np.stack([r.image for r in rows]), np.stack([r.label for r in rows])

    def _images(self, rows: list[Row]) -> torch.Tensor:
        return to_images(self._arrays(rows)[0], self.device)

    def _evaluate(self) -> tuple[dict[str, Any], Counter[str], torch.Tensor | None]:
        """Metrics on the validation tiles, how many of them each node has read for it, and the classes found in the first."""
        nodes: Counter[str] = Counter()
        if self.validation_rows is not None:
            totals = self._totals(self.validation_rows)
        else:
            stream, batches = self._read_validation()
            read = (stream.take(b) for b in batches)
            if (
                len(self.validation) * self.store.dataset.tile_size**2 * 4
                <= self.exp.cluster.cache_gib * self.workers * 2**30
            ):
                self.validation_rows = [[row.kept() for row in rows] for rows in read]
            totals = self._totals(self.validation_rows or read)
            stream.close()
            self._tell_starved(stream)
            for read, bad in self._everyone((stream.nodes, stream.bad)):
                nodes += read
                self._quarantine(bad)
        loss, pixels, soft, count = totals.sums.tolist()
        self.by_source = totals.counts.cpu().numpy()
        counts = self.by_source.sum(0)
        return (
            {
                "loss": loss / max(pixels, 1),
                "soft_iou": soft / max(count, 1),
                "tiles": len(self.validation),
                **metrics.scores(counts, self.names),
                "counts": counts.tolist(),
            },
            nodes,
            totals.first,
        )

    def _totals(self, batches: Iterable[list[Row]]) -> Totals:
        def arrays() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
            for number, rows in enumerate(batches):
                if number == 0:
                    self.examples = rows[:EXAMPLES]
                sources = torch.tensor([self.source_of[r.position] for r in rows], device=self.device)
                yield (*to_device(*self._arrays(rows), self.device), sources)

        return self.learner.evaluate(arrays(), len(self.sources))

    def _pictured(self, found: torch.Tensor | None) -> np.ndarray | None:
        """A few validation tiles as a picture, one a row: image, label, prediction."""
        if found is None or not self.examples:
            return None
        images, labels = self._arrays(self.examples)
        guess = found[:EXAMPLES].cpu().numpy()
        colors = np.zeros((256, 3), np.uint8)
        colors[: len(self.names)] = palette(self.store.dataset.classes)
        rows = [
            np.hstack([x, colors[target_of(y)], colors[p]])
            for x, y, p in zip(images, labels, guess, strict=True)
        ]
        return np.vstack(rows)

    def _read_validation(self) -> tuple[Stream, list[range]]:
        """This rank's share of the validation tiles, whole batches of the global order, and their positions."""
        size = self.exp.optim.batch
        batches = [
            range(i, min(i + size, len(self.validation))) for i in range(0, len(self.validation), size)
        ]
        own = batches[self.rank :: self.workers]
        wanted = [(p, self.validation[p]) for b in own for p in b]
        return self._stream("val", wanted, keys=None), own

    def _tell_starved(self, stream: Stream) -> None:
        if stream.starved and not self.starved:
            self.starved = True
            self._say(
                f"no read task has found a CPU for {STARVED_SECONDS:.0f} s: worker {self.rank} reads its tiles itself from now on, which "
                "is slower; lower --workers or --scorers"
            )

    def _stream(self, name: str, wanted: list[tuple[int, str]], keys: tuple[int, int] | None) -> Stream:
        cluster = self.exp.cluster
        return Stream(
            self.taught if name == "train" else self.store,
            wanted,
            name=f"{self.arm.name}-{name}",
            chunk=cluster.chunk,
            reader_cpus=cluster.reader_cpus,
            keys=keys,
            limits=self.exp.augment,
            alone=self.starved,
        )

    def _everyone(self, own: Any) -> list[Any]:
        """What each rank has to tell, in the order of ranks."""
        parts = [own]
        if self.workers > 1:
            parts = [None] * self.workers
            dist.all_gather_object(parts, own)
        return parts

    def _quarantine(self, bad: list[BadTile]) -> None:
        for tile in bad:
            if tile.tile_id not in self.quarantine and self.rank == 0:
                self._say(f"tile {tile.tile_id} is quarantined: {tile.reason}")
            self.quarantine[tile.tile_id] = tile
        allowed = self.exp.data.bad_tile_budget * self.store.index.num_rows
        if len(self.quarantine) > allowed:
            self._list_quarantine()
            first = next(iter(self.quarantine.values()))
            raise DataError(
                f"{len(self.quarantine)} of {self.store.index.num_rows} tiles are unusable, data.bad_tile_budget allows "
                f"{allowed:.1f}; the first is {first.tile_id}: {first.reason}; all are in {self.ledger.storage.uri}/quarantine.parquet"
            )

    def _list_quarantine(self) -> None:
        """Write `quarantine.parquet`, if there is anything in it."""
        if self.rank or not self.quarantine:
            return
        table, index = quarantine_table(self.quarantine.values()), self.store.index
        at = pc.index_in(table["tile_id"], index["tile_id"])
        expected = as_written(index.select(["sha256"]).take(at))["sha256"]
        self.ledger.storage.write(
            "quarantine.parquet", table_bytes(table.append_column("expected", expected))
        )

    def _check(self, cycle: int, order: Plan, train: dict[str, float], val: dict[str, Any]) -> None:
        finite = (
            torch.isfinite(torch.cat([p.detach().flatten() for p in self.learner.parameters.values()]))
            .all()
            .item()
        )
        if not finite or not all(map(math.isfinite, (train["loss"], val["loss"]))):
            self._name_tiles(cycle, order, 0, order.steps)
            raise DivergedError(
                f"training diverged in cycle {cycle}: loss {train['loss']}, in validation {val['loss']}; its tiles are in diverged.json, "
                "the last good cycle is committed: lower optim.lr"
            )

    def _state_bytes(self, opened: OpenCycle) -> bytes:
        state = {
            "strategy": opened.selection.state,
            "excluded": opened.excluded,
            "rollbacks": self.rollbacks,
            "quarantine": [asdict(self.quarantine[t]) for t in sorted(self.quarantine)],
        }
        return (json.dumps(state, indent=1) + "\n").encode()

    def _settle(self) -> None:
        """Wait until the cycle before is committed, and raise what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _commit(
        self,
        cycle: int,
        files: dict[str, bytes],
        record: dict[str, Any],
        *,
        model: Future[tuple[bytes, str]],
        optimizer: dict[str, torch.Tensor],
        pictures: np.ndarray | None,
    ) -> None:
        """Commit a cycle, in a thread while the next one begins: blocks the trainer 0.3 s a cycle otherwise."""
        files["model.safetensors"] = model.result()[0]
        files["optimizer.safetensors"] = checkpoint.pack(optimizer)
        if pictures is not None:
            files["examples.png"] = encode_picture(pictures)

        def completed() -> dict[str, Any]:
            self._at("commit", cycle)
            return record

        manifest = self.ledger.commit(cycle, files, completed)
        self.ledger.prune(cycle)
        if self.exp.cluster.commit_every_steps or self._noticed:
            self.ledger.prune_steps(cycle)
        event = {
            "kind": "cycle",
            "arm": self.arm.name,
            "manifest": manifest,
            "scorers": self.setup.scorers.up,
        }
        self.setup.monitor.post.remote(event)


def packed(weights: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    """Weights as bytes, and their SHA-256."""
    data = checkpoint.pack(weights)
    return data, digest(data)


def pixels_of(rows: pa.Table, classes: int) -> np.ndarray:
    """(C,) pixels of each class in labelled tiles."""
    known = rows["pixels"].drop_null()
    return matrix(known).sum(0, dtype=np.int64)[1:] if len(known) else np.zeros(classes, np.int64)


def node_id() -> str:
    """Id of this process's Ray node."""
    return ray.get_runtime_context().get_node_id()


def node_cpus() -> int:
    """CPUs that Ray counts on this node, at least one."""
    here = [n for n in ray.nodes() if n["NodeID"] == node_id()]
    return max(1, int(here[0]["Resources"].get("CPU", 1))) if here else os.cpu_count() or 1
