"""Selection diagnostics, on numbers small enough to check by hand."""

import pyarrow as pa

from raysed.core.diagnostics import ambiguous_share, class_shares, coverage, region_shares, repeats

POOL = pa.table(
    {
        "tile_id": ["a", "b", "c"],
        "region": ["west", "east", "east"],
        "pixels": [[9, 4, 0], [0, 1, 3], [0, 0, 8]],
    }
)


def test_coverage_and_repeats():
    cycles = [["a", "b"], ["b", "c"], ["b", "c"]]
    assert coverage(cycles, 4) == [0.5, 0.75, 0.75]
    assert repeats(cycles) == [0.5, 1.0]


def test_shares_count_a_tile_as_often_as_it_was_selected_and_leave_void_out():
    assert class_shares(POOL, ["x", "y"]) == {"x": 5 / 16, "y": 11 / 16}
    assert class_shares(POOL, ["x", "y"], ["a", "b", "b", "gone"]) == {"x": 0.5, "y": 0.5}
    assert region_shares(POOL, ["a", "b", "b", "a"]) == {"east": 0.5, "west": 0.5}
    assert list(region_shares(POOL)) == ["east", "west"]


def test_the_ambiguous_share_is_that_of_a_world_that_knows_it():
    known = POOL.append_column("ambiguous", pa.array([1.0, 0.25, 0.0], pa.float32()))
    assert ambiguous_share(known) == 1.25 / 3
    assert ambiguous_share(known, ["a", "b", "a", "gone"]) == 0.75
    assert ambiguous_share(known, []) == 0
    assert ambiguous_share(POOL) is None
    assert ambiguous_share(POOL.append_column("ambiguous", pa.nulls(3, pa.float32()))) is None
