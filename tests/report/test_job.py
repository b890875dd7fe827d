"""`jobs/report.py`: rebuild, verify, diff, results."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tiny_run import CYCLES, write_arm, write_store

from raysed.core.acquisition import Selection
from raysed.errors import DataError, UsageError
from raysed.io.ledger import Ledger, selection_table, table_bytes
from raysed.io.storage import Storage
from raysed.io.store import Store, finish

ROOT = Path(__file__).resolve().parents[2]


def flip_byte(path: Path, at: int = 40) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_an_honest_run_verifies_with_both_arms(report_job, tiny_run, capsys):
    assert report_job([tiny_run, "--verify"]) == 0
    assert (
        capsys.readouterr().out == f"verified: {2 * CYCLES} cycles, all hashes hold, all selections replay\n"
    )


@pytest.mark.parametrize("path", ["cycle_0001/scores.parquet", "baseline/cycle_0002/model.safetensors"])
def test_verify_finds_a_flipped_byte_in_either_arm(report_job, run_copy, path, capsys):
    flip_byte(run_copy / path)
    with pytest.raises(DataError, match="1 faults") as caught:
        report_job([str(run_copy), "--verify"])
    assert caught.value.exit_code == 4
    fault = capsys.readouterr().out.splitlines()
    assert len(fault) == 1
    assert fault[0].startswith("uniform: cycle 2" if "baseline" in path else "entropy: cycle 1")
    assert path.rpartition("/")[2] in fault[0]


def test_verify_finds_a_selection_that_does_not_follow_from_the_scores(report_job, run_copy, capsys):
    cycle = run_copy / "cycle_0002"
    ledger = Ledger(Storage(str(run_copy)))
    chosen = ledger.table(ledger.manifests()[2], "selected.parquet").to_pydict()
    forged = table_bytes(
        selection_table(Selection(chosen["tile_id"][::-1], chosen["weight"], chosen["reason"]))
    )
    (cycle / "selected.parquet").write_bytes(forged)
    manifest = json.loads((cycle / "manifest.json").read_text())
    manifest["files"]["selected.parquet"] = {
        "bytes": len(forged),
        "sha256": hashlib.sha256(forged).hexdigest(),
    }
    (cycle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError):
        report_job([str(run_copy), "--verify"])
    assert "entropy: cycle 2: the replayed selection differs" in capsys.readouterr().out


def test_verify_takes_a_moved_store_but_no_other_data_set(report_job, tiny_run, tiny_store, tmp_path, capsys):
    moved = shutil.copytree(tiny_store, tmp_path / "moved")
    assert report_job([tiny_run, "--verify", "--data", str(moved)]) == 0
    write_store(str(tmp_path / "other"), first=100)
    with pytest.raises(UsageError, match="give its store with --data"):
        report_job([tiny_run, "--verify", "--data", str(tmp_path / "other")])


def test_a_run_verifies_after_tiles_were_appended_to_its_store(report_job, tiny_run, tiny_store, tmp_path):
    moved = str(shutil.copytree(tiny_store, tmp_path / "moved"))
    opened = Store.open(moved)
    more = opened.index.set_column(
        0, "tile_id", pc.binary_join_element_wise("n", opened.index["tile_id"], "")
    )
    index, known = pa.concat_tables([opened.index, more]), opened.dataset
    finish(
        opened.storage, name=known.name, classes=known.classes, ignore=(0,), tile_size=known.tile_size, index=index, version=2
    )  # fmt: skip
    assert len(Store.open(moved).index) == 60
    assert report_job([tiny_run, "--verify", "--data", moved]) == 0


def test_diff_of_a_run_with_its_copy_is_equal(report_job, tiny_run, run_copy, capsys):
    for path in run_copy.rglob("manifest.json"):  # another machine took other times
        path.write_text(path.read_text().replace('"train": 2.0', '"train": 9.0'))
    assert report_job(["--diff", tiny_run, str(run_copy)]) == 0
    assert capsys.readouterr().out.strip().endswith("are equal")


def test_diff_names_the_arm_and_what_differs(report_job, tiny_run, tiny_store, tmp_path, capsys):
    experiment, _ = Ledger(Storage(tiny_run)).config()
    write_arm(Storage(str(tmp_path)), replace(experiment, seed=1), Store.open(tiny_store), cycles=2)
    assert report_job(["--diff", tiny_run, str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "arm uniform is only in one of them" in lines
    assert "entropy: config seed: 0 and 1" in lines
    assert f"entropy: cycles: {CYCLES} and 2" in lines
    [line] = [line for line in lines if line.startswith("entropy: cycle 0: selected.parquet differs: ")]
    assert re.search(r": tile_id of \d+ rows, first \S+ and \S+", line)


def test_diff_finds_a_difference_in_the_baseline_alone(report_job, tiny_run, run_copy, capsys):
    path = run_copy / "baseline" / "cycle_0001" / "manifest.json"
    path.write_text(path.read_text().replace('"loss": 0.5', '"loss": 0.25'))
    assert report_job(["--diff", tiny_run, str(run_copy)]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line]
    assert found
    assert all(line.startswith("uniform: cycle 1: ") for line in found)


def test_rebuild_writes_what_is_derived_and_results_without_local_paths(
    report_job, run_copy, tmp_path, capsys
):
    folder = tmp_path / "results" / "one"
    assert report_job([str(run_copy), "--results", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "mean of the last 3 cycles" in out
    for name in ("cycles.jsonl", "summary.json", "report.html"):
        assert f"{run_copy}/{name}" in out
        assert (run_copy / name).stat().st_size > 100
    for arm in (run_copy, run_copy / "baseline"):
        lines = (arm / "cycles.jsonl").read_text().splitlines()
        assert [json.loads(line)["cycle"] for line in lines] == list(range(CYCLES))
    assert list(json.loads((run_copy / "summary.json").read_text())["arms"]) == ["uniform", "entropy"]

    files = {p.name: p.read_text() for p in folder.iterdir()}
    assert set(files) == {
        "summary.json", "cycles-uniform.jsonl", "cycles-entropy.jsonl", "table.md", "curves.svg", "classes.svg", "seconds.svg",
    }  # fmt: skip
    for name, text in files.items():
        assert str(run_copy) not in text
        if name.endswith(".svg"):
            assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "abc123" in files["table.md"]
    assert "`python jobs/active.py`" in files["table.md"]
    assert len(files["cycles-entropy.jsonl"].splitlines()) == CYCLES
    assert sum(map(len, files.values())) < 1_000_000


def test_a_run_interrupted_in_its_passive_arm_has_results(report_job, run_copy, tmp_path):
    for folder in run_copy.glob("cycle_*"):
        shutil.rmtree(folder)
    assert report_job([str(run_copy), "--results", str(tmp_path / "out")]) == 0
    assert "abc123" in (tmp_path / "out" / "table.md").read_text()


def test_no_results_of_a_run_without_cycles(report_job, tiny_run, tmp_path):
    experiment, dataset_hash = Ledger(Storage(tiny_run)).config()
    Ledger(Storage(str(tmp_path / "r")), epoch=0).open(experiment, dataset_hash)
    with pytest.raises(UsageError, match="no committed cycle"):
        report_job([str(tmp_path / "r"), "--results", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [[], ["RUN", "--diff", "RUN", "RUN"], ["RUN", "--verfy"]])
def test_bad_usage_is_refused(report_job, tiny_run, argv):
    with pytest.raises(UsageError):
        report_job([tiny_run if a == "RUN" else a for a in argv])


def test_a_missing_run_is_one_line_and_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "jobs/report.py", str(tmp_path / "nowhere")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"error: no run at {tmp_path / 'nowhere'} (no config.json)"]
