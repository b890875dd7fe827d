import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raysed.core.splits import first_unseen, halves, training_rows, validation_rows
from raysed.core.tiles import shard_path


@pytest.fixture
def index() -> pa.Table:
    """Two tiles of each of 40 sources in four regions; every fourth source is validation; the last has no label."""
    rows = [
        {
            "tile_id": f"s{n}-{k}",
            "source": f"s{n}",
            "region": f"r{n % 5}",
            "split": "val" if n % 4 == 3 else "train",
            "shard": "shards/part-00000.parquet",
            "label_offset": None if n == 39 else 0,
        }
        for n in range(40)
        for k in range(2)
    ]
    return pa.Table.from_pylist(rows)


def test_halves_are_disjoint_complete_and_keep_a_source_together(index):
    both = validation_rows(index, "all", None)["tile_id"].to_pylist()
    dev, report = (validation_rows(index, half, None) for half in ("dev", "report"))
    assert sorted([*dev["tile_id"].to_pylist(), *report["tile_id"].to_pylist()]) == sorted(both)
    assert not set(dev["source"].to_pylist()) & set(report["source"].to_pylist())
    assert len(both) == 18
    assert len(dev) == 10


def test_the_halves_of_a_store_never_change():
    """Results rest on them."""
    regions = {f"dubai_t{t}_p{p}": (1, f"dubai_t{t}") for t in (1, 2, 3) for p in (3, 7)}
    assert [s for s, half in halves(regions).items() if half == "dev"] == [
        "dubai_t1_p3",
        "dubai_t2_p3",
        "dubai_t3_p3",
    ]


def test_a_source_keeps_its_half_when_tiles_are_appended(index):
    before = validation_rows(index, "dev", None)["source"].to_pylist()
    more = [
        {**row, "tile_id": f"a{row['tile_id']}", "source": f"a{row['source']}", "shard": shard_path(2, 1)}
        for row in index.filter(pc.equal(index["split"], "val")).to_pylist()[:6]
    ]
    grown = pa.concat_tables([index, pa.Table.from_pylist(more, schema=index.schema)])
    after = validation_rows(grown, "dev", None)["source"].to_pylist()
    assert [s for s in after if s in index["source"].to_pylist()] == before
    assert len(after) > len(before)


def test_a_region_held_out_is_validated_on_and_not_trained_on(index):
    train, val = training_rows(index, "r1,r2"), validation_rows(index, "all", "r1,r2")
    assert set(train["region"].to_pylist()) == {"r0", "r3", "r4"}
    assert set(train["split"].to_pylist()) == {"train"}
    assert set(val["region"].to_pylist()) == {"r1", "r2"}
    assert set(val["split"].to_pylist()) == {"train", "val"}
    assert len(training_rows(index, None)) == 60


@pytest.mark.parametrize("held_out", ["r1", "r1,r2", "r0,r1,r2,r3,r4"])
def test_no_source_changes_its_half_by_what_is_held_out(index, held_out):
    """Dev is chosen by in every experiment: a source of the report half must not be in it under a hold-out."""
    official, every = (
        {
            source: half
            for half in ("dev", "report")
            for source in validation_rows(index, half, regions)["source"].to_pylist()
        }
        for regions in (None, "r0,r1,r2,r3,r4")
    )
    for half in ("dev", "report"):
        rows = validation_rows(index, half, held_out)
        sources = rows["source"].to_pylist()
        assert {every[s] for s in sources} == {half}
        assert all(official.get(s, half) == half for s in sources)
        assert set(rows["region"].to_pylist()) == set(held_out.split(","))
    both = [len(validation_rows(index, half, held_out)) for half in ("dev", "report")]
    assert sum(both) == len(validation_rows(index, "all", held_out))
    assert abs(both[0] - both[1]) <= 2 * 2 * len(
        held_out.split(",")
    )  # a source has two tiles, a region two kinds


def test_a_tile_is_judged_by_the_first_run_that_has_not_trained_on_its_region():
    regions = {"a", "b", "c"}
    assert first_unseen(["a,b", "b,c"], regions) == {"a": 0, "b": 0, "c": 1}
    assert first_unseen(["a", None], regions) == {"a": 0}
    assert first_unseen([None], regions) == {}
