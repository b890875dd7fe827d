"""Whether an arm of the evidence wins: numbers of each metric with interval and p, and the verdict that follows from them.

An arm is judged against the best passive arm, the one of highest mean IoU, seed by seed: runs of one seed start from the same
weights and see the same augmentation of a tile in a cycle.  Letters: S seeds, M source images, T cycles, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raysed.core.cost import forwards
from raysed.core.randomness import keyed_rng
from raysed.core.statistics import (
    LAST,
    Difference,
    aulc_between,
    fluctuation,
    holm,
    iou_variation,
    mean_iou,
    mean_of_last,
    paired_bootstrap,
    paired_t,
    worst_iou,
)
from raysed.report.runfile import RunFile

Row = dict[str, Any]
Curve = dict[str, np.ndarray]
COSTS = ("tiles", "compute", "seconds")
COUNTED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "miou": ("miou", mean_iou),
    "worst_class": ("iou_worst", worst_iou),
    "cv": ("iou_cv", iou_variation),
}
"""Metric -> its name in a cycle's record, and what gives it from counts: its interval is over seeds and source images."""
TESTED = (*COUNTED, *(f"aulc_{c}" for c in COSTS), "aulc_labels", "fluctuation")
"""Metrics of which differences are tested: one of them can be registered as the primary one."""
TIMES = ("time_ratio", "time_ratio_warm")
METRICS = (*TESTED, *TIMES)
LOWER = ("cv", "fluctuation")
"""Metrics of which less is better."""
DRAWS = 4000
FLUCTUATION_LIMIT, TIME_LIMIT = 1.1, 1.05
LEVEL = 0.05
"""Chance of any false win among the competing arms."""


@dataclass(frozen=True)
class Judged:
    """An arm's runs, by seed."""

    name: str
    kind: str
    """passive, active or ceiling; the active ones compete."""
    runs: list[RunFile]
    """That are finished."""
    diverged: list[RunFile] = field(default_factory=list)
    """That ended in a cycle whose training diverged."""

    @property
    def label(self) -> str:
        """The name, and the seeds that its numbers lack because they diverged."""
        lost = ", ".join(str(r.seed) for r in self.diverged)
        return f"{self.name} (diverged: seed {lost})" if lost else self.name

    @property
    def buys_labels(self) -> bool:
        """Whether its runs bought labels round by round."""
        return any(r.facts["config"]["select"]["protocol"] == "pool" for r in self.runs)

    def paired(self, other: "Judged") -> tuple[list[RunFile], list[RunFile]]:
        """The runs of both of the seeds that both have, in order."""
        theirs = {r.seed: r for r in other.runs}
        own = [r for r in self.runs if r.seed in theirs]
        return own, [theirs[r.seed] for r in own]


def curve(run: RunFile) -> Curve:
    """miou of each cycle, and what had been spent by its end: tiles, compute, seconds, labels."""
    records = [m.record for m in run.cycles]
    spent = {
        "tiles": [r["tiles"] for r in records],
        "compute": [_forwards(r, run.facts["data"]["tile_size"]) for r in records],
        "seconds": [r["seconds"]["total"] for r in records],
    }
    costs = {name: np.cumsum(values) for name, values in spent.items()}
    costs["labels"] = np.array([r["labelled"] for r in records])
    return {"miou": np.array([r["val"]["miou"] for r in records]), **costs}


def by_labels(found: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Labels bought and miou at the end of each round that bought some."""
    labels = found["labels"]
    last = np.flatnonzero(np.diff(labels, append=np.inf) > 0)
    return labels[last], found["miou"][last]


def _forwards(record: dict[str, Any], side: int) -> float:
    scores = record["scores"] or {"tiles": 0, "side": side}
    return forwards(
        trained=record["tiles"],
        scored=scores["tiles"],
        scale=scores["side"] / side,
        estimated=record["estimated"],
    )


Values = dict[str, dict[int, dict[str, Any]]]
"""Arm -> seed -> metric -> its value; None where it is not known."""


def summary_rows(arms: Sequence[Judged], split: str, primary: str | None = None) -> list[Row]:
    """The rows of `summary.json`.

    Args:
        arms: all that were asked for, finished or not: the active ones are the family that Holm's steps correct for.
        split: dev or report.
        primary: the metric that was registered as the one to be judged by; None is exploratory.
    """
    values: Values = {a.name: {r.seed: _values(r) for r in a.runs} for a in arms}
    curves = {a.name: {r.seed: curve(r) for r in a.runs} for a in arms}
    _add_areas(values, curves, [a.name for a in arms if a.kind != "ceiling"])
    ends = {a.name: {s: by_labels(c) for s, c in curves[a.name].items()} for a in arms if a.buys_labels}
    _add_labels(values, ends)
    best = _best_passive(arms, values)
    timed = seconds_compare(arms)
    if not timed:
        for own in (v for found in values.values() for v in found.values()):
            own["aulc_seconds"] = None
    for arm in arms:
        for mine, theirs in zip(*arm.paired(best), strict=True):
            own, other = values[arm.name][mine.seed], values[best.name][theirs.seed]
            own |= {
                "time_ratio": own["seconds"] / other["seconds"] if timed else None,
                "time_ratio_warm": own["warm"] / other["warm"] if timed else None,
            }
    budgets = sorted({int(n) for own in ends.values() for labels, _ in own.values() for n in labels})
    rows = []
    for arm in arms:
        at_budgets = [f"miou@{n}" for n in budgets] if arm.buys_labels else []
        rows += [_row(arm, best, metric, values, split) for metric in (*METRICS, *at_budgets)]
    for row in rows:
        row["role"] = (
            "exploratory" if primary is None else "primary" if row["metric"] == primary else "secondary"
        )
    _correct(rows)
    return rows


def machines(arms: Sequence[Judged]) -> list[str]:
    """What the runs were made on, each kind once."""
    return list(dict.fromkeys(m for a in arms for r in a.runs for m in r.machines))


def precisions(arms: Sequence[Judged]) -> list[str]:
    """What the runs were computed in, each once."""
    return list(dict.fromkeys(r.facts["precision"] for a in arms for r in a.runs))


def seconds_compare(arms: Sequence[Judged]) -> bool:
    """Whether all runs were made on one kind of machine, in one precision: two kinds of processors may have one name."""
    return len(machines(arms)) == len(precisions(arms)) == 1


def _values(run: RunFile) -> dict[str, Any]:
    records = [m.record for m in run.cycles]
    found: dict[str, Any] = {
        metric: mean_of_last([r["val"][key] for r in records], LAST) for metric, (key, _) in COUNTED.items()
    }
    miou = [r["val"]["miou"] for r in records]
    found["fluctuation"] = fluctuation(miou, restarts=run.restarts)
    totals = [r["seconds"]["total"] for r in records]
    return {**found, "seconds": sum(totals), "warm": float(np.median(totals[1:] or totals))}


def _add_areas(values: Values, curves: Mapping[str, Mapping[int, Curve]], competing: Sequence[str]) -> None:
    """aulc by each cost, over the range that all these arms share."""
    for cost in COSTS:
        every = [c[cost] for name in competing for c in curves[name].values()]
        low, high = max(c[0] for c in every), min(c[-1] for c in every)
        for name, own in curves.items():
            for seed, c in own.items():
                covers = c[cost][0] <= low and high <= c[cost][-1]
                area = aulc_between(c[cost].tolist(), c["miou"].tolist(), low, high) if covers else None
                values[name][seed][f"aulc_{cost}"] = area


def _add_labels(values: Values, ends: Mapping[str, Mapping[int, tuple[np.ndarray, np.ndarray]]]) -> None:
    """Of arms that buy labels, miou at the end of each round and the area under it, over the range that all of them share."""
    every = [labels for own in ends.values() for labels, _ in own.values()]
    low, high = max((e[0] for e in every), default=0), min((e[-1] for e in every), default=0)
    for name, own in ends.items():
        for seed, (labels, miou) in own.items():
            at_budgets = {f"miou@{n}": float(v) for n, v in zip(labels, miou, strict=True)}
            area = aulc_between(labels.tolist(), miou.tolist(), low, high)
            values[name][seed] |= {**at_budgets, "aulc_labels": area}


def _best_passive(arms: Sequence[Judged], values: Values) -> Judged:
    """Of highest miou on the seeds that all passive arms have; one with a seed that diverged is no candidate."""
    passive = [a for a in arms if a.kind == "passive" and a.runs and not a.diverged]
    shared = set.intersection(*(set(values[a.name]) for a in passive))
    return max(
        passive,
        key=lambda a: np.mean([v["miou"] for s, v in values[a.name].items() if s in shared or not shared]),
    )


def _row(arm: Judged, best: Judged, metric: str, values: Values, split: str) -> Row:
    own = {s: v[metric] for s, v in values[arm.name].items() if v.get(metric) is not None}
    known = list(own.values())
    data = best.runs[0].facts["data"]
    row: Row = {
        "protocol": "pool" if arm.buys_labels else "reselect",
        "data": f"{data['name']} {data['hash'][:12]}",
        "split": split,
        "arm": arm.name,
        "kind": arm.kind,
        "metric": metric,
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "seeds": sorted(own),
        "diverged": [r.seed for r in arm.diverged],
        "minus_best_passive": None,
        "ci_low": None,
        "ci_high": None,
        "interval": None,
        "p": None,
        "p_holm": None,
        "best_passive": best.name,
    }
    if arm is best or metric in TIMES or (compared := _compared(arm, best, metric, values)) is None:
        return row
    found, over = compared
    row["minus_best_passive"] = found.mean
    if np.isfinite(found.low) and not arm.diverged:  # the seeds that came through may be the better ones
        row |= {"ci_low": found.low, "ci_high": found.high, "interval": over, "p": found.p}
    return row


def _compared(arm: Judged, best: Judged, metric: str, values: Values) -> tuple[Difference, str] | None:
    """Difference to the best passive arm and what its interval is over; None without a seed that both have."""
    mine, theirs = arm.paired(best)
    if metric in COUNTED:
        if not mine:
            return None
        one, other = (np.stack([_counts(r) for r in runs]) for runs in (mine, theirs))
        rng = keyed_rng("evidence", arm.name, metric)
        found = paired_bootstrap(one, other, rng, draws=DRAWS, statistic=COUNTED[metric][1])
        return found, "seeds and sources" if len(mine) > 1 else "sources"
    pairs = [[values[a.name][r.seed].get(metric) for a in (arm, best)] for r in mine]
    differences = [one - other for one, other in pairs if one is not None and other is not None]
    return (paired_t(differences), "seeds") if differences else None


def _counts(run: RunFile) -> np.ndarray:
    """(M, T, C, C) counts of the source images in the last cycles."""
    return np.moveaxis(np.array(run.facts["sources"]["counts"]), 0, 1)


def _correct(rows: Sequence[Row]) -> None:
    """Fill in p_holm: of each metric over all competing arms, those that could not be tested included."""
    for metric in {r["metric"] for r in rows}:
        family = [r for r in rows if r["metric"] == metric and r["kind"] == "active"]
        corrected = holm([1.0 if r["p"] is None else r["p"] for r in family])
        for row, p in zip(family, corrected, strict=True):
            row["p_holm"] = None if row["p"] is None else p


def verdict(row: Row) -> str:
    """better, worse or not apart, by the interval of the difference; alone if the number of competing arms may explain it."""
    if row["p"] is None:
        return "not tested, diverged" if row["diverged"] else "not tested"
    sign = -1 if row["metric"] in LOWER else 1
    low, high = sorted((sign * row["ci_low"], sign * row["ci_high"]))
    one = ", on one seed" if row["interval"] == "sources" else ""
    if low <= 0 <= high:
        return f"not apart{one}"
    alone = " alone" if row["p_holm"] is not None and row["p_holm"] >= LEVEL else ""
    return ("better" if low > 0 else "worse") + alone + one


def goal(rows: Sequence[Row], arm: str) -> dict[str, bool]:
    """The goal as it was stated before the runs, point by point, for one arm; its first point is of the primary metric alone, of
    miou where none is registered.
    """
    own = {r["metric"]: r for r in rows if r["arm"] == arm}
    base = next(r for r in rows if r["arm"] == own["miou"]["best_passive"] and r["metric"] == "fluctuation")
    primary = next((r for r in own.values() if r["role"] == "primary"), own["miou"])
    worst, cv = (own[m]["minus_best_passive"] for m in ("worst_class", "cv"))
    swings, seconds = (own[m]["mean"] for m in ("fluctuation", "time_ratio"))
    even = worst is not None and cv is not None and worst >= 0 and cv <= 0 and (worst > 0 or cv < 0)
    return {
        f"{primary['metric']} better": verdict(primary) == "better",
        "worst class and cv no worse, one better, by means": even,
        f"fluctuation at most {FLUCTUATION_LIMIT} times": swings is not None
        and swings <= FLUCTUATION_LIMIT * base["mean"],
        f"time at most {TIME_LIMIT} times": seconds is not None and seconds <= TIME_LIMIT,
    }
