"""What is proven before anything starts: that an experiment fits its tiles, its strategy and its cluster's files."""

from collections.abc import Callable

import pyarrow as pa

from raysed.cluster.connect import check_paths
from raysed.cluster.scorekeeping import RECORDED
from raysed.config import Experiment
from raysed.core import networks
from raysed.core.acquisition import strategy_of
from raysed.core.splits import training_rows, validation_rows
from raysed.errors import UsageError
from raysed.io import checkpoint, people
from raysed.io.ledger import Ledger
from raysed.io.model import init_notes, load_init, weights_of_run
from raysed.io.reference import judged_by, ledgers_of
from raysed.io.storage import Storage
from raysed.io.store import Store


def check_data(experiment: Experiment, store: Store, say: Callable[[str], None]) -> None:
    """Prove that the experiment fits its tile store; absent classes are said, and where a model it starts from differs."""
    check_strategy(experiment)
    dataset = store.dataset
    data = experiment.data
    regions = set(store.index["region"].to_pylist())
    if unknown := [r for r in (data.held_out or "").split(",") if r and r not in regions]:
        raise UsageError(
            f"data.held_out: the store has no region {unknown[0]!r}, but {', '.join(sorted(regions)[:12])}"
        )
    pool = training_rows(store.index, data.held_out, unlabelled=experiment.asks_people)
    experiment.select.budget(len(pool))
    if "irreducible" in strategy_of(experiment.select.strategy).needs:
        check_reference(experiment, pool, say)
    if not len(validation_rows(store.index, data.validation, data.held_out)):
        raise UsageError(
            f"{store.storage.uri} has no labelled tile in split val (data.validation {data.validation}, data.held_out "
            f"{data.held_out or 'none'}): nothing to evaluate on"
        )
    net = networks.build(experiment.model.arch, len(dataset.classes), experiment.seed)
    if dataset.tile_size % net.multiple or dataset.tile_size < 2 * net.multiple:
        raise UsageError(
            f"{experiment.model.arch} needs tiles of 2, 3, ... x {net.multiple} px, the store's have {dataset.tile_size}: "
            "prepare it with another --store"
        )
    if experiment.model.init:
        for note in init_notes(load_init(experiment.model).record, store):
            say(note)
    if experiment.asks_people:
        return  # what the training tiles hold is not known yet
    for land_class, train, val in zip(
        dataset.classes, dataset.pixels["train"][1:], dataset.pixels["val"][1:], strict=True
    ):
        if not train:
            where = "and counts in validation" if val else "nor in validation"
            say(
                f"note: class {land_class.name} has no pixel in the training tiles {where}; its loss weight is 0"
            )


def check_reference(experiment: Experiment, pool: pa.Table, say: Callable[[str], None]) -> None:
    """Prove that there are runs whose weights say what loss is irreducible; one that has trained on the tiles is said."""
    uri = experiment.select.reference
    if uri is None:
        raise UsageError(
            f"strategy {experiment.select.strategy} compares with a network trained before: give its run, --select.reference"
        )
    ledgers = ledgers_of(uri)
    for ledger in ledgers:
        other = ledger.config()[0].model.arch
        if other != experiment.model.arch:
            raise UsageError(
                f"--select.reference {ledger.storage.uri} is of {other}, this run of {experiment.model.arch}: they must be alike"
            )
        weights_of_run(ledger, None)
    _, leaky = judged_by(ledgers, pool)
    if len(leaky) and len(ledgers) > 1:
        raise UsageError(
            f"--select.reference {uri}: all these runs have trained on region {leaky['region'][0].as_py()!r}; each must hold out "
            "(--data.held-out) what the other trains on"
        )
    if len(leaky):
        say(
            f"note: leaky reference: {uri} has trained on {len(leaky)} of the {len(pool)} tiles, so what loss it leaves there is too low"
        )


def check_labels(experiment: Experiment, store: Store) -> None:
    """Refuse to start a cluster for a run whose picks are still with people.

    Raises:
        WaitingForLabels: with how many are missing, and where they are to go.
    """
    if not experiment.asks_people:
        return
    run = Storage(str(experiment.run))
    cycle = len(Ledger(run).manifests())
    if cycle >= experiment.cycles or not experiment.pool.begins(cycle):
        return
    number = cycle // experiment.pool.cycles
    if request := people.asked(run, number):
        people.require(run, number, request.tile_ids, str(experiment.pool.labels), store.dataset)


def check_run_paths(experiment: Experiment) -> None:
    """Refuse local paths of data, run, weights to begin with, reference or labels on a cluster of several nodes."""
    weights, references = experiment.model.encoder_weights, (experiment.select.reference or "").split("+")
    places = {
        "--data": experiment.data.uri,
        "--run": experiment.run,
        "--init": experiment.model.init,
        "--model.encoder-weights": weights
        if checkpoint.is_file_spec(weights) and weights != checkpoint.LITE0
        else None,
        **{f"--select.reference {k}": uri for k, uri in enumerate(references, start=1)},
    }
    if experiment.asks_people:
        places["--pool.labels"] = experiment.pool.labels
    check_paths(
        {f"{flag} {uri}": uri for flag, uri in places.items() if uri},
        shared=experiment.cluster.shared_filesystem,
        remedy="give an s3:// URI (or set RAYSED_DATA and RAYSED_RUN), or --cluster.shared-filesystem if all nodes see the same files",
    )


def check_strategy(experiment: Experiment) -> None:
    """Prove that the run records what its strategy selects by."""
    strategy = strategy_of(experiment.select.strategy, experiment.select.options)
    if missing := strategy.needs - RECORDED:
        raise UsageError(
            f"strategy {experiment.select.strategy} needs the scores {', '.join(sorted(missing))}, which no run records: "
            "choose another --select"
        )
    if "features" in strategy.needs and experiment.select.scores == "byproduct":
        raise UsageError(
            f"strategy {experiment.select.strategy} compares features of one network: select.scores must be fresh or overlapped"
        )
    if experiment.buys_labels and strategy.needs_labels:
        raise UsageError(
            f"strategy {experiment.select.strategy} looks at labels, which select.protocol pool has yet to buy: choose another --select"
        )
