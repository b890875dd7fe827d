"""`summary.json` and the table printed at the end of a run: derived from the manifests alone."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from raysed.core.statistics import LAST, first_above, fluctuation, mean_of_last
from raysed.io.ledger import Ledger, Manifest
from raysed.io.storage import Storage

SCALARS = (
    "miou",
    "iou_micro",
    "iou_frequency_weighted",
    "pixel_accuracy",
    "iou_variance",
    "iou_cv",
    "iou_worst",
    "soft_iou",
    "loss",
)
FIRST_CORRECT = 0.01
"""IoU above which a class counts as found."""
DEFINITIONS = {
    "miou": "mean of the class IoU over the classes that have pixels in the validation truth (classes_present); void pixels are ignored",
    "iou_micro": "IoU over the pixels of all classes together",
    "iou_frequency_weighted": "class IoU weighted by the class's share of the truth pixels",
    "pixel_accuracy": "share of the known pixels whose class is right",
    "iou_variance": "population variance of the class IoU, in squared percentage points, as in the paper's table 2; lower is more even",
    "iou_cv": "standard deviation of the class IoU over its mean: evenness that does not reward low values",
    "iou_worst": "IoU of the worst class",
    "soft_iou": "legacy soft IoU without argmax, averaged over batches, absent classes counting 0, as in OpenEarthMap's own code",
    "loss": "focal loss on the validation tiles, mean over the known pixels",
    "fluctuation": "standard deviation of the change of miou from one cycle to the next, over the whole run",
    "found in cycle": "first cycle whose IoU of the class is above 0.01",
    "seconds": "wall clock by phase; stall is the wait for tiles, other is what no phase accounts for",
    "active/passive": "seconds of the active arm over those of the passive one: median of the cycles without the first, and sum of all",
    "entropy": "of a pixel, of the predicted class distribution, in nats; of a tile, mean over its pixels",
}
"""What the numbers of a report mean."""
ENVIRONMENT = ("commit", "command")
HARDWARE = ("cpu", "cores", "gpu", "device", "precision", "workers", "threads")


def arms_of(run: Storage) -> dict[str, tuple[Ledger, list[Manifest]]]:
    """Arms of a run by the name of their strategy, passive first, with their committed cycles.

    Raises:
        UsageError: no run here.
    """
    own = Ledger(run)
    found = {}
    if run.exists("baseline/config.json"):
        baseline = Ledger(run.at("baseline"))
        found[baseline.config()[0].select.strategy] = (baseline, baseline.manifests())
    found[own.config()[0].select.strategy] = (own, own.manifests())
    return found


def summarise(run: Storage) -> dict[str, Any]:
    """What a run has done, as plain numbers; cycles count from 0, as in the manifests.

    arms: by strategy, see `_arm`.  ratios: seconds, active over passive.  hardware, versions: of the last cycle.  commits, machines
    (see `machine_of`): all that the run was continued under and on.

    Raises:
        UsageError: no run here.
    """
    arms = arms_of(run)
    committed = {name: manifests for name, (_, manifests) in arms.items() if manifests}
    summary: dict[str, Any] = {
        "arms": {name: _arm(m, arms[name][0].config()[0].restarts(len(m))) for name, m in committed.items()},
        "ratios": _ratios(committed),
    }
    own, manifests = list(arms.values())[-1]
    experiment, dataset_hash = own.config()
    summary["config"] = {**experiment.to_dict(), "run": run.uri}
    summary["dataset_hash"] = dataset_hash
    if not manifests:  # interrupted in the passive arm, which comes first
        manifests = next(iter(committed.values()), [])
    if manifests:
        record = manifests[-1].record
        environment = record["environment"]
        summary |= {k: environment[k] for k in ENVIRONMENT}
        known = {**record, **environment}
        summary["commits"] = list(dict.fromkeys(m.record["environment"]["commit"] for m in manifests))
        summary["machines"] = list(dict.fromkeys(machine_of(m.record) for c in committed.values() for m in c))
        summary["hardware"] = {k: known[k] for k in HARDWARE if known.get(k) is not None}
        summary["versions"] = {k: v for k, v in environment.items() if k not in (*ENVIRONMENT, *HARDWARE)}
    return summary


def write_summary(run: Storage) -> dict[str, Any]:
    """`summarise`, written to `summary.json` as well."""
    summary = summarise(run)
    run.write("summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _arm(manifests: list[Manifest], restarts: list[int]) -> dict[str, Any]:
    """Numbers of one arm, some of whose cycles begin with the initial weights again.

    metrics, iou: mean of the last `mean_of_last` cycles, the headline.  final: of the last cycle.  fluctuation: standard
    deviation of the differences of miou from cycle to cycle, those into such cycles left out.
    """
    records = [m.record for m in manifests]
    totals = [r["seconds"]["total"] for r in records]
    phases = sorted({k for r in records for k in r["seconds"]} - {"total"})
    seconds = {p: round(sum(r["seconds"].get(p, 0.0) for r in records), 2) for p in phases}
    trained = sum(r["tiles"] for r in records)
    scored = sum(r["scores"]["tiles"] for r in records if r["scores"])
    names = list(records[-1]["val"]["iou"])
    return {
        "strategy": records[-1]["strategy"],
        "cycles": len(records),
        "tiles_per_cycle": records[-1]["tiles"],
        "tiles_scored": scored,
        "mean_of_last": min(len(records), LAST),
        "metrics": {k: mean_of_last([r["val"][k] for r in records], LAST) for k in SCALARS},
        "iou": {n: mean_of_last([r["val"]["iou"][n] for r in records], LAST) for n in names},
        "final": {k: records[-1]["val"][k] for k in (*SCALARS, "classes_present")},
        "fluctuation": fluctuation([r["val"]["miou"] for r in records], last=1.0, restarts=restarts),
        "first_correct_cycle": {
            n: first_above([r["val"]["iou"][n] for r in records], FIRST_CORRECT) for n in names
        },
        "train_loss": records[-1]["train"]["loss"],
        "quarantined": records[-1]["quarantined"],
        "seconds": seconds,
        "seconds_total": round(sum(totals), 2),
        "seconds_a_cycle": {"first": totals[0], "median_warm": float(np.median(totals[1:] or totals))},
        "tiles_per_second": {
            "train": trained / max(seconds.get("train", 0), 1e-9),
            "score": scored / seconds["score"] if seconds.get("score") else None,
            "evaluate": sum(r["val"]["tiles"] for r in records) / max(seconds.get("evaluate", 0), 1e-9),
        },
    }


def _ratios(committed: dict[str, list[Manifest]]) -> dict[str, float]:
    """Seconds of the active arm over those of the passive one, a warm cycle (median, the first left out) and in all, over the
    cycles that both have committed.
    """
    if len(committed) != 2:
        return {}
    both = min(map(len, committed.values()))
    passive, active = ([m.record["seconds"]["total"] for m in c[:both]] for c in committed.values())
    return {
        "active/passive seconds a cycle": float(
            np.median(active[1:] or active) / np.median(passive[1:] or passive)
        ),
        "active/passive seconds": sum(active) / sum(passive),
    }


def table(summary: dict[str, Any]) -> str:
    """The result as plain text of at most 100 columns: one column an arm and, of two, their difference."""
    arms = summary["arms"]
    if not arms:
        return "no cycle is committed yet"
    counts = {k: [str(a[k]) for a in arms.values()] for k in ("cycles", "tiles_per_cycle", "quarantined")}
    present = [str(a["final"]["classes_present"]) for a in arms.values()]
    n = max(a["mean_of_last"] for a in arms.values())
    lines = [_row(f"mean of the last {n} cycles", list(arms), "difference" if len(arms) == 2 else "")]
    lines += [_row(k, v) for k, v in counts.items()] + [_row("classes_present", present)]
    lines += [_numbers(k, [a["metrics"][k] for a in arms.values()]) for k in SCALARS]
    lines += [_numbers("fluctuation of miou", [a["fluctuation"] for a in arms.values()]), "", "IoU by class"]
    first = next(iter(arms.values()))
    lines += [_numbers(f"  {c}", [a["iou"][c] for a in arms.values()]) for c in first["iou"]]
    lines += ["", "seconds by phase"]
    phases = sorted({p for a in arms.values() for p in a["seconds"]})
    lines += [_numbers(f"  {p}", [a["seconds"].get(p, 0.0) for a in arms.values()], 1) for p in phases]
    lines += [
        _numbers("  all cycles", [a["seconds_total"] for a in arms.values()], 1),
        _numbers("  a warm cycle, median", [a["seconds_a_cycle"]["median_warm"] for a in arms.values()], 1),
    ]
    lines += [f"{k}: {v:.2f}" for k, v in summary["ratios"].items()]
    return "\n".join(lines)


def _row(label: str, cells: list[str], last: str = "") -> str:
    return f"{label[:29]:<30}" + "".join(f"{c[:19]:>20}" for c in cells) + (f"{last:>16}" if last else "")


def _numbers(label: str, values: list[float | None], digits: int = 4) -> str:
    cells = ["-" if v is None else f"{v:.{digits}f}" for v in values]
    a, b = (*values, None)[:2]
    return _row(
        label,
        cells,
        f"{round(b - a, digits) + 0.0:+.{digits}f}"
        if a is not None and b is not None and len(values) == 2
        else "",
    )


def machine_of(record: Mapping[str, Any]) -> str:
    """What a cycle was made on, by a manifest's record or the facts of a run; not the precision, which is the network's."""
    env = record["environment"]
    gpu = f", {env['gpu']}" if env.get("gpu") else ""
    use = f"{record['workers']} workers on {record['device']}, {record['threads']} threads"
    return f"{env['cores']} cores of {env['cpu']}{gpu}: {use}"
