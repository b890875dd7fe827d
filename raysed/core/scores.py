"""The score table: what is known about every tile of the pool, and how old it is.  Letters: N tiles, C classes.

Scores come from two sources: passes of the scorers, and training visits, which cost nothing.  A visit sees an augmented tile
and batch statistics, so its scores are moved to the scale of the scorers' before they are mixed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysed.core.pool import matrix, names_of, sorted_names

SMOOTHING = 0.5
"""Share of a new visit in a tile's smoothed statistics."""
NEVER = -1
"""Age of a tile that no scorer and no visit has seen."""


@dataclass(frozen=True)
class ScoreTable:
    """Scores of a pool in order of tile_id."""

    ids: pa.StringArray
    """(N,) sorted."""
    scored: np.ndarray
    """(N, 2 + C) float32: entropy, margin, mass of each class; nan where unknown."""
    loss: np.ndarray
    """(N, 1 + C) float32: cross-entropy of training visits, smoothed, and each class's share of it; nan where never visited."""
    age: np.ndarray
    """(N,) int32 cycles since `scored` was renewed."""

    @classmethod
    def unknown(cls, ids: Iterable[str] | pa.StringArray, classes: int) -> "ScoreTable":
        """Nothing is known yet."""
        names = sorted_names(ids)
        n = len(names)
        return cls(
            names, _unknown(n, 2 + classes), _unknown(n, 1 + classes), np.broadcast_to(np.int32(NEVER), n)
        )

    def _at(self, ids: list[str] | pa.StringArray) -> np.ndarray:
        at = pc.index_in(names_of(ids), value_set=self.ids)
        assert not at.null_count, "a tile that is not in the pool"
        return at.to_numpy()

    def only(self, ids: list[str] | pa.StringArray) -> "ScoreTable":
        """Rows of these tiles, those that are not here yet as unknown."""
        fresh = ScoreTable.unknown(ids, self.scored.shape[1] - 2)
        if fresh.ids.equals(self.ids):
            return self
        found = pc.index_in(fresh.ids, value_set=self.ids)
        to, at = np.flatnonzero(found.is_valid()), found.drop_null().to_numpy()
        return replace(
            fresh,
            scored=_carried(self.scored, at, fresh.scored, to),
            loss=_carried(self.loss, at, fresh.loss, to),
            age=_carried(self.age, at, fresh.age, to),
        )

    def older(self) -> "ScoreTable":
        """A cycle has passed."""
        return replace(self, age=np.where(self.age == NEVER, NEVER, self.age + 1).astype(np.int32))

    def with_scores(self, ids: list[str] | pa.StringArray, rows: np.ndarray) -> "ScoreTable":
        """A scorer's (n, 2 + C) rows replace what was known.

        Args:
            ids: n tiles.
            rows: of these tiles.
        """
        if self.ids.equals(names_of(ids)):
            return replace(
                self, scored=np.asarray(rows, np.float32), age=np.broadcast_to(np.int32(0), len(rows))
            )
        scored, age, at = self.scored.copy(), self.age.copy(), self._at(ids)
        scored[at], age[at] = rows, 0
        return replace(self, scored=scored, age=age)

    def without_scores(self) -> "ScoreTable":
        """What scorers have told forgotten."""
        unknown = ScoreTable.unknown(self.ids, self.scored.shape[1] - 2)
        return replace(self, scored=unknown.scored, age=unknown.age)

    def with_losses(self, ids: list[str], visits: np.ndarray) -> "ScoreTable":
        """Training visits renew the smoothed losses; only the last 1 + C columns of the visits are used.

        Args:
            ids: n tiles.
            visits: (n, 2 + C + 1 + C) rows of `uncertainty.visit_scores`.
        """
        if not len(ids):
            return self
        loss, at = self.loss.copy(), self._at(ids)
        loss[at] = _smoothed(loss[at], visits[:, self.scored.shape[1] :])
        return replace(self, loss=loss)

    def with_visits(self, ids: list[str], visits: np.ndarray) -> "ScoreTable":
        """Training visits renew the smoothed scores too; the visits are on the scorers' scale already, see `calibrated`."""
        table = self.with_losses(ids, visits)
        scored, age, at = table.scored.copy(), table.age.copy(), table._at(ids)
        scored[at] = _smoothed(scored[at], visits[:, : scored.shape[1]])
        age[at] = 0
        return replace(table, scored=scored, age=age)

    def oldest(self, count: int, besides: set[str]) -> list[str]:
        """Tiles to score next: the never scored first, then by age; ties by tile_id."""
        age = np.where(self.age == NEVER, np.iinfo(np.int32).max, self.age)
        age[pc.is_in(self.ids, value_set=pa.array(besides, pa.string())).to_numpy(zero_copy_only=False)] = -1
        order = np.argsort(-age.astype(np.int64), kind="stable")
        return self.ids.take(order[: min(count, int((age >= 0).sum()))]).to_pylist()

    def table(self) -> pa.Table:
        """`scores.parquet`: tile_id, entropy, margin, mass, loss, class_loss, age; null where unknown."""
        return pa.table(
            {
                "tile_id": self.ids,
                "entropy": _nullable(self.scored[:, 0]),
                "margin": _nullable(self.scored[:, 1]),
                "mass": _lists(self.scored[:, 2:]),
                "loss": _nullable(self.loss[:, 0]),
                "class_loss": _lists(self.loss[:, 1:]),
                "age": pa.array(self.age, pa.int32()),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table, classes: int) -> "ScoreTable":
        """Inverse of `table`."""
        names = names_of(table["tile_id"])
        scored, loss = (np.full((len(names), n + classes), np.nan, np.float32) for n in (2, 1))
        for name, target in (("entropy", scored[:, 0]), ("margin", scored[:, 1]), ("loss", loss[:, 0])):
            target[:] = table[name].to_numpy()
        for name, block in (("mass", scored[:, 2:]), ("class_loss", loss[:, 1:])):
            if table[name].null_count < len(table):
                block[:] = matrix(table[name])
        return cls(names, scored, loss, table["age"].to_numpy())


def calibrated(visits: np.ndarray, sample: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Visits on the scorers' scale: every scorer column gets the mean and the deviation that scorers find on the same tiles.

    Args:
        visits: (n, 2 + C + 1 + C) rows of `uncertainty.visit_scores`.
        sample: (m, 2 + C + 1 + C) visits of tiles that a scorer has scored just after.
        reference: (m, 2 + C) the scorer's rows of these tiles.
    """
    width = reference.shape[1]
    spread, wanted = sample[:, :width].std(0), reference.std(0)
    scale = np.divide(wanted, spread, out=np.ones_like(wanted), where=spread > 0)
    moved = (visits[:, :width] - sample[:, :width].mean(0)) * scale + reference.mean(0)
    return np.hstack([np.maximum(moved, 0), visits[:, width:]]).astype(np.float32)


def _smoothed(before: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(before), new, (1 - SMOOTHING) * before + SMOOTHING * new)


def _unknown(tiles: int, width: int) -> np.ndarray:
    """(N, width) of nan, in the memory of one: losses of 10^7 tiles that nobody asks for would take a third of a GiB."""
    return np.broadcast_to(np.float32(np.nan), (tiles, width))


def _carried(values: np.ndarray, at: np.ndarray, others: np.ndarray, to: np.ndarray) -> np.ndarray:
    """The others with some of the values; no copy where that changes none of them, because nothing is known on either side."""
    is_one_row = not any((*values.strides, *others.strides))
    if not len(at) or (is_one_row and np.array_equal(values[0], others[0], equal_nan=True)):
        return others
    made = others.copy()
    made[to] = values[at]
    return made


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.float32(), mask=np.isnan(values))


def _lists(rows: np.ndarray) -> pa.Array:
    missing = np.isnan(rows).any(1)
    if missing.all():
        return pa.nulls(len(rows), pa.list_(pa.float32()))
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1])
    return pa.ListArray.from_arrays(offsets, rows.reshape(-1), mask=pa.array(missing))
