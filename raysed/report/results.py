"""The small files of a reported experiment, for keeping in a repository: text and figures only."""

import json
from typing import Any

from raysed.errors import UsageError
from raysed.io.storage import Storage
from raysed.report import figures
from raysed.report.summary import SCALARS, arms_of, summarise, table

CURVES = [("train", "loss"), *(("val", name) for name in ("loss", *SCALARS[:-1]))]
"""(group, metric) of the record that have a curve."""


def result_files(run: Storage) -> dict[str, str]:
    """File name -> text; without the paths of the machine it ran on, except in the command line.

    Raises:
        UsageError: no run here, or no cycle yet.
    """
    arms = {name: manifests for name, (_, manifests) in arms_of(run).items() if manifests}
    if not arms:
        raise UsageError(f"{run.uri} has no committed cycle, so there are no results yet")
    summary = summarise(run)
    summary["config"]["run"] = summary["config"]["data"]["uri"] = None
    names = list(next(iter(summary["arms"].values()))["iou"])
    lines = {
        f"cycles-{arm}.jsonl": "".join(json.dumps({"cycle": m.cycle, **m.record}) + "\n" for m in manifests)
        for arm, manifests in arms.items()
    }
    return {
        "summary.json": json.dumps(summary, indent=1) + "\n",
        **lines,
        "curves.svg": figures.metric_curves(arms, CURVES),
        "classes.svg": figures.class_curves(arms, names),
        "seconds.svg": figures.seconds_bars(arms, list(arms)),
        "table.md": _markdown(summary),
    }


def _markdown(summary: dict[str, Any]) -> str:
    """The table with what it was measured with, to be put into a README as it is."""
    facts = {
        "Command": f"`{summary['command']}`",
        "Commit": ", then ".join(summary["commits"]),
        "Hardware": ", then ".join(summary["machines"]),
        "Precision": summary["hardware"]["precision"],
        "Seeds": f"one ({summary['config']['seed']})",
        "Seconds": ", ".join(f"{name} {arm['seconds_total']:.0f}" for name, arm in summary["arms"].items()),
    }
    top = "  \n".join(f"{k}: {v}" for k, v in facts.items())
    return f"{top}\n\n```\n{table(summary)}\n```\n"
