"""What the runs of the evidence show: `summary.json`, tables and figures, all of them from the result files alone.

An arm is judged against the best passive arm, the one of highest mean IoU, seed by seed: runs of one seed start from the same
weights and see the same augmentation of a tile in a cycle.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysed.core.cost import forwards
from raysed.core.randomness import keyed_rng
from raysed.core.statistics import (
    LAST,
    aulc_between,
    first_above,
    fluctuation,
    holm,
    iou_variation,
    mean_iou,
    mean_of_last,
    paired_bootstrap,
    paired_t,
    worst_iou,
)
from raysed.errors import UsageError
from raysed.io.storage import Storage
from raysed.report import figures, runfile
from raysed.report.comparison import mean_curves
from raysed.report.runfile import RunFile
from raysed.report.summary import FIRST_CORRECT
from raysed.report.tables import markdown

Row = dict[str, Any]
COSTS = ("tiles", "compute", "seconds")
COUNTED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "miou": ("miou", mean_iou),
    "worst_class": ("iou_worst", worst_iou),
    "cv": ("iou_cv", iou_variation),
}
"""Metric -> its name in a cycle's record, and what gives it from counts: its interval is over seeds and source images."""
LOWER = ("cv", "fluctuation", "time_ratio")
"""Metrics of which less is better."""
METRICS = (*COUNTED, *(f"aulc_{c}" for c in COSTS), "aulc_labels", "fluctuation", "time_ratio")
DRAWS = 10_000
FLUCTUATION_LIMIT, TIME_LIMIT = 1.1, 1.05
LEVEL = 0.05
"""Chance of any false win among the arms."""
NOTE = f"""miou, worst_class (IoU of the worst class) and cv (standard deviation over mean of the class IoU) are means of the last {LAST} cycles.
aulc is the area under the curve of miou over the range of cost that all arms but the ceiling share, in units of miou (the
ceiling has none where its first cycle costs more than theirs): by tiles trained on; by compute, in forward passes (a training
visit counts 3, a scored tile 1, less at smaller side; validation is alike for all and left out, and so is the run that
select.reference names); by seconds of whole cycles; by labels bought, of runs that buy them, at the end of each
round.  fluctuation is the standard deviation of the change of miou from cycle to cycle in the second half. time_ratio is the
median warm cycle's seconds over that of the best passive arm.  Differences are to the best passive arm, paired by seed;
brackets hold 95 % intervals by Student's t: of miou, worst_class and cv over seeds and source images, whose error is a
bootstrap's, or over images alone where there is one seed; of the others over seeds, and none of one seed.  The best passive arm was picked by the same numbers,
of the seeds that all passive arms have, which favours it.  A win is alone if its interval is apart from 0 and its p, corrected
for the number of competing arms by Holm's steps, is not below {LEVEL}."""


@dataclass(frozen=True)
class Judged:
    """An arm's runs, by seed."""

    name: str
    kind: str
    runs: list[RunFile]

    @property
    def buys_labels(self) -> bool:
        """Whether its runs bought labels round by round."""
        return self.runs[0].facts["config"]["select"]["protocol"] == "pool"

    def paired(self, other: "Judged") -> tuple[list[RunFile], list[RunFile]]:
        """The runs of both of the seeds that both have, in order."""
        theirs = {r.seed: r for r in other.runs}
        own = [r for r in self.runs if r.seed in theirs]
        return own, [theirs[r.seed] for r in own]


def write_evidence(results: Storage, kinds: Mapping[str, str], files: Mapping[str, str], split: str) -> str:
    """Write `summary.json`, `runs.json`, `tables.md` and the figures beside the result files; the tables as text.

    Args:
        results: folder of result files.
        kinds: arm -> passive, active or ceiling, in the order of the tables.
        files: arm -> its name in the result files.
        split: dev or report.

    Raises:
        UsageError: no finished run, runs of several data sets or validation images, or no passive arm.
    """
    arms = read_arms(results, kinds, files)
    rows = summary_rows(arms, split)
    text = tables(arms, rows, split)
    data = {a.name: _curves(a) for a in arms}
    means = mean_curves([r for a in arms for r in a.runs])
    first = arms[0].runs[0]
    names = list(first.cycles[-1].record["val"]["iou"])
    titles = {"tiles": "tiles trained on", "compute": "forward passes", "seconds": "seconds"}
    panels = {titles[c]: {n: (d[c], d["miou"]) for n, d in data.items()} for c in COSTS}
    ends = {a.name: [by_labels(curve(r)) for r in a.runs] for a in arms if a.buys_labels}
    if ends and all(len(labels) > 1 for own in ends.values() for labels, _ in own):
        panels["labels bought"] = {
            n: (np.stack([x for x, _ in own]), np.stack([y for _, y in own])) for n, own in ends.items()
        }
    pictures = {
        "curves.svg": figures.band_curves(panels),
        "classes.svg": figures.class_curves(means, names),
        "picked-classes.svg": figures.share_bars(
            first.facts["picks"]["pool_classes"], _picked(arms, "classes"), "share of pixels picked"
        ),
        "picked-regions.svg": figures.share_bars(
            dict(list(first.facts["picks"]["pool_regions"].items())[:12]),
            _picked(arms, "regions"),
            "share of tiles picked",
        ),
    }
    shown = "\n\n".join(f"![{n.removesuffix('.svg')}]({n})" for n in pictures)
    about = [_about(a, r) for a in arms for r in a.runs]
    written = {
        "summary.json": json.dumps(rows, indent=1) + "\n",
        "runs.json": json.dumps(about, indent=1) + "\n",
        "tables.md": f"{text}\n## Figures\n\nLine: mean over seeds; band: lowest to highest seed.\n\n{shown}\n",
        **pictures,
    }
    for name, content in written.items():
        results.write(name, content.encode())
    return f"{text}\nresults {results.uri}: {' '.join(written)}"


def read_arms(results: Storage, kinds: Mapping[str, str], files: Mapping[str, str]) -> list[Judged]:
    """All arms of which a run is finished, in the order of `kinds`.

    Raises:
        UsageError: see `write_evidence`.
    """
    found = [runfile.read(results, p) for p in results.list() if p.endswith(".jsonl") and "/" not in p]
    arms = []
    for name, kind in kinds.items():
        own = sorted(
            (r for r in found if r.name == files[name] and "sources" in r.facts), key=lambda r: r.seed
        )
        if own:
            arms.append(Judged(name, kind, own))
    hashes = {r.facts["data"]["hash"][:12] for a in arms for r in a.runs}
    if len(hashes) > 1:
        raise UsageError(f"{results.uri} mixes data sets {', '.join(sorted(hashes))}: evidence has one")
    runs = [r for a in arms for r in a.runs]
    for run in runs:
        if run.facts["sources"]["names"] != runs[0].facts["sources"]["names"]:
            raise UsageError(
                f"{results.uri}/{run.path} is of other validation images than {runs[0].path}: evidence has one set"
            )
    if not any(a.kind == "passive" for a in arms):
        raise UsageError(
            f"{results.uri} has no finished run of a passive arm to judge by: add uniform to --arms"
        )
    return arms


def curve(run: RunFile) -> dict[str, np.ndarray]:
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


def by_labels(found: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
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


def _curves(arm: Judged) -> dict[str, np.ndarray]:
    """(S, T) of each of `curve`, as far as all seeds have come."""
    found = [curve(r) for r in arm.runs]
    length = min(len(c["miou"]) for c in found)
    return {k: np.stack([c[k][:length] for c in found]) for k in found[0]}


def summary_rows(arms: Sequence[Judged], split: str) -> list[Row]:
    """The rows of `summary.json`."""
    values = {a.name: {r.seed: _values(r) for r in a.runs} for a in arms}
    curves = {a.name: {r.seed: curve(r) for r in a.runs} for a in arms}
    competing = [a.name for a in arms if a.kind != "ceiling"]
    for cost in COSTS:
        every = [c[cost] for name in competing for c in curves[name].values()]
        low, high = max(c[0] for c in every), min(c[-1] for c in every)
        for name, own in curves.items():
            for seed, c in own.items():
                covers = c[cost][0] <= low and high <= c[cost][-1]
                area = aulc_between(c[cost].tolist(), c["miou"].tolist(), low, high) if covers else None
                values[name][seed][f"aulc_{cost}"] = area
    buyers = [a.name for a in arms if a.buys_labels]
    ends = {name: {s: by_labels(c) for s, c in curves[name].items()} for name in buyers}
    every = [labels for own in ends.values() for labels, _ in own.values()]
    low, high = max((e[0] for e in every), default=0), min((e[-1] for e in every), default=0)
    for name, own_ends in ends.items():
        for seed, (labels, miou) in own_ends.items():
            area = aulc_between(labels.tolist(), miou.tolist(), low, high)
            values[name][seed]["aulc_labels"] = area
    passive = [a for a in arms if a.kind == "passive"]
    shared = set.intersection(*(set(values[a.name]) for a in passive))
    best = max(
        passive,
        key=lambda a: np.mean([v["miou"] for s, v in values[a.name].items() if s in shared or not shared]),
    )
    for arm in arms:
        for mine, theirs in zip(*arm.paired(best), strict=True):
            ratio = values[arm.name][mine.seed]["warm"] / values[best.name][theirs.seed]["warm"]
            values[arm.name][mine.seed]["time_ratio"] = ratio
    rows = [_row(arm, best, metric, values, split) for arm in arms for metric in METRICS]
    for metric in COUNTED:
        rivals = [r for r in rows if r["metric"] == metric and r["p"] is not None and r["kind"] != "ceiling"]
        for row, p in zip(rivals, holm([r["p"] for r in rivals]), strict=True):
            row["p_holm"] = p
    return rows


def _values(run: RunFile) -> dict[str, Any]:
    records = [m.record for m in run.cycles]
    found: dict[str, Any] = {
        metric: mean_of_last([r["val"][key] for r in records], LAST) for metric, (key, _) in COUNTED.items()
    }
    found["fluctuation"] = fluctuation([r["val"]["miou"] for r in records])
    totals = [r["seconds"]["total"] for r in records]
    found["warm"] = float(np.median(totals[1:] or totals))
    return found


def _row(arm: Judged, best: Judged, metric: str, values: dict[str, dict[int, Any]], split: str) -> Row:
    own = {s: v[metric] for s, v in values[arm.name].items() if v.get(metric) is not None}
    known = list(own.values())
    facts = arm.runs[0].facts
    row: Row = {
        "protocol": "pool" if best.buys_labels else "reselect",
        "data": f"{facts['data']['name']} {facts['data']['hash'][:12]}",
        "split": split,
        "arm": arm.name,
        "kind": arm.kind,
        "metric": metric,
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "seeds": sorted(own),
        "minus_best_passive": None,
        "ci_low": None,
        "ci_high": None,
        "interval": None,
        "p": None,
        "p_holm": None,
        "best_passive": best.name,
    }
    if arm is best or metric == "time_ratio":
        return row
    mine, theirs = arm.paired(best)
    rng = keyed_rng("evidence", arm.name, metric)
    if metric in COUNTED:
        if not mine:
            return row
        counts = [np.stack([_counts(r) for r in runs]) for runs in (mine, theirs)]
        found = paired_bootstrap(counts[0], counts[1], rng, draws=DRAWS, statistic=COUNTED[metric][1])
        row["interval"] = "seeds and sources" if len(mine) > 1 else "sources"
        row["p"] = found.p
    else:
        other = values[best.name]
        both = [r.seed for r in mine if r.seed in own and other[r.seed].get(metric) is not None]
        paired = [own[s] - other[s][metric] for s in both]
        if not paired:
            return row
        found = paired_t(paired)
        row["interval"] = "seeds" if len(paired) > 1 else None
        row["p"] = found.p if len(paired) > 1 else None
    row["minus_best_passive"] = found.mean
    if np.isfinite(found.low):
        row["ci_low"], row["ci_high"] = found.low, found.high
    return row


def _counts(run: RunFile) -> np.ndarray:
    """(M, T, C, C) counts of the source images in the last cycles."""
    return np.moveaxis(np.array(run.facts["sources"]["counts"]), 0, 1)


def goal(rows: Sequence[Row], arm: str) -> dict[str, bool]:
    """The goal as it was stated before the runs, point by point, for one arm."""
    own = {r["metric"]: r for r in rows if r["arm"] == arm}
    base = next(r for r in rows if r["arm"] == own["miou"]["best_passive"] and r["metric"] == "fluctuation")
    worst, cv = own["worst_class"]["minus_best_passive"] or 0, own["cv"]["minus_best_passive"] or 0
    return {
        "miou or aulc_compute above 0 with its interval": any(
            (own[m]["ci_low"] or 0) > 0 for m in ("miou", "aulc_compute")
        ),
        "worst class and cv no worse, one better": worst >= 0 and cv <= 0 and (worst > 0 or cv < 0),
        f"fluctuation at most {FLUCTUATION_LIMIT} times": (own["fluctuation"]["mean"] or 0)
        <= FLUCTUATION_LIMIT * (base["mean"] or 0),
        f"time at most {TIME_LIMIT} times": (own["time_ratio"]["mean"] or np.inf) <= TIME_LIMIT,
    }


def verdict(row: Row) -> str:
    """better, worse or not apart, by the interval of the difference; alone if the number of arms may explain it."""
    if row["ci_low"] is None:
        return ""
    sign = -1 if row["metric"] in LOWER else 1
    low, high = sorted((sign * row["ci_low"], sign * row["ci_high"]))
    if low <= 0 <= high:
        return "not apart"
    alone = row["p_holm"] is not None and row["p_holm"] >= LEVEL
    return ("better" if low > 0 else "worse") + " alone" * alone


def tables(arms: Sequence[Judged], rows: Sequence[Row], split: str) -> str:
    """All tables as markdown."""
    found = {(r["arm"], r["metric"]): r for r in rows}
    names = [a.name for a in arms]
    first = arms[0].runs[0]
    classes = list(first.cycles[-1].record["val"]["iou"])
    data, env = first.facts["data"], first.facts["environment"]
    weights = first.facts["config"]["model"]["encoder_weights"]
    best = rows[0]["best_passive"]
    head = (
        f"# Evidence on {data['name']}, {split} half\n\n{data['train']} training and {data['val']} validation tiles of {data['tile_size']} px, "
        f"{len(first.facts['sources']['names'])} validation images, hash {data['hash'][:12]}.  {first.facts['config']['model']['arch']}, "
        f"{f'pretrained weights {weights}' if weights else 'from scratch'}.  Commit {env['commit']}, {env['cores']} cores of {env['cpu']}, "
        f"{first.facts['device']}.  The best passive arm is {best}.\n\n    {env['command']}\n\n{NOTE}\n"
    )
    result = [[a.name, a.kind, str(len(a.runs)), *(_spread(found[a.name, m]) for m in METRICS)] for a in arms]
    apart = [[n, *(_difference(found[n, m]) for m in METRICS[:-1])] for n in names if n != best]
    wins = [[n, *(verdict(found[n, m]) for m in METRICS[:-1])] for n in names if n != best]
    active = [a.name for a in arms if a.kind == "active"]
    goals = [[n, *("yes" if ok else "no" for ok in goal(rows, n).values())] for n in active]
    by_class = [[c, *(_class(a, c) for a in arms)] for c in classes]
    found_in = [[c, *(_first(a, c) for a in arms)] for c in classes]
    picked = [
        [
            a.name,
            f"{np.mean([r.facts['picks']['coverage'][-1] for r in a.runs]):.3f}",
            f"{np.mean([np.mean(r.facts['picks']['repeats'] or [0]) for r in a.runs]):.3f}",
            _ambiguous(a),
            "yes" if not any(r.facts["replay"] for r in a.runs) else "NO",
        ]
        for a in arms
    ]
    parts = [
        head,
        markdown("Result, mean and standard deviation over seeds", ["arm", "kind", "seeds", *METRICS], result),
        markdown(f"Difference to {best}", ["arm", *METRICS[:-1]], apart),
        markdown(f"Wins against {best}", ["arm", *METRICS[:-1]], wins),
        markdown("Seeds on which the row's arm has the higher miou than the column's", ["arm", *names], _duels(arms)),
        markdown("The goal as stated before the runs", ["arm", *(goal(rows, active[0]) if active else [])], goals),
        markdown(f"IoU by class, mean of the last {LAST} cycles", ["class", *names], by_class),
        markdown(f"First cycle in which a class is found (IoU above {FIRST_CORRECT}), median over seeds", ["class", *names], found_in),
        markdown("Selections", ["arm", "share of the pool seen", "share repeated from the cycle before", "share ambiguous / in the pool", "replays"], picked),
    ]  # fmt: skip
    return "\n".join(parts)


def _spread(row: Row) -> str:
    if row["mean"] is None:
        return ""
    return f"{row['mean']:.4f}" + (f" ± {row['sd']:.4f}" if row["sd"] is not None else "")


def _difference(row: Row) -> str:
    if row["minus_best_passive"] is None:
        return ""
    span = "" if row["ci_low"] is None else f" [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
    return f"{row['minus_best_passive']:+.4f}{span}"


def _duels(arms: Sequence[Judged]) -> list[list[str]]:
    last = {a.name: {r.seed: _values(r)["miou"] or 0.0 for r in a.runs} for a in arms}
    rows = []
    for one in arms:
        cells = [one.name]
        for other in arms:
            both = last[one.name].keys() & last[other.name].keys()
            won = sum(last[one.name][s] > last[other.name][s] for s in both)
            cells.append("" if one is other else f"{won} of {len(both)}")
        rows.append(cells)
    return rows


def _class(arm: Judged, name: str) -> str:
    values = [mean_of_last([m.record["val"]["iou"][name] for m in r.cycles], LAST) for r in arm.runs]
    known = [v for v in values if v is not None]
    return f"{np.mean(known):.4f}" if known else ""


def _first(arm: Judged, name: str) -> str:
    values = [first_above([m.record["val"]["iou"][name] for m in r.cycles], FIRST_CORRECT) for r in arm.runs]
    known = [v + 1 for v in values if v is not None]
    return "" if not known else f"{np.median(known):g}" + (" (not in all)" if None in values else "")


def _picked(arms: Sequence[Judged], what: str) -> dict[str, dict[str, float]]:
    """Arm -> shares of its picks, mean over seeds."""
    return {
        a.name: {
            n: float(np.mean([r.facts["picks"][what][n] for r in a.runs]))
            for n in a.runs[0].facts["picks"][what]
        }
        for a in arms
    }


def _ambiguous(arm: Judged) -> str:
    found = [(r.facts["picks"].get("ambiguous"), r.facts["picks"].get("pool_ambiguous")) for r in arm.runs]
    if any(share is None for pair in found for share in pair):  # imagery, or a store made before it was kept
        return "not known"
    picked, pool = np.mean(found, axis=0)
    return f"{picked:.3f} / {pool:.3f}"


def _about(arm: Judged, run: RunFile) -> dict[str, Any]:
    """What a run was measured with, and the manifests behind its numbers."""
    facts = {k: v for k, v in run.facts.items() if k not in ("sources", "picks")}
    digests = [m.files["manifest.json"]["sha256"][:16] for m in run.cycles]
    return {"arm": arm.name, "kind": arm.kind, "seed": run.seed, "cycles": len(run.cycles), "manifests": digests, **facts}  # fmt: skip
