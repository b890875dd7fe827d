"""The fast faults of `jobs/chaos.py`, and mutants of the guards, which must turn a row red.  All of them: `make chaos`."""

import json

import pytest

from raysed.cluster.chaos import Bench, Fault, attempt, small_store
from raysed.cluster.faultproxy import FaultProxy
from raysed.cluster.faults import FAULTS, bomb
from raysed.cluster.soak import Soak
from raysed.io import codec
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage

pytestmark = pytest.mark.alone
WALKS = {f"{n} {v}": f for n, vs in FAULTS.items() for v, f in vs.items() if f.kind == "walk"}
SLOW = ("F22 paused driver", "F22 overtaken before it writes")  # the lease has to run out


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
        pytest.param("F22 overtaken before it writes", "no-fencing", "sha256", marks=pytest.mark.slow),
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
    row = attempt(bench, "calm", Fault(lambda trial: (trial.start(), trial.ends(0)), "walk"))
    assert (row.verdict, row.note) == ("lost", "the fault did not strike")


def test_a_process_waits_at_one_gate_after_the_other(bench):
    def act(trial):
        trial.start(("train", 1, 0), ("train", 2, 0))
        pid = trial.at_gate()
        trial.strike()
        assert len(trial.ledger.manifests()) == 1
        trial.go()
        assert trial.at_gate(1) == pid
        assert len(trial.ledger.manifests()) == 2
        trial.go(1)
        trial.ends(0)

    assert attempt(bench, "two gates", Fault(act, "walk")).verdict == "survived"


def test_a_bomb_is_small_and_says_it_is_large():
    with pytest.raises(ValueError, match="30000"):
        codec.decode_label(bomb(30_000), 64)
    assert len(bomb(30_000)) == 45


def test_a_soak_counts_goodput_by_undisturbed_cycles_and_growth_after_warm_up(tmp_path):
    soak = Soak(Bench(tmp_path, "data", str(tmp_path), {}, cluster=object()), 1.0, 0, print)
    lines = [json.dumps({"at": at, "event": "commit", "cycle": 0}) for at in (100, 110, 120, 145, 155)]
    (soak.trial.folder / "trace.jsonl").write_text("\n".join(lines))
    ledger = Ledger(Storage(soak.trial.run), epoch=1)
    for cycle in range(5):
        ledger.commit(cycle, {}, dict)
    soak.began, soak.faults = 100.0, [{"second": 22.0, "what": "worker", "recovered_s": 23.0}]
    soak.memory = [{"second": s, "driver": m, "Scorer": 1.0} for s, m in ((5, 50), (25, 200), (35, 200), (45, 206), (55, 206))]  # fmt: skip
    facts = soak.facts()
    assert (facts["cycles"], facts["cycle_s"], facts["goodput"]) == (5, 10, 0.727)
    assert facts["memory"]["driver"]["growth"] == 0.03
    assert facts["memory"]["Scorer"]["most_mib"] == 1
