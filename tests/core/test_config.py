import pytest

from raysed.cli import experiment_parser, parse_experiment
from raysed.config import Experiment, SelectConfig, fields_of, load_config, with_overrides
from raysed.errors import UsageError
from raysed.experiments import PRESETS


def parsed(*argv: str) -> Experiment:
    args = experiment_parser("", Experiment()).parse(argv)
    return parse_experiment(args, Experiment())[0]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("RAYSED_DATA", "RAYSED_RUN"):
        monkeypatch.delenv(name, raising=False)


def test_defaults_are_the_papers():
    exp = Experiment()
    assert (exp.optim.lr, exp.cycles, exp.select.fraction, exp.loss.gamma, exp.optim.batch) == (
        5e-5,
        100,
        0.2,
        2.0,
        16,
    )
    assert exp.select.budget(9212) == 1842


def test_every_field_has_a_text_and_a_flag():
    text = experiment_parser("", Experiment()).format_help()
    for f in fields_of():
        assert f.doc.endswith("."), f.name
        assert f"--{f.name.replace('_', '-')}" in text


def test_short_and_dotted_flags_mean_the_same():
    assert parsed("--data", "x", "--arch", "unet", "--workers", "2") == parsed(
        "--data.uri", "x", "--model.arch=unet", "--cluster.workers", "2"
    )


def test_data_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("RAYSED_DATA", "s3://bucket/tiles")
    assert parsed().data.uri == "s3://bucket/tiles"
    assert parsed("--data", "here").data.uri == "here"


def test_without_data_the_demo_is_taken():
    assert parsed("--cycles", "7") == with_overrides(PRESETS["demo"], {"cycles": 7}, "")


def test_the_job_decides_the_strategy_of_a_preset_unless_told_otherwise():
    train, active = Experiment(), Experiment(select=SelectConfig(strategy="margin"))
    for job, argv, expected in (
        (active, ["--preset", "yardstick"], "margin"),
        (active, ["--preset", "stable"], "margin"),
        (active, ["--preset", "paper"], "entropy"),
        (active, ["--preset", "paper", "--select", "uniform"], "uniform"),
        (train, ["--preset", "paper"], "uniform"),
    ):
        args = experiment_parser("", job).parse(["--data", "x", *argv])
        assert parse_experiment(args, job)[0].select.strategy == expected


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--optim.rl", "1"], "did you mean '--optim.lr'"),
        (["--cycels", "3"], "did you mean '--cycles'"),
        (["--cycles", "many"], "cycles must be int, got 'many'"),
        (["--optim.schedule", "linear"], "must be one of constant, cosine"),
        (["--select.fraction", "0"], "select.fraction must lie in (0, 1], got 0.0"),
        (["--optim.batch", "12"], "multiple of optim.micro_batch"),
        (["--optim.ema", "1"], "optim.ema must lie in [0, 1), got 1.0"),
        (["--optim.norm-tiles", "64"], "goes with optim.ema, got 64 and ema 0.0"),
        (["--workers", "9"], "9 workers need at least as many micro-batches"),
        (["--optim.rollbacks", "-1"], "optim.rollbacks must not be negative, got -1"),
        (["--cluster.threads", "0"], "cluster.threads must be at least 1, or none, got 0"),
        (["--cluster.threads", "-1"], "cluster.threads must be at least 1, or none, got -1"),
        (["--cluster.wait-nodes", "-5"], "cluster.wait_nodes must not be negative, got -5.0"),
        (["--cluster.cache-gib", "-1"], "cluster.cache_gib must not be negative, got -1.0"),
        (["--cluster.worker-gpus", "-1"], "cluster.worker_gpus must be positive, got -1.0"),
        (["--cluster.scorer-gpus", "0"], "cluster.scorer_gpus must be positive, got 0.0"),
        (["--config", "/nowhere.json"], "No such file"),
        (["stray"], "unknown argument 'stray'"),
    ],
)
def test_bad_flags_are_one_line_with_a_remedy(argv, text):
    with pytest.raises(UsageError) as caught:
        parsed("--data", "x", *argv)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_config_files_round_trip_and_name_unknown_fields():
    exp = PRESETS["yardstick"]
    assert Experiment.from_dict(exp.to_dict()) == exp
    with pytest.raises(UsageError, match=r"did you mean 'optim\.lr'"):
        load_config('{"optim": {"rl": 1}}', "f.json")
    with pytest.raises(UsageError, match=r"f\.json: not JSON, line 1"):
        load_config("{", "f.json")


def test_budget_larger_than_the_pool_and_empty_pool_are_refused():
    select = parsed("--data", "x", "--select.tiles", "11").select
    with pytest.raises(UsageError, match="asks for 11 tiles a cycle, the pool has 10"):
        select.budget(10)
    with pytest.raises(UsageError, match="pool is empty"):
        select.budget(0)


@pytest.mark.parametrize("argv", [("--preset", "paper"), ("--config", "FILE")])
def test_a_configuration_without_a_tile_store_is_no_demo(tmp_path, argv):
    file = tmp_path / "best.json"
    file.write_text("{}")
    argv = [str(file) if a == "FILE" else a for a in argv]
    with pytest.raises(UsageError, match="needs a tile store: give --data, or set RAYSED_DATA"):
        parsed(*argv)
    assert parsed(*argv, "--data", "here").data.uri == "here"
