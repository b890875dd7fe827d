"""Order and shares of one cycle: pure, the same for any worker count."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from raysed.core.randomness import keyed_rng


@dataclass(frozen=True)
class Plan:
    """One cycle's tiles in their global order, cut into steps of `batch` and micro-batches of `micro_batch` tiles.

    Position p belongs to step p // batch; micro-batch j of every step belongs to rank j % workers.  Every tile is visited
    once; all ranks take the same number of steps, the last of which may leave some micro-batches short or empty.
    """

    order: tuple[str, ...]
    batch: int
    micro_batch: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the cycle."""
        return -(-len(self.order) // self.batch)

    def micro_batches(self, step: int, rank: int, workers: int) -> list[tuple[int, range]]:
        """(micro-batch number, its positions) of one rank in one step; positions may be empty in the last step."""
        start, end = step * self.batch, min((step + 1) * self.batch, len(self.order))
        return [
            (j, range(min(start + j * self.micro_batch, end), min(start + (j + 1) * self.micro_batch, end)))
            for j in range(rank, self.batch // self.micro_batch, workers)
        ]

    def share(self, rank: int, workers: int) -> list[int]:
        """All positions of one rank, in the order it needs them."""
        steps = (self.micro_batches(s, rank, workers) for s in range(self.steps))
        return [p for step in steps for _, positions in step for p in positions]


def plan(ids: Sequence[str], seed: int, cycle: int, batch: int, micro_batch: int) -> Plan:
    """Plan of a cycle: the ids, shuffled by (seed, cycle) alone, whatever order they come in."""
    order = sorted(ids)
    keyed_rng("order", seed, cycle).shuffle(order)
    return Plan(tuple(order), batch, micro_batch)


def norm_plan(
    ids: pa.StringArray, count: int, *, seed: int, cycle: int, batch: int, micro_batch: int
) -> Plan:
    """Tiles that batch norm is estimated from after a cycle: drawn uniformly by (seed, cycle) alone, so that no strategy shifts it.

    Args:
        ids: sorted.
        count: tiles to draw; all of them if they are fewer.
        seed: of the run.
        cycle: number.
        batch: tiles a step.
        micro_batch: tiles a forward pass.
    """
    at = keyed_rng("norm", seed, cycle).choice(len(ids), min(count, len(ids)), replace=False)
    return Plan(tuple(ids.take(pa.array(at)).to_pylist()), batch, micro_batch)
