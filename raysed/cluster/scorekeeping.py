"""Who scores which tiles when: the score table of a run on rank 0, from cycle to cycle."""

import math
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysed.cluster.scoring import ScorerPool, Scores, score_pool
from raysed.config import SelectConfig
from raysed.core.acquisition import STRATEGIES
from raysed.core.pool import matrix, names_of
from raysed.core.scores import ScoreTable, calibrated
from raysed.io.store import BadTile, Store, give_back

Weights = Callable[[], tuple[dict[str, np.ndarray], str]]
"""A network's state dict as arrays, and its hash."""
References = Callable[[pa.StringArray], list[tuple[pa.StringArray, Weights]]]
"""Of these tiles, those that each network of a reference judges, and its weights."""
FIRST_GRACE, GRACE = 60.0, 3.0
"""Seconds that the first scorer waits for the others: when they were just made, and later, when one may have lost its node."""
RELEASE_SECONDS = 60.0
"""Scorers that will be idle for longer are given back where nothing else keeps their node: new ones take about ten seconds, and
read the pool again.
"""
SAMPLE = 32
"""Visited tiles that a scorer scores too, to bring by-product scores onto its scale."""
COLLECTED = frozenset({"loss", "class_loss"})
"""Columns that come from training visits alone."""
MANY = 1_000_000
"""Tiles of a pool whose scores leave behind holes of memory worth giving back before the next ones; milliseconds, of minutes."""
RECORDED = frozenset({"entropy", "margin", "mass", "features", "irreducible"}) | COLLECTED
"""Columns that a run can record."""


@dataclass(frozen=True)
class Scored:
    """The scores that one cycle selects by."""

    table: pa.Table
    tiles: int
    """Scored by a scorer for this cycle."""
    nodes: dict[str, int]
    bad: list[BadTile]
    weights: str | None
    """Hash of the weights they were scored with; None if no scorer worked."""


def scored_side(wanted: str, mode: str, side: int, multiple: int) -> int:
    """Side at which scorers look at tiles: half, where it is wanted and the network has two of its strides in it.

    Args:
        wanted: auto, full or half; auto is half where training gives most scores.
        mode: where scores come from.
        side: of a stored tile, pixels.
        multiple: what the network's input must be a multiple of.
    """
    half = side // 2 // multiple * multiple
    is_half = wanted == "half" or (wanted == "auto" and mode == "byproduct")
    return half if is_half and half >= 2 * multiple else side


class Scorekeeper:
    """The score table and what keeps it up to date.

    Args:
        scorers: the pool; without any if the strategy needs no forward pass.
        patience: seconds to wait for a scorer.
        store: the tile store.
        select: strategy and mode.
        multiple: side of a tile that the network takes is a multiple of this.
        taken: threads that training workers use, by node: in mode overlapped scorers leave them alone.
        reference: the networks that say what loss is irreducible, if the strategy asks for it.
    """

    def __init__(
        self,
        scorers: ScorerPool,
        patience: float,
        store: Store,
        select: SelectConfig,
        *,
        multiple: int,
        taken: Mapping[str, int],
        precision: str,
        reference: References | None = None,
    ) -> None:
        strategy = STRATEGIES[select.strategy]
        self.scorers, self.patience, self.store = scorers, patience, store
        self._grace, self.precision = FIRST_GRACE, precision
        self.mode = select.scores if strategy.needs_scores else "visits"
        self.refresh = select.refresh
        self.features = "features" in strategy.needs
        """Whether scorers give the network's deepest features too."""
        self.collects = bool(strategy.needs & COLLECTED) or self.mode == "byproduct"
        """Whether training has to record its visits."""
        self.side = scored_side(select.side, self.mode, store.dataset.tile_size, multiple)
        self._taken = taken if self.mode == "overlapped" else {}
        self.classes = len(store.dataset.classes)
        self.reference = reference
        self.irreducible: dict[str, float] | None = None
        """Loss of each tile under its reference; a pass over the pool once a run, and from the ledger when it goes on."""
        self.table = ScoreTable.unknown([], self.classes)
        self.visits: tuple[list[str], np.ndarray] = ([], np.zeros((0, 3 + 2 * self.classes), np.float32))
        """Tiles of the last cycle in the order of its plan, and their rows of `uncertainty.visit_scores`."""
        self._ahead: tuple[Future[Scores], str] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raysed-score")

    def restore(self, scores: pa.Table, visits: pa.Table | None) -> None:
        """Go on after a committed cycle, from its `scores.parquet` and `visits.parquet`."""
        self.table = self._kept(ScoreTable.from_table(scores, self.classes))
        if "irreducible" in scores.column_names:
            pairs = zip(scores["tile_id"].to_pylist(), scores["irreducible"].to_pylist(), strict=True)
            self.irreducible = {t: v for t, v in pairs if v is not None}
        if visits is not None:
            self.visits = visits["tile_id"].to_pylist(), matrix(visits["row"])

    def _kept(self, table: ScoreTable) -> ScoreTable:
        """What the next cycle needs: a fresh pass renews all scores, and those of ten million tiles are a third of a GiB."""
        return table.without_scores() if self.mode == "fresh" else table

    def forget(self) -> None:
        """Be as at the beginning of a run, but for the irreducible losses, once the pass that may be running has ended."""
        self._drop_ahead()
        self.table = ScoreTable.unknown([], self.classes)
        self.visits = [], self.visits[1][:0]

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            with suppress(Exception):
                self._ahead[0].result()
        self._ahead = None

    def visits_table(self) -> pa.Table:
        """`visits.parquet`: tile_id, row (see `uncertainty.visit_scores`)."""
        ids, rows = self.visits
        return pa.table(
            {"tile_id": pa.array(ids, pa.string()), "row": pa.array(list(rows), pa.list_(pa.float32()))}
        )

    def scores(
        self, ids: pa.StringArray, now: Weights, before: Weights | None, *, is_read: bool = True
    ) -> Scored | None:
        """Scores for the selection of a cycle.

        Args:
            ids: the tiles that can be selected, sorted.
            now: the weights that the cycle starts from.
            before: those that the cycle before started from; asked only in mode overlapped.  None in the first cycle.
            is_read: whether the selection looks at scores.  If not, what training has told is taken down all the same, and nothing else is scored
                than the few tiles that bring it onto the scorers' scale.

        Returns:
            None if there is nothing to take down.
        """
        if not is_read:
            self._drop_ahead()
            if not (self.collects or self.reference):
                return None
        is_large = len(ids) >= MANY
        if is_large:
            give_back()
        table = self.table.only(ids).older()
        keep = np.flatnonzero(_is_in(names_of(self.visits[0]), ids))
        visited, rows = [self.visits[0][i] for i in keep], self.visits[1][keep]
        found, version = None, None
        if self.mode == "byproduct" and visited:
            refreshed = math.ceil(self.refresh * len(ids)) if is_read else 0
            found, version, table = self._refreshed(table, visited, rows, now, refreshed)
        else:
            table = table.with_losses(visited, rows)
            if is_read and self.mode == "overlapped":
                found, version = self._one_cycle_old(ids, now, before)
            elif is_read and self.mode != "visits":
                found, version = self._pass(ids, now)
        if found is not None:
            kept = _is_in(found.ids, ids)
            table = (
                table.with_scores(found.ids, found.rows)
                if kept.all()
                else table.with_scores(found.ids.filter(pa.array(kept)), found.rows[kept])
            )
        columns = table.table()
        self.table = self._kept(table)
        bad, tiles, nodes = (list(found.bad), len(found.ids), found.nodes) if found else ([], 0, {})
        if self.reference is not None:
            more, unread = self._reference_pass(ids)
            bad, tiles = bad + unread, tiles + more
            values = [(self.irreducible or {}).get(t) for t in columns["tile_id"].to_pylist()]
            columns = columns.append_column("irreducible", pa.array(values, pa.float32()))
        if self.features and found is not None:
            columns = columns.append_column("features", _features(columns["tile_id"], found))
        if is_large:
            del found, table
            give_back()
        return Scored(columns, tiles, nodes, bad, version)

    def _reference_pass(self, ids: pa.StringArray) -> tuple[int, list[BadTile]]:
        """Find the irreducible losses, once; the number of tiles scored for that, and those that could not be read."""
        if self.irreducible is not None or self.reference is None:
            return 0, []
        self.irreducible, bad = {}, []
        for own, network in self.reference(ids):
            weights, version = network()
            found = self._passed(own, weights, version, side=self.store.dataset.tile_size, loss=True)
            self.irreducible |= zip(found.ids.to_pylist(), found.loss.tolist(), strict=True)
            bad += found.bad
        return len(self.irreducible), bad

    def begin_ahead(self, ids: pa.StringArray, now: Weights) -> None:
        """In mode overlapped: score the pool for the next cycle while this one trains."""
        if self.mode == "overlapped" and self._ahead is None:
            weights, version = now()
            self._ahead = self._thread.submit(self._pool, ids, weights, version), version

    def rest(self, seconds: float, occupied: Collection[str]) -> int:
        """Give back the scorers on nodes other than these if they will be idle for so long; how many they are."""
        if self.mode == "overlapped" or seconds < RELEASE_SECONDS:
            return 0
        self._grace = FIRST_GRACE
        return self.scorers.release(occupied)

    def _one_cycle_old(self, ids: pa.StringArray, now: Weights, before: Weights | None) -> tuple[Scores, str]:
        if self._ahead is None:  # the first cycle, or one that is continued
            found, version = self._pass(ids, before or now)
            if before is None:
                done: Future[Scores] = Future()
                done.set_result(found)
                self._ahead = done, version  # the second cycle selects by the first weights as well
            return found, version
        future, version = self._ahead
        self._ahead = None
        return future.result(), version

    def _refreshed(
        self, table: ScoreTable, visited: list[str], rows: np.ndarray, now: Weights, refreshed: int
    ) -> tuple[Scores, str, ScoreTable]:
        spread = np.unique(
            np.linspace(0, len(visited) - 1, min(SAMPLE, len(visited))).astype(int)
        )  # late visits differ
        sample = [visited[i] for i in spread]
        oldest = table.oldest(refreshed, set(visited))
        found, version = self._pass(names_of(sorted([*sample, *oldest])), now)
        scorer = dict(zip(found.ids.to_pylist(), found.rows, strict=True))
        both = [i for i in spread if visited[i] in scorer]
        if len(both) > 1:
            rows = calibrated(rows, rows[both], np.stack([scorer[visited[i]] for i in both]))
        return found, version, table.with_visits(visited, rows)

    def _pass(self, ids: pa.StringArray, weights: Weights) -> tuple[Scores, str]:
        arrays, version = weights()
        return self._pool(ids, arrays, version), version

    def _pool(self, ids: pa.StringArray, weights: dict[str, np.ndarray], version: str) -> Scores:
        return self._passed(ids, weights, version, side=self.side, features=self.features)

    def _passed(
        self,
        ids: pa.StringArray,
        weights: dict[str, np.ndarray],
        version: str,
        *,
        side: int,
        features: bool = False,
        loss: bool = False,
    ) -> Scores:
        scorers, threads = self.scorers.ready(self.patience, self._grace, self._taken)
        self._grace = GRACE
        at = self.store.located(ids)
        return score_pool(
            scorers,
            threads,
            weights,
            version,
            at,
            side=side,
            features=features,
            loss=loss,
            precision=self.precision,
            renew=self.scorers.renew,
        )


def _is_in(ids: pa.StringArray, others: pa.StringArray) -> np.ndarray:
    """(N,) bool: which ids are among the others."""
    if ids.equals(others):
        return np.ones(len(ids), bool)
    return pc.is_in(ids, value_set=others).to_numpy(zero_copy_only=False)


def _features(ids: pa.ChunkedArray, found: Scores) -> pa.Array:
    """Column of each tile's features, null where it has none."""
    at = {t: i for i, t in enumerate(found.ids.to_pylist())}
    rows = [found.features[at[t]] if t in at else None for t in ids.to_pylist()]
    return pa.array(rows, pa.list_(pa.float16()))
