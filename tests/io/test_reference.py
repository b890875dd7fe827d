"""Which run of a reference judges which tile, told from the runs' own directories."""

import pyarrow as pa
import pytest

from raysed.config import DataConfig, Experiment
from raysed.io.ledger import Ledger
from raysed.io.reference import judged_by, ledgers_of
from raysed.io.storage import Storage

ROWS = pa.table({"tile_id": [f"t{i}" for i in range(6)], "region": list("abcabc")})


@pytest.fixture
def runs(tmp_path):
    """Runs that held out regions a, b and c, and none."""

    def begun(name: str, held_out: str | None) -> str:
        uri = str(tmp_path / name)
        Ledger(Storage(uri), epoch=1).open(Experiment(data=DataConfig(held_out=held_out)), "hash")
        return uri

    return [begun("one", "a,b"), begun("two", "c"), begun("all", None)]


def judged(reference: str) -> tuple[list[list[str]], list[str]]:
    shares, leaky = judged_by(ledgers_of(reference), ROWS)
    return [s["tile_id"].to_pylist() for s in shares], leaky["tile_id"].to_pylist()


def test_two_runs_judge_what_they_have_not_trained_on(runs):
    one, two, _ = runs
    assert judged(f"{one}+{two}") == ([["t0", "t1", "t3", "t4"], ["t2", "t5"]], [])


def test_one_run_judges_all_and_tells_what_it_has_trained_on(runs):
    one, _, every = runs
    ids = ROWS["tile_id"].to_pylist()
    assert judged(one) == ([ids], ["t2", "t5"])
    assert judged(every) == ([ids], ids)
    assert judged(f"{one}+{every}") == ([ids, []], ["t2", "t5"])
