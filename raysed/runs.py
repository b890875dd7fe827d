"""One run from its flags to its report: what `jobs/train.py` and `jobs/active.py` share."""

import os
from collections.abc import Sequence
from dataclasses import replace

from raysed import cli
from raysed.config import Experiment
from raysed.errors import UsageError
from raysed.io.storage import Storage

DEMO_STORE = "data/synthetic"
"""Where the demo's tile store is made, once."""
DEMO_SCENES, DEMO_TILE = 150, 128


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def run_experiment(doc: str | None, argv: Sequence[str], start: Experiment) -> int:
    """Parse flags, run, report; the job's exit code.

    Args:
        doc: help text of the job.
        argv: flags.
        start: defaults of the job.
    """
    parser = cli.experiment_parser(doc, start)
    args = parser.parse(argv)
    experiment, preset = cli.parse_experiment(args, start)
    # torch, Ray and matplotlib take seconds: --help and a wrong flag need none of them
    from raysed.cluster.estimate import dry_run
    from raysed.cluster.launch import launch
    from raysed.report.html import write_report
    from raysed.report.summary import table, write_summary

    for flag, value in (("--tiles-per-second", args.tiles_per_second), ("--price", args.price)):
        if value is not None and (value <= 0 or not args.dry_run):
            raise UsageError(f"{flag} must be positive and goes with --dry-run, got {value:g}")
    experiment = with_init(
        with_data(experiment, preset), arch=getattr(args, "model.arch"), config=args.config
    )
    if experiment.run is None:
        name = (
            preset
            or f"{experiment.model.arch}-{experiment.select.strategy}-seed{experiment.seed}".replace(":", "-")
        )
        experiment = replace(experiment, run=f"runs/{name}")
    experiment = replace(experiment, run=Storage(str(experiment.run)).uri)
    say(f"run {experiment.run}  data {experiment.data.uri}")
    if args.dry_run:
        dry_run(experiment, tiles_per_second=args.tiles_per_second, price=args.price, say=say)
        return 0
    code = launch(experiment, say=say, hold=os.environ.get("RAYSED_HOLD"))
    run = Storage(str(experiment.run))
    say("\n" + table(write_summary(run)))
    say(f"\nsummary  {run.uri}/summary.json")
    say(f"report   {write_report(run)}")
    say(f"curves   tensorboard --logdir {run.uri}")
    return code


def with_data(experiment: Experiment, preset: str | None) -> Experiment:
    """The experiment with the absolute URIs of its tile store and of what else it reads; without a store the demo's world is made, once."""
    uri = experiment.data.uri
    if uri is None:
        uri = DEMO_STORE
        say(
            f"no --data and no RAYSED_DATA: taking the preset {preset} on the synthetic world in {DEMO_STORE}"
        )
        from raysed.cluster.prepare import prepare_synthetic

        shared = experiment.cluster.shared_filesystem
        prepare_synthetic(DEMO_STORE, scenes=DEMO_SCENES, tile=DEMO_TILE, shared_filesystem=shared, say=say)
    return absolute(replace(experiment, data=replace(experiment.data, uri=Storage(uri).uri)))


def absolute(experiment: Experiment) -> Experiment:
    """The experiment with absolute URIs of weights and models to begin with, references and labels: workers stand in a folder of their own."""
    from raysed.io.checkpoint import LITE0, is_file_spec

    model, select, pool = experiment.model, experiment.select, experiment.pool
    if is_file_spec(model.encoder_weights) and model.encoder_weights != LITE0:
        model = replace(model, encoder_weights=Storage(str(model.encoder_weights)).uri)
    if model.init is not None:
        model = replace(model, init=Storage(model.init).uri)
    if select.reference is not None:
        select = replace(select, reference="+".join(Storage(r).uri for r in select.reference.split("+")))
    if pool.labels is not None:
        pool = replace(pool, labels=Storage(pool.labels).uri)
    return replace(experiment, model=model, select=select, pool=pool)


def with_init(experiment: Experiment, *, arch: str | None, config: str | None) -> Experiment:
    """The experiment with the hash of the model that it starts from, if any.

    Args:
        experiment: the experiment.
        arch: as given by flag; without flag and config file the architecture is the model's.
        config: as given by flag.

    Raises:
        RaysedError: see `load_init`.
    """
    wanted = experiment.model
    if wanted.init is None:
        return experiment
    from raysed.io.model import load, load_init

    if arch is None and config is None:
        wanted = replace(wanted, arch=load(str(wanted.init)).record.arch)
    return replace(experiment, model=replace(wanted, sha256=load_init(wanted).record.sha256))
