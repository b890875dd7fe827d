"""The runs whose networks say what loss of a tile training cannot take away: `select.reference`.

A network that has trained on a tile has learned some of what cannot be learned, and so says too little: a leaky reference.  Several
runs, each with other regions held out, are a cross-fit: a tile is judged by the first that has not trained on it.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from raysed.core.splits import first_unseen
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage


def ledgers_of(reference: str) -> list[Ledger]:
    """The ledgers of runs with plus signs between."""
    return [Ledger(Storage(uri)) for uri in reference.split("+")]


def judged_by(ledgers: Sequence[Ledger], rows: pa.Table) -> tuple[list[pa.Table], pa.Table]:
    """The tiles that each run judges, and those of them that every run has trained on, which the first judges.

    What a run has trained on is told by the regions that its newest configuration holds out.

    Args:
        ledgers: of the runs.
        rows: of the index.
    """
    regions = rows["region"].to_pylist()
    judge = first_unseen([ledger.config()[0].data.held_out for ledger in ledgers], set(regions))
    number = np.array([judge.get(r, -1) for r in regions], int)
    shares = [rows.filter(pa.array(np.maximum(number, 0) == i)) for i in range(len(ledgers))]
    return shares, rows.filter(pa.array(number < 0))
