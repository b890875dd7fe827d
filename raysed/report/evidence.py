"""What the runs of the evidence show: `summary.json`, tables and figures, all of them from the result files alone."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from raysed.core.statistics import LAST, first_above, mean_of_last
from raysed.errors import UsageError
from raysed.io.storage import Storage
from raysed.report import figures, runfile
from raysed.report.comparison import mean_curves
from raysed.report.judging import (
    COSTS,
    LEVEL,
    METRICS,
    TESTED,
    Curve,
    Judged,
    Row,
    by_labels,
    curve,
    goal,
    machines,
    precisions,
    seconds_compare,
    summary_rows,
    verdict,
)
from raysed.report.runfile import RunFile
from raysed.report.summary import FIRST_CORRECT
from raysed.report.tables import markdown

NOTE = f"""miou, worst_class (IoU of the worst class) and cv (standard deviation over mean of the class IoU) are means of the last {LAST} cycles.
aulc is the area under the curve of miou over the range of cost that all arms but the ceiling share, in units of miou (the
ceiling has none where its first cycle costs more than theirs): by tiles trained on; by compute, in forward passes (a training
visit counts 3, a scored tile 1, less at smaller side; validation is alike for all and left out, and so is the run that
select.reference names); by seconds of whole cycles; by labels bought, of runs that buy them, at the end of each round.
fluctuation is the standard deviation of the change of miou from cycle to cycle in the second half, without the changes into
cycles that begin with the initial weights, as rounds with pool.retrain do.  time_ratio is the seconds
of all cycles together, each with its scoring, the first one too, over those of the best passive arm; time_ratio_warm is that of
the median cycle without the first.

Differences are to the best passive arm, paired by seed; brackets hold 95 % intervals by Student's t.  Those of miou, worst_class
and cv are over seeds and source images, the error of the latter by bootstrap, or over images alone where there is one seed; the
others are over seeds, and one seed has none.  The best passive arm was picked by the same numbers, of the seeds that all passive
arms have, which favours it; an arm of which a seed diverged is no candidate, and is not tested, since its other seeds may be the
better ones.  A win is alone if its interval is apart from 0 and its p is not below {LEVEL} when corrected by Holm's steps for the
number of active arms, those that could not be tested included."""
EXPLORATORY = """## Exploratory

No primary metric is registered for this half: differences, intervals and wins below are to choose by, and no verdict.
"""


def write_evidence(
    results: Storage,
    kinds: Mapping[str, str],
    files: Mapping[str, str],
    split: str,
    *,
    own: Mapping[str, Collection[str]],
    primary: str | None = None,
    seeds: Sequence[int] | None = None,
) -> str:
    """Write `summary.json`, `runs.json`, `tables.md` and the figures beside the result files; the tables as text.

    Args:
        results: folder of result files.
        kinds: arm -> passive, active or ceiling, in the order of the tables.
        files: arm -> its name in the result files.
        split: dev or report.
        own: name in the result files -> dotted fields that the arm fixes.
        primary: metric that was registered before; None is exploratory.
        seeds: that count; None is all that there are.

    Raises:
        UsageError: no finished run, runs of several data sets, validation images or configurations, or no passive arm.
    """
    asked = read_arms(results, kinds, files, seeds)
    runfile.check_alike([r for a in asked for r in (*a.runs, *a.diverged)], own, results.uri)
    rows = summary_rows(asked, split, primary)
    text = tables(asked, rows, split)
    arms = [a for a in asked if a.runs]
    data = {a.label: _curves(a) for a in arms}
    means = mean_curves([r for a in arms for r in a.runs])
    first = arms[0].runs[0]
    names = list(first.cycles[-1].record["val"]["iou"])
    titles = {"tiles": "tiles trained on", "compute": "forward passes", "seconds": "seconds"}
    panels = {titles[c]: {n: (d[c], d["miou"]) for n, d in data.items()} for c in COSTS}
    ends = {a.label: [by_labels(curve(r)) for r in a.runs] for a in arms if a.buys_labels}
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
    about = [_about(a, r) for a in asked for r in (*a.runs, *a.diverged)]
    written = {
        "summary.json": json.dumps(rows, indent=1) + "\n",
        "runs.json": json.dumps(about, indent=1) + "\n",
        "tables.md": f"{text}\n## Figures\n\nLine: mean over seeds; band: lowest to highest seed.\n\n{shown}\n",
        **pictures,
    }
    for name, content in written.items():
        results.write(name, content.encode())
    return f"{text}\nresults {results.uri}: {' '.join(written)}"


def renew_combined(results: Storage) -> str | None:
    """Write the rows of all `summary.json` in the folders beside a results folder to one beside them, each with its folder.

    Args:
        results: folder of result files, in one named evidence; nothing is combined elsewhere.

    Returns:
        URI of the combined file.
    """
    above = results.uri.rpartition("/")[0]
    if above.rpartition("/")[2] != "evidence":
        return None
    storage, rows = Storage(above), []
    for path in sorted(p for p in storage.list() if p.endswith("/summary.json")):
        own = json.loads(storage.read(path))
        if isinstance(own, list):  # those of runs and comparisons are no rows of arms
            rows += [{"folder": path.removesuffix("/summary.json"), **row} for row in own]
    storage.write("summary.json", (json.dumps(rows, indent=1) + "\n").encode())
    return f"{storage.uri}/summary.json"


def read_arms(
    results: Storage,
    kinds: Mapping[str, str],
    files: Mapping[str, str],
    seeds: Sequence[int] | None = None,
) -> list[Judged]:
    """The arms with their runs that are finished or have diverged, in the order of `kinds`.

    Raises:
        UsageError: see `write_evidence`.
    """
    found = [runfile.read(results, p) for p in results.list() if p.endswith(".jsonl") and "/" not in p]
    found = sorted((r for r in found if seeds is None or r.seed in seeds), key=lambda r: r.seed)
    arms = []
    for name, kind in kinds.items():
        own = [r for r in found if r.name == files[name]]
        finished = [r for r in own if "sources" in r.facts]
        arms.append(Judged(name, kind, finished, [r for r in own if r not in finished and r.ended_diverged]))
    runs = [r for a in arms for r in a.runs]
    hashes = {r.facts["data"]["hash"][:12] for r in runs}
    if len(hashes) > 1:
        raise UsageError(f"{results.uri} mixes data sets {', '.join(sorted(hashes))}: evidence has one")
    for run in runs:
        if run.facts["sources"]["names"] != runs[0].facts["sources"]["names"]:
            raise UsageError(
                f"{results.uri}/{run.path} is of other validation images than {runs[0].path}: evidence has one set"
            )
    passive = [a for a in arms if a.kind == "passive" and (a.runs or a.diverged)]
    if not passive:
        raise UsageError(
            f"{results.uri} has no finished run of a passive arm to judge by: add uniform to --arms"
        )
    if all(a.diverged for a in passive):
        named = ", ".join(a.label for a in passive)
        raise UsageError(
            f"{results.uri} has no passive arm to judge by that came through: {named}: lower optim.lr"
        )
    return arms


def _curves(arm: Judged) -> Curve:
    """(S, T) of each of `curve`, as far as all seeds have come."""
    found = [curve(r) for r in arm.runs]
    length = min(len(c["miou"]) for c in found)
    return {k: np.stack([c[k][:length] for c in found]) for k in found[0]}


def tables(asked: Sequence[Judged], rows: Sequence[Row], split: str) -> str:
    """All tables as markdown."""
    arms = [a for a in asked if a.runs]
    found = {(r["arm"], r["metric"]): r for r in rows}
    labels = [a.label for a in arms]
    metrics = [m for m in METRICS if any(found[a.name, m]["mean"] is not None for a in arms)]
    tested = [m for m in metrics if m in TESTED]
    first = arms[0].runs[0]
    classes = list(first.cycles[-1].record["val"]["iou"])
    data, runs = first.facts["data"], [r for a in arms for r in a.runs]
    commits = ", ".join(dict.fromkeys(c for r in runs for c in r.commits))
    commands = "\n".join(f"    {c}" for c in dict.fromkeys(r.facts["environment"]["command"] for r in runs))
    weights = first.facts["config"]["model"]["encoder_weights"]
    best = rows[0]["best_passive"]
    rivals = [a for a in asked if a.name != best]
    primary = next((r["metric"] for r in rows if r["role"] == "primary"), None)
    head = (
        f"# Evidence on {data['name']}, {split} half\n\n{data['train']} training and {data['val']} validation tiles of {data['tile_size']} px, "
        f"{len(first.facts['sources']['names'])} validation images, hash {data['hash'][:12]}.  {first.facts['config']['model']['arch']}, "
        f"{f'pretrained weights {weights}' if weights else 'from scratch'}.  Commit {commits}.  "
        f"{'; '.join(machines(arms))}; in {', '.join(precisions(arms))}.  The best passive arm is {best}.\n\n{commands}\n\n{NOTE}\n"
    )
    if not seconds_compare(arms):
        head += "\nSeconds are not compared: the runs were made on several kinds of machines or in several precisions.\n"
    result = [[a.label, a.kind, _seeds(a), *(_spread(found[a.name, m]) for m in metrics)] for a in asked]
    apart = [[a.label, *(_difference(found[a.name, m]) for m in tested)] for a in rivals]
    wins = [[a.label, *(verdict(found[a.name, m]) for m in tested)] for a in rivals]
    active = [a for a in asked if a.kind == "active"]
    goals = [[a.label, *("yes" if ok else "no" for ok in goal(rows, a.name).values())] for a in active]
    by_class = [[c, *(_class(a, c) for a in arms)] for c in classes]
    found_in = [[c, *(_first(a, c) for a in arms)] for c in classes]
    picked = [
        [
            a.label,
            f"{np.mean([r.facts['picks']['coverage'][-1] for r in a.runs]):.3f}",
            f"{np.mean([np.mean(r.facts['picks']['repeats'] or [0]) for r in a.runs]):.3f}",
            _ambiguous(a),
            "yes" if not any(r.facts["replay"] for r in a.runs) else "NO",
        ]
        for a in arms
    ]
    roles = f"{primary} primary, the others secondary" if primary else "exploratory"
    parts = [
        head,
        _verdicts(active, found, primary, best) if primary else EXPLORATORY,
        _diverged(asked),
        markdown("Result, mean and standard deviation over seeds", ["arm", "kind", "seeds", *metrics], result),
        markdown(f"Difference to {best}", ["arm", *tested], apart),
        markdown(f"Wins against {best}: {roles}", ["arm", *(f"{m} ({found[best, m]['role']})" if primary else m for m in tested)], wins),
        _at_budgets(arms, found),
        markdown("Seeds on which the row's arm has the higher miou than the column's", ["arm", *labels], _duels(arms)),
        markdown(f"The goal as stated before the runs{'' if primary else ', exploratory'}", ["arm", *(goal(rows, active[0].name) if active else [])], goals),
        markdown(f"IoU by class, mean of the last {LAST} cycles", ["class", *labels], by_class),
        markdown(f"First cycle in which a class is found (IoU above {FIRST_CORRECT}), median over seeds", ["class", *labels], found_in),
        markdown("Selections, or purchases of arms that buy labels", ["arm", "share of the pool seen", "share repeated from the cycle before", "share ambiguous / in the pool", "replays"], picked),
    ]  # fmt: skip
    return "\n".join(p for p in parts if p)


def _verdicts(active: Sequence[Judged], found: Mapping[tuple[str, str], Row], primary: str, best: str) -> str:
    rows = []
    for arm in active:
        row = found[arm.name, primary]
        chances = [_chance(row[k]) for k in ("p", "p_holm")]
        rows.append([arm.label, _difference(row), row["interval"] or "", *chances, verdict(row)])
    title = f"Verdict on {primary}, the primary metric as registered: {len(active)} competing arms"
    return markdown(
        title, ["arm", f"difference to {best}", "interval over", "p", "p by Holm's steps", "verdict"], rows
    )


def _chance(p: float | None) -> str:
    return "" if p is None else f"{p:.4f}" if p >= 1e-4 else "<0.0001"


def _diverged(arms: Sequence[Judged]) -> str:
    """The runs whose training diverged, with the cycle, from 1."""
    rows = []
    for arm in arms:
        for run in (*arm.runs, *arm.diverged):
            if "diverged" in run.facts:
                after = (
                    "ended there"
                    if run.ended_diverged
                    else "went back to the last commit, at half the learning rate, and finished"
                )
                rows.append([arm.name, str(run.seed), str(run.facts["diverged"]["cycle"] + 1), after])
    return markdown("Runs whose training diverged", ["arm", "seed", "cycle", "what became of it"], rows)


def _at_budgets(arms: Sequence[Judged], found: Mapping[tuple[str, str], Row]) -> str:
    """miou of arms that buy labels, by labels bought."""
    budgets = list(dict.fromkeys(m for _, m in found if m.startswith("miou@")))
    rows = [[a.label, *(_spread(found[a.name, m]) for m in budgets)] for a in arms if a.buys_labels]
    return markdown("miou at the end of each round, by labels bought", ["arm", *budgets], rows)


def _seeds(arm: Judged) -> str:
    lost = len(arm.diverged)
    return f"{len(arm.runs)} of {len(arm.runs) + lost}" if lost else str(len(arm.runs))


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
    last = {
        a.name: {r.seed: mean_of_last([m.record["val"]["miou"] for m in r.cycles], LAST) or 0 for r in a.runs}
        for a in arms
    }
    rows = []
    for one in arms:
        cells = [one.label]
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
        a.label: {
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
