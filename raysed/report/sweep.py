"""What a sweep has found: a table, a picture, and its best configuration as a file for --config."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysed.config import Experiment, flatten
from raysed.core.statistics import mean_of_last
from raysed.errors import DivergedError
from raysed.io.ledger import Manifest
from raysed.report.figures import parallel_coordinates

LAST = 3
"""A trial's score is the mean of its last so many cycles; trials are too short for ten."""
NOT_OF_BEST = ("run", "seed", "cycles", "baseline", "allow_config_change", "data.", "cluster.")
"""Fields that belong to the sweep and not to its finding."""


@dataclass(frozen=True)
class TrialResult:
    """A trial and how it ended."""

    number: int
    experiment: Experiment
    values: dict[str, float]
    """Of the swept fields."""
    outcome: str | None
    """finished, stopped, failed, or None while it has not ended."""
    returned: float | None
    """Seconds it took to give its resources back."""
    manifests: list[Manifest]

    @property
    def miou(self) -> list[float]:
        return [m.record["val"]["miou"] for m in self.manifests]

    @property
    def score(self) -> float | None:
        return mean_of_last(self.miou, LAST)


def best_of(trials: Sequence[TrialResult]) -> TrialResult:
    """The finished trial with the highest score; of equal ones the first.

    Raises:
        DivergedError: none has finished.
    """
    finished = [t for t in trials if t.outcome == "finished"]
    if not finished:
        raise DivergedError(
            f"none of {len(trials)} trials has finished: lower --optim.lr and the range of raysed/core/sweep.py"
        )
    return max(finished, key=lambda t: (t.score or 0.0, -t.number))


def best_config(best: TrialResult) -> str:
    """JSON of the fields that differ from the defaults, for --config; without those of the sweep itself."""
    tree: dict[str, Any] = {}
    swept = [(n, v) for n, v in flatten(best.experiment.to_dict()) if n in best.values]
    differing = [(n, mine) for n, (mine, _) in best.experiment.differences(Experiment()).items()]
    for name, value in dict([*differing, *swept]).items():
        if name.startswith(NOT_OF_BEST):
            continue
        *groups, leaf = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return json.dumps(tree, indent=1) + "\n"


def sweep_files(trials: Sequence[TrialResult]) -> dict[str, str]:
    """File name -> text: table.md, parallel.svg, best.json, trials.jsonl, summary.json.

    Raises:
        DivergedError: no trial has finished.
    """
    best, base = best_of(trials), trials[0]
    shown = [t for t in trials if t.manifests]
    points = [{**t.values, f"miou, last {LAST} cycles": t.score or 0.0} for t in shown]
    return {
        "table.md": table(trials),
        "parallel.svg": parallel_coordinates(
            points,
            ["optim.lr"],
            [t.outcome == "finished" for t in shown],
            next((k for k, t in enumerate(shown) if t.number == 0), None),
        ),
        "best.json": best_config(best),
        "trials.jsonl": "".join(json.dumps(_line(t)) + "\n" for t in trials),
        "summary.json": json.dumps({"best": _line(best), "base": _line(base), "rows": rows(trials), **_about(best)}, indent=1) + "\n",
    }  # fmt: skip


def rows(trials: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Rows as those of a comparison: best and base at equal cycles, and every trial's score."""
    made = []
    for trial in trials:
        seconds = sum(m.record["seconds"]["total"] for m in trial.manifests)
        data = trial.manifests[-1].record["dataset_hash"][:12] if trial.manifests else ""
        made.append({"data": data, "experiment": f"trial-{trial.number:04d}", "seed": trial.experiment.seed, "metric": "miou", "value": trial.score, "paper": None, "seconds": round(seconds, 1)})  # fmt: skip
    return made


def _line(trial: TrialResult) -> dict[str, Any]:
    return {
        "trial": trial.number,
        **trial.values,
        "outcome": trial.outcome,
        "cycles": len(trial.manifests),
        "score": trial.score,
        "returned_after": trial.returned,
        "seconds": round(sum(m.record["seconds"]["total"] for m in trial.manifests), 1),
        "miou": trial.miou,
        "val_loss": [m.record["val"]["loss"] for m in trial.manifests],
    }


def _about(best: TrialResult) -> dict[str, Any]:
    config = best.experiment.to_dict()
    config["run"] = config["data"]["uri"] = None
    return {"config": config, "environment": best.manifests[-1].record.get("environment")}


def table(trials: Sequence[TrialResult]) -> str:
    """All trials, the best first, as markdown."""
    best, base = best_of(trials), trials[0]
    order = sorted(trials, key=lambda t: (t.outcome != "finished", -len(t.manifests), -(t.score or 0)))
    head = [
        "trial",
        *base.values,
        "outcome",
        "cycles",
        f"miou, mean of last {LAST}",
        "highest",
        "seconds",
        "resources back after",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for t in order:
        values = [f"{v:.3g}" for v in t.values.values()]
        scores = [f"{t.score:.4f}", f"{max(t.miou):.4f}"] if t.score is not None else ["", ""]
        seconds = f"{sum(m.record['seconds']['total'] for m in t.manifests):.0f}"
        back = "" if t.returned is None else f"{t.returned:.1f} s"
        name = f"{t.number}, as it stands" if t.number == 0 else str(t.number)
        lines.append(
            f"| {' | '.join([name, *values, t.outcome or 'not ended', str(len(t.manifests)), *scores, seconds, back])} |"
        )
    n = len(base.manifests)
    verdict = f"Best: trial {best.number}, {best.score:.4f}."
    if base.outcome == "finished" and base.score is not None and best.score is not None and best is not base:
        verdict += f"  The experiment as it stands (trial 0) reaches {base.score:.4f} in the same {n} cycles: {best.score - base.score:+.4f}."
    return "\n".join(
        [
            *lines,
            "",
            verdict,
            "One seed, and the best of many is biased upwards: confirm it with other seeds.",
            "",
        ]
    )
