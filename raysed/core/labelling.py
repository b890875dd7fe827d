"""Pool-based selection: labels are bought round by round, and nothing of a label that was not bought is used.

A cycle at the beginning of a round buys labels: the first round by chance, the same for every strategy, later ones as the strategy
says.  Every cycle then trains on tiles that are labelled, in epochs.  Letters: N tiles, k tiles.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysed.core import draws
from raysed.core.pool import Pool, Selection

HIDDEN = ("label_offset", "label_length", "sha256")
"""Columns of the index that tell of a tile's label, besides its pixels; sha256 is over image and label."""
Choice = Callable[[pa.Table, dict[str, Any], int], Selection]
"""Which tiles to buy: rows without labels, the strategy's own state, how many."""


def hidden(index: pa.Table) -> pa.Table:
    """The rows with everything null that a label tells, and no pixel of any class."""
    widths = pc.list_value_length(index["pixels"]).drop_null()
    width = widths[0].as_py() if len(widths) else 2  # void and any class: nothing is known of either
    none = pa.array([[0] * width] * len(index), pa.list_(pa.int64()))
    index = index.set_column(index.schema.get_field_index("pixels"), "pixels", none)
    for name in HIDDEN:
        if name in index.column_names:
            at = index.schema.get_field_index(name)
            field = index.schema.field(name)
            index = index.set_column(at, field, pa.nulls(len(index), field.type))
    return index


def bought(state: dict[str, Any]) -> dict[str, int]:
    """Tile -> round in which its label was bought."""
    return state["pool"]["bought"] if "pool" in state else {}


def rows_bought(index: pa.Table, state: dict[str, Any]) -> pa.Table:
    """The rows whose labels were bought."""
    return index.filter(pc.is_in(index["tile_id"], pa.array(list(bought(state)), pa.string())))


def rows_left(index: pa.Table, state: dict[str, Any]) -> pa.Table:
    """The rows whose labels were not bought, without anything a label tells."""
    owned = pa.array(list(bought(state)), pa.string())
    return hidden(index.filter(pc.invert(pc.is_in(index["tile_id"], owned))))


def by_chance(rng: np.random.Generator) -> Choice:
    """Uniform draws: how every run begins."""

    def choose(index: pa.Table, state: dict[str, Any], budget: int) -> Selection:
        pool = Pool(None, index)
        at = np.sort(rng.choice(len(pool), budget, replace=False))
        return pool.selection(at, ["start"] * budget)

    return choose


def pool_cycle(
    index: pa.Table,
    state: dict[str, Any],
    *,
    number: int,
    buys: int,
    choice: Choice,
    budget: int,
    rng: np.random.Generator,
) -> Selection:
    """The tiles that a cycle trains on, and in `bought` those whose labels it buys first.

    Args:
        index: all tiles of the pool.
        state: after the cycle before: the strategy's own, and under `pool` the tiles bought and the queue they are trained in.
        number: of the round.
        buys: labels to buy now; 0 within a round.  Never more than are left.
        choice: says which.
        budget: tiles to train on; all that are labelled if they are fewer.
        rng: of the order of training.
    """
    own = {k: v for k, v in state.items() if k != "pool"}
    picks, owned = None, dict(bought(state))
    left = rows_left(index, state)
    if buys and len(left):
        picks = choice(left, own, min(buys, len(left)))
        owned |= dict.fromkeys(picks.tile_ids, number)
        own = picks.state
    ids = np.array(sorted(set(owned) & set(index["tile_id"].to_pylist())), object)
    queue = state.get("pool", {}).get("queue")
    at, queue = draws.from_queue(ids, queue, min(budget, len(ids)), rng)
    chosen = ids[at].tolist()
    reasons = [f"labelled in round {owned[t]}" for t in chosen]
    kept = {**own, "pool": {"bought": owned, "queue": queue}}
    return Selection(chosen, [1.0] * len(chosen), reasons, kept, picks)
