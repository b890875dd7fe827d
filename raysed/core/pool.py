"""The pool that a strategy selects from, as arrays.  Letters: N tiles, C classes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Selection:
    """The tiles of one cycle, best first."""

    tile_ids: list[str]
    weights: list[float]
    """Importance weights of the tiles' losses; all 1 where a strategy has none."""
    reasons: list[str]
    state: dict[str, Any] = field(default_factory=dict)
    """What the strategy wants to see again in the next cycle; JSON."""
    bought: "Selection | None" = None
    """The tiles whose labels are bought before training, where labels are."""


class Pool:
    """Index and scores in order of tile_id: a stable sort then breaks ties by tile_id, and no draw depends on the order of rows.

    Args:
        scores: any rows of tiles; those that the index does not have are ignored.
        index: the tiles that can be selected.
    """

    def __init__(self, scores: pa.Table | None, index: pa.Table) -> None:
        self._scores, self._index = scores, index
        names = names_of(index["tile_id"])
        self._order = None if is_sorted(names) else pc.sort_indices(names)
        self._ids = names if self._order is None else names.take(self._order)

    def __len__(self) -> int:
        return len(self._ids)

    @cached_property
    def ids(self) -> np.ndarray:
        """(N,) str; as Python objects, three times the memory that the tables hold them in."""
        return self._ids.to_numpy(zero_copy_only=False)

    def score(self, name: str) -> np.ndarray:
        """(N,) float64 column of the scores; nan for a tile that has none."""
        return self._scored(name).to_numpy().astype(float)

    def scores(self, name: str) -> np.ndarray:
        """(N, width) column of lists of the scores, in its own float type; nan for a tile that has none; width 1 if none has."""
        return matrix(self._scored(name))

    def other_scores(self, name: str) -> np.ndarray:
        """(M, width) column of lists of the scores, of the tiles in order of tile_id that the index does not have; only finite ones."""
        assert self._scores is not None
        others = self._scores.filter(pc.invert(pc.is_in(self._scores["tile_id"], self._ids)))
        values = matrix(others.sort_by("tile_id")[name])
        return values[np.isfinite(values).all(1)]

    @cached_property
    def pixels(self) -> np.ndarray:
        """(N, C) float64 labelled pixels of each class; 0 in a tile without a label."""
        return np.nan_to_num(matrix(pc.cast(self._column("pixels"), pa.list_(pa.float64()))))[:, 1:]

    @cached_property
    def class_shares(self) -> np.ndarray:
        """(N, C) float64 share of each class in a tile's known pixels; 0 in a tile without any."""
        return self.pixels / np.maximum(self.pixels.sum(1, keepdims=True), 1)

    def codes(self, name: str) -> np.ndarray:
        """(N,) int group number of a column of names, such as the region, in the order in which the groups come."""
        column = self._column(name).combine_chunks()
        named = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        return pd.factorize(named.indices.to_numpy())[0]

    def selection(
        self,
        at: np.ndarray,
        reasons: list[str],
        weights: np.ndarray | None = None,
        state: dict[str, Any] | None = None,
    ) -> Selection:
        """Selection of the tiles at these positions."""
        own = [1.0] * len(at) if weights is None else weights.tolist()
        return Selection(self._ids.take(pa.array(at)).to_pylist(), own, reasons, state or {})

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._index[name] if self._order is None else self._index[name].take(self._order)

    def _scored(self, name: str) -> pa.ChunkedArray:
        assert self._scores is not None
        column = self._scores[name]
        return column if self._rows is None else column.take(self._rows)

    @cached_property
    def _rows(self) -> pa.Array | None:
        """Of the scores, one a tile; None if they are just these tiles in this order: a join of 10^7 costs seconds and 0.8 GiB."""
        assert self._scores is not None
        known = self._scores["tile_id"]
        return None if names_of(known).equals(self._ids) else pc.index_in(self._ids, value_set=known)


def names_of(ids: Iterable[str] | pa.StringArray | pa.ChunkedArray) -> pa.StringArray:
    """(N,) tile ids as one array, a third of the memory that they take as Python objects."""
    if isinstance(ids, pa.ChunkedArray):
        return ids.chunk(0) if ids.num_chunks == 1 else ids.combine_chunks()
    return ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())


def is_sorted(ids: pa.StringArray) -> bool:
    """Whether no tile id is below the one before it."""
    return bool(pc.all(pc.less_equal(ids[:-1], ids[1:])).as_py())


def sorted_names(ids: Iterable[str] | pa.StringArray | pa.ChunkedArray) -> pa.StringArray:
    """`names_of`, in order; no copy of what is in order."""
    names = names_of(ids)
    return names if is_sorted(names) else names.take(pc.sort_indices(names))


def without(ids: pa.StringArray, others: Iterable[str]) -> pa.StringArray:
    """The tile ids that are not among the others, in order."""
    gone = names_of(others)
    return ids.filter(pc.invert(pc.is_in(ids, value_set=gone))) if len(gone) else ids


def matrix(lists: pa.ChunkedArray) -> np.ndarray:
    """(N, width) of a column of lists of one length; nan where null; width 1 if all are."""
    array = lists.combine_chunks()
    known = array.is_valid().to_numpy(zero_copy_only=False)
    values = array.flatten().to_numpy(zero_copy_only=False)
    width = max(len(values) // max(known.sum(), 1), 1)
    matrix = np.full((len(array), width), np.nan, values.dtype)
    matrix[known] = values.reshape(-1, width)
    return matrix
