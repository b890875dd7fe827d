"""Tables and figures of a comparison, beside the paper's numbers.  All of it follows from the rows of `summary.json`.

A row is `{data, experiment, seed, metric, value, paper, seconds}`; `seconds` are those of the whole run that the value is of.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from raysed.core.metrics import evenness
from raysed.core.statistics import first_above, fluctuation, mean_of_last
from raysed.errors import UsageError
from raysed.io.ledger import Manifest
from raysed.io.storage import Storage
from raysed.report import figures, runfile
from raysed.report.runfile import RunFile
from raysed.report.summary import FIRST_CORRECT, LAST, SCALARS
from raysed.report.tables import markdown

Row = dict[str, Any]
RATIOS = (("b0", "unet"), ("b4", "unet"), ("b0-active", "b0"))
"""Whose seconds are compared; the last is active over passive."""
AHEAD = 0.2
"""By how much the passive baseline's miou must exceed that of the best constant prediction."""
FIGURES = {
    "iou.svg": ("val", "miou"),
    "train-loss.svg": ("train", "loss"),
    "val-loss.svg": ("val", "loss"),
}
NOTE = f"""Every value is the mean of the last {LAST} cycles, then the mean over seeds, with the lowest and highest seed in brackets.  `paper` is the
paper's figure on OpenEarthMap after 100 cycles, whatever data and cycles this comparison has.  Its headline is some mean IoU that
it does not define; the mean of its table 2 is another number, given beside `miou`, which is defined alike.  fluctuation is the standard
deviation of the change from cycle to cycle, over the whole run.  Ratios of seconds are of runs on machines alike."""


class Paper(Protocol):
    """What the paper says of a run, and the dotted fields that make it."""

    @property
    def fields(self) -> Mapping[str, Any]: ...
    @property
    def headline(self) -> float: ...
    @property
    def hours(self) -> float | None: ...
    @property
    def iou(self) -> Mapping[str, float]: ...


def write_comparison(results: Storage, paper: Mapping[str, Paper]) -> str:
    """Write `summary.json`, `tables.md` and the figures beside the result files; the tables as text.

    Args:
        results: folder of result files.
        paper: by name of the experiment, in the order of the tables.

    Raises:
        UsageError: no finished run, or runs of several data sets or configurations.
    """
    runs, others = read_runs(results, paper)
    rows = [row for run in runs for row in rows_of(run, paper[run.name])]
    rows += ratio_rows(rows, paper, {(r.name, r.seed): r.machines for r in runs})
    text = tables(rows, runs) + _left_out(others)
    arms = mean_curves(runs)
    names = list(next(iter(arms.values()))[-1].record["val"]["iou"])
    files = {name: figures.metric_curves(arms, [metric]) for name, metric in FIGURES.items()}
    files["classes.svg"] = figures.class_curves(arms, names)
    pictures = "\n\n".join(f"![{name.removesuffix('.svg')} over cycles]({name})" for name in files)
    files["tables.md"] = (
        f"{text}\n## Curves\n\nThin: each cycle.  Thick: mean of the last {figures.WINDOW}.  Mean over seeds.\n\n{pictures}\n"
    )
    files["summary.json"] = (
        json.dumps({"rows": rows, "runs": [_about(r) for r in (*runs, *others)]}, indent=1) + "\n"
    )
    for name, content in files.items():
        results.write(name, content.encode())
    return f"{text}\nresults {results.uri}: {' '.join(files)}"


def read_runs(results: Storage, paper: Mapping[str, Paper]) -> tuple[list[RunFile], list[RunFile]]:
    """The runs that are finished and those that are not or have diverged, each in the order of the paper, then by seed.

    Raises:
        UsageError: see `write_comparison`.
    """
    names = list(paper)
    found = [
        runfile.read(results, path) for path in results.list() if path.endswith(".jsonl") and "/" not in path
    ]
    found = sorted((r for r in found if r.name in names), key=lambda run: (names.index(run.name), run.seed))
    whole = [run for run in found if run.is_whole]
    if not whole:
        raise UsageError(
            f"no finished run of a comparison in {results.uri}: give the --run or --results of jobs/compare.py"
        )
    hashes = {run.facts["data"]["hash"][:12] for run in found}
    if len(hashes) > 1:
        raise UsageError(f"{results.uri} mixes data sets {', '.join(sorted(hashes))}: one comparison has one")
    runfile.check_alike(found, {name: paper[name].fields.keys() for name in names}, results.uri)
    return whole, [run for run in found if not run.is_whole]


def rows_of(run: RunFile, paper: Paper) -> list[Row]:
    """All numbers of one run."""
    total = sum(m.record["seconds"]["total"] for m in run.cycles)

    def row(metric: str, value: float | None, reported: float | None = None) -> Row:
        data = f"{run.facts['data']['name']} {run.facts['data']['hash'][:12]}"
        return {"data": data, "experiment": run.name, "seed": run.seed, "metric": metric, "value": value, "paper": reported, "seconds": round(total, 1)}  # fmt: skip

    return [row(*found) for found in _values(run, paper)]


def _values(run: RunFile, paper: Paper) -> Iterator[tuple[Any, ...]]:
    """(metric, value, the paper's) of a run."""
    records = [m.record for m in run.cycles]
    names = list(records[-1]["val"]["iou"])
    theirs = dict(paper.iou) if set(names) == set(paper.iou) else {}
    table2 = _spread(list(theirs.values())) if theirs else {}
    yield "cycles", len(records), 100
    yield "headline", None, paper.headline
    for metric in SCALARS:
        yield (
            metric,
            mean_of_last([r["val"][metric] for r in records], LAST),
            table2.get("mean" if metric == "miou" else ""),
        )
    yield "train_loss", mean_of_last([r["train"]["loss"] for r in records], LAST)
    yield "best_constant_miou", best_constant(np.array(records[-1]["val"]["counts"]))
    yield "fluctuation", fluctuation([r["val"]["miou"] for r in records], last=1.0)
    iou = {n: [r["val"]["iou"][n] for r in records] for n in names}
    means = {n: mean_of_last(v, LAST) for n, v in iou.items()}
    for name, value in means.items():
        yield f"iou/{name}", value, theirs.get(name)
    for key, value in _spread([v for v in means.values() if v is not None]).items():
        yield f"class_iou_{key}", value, table2.get(key)
    for name, values in iou.items():
        yield f"first_correct_cycle/{name}", first_above(values, FIRST_CORRECT)
        yield f"fluctuation/{name}", fluctuation([v for v in values if v is not None], last=1.0)
    yield from _seconds(records, paper.hours)
    for key in ("parameters", "forward_ms"):
        if "network" in run.facts:
            yield key, run.facts["network"][key]
    for condition, scores in run.facts.get("robustness", {}).items():
        yield f"miou under {condition}", scores["miou"]


def _spread(values: list[float]) -> dict[str, float]:
    """Mean of class values, their population variance in squared percentage points, coefficient of variation, the worst."""
    known = np.array(values, float)
    even = evenness(known)
    return {
        "mean": float(known.mean()),
        "variance": float(known.var() * 1e4),
        "cv": even["cv"],
        "worst": even["worst"],
    }


def best_constant(counts: np.ndarray) -> float:
    """Mean IoU of the best network that answers one class everywhere: its IoU is its share of the truth, the others have 0."""
    truth = counts.sum(1)
    return float(truth.max() / truth.sum() / (truth > 0).sum())


def _seconds(records: list[dict[str, Any]], hours: float | None) -> Iterator[tuple[Any, ...]]:
    totals = [r["seconds"]["total"] for r in records]
    for phase in (*figures.PHASES, "total"):
        if any(phase in r["seconds"] for r in records):
            reported = 3600 * hours if hours and phase == "total" else None
            yield f"seconds/{phase}", round(sum(r["seconds"].get(phase, 0.0) for r in records), 2), reported
    yield "seconds/warm_cycle", float(np.median(totals[1:] or totals)), 36 * hours if hours else None


def ratio_rows(
    rows: list[Row], paper: Mapping[str, Paper], machines: Mapping[tuple[str, int], Sequence[str]]
) -> list[Row]:
    """Seconds of a warm cycle, one experiment over the other, for each seed that both have on one kind of machine.

    Args:
        rows: of all runs.
        paper: by name of the experiment.
        machines: (experiment, seed) -> what its cycles were made on.
    """
    metric = "seconds/warm_cycle"
    found = {(r["experiment"], r["seed"]): r for r in rows if r["metric"] == metric}
    made = []
    for one, other in RATIOS:
        for (name, seed), mine in found.items():
            theirs = found.get((other, seed))
            if name != one or theirs is None or len({*machines[name, seed], *machines[other, seed]}) > 1:
                continue
            a, b = paper[one].hours, paper[other].hours
            made.append({**mine, "experiment": f"{one}/{other}", "value": mine["value"] / theirs["value"], "paper": a / b if a and b else None})  # fmt: skip
    return made


def mean_curves(runs: Sequence[RunFile]) -> figures.Arms:
    """Experiment -> cycles with what the figures show, averaged over its seeds."""
    arms: figures.Arms = {}
    for name in dict.fromkeys(run.name for run in runs):
        seeds = [run.cycles for run in runs if run.name == name]
        arms[name] = [
            Manifest(cycle, {}, _mean([s[cycle].record for s in seeds])) for cycle in range(len(seeds[0]))
        ]
    return arms


def _mean(records: list[dict[str, Any]]) -> dict[str, Any]:
    classes = {n: [r["val"]["iou"][n] for r in records] for n in records[0]["val"]["iou"]}
    return {
        "train": {"loss": float(np.mean([r["train"]["loss"] for r in records]))},
        "val": {
            **{k: float(np.mean([r["val"][k] for r in records])) for k in ("miou", "loss")},
            "iou": {n: mean_of_last(v, len(v)) for n, v in classes.items()},
        },
    }


def _about(run: RunFile) -> dict[str, Any]:
    """What a run was measured with, and the manifests behind its numbers."""
    return {
        "experiment": run.name,
        "seed": run.seed,
        "cycles": len(run.cycles),
        "manifests": [m.files["manifest.json"]["sha256"][:16] for m in run.cycles],
        **run.facts,
    }


def tables(rows: list[Row], runs: Sequence[RunFile]) -> str:
    """All tables as markdown."""
    names = list(dict.fromkeys(run.name for run in runs))
    classes = list(runs[0].cycles[-1].record["val"]["iou"])
    look = _Look(rows)
    scores = [m for m in SCALARS if m not in ("iou_variance", "loss")]
    head = [
        "run",
        "seeds",
        "cycles",
        "paper's headline",
        "miou",
        "paper's table 2, mean",
        *scores[1:],
        "fluctuation",
    ]
    result = [
        [
            n,
            look.seeds(n),
            look.mean(n, "cycles", 0),
            look.paper(n, "headline"),
            look.mean(n, "miou"),
            look.paper(n, "miou"),
        ]
        + [look.mean(n, m) for m in (*scores[1:], "fluctuation")]
        for n in names
    ]
    both = [
        (n, kind)
        for n in names
        for kind in ("here", "paper")
        if kind == "here" or look.paper(n, f"iou/{classes[0]}")
    ]
    table2 = [[c, *(look.either(n, f"iou/{c}", kind) for n, kind in both)] for c in classes]
    for label, metric, digits in (("mean", "mean", 4), ("variance, squared points", "variance", 2), ("std / mean", "cv", 3), ("worst class", "worst", 4)):  # fmt: skip
        table2.append([label, *(look.either(n, f"class_iou_{metric}", kind, digits) for n, kind in both)])
    worst = {n: min(classes, key=lambda c: look.number(n, f"iou/{c}")) for n in names}
    table2.append(["which", *(worst[n] if kind == "here" else "" for n, kind in both)])
    phases = [p for p in (*figures.PHASES, "total") if any(look.mean(n, f"seconds/{p}") for n in names)]
    seconds = [
        [
            n,
            *(look.mean(n, f"seconds/{p}", 0) for p in phases),
            look.mean(n, "seconds/warm_cycle", 1),
            look.paper(n, "seconds/total", 0),
        ]
        for n in names
    ]
    ratios = [
        [
            f"{a}/{b}",
            look.mean(f"{a}/{b}", "seconds/warm_cycle", 2),
            look.paper(f"{a}/{b}", "seconds/warm_cycle", 2),
        ]
        for a, b in RATIOS
        if look.mean(f"{a}/{b}", "seconds/warm_cycle")
    ]
    nets = [[n, look.mean(n, "parameters", 0), look.mean(n, "forward_ms", 1)] for n in names]
    conditions = list(dict.fromkeys(r["metric"] for r in rows if r["metric"].startswith("miou under ")))
    robust = [[n, *(look.mean(n, c) for c in conditions)] for n in names]
    first = [[c, *(look.first(n, f"first_correct_cycle/{c}") for n in names)] for c in classes]
    moves = [[c, *(look.mean(n, f"fluctuation/{c}") for n in names)] for c in classes]
    return "\n".join(
        [
            f"{_facts(runs)}\n\n{NOTE}\n",
            markdown("Result", head, result) + _constant(look),
            markdown("IoU by class", ["class", *(n if k == "here" else f"{n}, paper" for n, k in both)], table2),
            markdown(f"First cycle in which a class is found (IoU above {FIRST_CORRECT})", ["class", *names], first),
            markdown("Fluctuation of the IoU of a class from cycle to cycle", ["class", *names], moves),
            markdown("Selections; of classes and of what the synthetic world obscured, the share of the picks over that of the pool", ["run", "seen of the pool", "repeated from the cycle before", *classes, "ambiguous"], _picked(runs)),
            markdown(f"Seconds{_mixed(runs)}", ["run", *phases, "a warm cycle", "paper, total"], seconds),
            markdown("Ratios of a warm cycle's seconds", ["runs", "here", "paper"], ratios),
            markdown(f"Networks; the paper gives neither number.  Forward pass: {_timed(runs)}{_mixed(runs)}", ["run", "parameters", "forward, ms"], nets),
            markdown(f"Validation under disturbance, weights of the last cycle, {_tiles(runs)} tiles", ["run", *conditions], robust) if conditions else "",
        ]
    )  # fmt: skip


def _picked(runs: Sequence[RunFile]) -> list[list[str]]:
    """What each run selected, mean over its seeds."""
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        picks = [run.facts["picks"] for run in runs if run.name == name and "picks" in run.facts]
        if not picks:
            continue
        shares = [[p["coverage"][-1] for p in picks], [np.mean(p["repeats"] or [0]) for p in picks]]
        ratios = [[_over(p["classes"][c], p["pool_classes"][c]) for p in picks] for c in picks[0]["classes"]]
        ratios.append([_over(p["ambiguous"], p["pool_ambiguous"]) for p in picks])
        rows.append([name, *(f"{np.mean(s):.3f}" for s in shares), *(_mean_ratio(r) for r in ratios)])
    return rows


def _over(picked: float | None, pool: float | None) -> float | None:
    return picked / pool if picked is not None and pool else None


def _mean_ratio(ratios: Sequence[float | None]) -> str:
    known = [r for r in ratios if r is not None]
    return f"{np.mean(known):.2f}" if known else ""


class _Look:
    """Cells from rows."""

    def __init__(self, rows: list[Row]) -> None:
        self.found: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            self.found.setdefault((row["experiment"], row["metric"]), []).append(row)

    def seeds(self, name: str) -> str:
        return ", ".join(str(r["seed"]) for r in self.found[name, "cycles"])

    def first(self, name: str, metric: str) -> str:
        """Mean over the seeds for which a cycle is known, counted from 1; with their number if it is unknown for others."""
        found = [r["value"] for r in self.found.get((name, metric), [])]
        known = [v + 1 for v in found if v is not None]
        if not known:
            return "never" if found else ""
        some = "" if len(known) == len(found) else f" ({len(known)} of {len(found)} seeds)"
        return f"{np.mean(known):.1f}{some}"

    def mean(self, name: str, metric: str, digits: int = 4) -> str:
        """Mean over seeds; of several, with the lowest and the highest."""
        known = [r["value"] for r in self.found.get((name, metric), []) if r["value"] is not None]
        if not known:
            return ""
        text = f"{np.mean(known):.{digits}f}"
        return (
            text
            if len(known) == 1 or min(known) == max(known)
            else f"{text} ({min(known):.{digits}f} to {max(known):.{digits}f})"
        )

    def number(self, name: str, metric: str) -> float:
        """Mean over seeds; infinite if none is known."""
        known = [r["value"] for r in self.found[name, metric] if r["value"] is not None]
        return float(np.mean(known)) if known else float("inf")

    def paper(self, name: str, metric: str, digits: int = 4) -> str:
        known = [r["paper"] for r in self.found.get((name, metric), []) if r["paper"] is not None]
        return f"{known[0]:.{digits}f}" if known else ""

    def either(self, name: str, metric: str, kind: str, digits: int = 4) -> str:
        return self.mean(name, metric, digits) if kind == "here" else self.paper(name, metric, digits)


def _constant(look: _Look) -> str:
    """What a network that has learnt nothing reaches, and whether the passive baseline is far enough from it."""
    names = [n for n, m in look.found if m == "best_constant_miou"]
    text = f"\nThe best constant prediction has miou {look.mean(names[0], 'best_constant_miou')}."
    if ("b0", "miou") in look.found:
        ahead = look.number("b0", "miou") - look.number("b0", "best_constant_miou")
        counts = "counts" if ahead > AHEAD else "does not count"
        text += f"  b0, passive, is {ahead:.3f} above it, so this comparison {counts}: {AHEAD} is asked for."
    return text + "\n"


def _facts(runs: Sequence[RunFile]) -> str:
    data, environments = runs[0].facts["data"], [r.facts["environment"] for r in runs]
    commits = ", ".join(dict.fromkeys(c for r in runs for c in r.commits))
    machines = "; ".join(dict.fromkeys(m for r in runs for m in r.machines))
    precisions = ", ".join(dict.fromkeys(f"{r.name} in {r.facts['precision']}" for r in runs))
    commands = "\n".join(f"    {c}" for c in dict.fromkeys(str(e["command"]) for e in environments))
    return (
        f"# The paper's comparison on {data['name']}\n\n{data['train']} training and {data['val']} validation tiles of {data['tile_size']} px, "
        f"hash {data['hash'][:12]}.  Commit {commits}.  {machines}; {precisions}.\n\n{commands}"
    )


def _left_out(runs: Sequence[RunFile]) -> str:
    """The runs that no table counts, with how far they came."""
    rows = []
    for run in runs:
        came = f"{len(run.cycles)} of {run.facts['config']['cycles']}"
        rows.append([run.name, str(run.seed), came, "diverged" if run.ended_diverged else "not finished"])
    return markdown("Runs that no table counts", ["run", "seed", "cycles", ""], rows) if rows else ""


def _timed(runs: Sequence[RunFile]) -> str:
    return next((r.facts["network"]["forward_on"] for r in runs if "network" in r.facts), "not measured yet")


def _mixed(runs: Sequence[RunFile]) -> str:
    kinds = {m for r in runs for m in r.machines}
    return f"; made on {len(kinds)} kinds of machines, so not to be compared" if len(kinds) > 1 else ""


def _tiles(runs: Sequence[RunFile]) -> int:
    return next((r.facts["robustness"]["clean"]["tiles"] for r in runs if "robustness" in r.facts), 0)
