"""The evidence as a user makes it: arms and plans checked, killed and continued, told from its result files what is left."""

import json
import shutil
import subprocess

import pytest
from processes import FAST, kill_at, run

from raysed.config import DataConfig, Experiment, with_overrides
from raysed.core.splits import validation_rows
from raysed.errors import UsageError
from raysed.evidence import arms_of, asked_for, check_registered, evidence
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
        ("uniform,entropy:seed=3", "'entropy:seed=3' must not have 'seed=3'"),
        ("uniform:model.init=m", "must not have 'model.init=m'"),
        ("uniform:select.strategy=entropy", "must not have"),
        ("uniform,ceiling:cycles=6", "must not have 'cycles=6'"),
        ("uniform:data.held_out=r", "must not have"),
    ],
)
def test_bad_arms_are_named(arms, text):
    with pytest.raises(UsageError, match=text):
        arms_of(arms)


def test_the_report_half_needs_a_committed_plan_that_is_this_one(tmp_path):
    def git(*argv: str) -> None:
        own = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *own, *argv], check=True, capture_output=True)

    path = tmp_path / "plan.json"
    asked = {
        "arms": ["defensive", "uniform"],
        "seeds": [0, 1],
        "cycles": 30,
        "config": "c" * 64,
        "data": "d" * 64,
    }
    with pytest.raises(UsageError, match=r"there is no .*plan\.json; to register") as refusal:
        check_registered(path, asked)
    path.write_text(str(refusal.value).partition("is read: ")[2])  # all that has to be committed
    git("init", "-q")
    with pytest.raises(UsageError, match="is not committed"):
        check_registered(path, asked)
    git("add", ".")
    git("commit", "-qm", "plan")
    assert check_registered(path, asked) == "miou"
    for name, value, text in [
        ("seeds", [0], r"registers seeds \[0, 1\], asked for are \[0\]"),
        ("arms", ["uniform"], "registers arms"),
        ("config", "e" * 64, "registers config c+, asked for are e+"),
        ("data", "e" * 64, "registers data d+, asked for are e+"),
    ]:
        with pytest.raises(UsageError, match=text) as refusal:
            check_registered(path, {**asked, name: value})
        assert json.loads(str(refusal.value).partition("is read: ")[2]) == {
            "primary": "miou",
            **asked,
            name: value,
        }
    said = {
        "primary": "aulc_compute",
        **asked,
        "arms": ["uniform", "defensive"],
        "seeds": [1, 0],
        "cycles": 20,
    }
    path.write_text(json.dumps(said))
    with pytest.raises(UsageError, match="is not committed"):
        check_registered(path, {**asked, "cycles": 20})
    git("commit", "-qam", "another")
    assert check_registered(path, {**asked, "cycles": 20}) == "aulc_compute"
    for bad in ({**said, "primary": "luck"}, {**said, "primary": "time_ratio"}, ["miou"], {}):
        path.write_text(json.dumps(bad))
        with pytest.raises(UsageError, match="primary must be one of miou"):
            check_registered(path, asked)


def test_a_plan_pins_the_configuration_that_all_arms_share_and_the_data(small_store):
    store, arms = Store.open(small_store), arms_of("uniform,entropy")
    base = Experiment(run="here", data=DataConfig(uri=small_store))
    plan = asked_for(arms, [1, 0], base, store)
    assert (plan["arms"], plan["seeds"], plan["cycles"]) == (["entropy", "uniform"], [0, 1], 100)
    assert plan["data"] == store.dataset.content_hash
    moved = {
        "run": "there",
        "seed": 7,
        "select.strategy": "entropy",
        "data.validation": "dev",
        "cluster.workers": 2,
    }
    assert asked_for(arms, [0, 1], with_overrides(base, moved, "test"), store) == plan
    for field, value in (("optim.lr", 1e-3), ("select.fraction", 0.5), ("data.held_out", "north")):
        changed = asked_for(arms, [0, 1], with_overrides(base, {field: value}, "test"), store)
        assert {k for k in plan if plan[k] != changed[k]} == {"config"}


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--init", "model"], "--init is for jobs/train.py and jobs/active.py: all arms of a seed start"),
        (["--select", "entropy"], "select.strategy is fixed by --arms"),
        (
            ["--split", "report", "--preregistration", "nowhere.json"],
            "--split report needs a plan and there is no",
        ),
    ],
)
def test_what_the_evidence_fixes_is_refused_in_one_line(small_store, argv, text):
    with pytest.raises(UsageError, match=text):
        evidence(None, ["--data", small_store, "--cycles", "2", *argv])


def test_a_configuration_that_begins_with_a_model_is_refused(small_store, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"init": "m", "sha256": "0"}}))
    with pytest.raises(UsageError, match=r"config\.json has model\.init"):
        evidence(None, ["--data", small_store, "--config", str(tmp_path / "config.json")])


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
