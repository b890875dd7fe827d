"""The fast faults of `jobs/chaos.py`, and mutants of the guards, which must turn a row red.  All of them: `make chaos`."""

import pytest

from raysed.cluster.chaos import Bench, attempt, small_store
from raysed.cluster.faultproxy import FaultProxy
from raysed.cluster.faults import FAULTS

pytestmark = pytest.mark.alone
WALKS = {f"{n} {v}": f for n, vs in FAULTS.items() for v, f in vs.items() if f.kind == "walk"}
SLOW = ("F22 paused driver",)  # the lease has to run out


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    small_store(str(folder / "tiles"))
    return Bench(folder, str(folder / "tiles"), str(folder / "runs"), {})


@pytest.fixture(scope="module")
def remote(object_server, tmp_path_factory):
    """The same in a bucket behind the proxy."""
    with FaultProxy(object_server.endpoint) as proxy, object_server.credentials():
        small_store("s3://raysed/chaos/tiles")
        through = {**object_server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        yield Bench(
            tmp_path_factory.mktemp("remote"),
            "s3://raysed/chaos/tiles",
            "s3://raysed/chaos/runs",
            through,
            proxy,
        )


def bench_of(name, request):
    return request.getfixturevalue("remote" if WALKS[name].bucket else "bench")


@pytest.mark.parametrize("name", [n for n in WALKS if n not in SLOW])
def test_nothing_is_lost(name, request):
    row = attempt(bench_of(name, request), name, WALKS[name])
    assert row.verdict == ("survived" if WALKS[name].in_place else "not_promised"), row.note


@pytest.mark.parametrize(
    ("name", "mutant", "text"),
    [
        ("F20 upload dies", "manifest-first", "a half-written cycle counts"),
        ("F21 flipped weights", "no-hash-check", "the fallback was not said"),
        ("F20 no manifest", "seed-by-call", "differences"),
        ("F11 SlowDown 5 s", "no-retry", "exit code 6"),
        ("F12 flipped and cut tiles", "no-reread", "exit code 4"),
    ],
)
def test_a_guard_left_out_turns_its_row_red(name, mutant, text, request, monkeypatch):
    bench = bench_of(name, request)
    bench.calm_run("walk", None if WALKS[name].bucket else str(bench.folder / "runs"))
    monkeypatch.setattr(bench, "mutant", mutant)
    row = attempt(bench, name, WALKS[name])
    assert row.verdict == "lost"
    assert text in row.note


def test_a_fault_that_never_struck_is_not_survived(bench):
    """The harness must not praise a calm run."""
    fault = FAULTS["F20"]["upload dies"]
    row = attempt(bench, "calm", type(fault)(lambda trial: (trial.start(), trial.ends(0)), "walk"))
    assert (row.verdict, row.note) == ("lost", "the fault did not strike")
