"""The evidence as a user makes it: arms and plans checked, killed and continued, told from its result files what is left."""

import json
import shutil
import subprocess

import pytest
from processes import FAST, kill_at, run

from raysed.config import Experiment
from raysed.core.splits import validation_rows
from raysed.errors import UsageError
from raysed.evidence import arms_of, check_registered
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage
from raysed.io.store import Store


def test_an_arm_is_a_strategy_with_fields_of_its_own():
    arms = arms_of("ceiling,uniform:optim.ema=0,infobatch,defensive-entropy:select.scores=byproduct")
    assert [a.kind for a in arms] == ["ceiling", "passive", "passive", "active"]
    assert arms[3].file == "defensive-entropy_select.scores_byproduct"
    ran = [a.experiment(Experiment(), "r", 3, "dev") for a in arms]
    assert [e.select.budget(50) for e in ran] == [50, 10, 10, 10]
    assert {(e.seed, e.data.validation, e.run) for e in ran} == {(3, "dev", "r")}
    assert ran[3].select.scores == "byproduct"


def test_an_arm_may_have_a_strategy_of_other_numbers():
    arm = arms_of("uniform,defensive:select.options=mixture=0.3+tail=1:optim.ema=0")[1]
    assert arm.fields == {"select.options": "mixture=0.3+tail=1", "optim.ema": "0"}
    assert arm.experiment(Experiment(), "r", 0, "dev").select.options == "mixture=0.3+tail=1"
    with pytest.raises(UsageError, match="no option 'mixtur', did you mean 'mixture'"):
        arms_of("defensive:select.options=mixtur=0.3")[0].experiment(Experiment(), "r", 0, "dev")


def test_class_random_balances_classes_in_one_channel_unless_told_otherwise():
    plain, both, other = arms_of("class-random,class-random:loss.alpha_power=0.25,uniform")
    power = [a.experiment(Experiment(), "r", 0, "dev").loss.alpha_power for a in (plain, both, other)]
    assert power == [0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("arms", "text"),
    [
        ("unifrom", "--arms takes ceiling, uniform, .* got 'unifrom'"),
        ("uniform:optim.ema", "'optim.ema' has no value"),
        ("uniform,uniform", "names an arm twice"),
    ],
)
def test_bad_arms_are_named(arms, text):
    with pytest.raises(UsageError, match=text):
        arms_of(arms)


def test_the_report_half_needs_a_committed_plan_that_is_this_one(tmp_path):
    def git(*argv: str) -> None:
        own = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *own, *argv], check=True, capture_output=True)

    path, arms = tmp_path / "plan.json", arms_of("uniform,defensive")
    with pytest.raises(UsageError, match="needs the plan"):
        check_registered(path, arms, [0, 1], 30)
    said = {"primary": "miou", "arms": ["defensive", "uniform"], "seeds": [1, 0], "cycles": 30}
    path.write_text(json.dumps(said))
    git("init", "-q")
    with pytest.raises(UsageError, match="is not committed"):
        check_registered(path, arms, [0, 1], 30)
    git("add", ".")
    git("commit", "-qm", "plan")
    check_registered(path, arms, [0, 1], 30)
    with pytest.raises(UsageError, match=r"registers seeds \[0, 1\], asked for are \[0\]"):
        check_registered(path, arms, [0], 30)
    with pytest.raises(UsageError, match="registers arms"):
        check_registered(path, arms_of("uniform"), [0, 1], 30)
    path.write_text(json.dumps({**said, "cycles": 20}))
    with pytest.raises(UsageError, match="is not committed"):
        check_registered(path, arms, [0, 1], 20)
    path.write_text(json.dumps({**said, "primary": "luck"}))
    with pytest.raises(UsageError, match="primary must be one of miou"):
        check_registered(path, arms, [0, 1], 30)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_evidence_continues_and_repeats_nothing(ray_head, small_store, tmp_path):
    root, kept = tmp_path / "runs", tmp_path / "kept"
    flags = ["--data", small_store, "--run", str(root), "--results", str(kept), "--cycles", "2", *FAST]
    flags += ["--arms", "uniform,defensive"]
    kill_at("train@1", "evidence", *flags)
    done = run("evidence", *flags)
    assert "continues after cycle 1 of 2" in done.stdout
    assert done.stdout.count("ETA") == 3
    one, other = (Ledger(Storage(str(root / f"{n}-seed0"))).manifests() for n in ("uniform", "defensive"))
    judged = len(validation_rows(Store.open(small_store).index, "dev", None))
    assert {m.record["val"]["tiles"] for m in (*one, *other)} == {judged}
    rows = json.loads((kept / "summary.json").read_text())
    assert {r["arm"] for r in rows} == {"uniform", "defensive"}
    assert {r["split"] for r in rows} == {"dev"}
    facts = json.loads((kept / "uniform-seed0.jsonl").read_text().splitlines()[0])
    assert facts["replay"] == []
    shutil.rmtree(root)
    again = run("evidence", *flags)
    assert again.stdout.count(": finished") == 2
    assert json.loads((kept / "summary.json").read_text()) == rows
