"""Arms x seeds under one protocol, paired by seed, then what they show: the engine of `jobs/evidence.py`."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysed import cli
from raysed.compare import run_all, seeds_of
from raysed.config import Experiment, with_overrides
from raysed.core.acquisition import STRATEGIES, strategy_of
from raysed.errors import EXIT_INTERRUPTED, UsageError
from raysed.io.ledger import config_hash
from raysed.io.provenance import is_committed
from raysed.io.storage import Storage
from raysed.io.store import Store
from raysed.report import runfile
from raysed.report.evidence import renew_combined, write_evidence
from raysed.report.judging import TESTED
from raysed.runs import absolute, say, with_data

OWN = ("select.strategy", "select.options", "seed", "baseline", "data.validation")
"""Fields that arms, seeds and split fix."""
SHARED = ("run", "seed", "baseline", "cycles", "data.", "select.strategy", "model.init")
"""Fields, or what they begin with, that no arm may have of its own: it would be another arm than its name says, start from other
weights, or be judged by other cycles or images."""
CEILING = "ceiling"
"""Arm that trains on all tiles in every cycle: what there is to win, at several times the compute."""
RIVALS = ("infobatch",)
"""Strategies that read losses and still stand with the passive ones to be beaten: they promise no more than a passive result."""
PREREGISTRATION = "results/evidence/preregistration.json"


@dataclass(frozen=True)
class EvidenceArm:
    """One arm: a strategy, or the ceiling, and fields of its own."""

    name: str
    """As given: `strategy[:field=value]...`; only the first `=` of a field divides."""
    strategy: str
    fields: dict[str, str]

    @property
    def file(self) -> str:
        """The name as a part of file names."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", self.name)

    @property
    def kind(self) -> str:
        """passive, active or ceiling."""
        if self.strategy == CEILING:
            return CEILING
        passive = not STRATEGIES[self.strategy].needs or self.strategy in RIVALS
        return "passive" if passive else "active"

    @property
    def fixed(self) -> dict[str, str]:
        """Dotted fields that make this arm; all others are those of the series."""
        own = {"select.strategy": self.strategy}
        if self.strategy == CEILING:
            own = {
                "select.strategy": "uniform",
                "select.fraction": "1",
                "select.tiles": "none",
                "select.protocol": "reselect",
            }
        if self.strategy == "class-random":
            own["loss.alpha_power"] = "0"  # one channel for class balance
        return {**own, **self.fields}

    def experiment(self, base: Experiment, run: str, seed: int, split: str) -> Experiment:
        """The run of a seed.

        Raises:
            UsageError: a field that there is not, or a value that it does not take.
        """
        common = {"run": run, "seed": seed, "baseline": False, "data.validation": split}
        experiment = absolute(with_overrides(base, {**self.fixed, **common}, f"arm {self.name}"))
        strategy_of(experiment.select.strategy, experiment.select.options)  # refused now, not hours later
        return experiment


def arms_of(text: str) -> list[EvidenceArm]:
    """The arms of --arms.

    Raises:
        UsageError: an unknown strategy, a field without a value or that no arm may have, or the same arm twice.
    """
    arms = []
    for name in text.split(","):
        strategy, *rest = name.split(":")
        if strategy != CEILING and strategy not in STRATEGIES:
            raise UsageError(f"--arms takes {CEILING}, {', '.join(STRATEGIES)}, got {strategy!r}")
        if bad := [f for f in rest if "=" not in f]:
            raise UsageError(f"--arms: {name!r} must be strategy[:field=value], {bad[0]!r} has no value")
        if fixed := [f for f in rest if f.split("=", 1)[0].startswith(SHARED)]:
            raise UsageError(
                f"--arms: {name!r} must not have {fixed[0]!r}: it is the same for all arms, or their strategy"
            )
        arms.append(EvidenceArm(name, strategy, dict(f.split("=", 1) for f in rest)))
    if len({a.file for a in arms}) < len(arms):
        raise UsageError(f"--arms names an arm twice: {text}")
    return arms


def evidence(doc: str | None, argv: Sequence[str]) -> int:
    """Parse flags, do all runs that are left, report; the job's exit code."""
    parser = cli.experiment_parser(doc, Experiment())
    parser.add_argument("--arms", default=f"{CEILING},uniform,entropy,defensive", metavar="NAME,NAME", help="arms, each strategy[:field=value] or ceiling (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seeds", default="0", metavar="N,N", help="seeds of every arm (default: 0)")
    parser.add_argument("--split", choices=("dev", "report"), default="dev", help="half of the validation images that counts (default: dev)")  # fmt: skip
    parser.add_argument("--results", metavar="URI", help="folder of result files, tables and figures (default: results/evidence/DATA-SPLIT)")  # fmt: skip
    parser.add_argument("--preregistration", default=PREREGISTRATION, metavar="FILE", help="committed JSON of primary metric, arms, seeds, cycles, configuration and data set, without which the report half is not read; the refusal prints it (default: %(default)s)")  # fmt: skip
    args = parser.parse(argv)
    for name in OWN:
        if getattr(args, name) is not None:
            raise UsageError(f"{name} is fixed by --arms, --seeds and --split")
    if getattr(args, "model.init") is not None:
        raise UsageError(
            "--init is for jobs/train.py and jobs/active.py: all arms of a seed start from the weights that follow from it"
        )
    arms, seeds = arms_of(args.arms), seeds_of(args.seeds)
    base, preset = cli.parse_experiment(args, Experiment())
    if base.model.init is not None:
        raise UsageError(
            f"--config {args.config} has model.init: all arms of a seed start from the weights that follow from it"
        )
    base = with_data(base, preset)
    store = Store.open(str(base.data.uri))
    primary = None
    if args.split == "report":
        primary = check_registered(Path(args.preregistration), asked_for(arms, seeds, base, store))
    root = Storage(base.run or f"runs/evidence-{store.dataset.name}-{args.split}")
    results = Storage(args.results or f"results/evidence/{store.dataset.name}-{args.split}")
    say(f"runs {root.uri}  data {base.data.uri}  results {results.uri}")
    runs = [(arm.file, experiment) for arm, experiment in plan(base, root, arms, seeds, args.split)]
    code = run_all(runs, args, results, store, evidence=True)
    if args.dry_run or code in EXIT_INTERRUPTED.values():
        return code
    kinds, files = {a.name: a.kind for a in arms}, {a.name: a.file for a in arms}
    own = {a.file: a.fixed.keys() for a in arms}
    counted = seeds if args.split == "report" else None
    say("\n" + write_evidence(results, kinds, files, args.split, own=own, primary=primary, seeds=counted))
    if combined := renew_combined(results):
        say(f"all folders  {combined}")
    return code


def plan(
    base: Experiment, root: Storage, arms: Sequence[EvidenceArm], seeds: Sequence[int], split: str
) -> Iterator[tuple[EvidenceArm, Experiment]]:
    """(arm, experiment) of each run, all arms of a seed before the next seed."""
    for seed in seeds:
        for arm in arms:
            run = root.at(runfile.file_of(arm.file, seed).removesuffix(".jsonl")).uri
            yield arm, arm.experiment(base, run, seed, split)


def asked_for(
    arms: Sequence[EvidenceArm], seeds: Sequence[int], base: Experiment, store: Store
) -> dict[str, Any]:
    """What a plan must register before these arms and seeds are read on the report half, besides the primary metric: config is the
    hash of what all arms share, data the content hash of the store.
    """
    neutral = {"seed": 0, "select.strategy": "uniform", "select.options": "", "data.validation": "report"}
    return {
        "arms": sorted(a.name for a in arms),
        "seeds": sorted(seeds),
        "cycles": base.cycles,
        "config": config_hash(with_overrides(base, neutral, "plan")),
        "data": store.dataset.content_hash,
    }


def check_registered(path: Path, asked: dict[str, Any]) -> str:
    """Prove that what is about to be read was said before, and committed; the primary metric.

    Args:
        path: of the plan.
        asked: see `asked_for`.

    Raises:
        UsageError: no such file, not JSON, not committed, or another plan than this one; with the plan that would register it.
    """
    said = _said(path)
    known = said.get("primary") in TESTED
    plan = json.dumps({"primary": said["primary"] if known else "miou", **asked})
    cure = f"to register what is asked for, commit this as {path} before the report half is read: {plan}"
    if not path.is_file():
        raise UsageError(f"--split report needs a plan and there is no {path}; {cure}")
    if not known:
        raise UsageError(
            f"{path}: primary must be one of {', '.join(TESTED)}, got {said.get('primary')!r}; {cure}"
        )
    for name, value in asked.items():
        found = said.get(name)
        if (sorted(found) if isinstance(found, list) else found) != value:
            raise UsageError(f"{path} registers {name} {found}, asked for are {value}; {cure}")
    if not is_committed(path):
        raise UsageError(f"{path} is not committed as it is: commit it before the report half is read")
    return said["primary"]


def _said(path: Path) -> dict[str, Any]:
    """What a plan says; nothing where there is none, or no JSON object."""
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
