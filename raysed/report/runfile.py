"""The small result file of one run of a comparison or of the evidence: all that tables and figures need, when weights are long gone.

JSON lines: first the facts of the run (name, seed, configuration, data set, environment, network, robustness), then a line a
cycle with the manifest's own numbers and the sha256 of the manifest that they come from.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raysed.config import Experiment, flatten
from raysed.core import diagnostics
from raysed.core.splits import training_rows, validation_rows
from raysed.core.statistics import LAST
from raysed.errors import DataError, UsageError
from raysed.io.ledger import MAY_CHANGE, Ledger, Manifest, config_hash, folder, verify
from raysed.io.storage import Storage, digest
from raysed.io.store import Store
from raysed.report.robustness import network_facts, robustness
from raysed.report.summary import machine_of

FORMAT = 1
_KEPT = ("strategy", "tiles", "labelled", "estimated", "quarantined", "train", "val", "scores", "seconds")


@dataclass(frozen=True)
class RunFile:
    """A run of a comparison."""

    name: str
    """Of the experiment, such as b0-active."""
    seed: int
    facts: dict[str, Any]
    """config, data {name, hash, train, val, tile_size}, environment, device, precision, workers, threads, all of the last cycle;
    machines (see `machine_of`) and commits, each once, of all cycles; diverged, if it has (see `Ledger.diverged`); after the last cycle also
    picks (see `picks_of`), of a comparison network {parameters, forward_ms, ...} and robustness {condition: scores}, of the evidence
    replay (what does not verify) and sources {names, counts}: (T, M, C, C) of the last T cycles."""
    cycles: list[Manifest] = field(default_factory=list)
    """With no files but the digest of the manifest itself."""

    @property
    def path(self) -> str:
        return file_of(self.name, self.seed)

    @property
    def ended_diverged(self) -> bool:
        """Whether the run ended in a cycle whose training diverged; it may have gone back and come through, too."""
        return "diverged" in self.facts and self.facts["diverged"]["cycle"] >= len(self.cycles)

    @property
    def is_whole(self) -> bool:
        """Whether it has all cycles of its configuration."""
        return len(self.cycles) >= self.facts["config"]["cycles"]

    @property
    def restarts(self) -> list[int]:
        """Cycles that began with the initial weights again."""
        return Experiment.from_dict(self.facts["config"], self.path).restarts(len(self.cycles))

    @property
    def machines(self) -> list[str]:
        """What its cycles were made on, each kind once."""
        return self.facts.get("machines") or [machine_of(self.facts)]

    @property
    def commits(self) -> list[str]:
        """Of raysed, that its cycles were made with."""
        return self.facts.get("commits") or [str(self.facts["environment"]["commit"])]

    def is_finished(self, experiment: Experiment) -> bool:
        """Whether this is all of that experiment.

        Args:
            experiment: the run as it is wanted now.

        Raises:
            UsageError: it is of another configuration, with the difference.
        """
        then = Experiment.from_dict(self.facts["config"], self.path)
        if config_hash(then) != config_hash(experiment):
            differs = [
                f"{k}: {a!r} there, {b!r} now"
                for k, (a, b) in then.differences(experiment).items()
                if not k.startswith(MAY_CHANGE)
            ]
            raise UsageError(
                f"{self.path} holds a run of another configuration ({'; '.join(differs)}): choose another --run and --results"
            )
        return len(self.cycles) >= experiment.cycles

    def to_bytes(self) -> bytes:
        """The file."""
        head = {"format": FORMAT, "name": self.name, "seed": self.seed, **self.facts}
        lines = [
            {"cycle": m.cycle, "manifest": m.files["manifest.json"]["sha256"], **m.record}
            for m in self.cycles
        ]
        return "".join(json.dumps(line) + "\n" for line in (head, *lines)).encode()


def file_of(name: str, seed: int) -> str:
    """Name of a run's directory and, with an ending, of its result file."""
    return f"{name}-seed{seed}.jsonl"


def check_alike(runs: Sequence[RunFile], own: Mapping[str, Collection[str]], where: str) -> None:
    """Prove that runs differ in nothing but seed and what each arm fixes itself.

    Args:
        runs: of one series.
        own: name of a run -> dotted fields that it fixes.
        where: URI of the folder.

    Raises:
        UsageError: a field that differs, with both runs.
    """
    first: dict[str, tuple[Any, RunFile]] = {}
    for run in runs:
        for name, value in flatten(Experiment.from_dict(run.facts["config"], run.path).to_dict()):
            if name in ("seed", *own[run.name]) or name.startswith(MAY_CHANGE):
                continue
            there, other = first.setdefault(name, (value, run))
            if value != there:
                raise UsageError(
                    f"{where}: {run.path} ran with {name} {value!r}, {other.path} with {there!r}: runs of one series have one "
                    "configuration, remove one of the files or choose another --run and --results"
                )


def read(storage: Storage, path: str) -> RunFile:
    """A result file.

    Raises:
        DataError: not one of this version.
    """
    try:
        head, *lines = [json.loads(line) for line in storage.read(path).splitlines()]
        if head.pop("format") != FORMAT:
            raise ValueError(f"not format {FORMAT}")
        name, seed = head.pop("name"), head.pop("seed")
        cycles = [
            Manifest(line.pop("cycle"), {"manifest.json": {"sha256": line.pop("manifest"), "bytes": 0}}, line)
            for line in lines
        ]
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{storage.uri}/{path} is not a result file of a run ({error}): remove it") from error
    return RunFile(name, seed, head, cycles)


def collect(
    run: Storage, name: str, seed: int, store: Store, *, evidence: bool = False, measured: bool = True
) -> RunFile:
    """What a run directory holds so far.

    Args:
        run: the directory.
        name: of the experiment.
        seed: of the run.
        store: its tile store, as the run has it.
        evidence: of a finished run take what evidence needs: its selections replayed, the counts of each source.
            Otherwise its network is measured, which takes minutes.
        measured: False leaves that out for now, because other runs would be in the way of it.

    Raises:
        UsageError: no run there.
    """
    ledger = Ledger(run)
    experiment, dataset_hash = ledger.config()
    manifests = ledger.manifests()
    config = experiment.to_dict()
    config["run"] = config["data"]["uri"] = None
    facts: dict[str, Any] = {
        "config": config,
        "data": {
            "name": store.dataset.name,
            "hash": dataset_hash,
            "tile_size": store.dataset.tile_size,
            "train": len(training_rows(store.index, experiment.data.held_out)),
            "val": len(validation_rows(store.index, experiment.data.validation, experiment.data.held_out)),
        },
    }
    if manifests:
        record = manifests[-1].record
        facts |= {k: record[k] for k in ("environment", "device", "precision", "workers", "threads")}
        facts["machines"] = list(dict.fromkeys(machine_of(m.record) for m in manifests))
        facts["commits"] = list(dict.fromkeys(m.record["environment"]["commit"] for m in manifests))
    if diverged := ledger.diverged():
        facts["diverged"] = diverged
    if len(manifests) >= experiment.cycles:
        facts["picks"] = picks_of(ledger, manifests, store, experiment)
    if len(manifests) >= experiment.cycles and evidence:
        facts["sources"] = sources_of(ledger, manifests)
        facts["replay"] = verify(ledger, store.split("train"))
    elif len(manifests) >= experiment.cycles and measured:
        facts["network"] = network_facts(experiment, store)
        facts["robustness"] = robustness(ledger, manifests[-1], store)
    cycles = [
        Manifest(
            m.cycle,
            {
                "manifest.json": {
                    "sha256": digest(run.read(f"{folder(m.cycle)}/manifest.json")),
                    "bytes": 0,
                }
            },
            {k: m.record[k] for k in _KEPT if k in m.record},
        )
        for m in manifests
    ]
    return RunFile(name, seed, facts, cycles)


def picks_of(
    ledger: Ledger, manifests: list[Manifest], store: Store, experiment: Experiment
) -> dict[str, Any]:
    """What a run selected: coverage after each cycle, repeats, shares of classes and regions in its picks and in the pool, and how
    ambiguous both are.

    A run that buys labels picks what it buys: coverage and repeats are of its rounds, and the shares leave out the first, which is
    by chance.
    """
    pool = training_rows(store.index, experiment.data.held_out)
    names = [c.name for c in store.dataset.classes]
    table = "bought.parquet" if experiment.buys_labels else "selected.parquet"
    picks = [ledger.table(m, table)["tile_id"].to_pylist() for m in manifests if table in m.files]
    by_strategy = (picks[1:] or picks) if experiment.buys_labels else picks
    every = [t for ids in by_strategy for t in ids]
    return {
        "coverage": [round(c, 4) for c in diagnostics.coverage(picks, len(pool))],
        "repeats": [round(r, 4) for r in diagnostics.repeats(picks)],
        "classes": diagnostics.class_shares(pool, names, every),
        "pool_classes": diagnostics.class_shares(pool, names),
        "regions": diagnostics.region_shares(pool, every),
        "pool_regions": diagnostics.region_shares(pool),
        "ambiguous": diagnostics.ambiguous_share(pool, every),
        "pool_ambiguous": diagnostics.ambiguous_share(pool),
    }


def sources_of(ledger: Ledger, manifests: list[Manifest]) -> dict[str, Any]:
    """names of the M source images, counts: (T, M, C, C) of the last T cycles."""
    tables = [ledger.table(m, "sources.parquet") for m in manifests[-LAST:]]
    counts = [np.array(t["counts"].to_pylist(), int) for t in tables]
    side = round(counts[0].shape[1] ** 0.5)
    return {
        "names": tables[0]["source"].to_pylist(),
        "counts": [c.reshape(len(c), side, side).tolist() for c in counts],
    }
