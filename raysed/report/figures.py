"""Figures of a run as SVG text.  An arm has the same colour everywhere; colours are safe for the colour-blind."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raysed.io.ledger import Manifest

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777", "#000000")
WINDOW = 10
"""Cycles of the moving average, as in the paper's figures."""
Arms = dict[str, list[Manifest]]
PHASES = ("score", "select", "stall", "train", "evaluate", "commit", "other")


def moving_average(values: Sequence[float], window: int = WINDOW) -> np.ndarray:
    """Mean of the last `window` values up to each position (fewer at the start)."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def metric_curves(arms: Arms, metrics: Sequence[tuple[str, str]]) -> str:
    """Curves over cycles, raw thin and moving average thick, one panel a metric.

    Args:
        arms: name -> committed cycles.
        metrics: (group, name) of the record, such as ("val", "miou").
    """
    columns = min(3, len(metrics))
    figure = _figure(3.4 * columns, 2.5 * -(-len(metrics) // columns))
    for k, (group, name) in enumerate(metrics, start=1):
        axes = figure.add_subplot(-(-len(metrics) // columns), columns, k)
        for color, (arm, manifests) in zip(COLORS, arms.items(), strict=False):
            values = [m.record[group][name] for m in manifests]
            _curve(axes, values, color, arm)
        axes.set_title(f"{group} {name}", fontsize=9)
        axes.set_xlabel("cycle", fontsize=8)
        if k == 1:
            axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def class_curves(arms: Arms) -> str:
    """Validation IoU of each class over cycles."""
    names = list(next(iter(arms.values()))[-1].record["val"]["iou"])
    rows = -(-len(names) // 4)
    figure = _figure(10.2, 2.1 * rows)
    for k, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, 4, k)
        for color, (arm, manifests) in zip(COLORS, arms.items(), strict=False):
            values = [m.record["val"]["iou"][name] for m in manifests]
            if None not in values:
                _curve(axes, values, color, arm)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("cycle", fontsize=8)
        axes.set_ylim(0, 1)
    return _svg(figure)


def seconds_bars(arms: Arms) -> str:
    """Seconds by phase of every cycle, stacked, one panel an arm."""
    figure = _figure(10.2, 2.4)
    top = max(m.record["seconds"]["total"] for manifests in arms.values() for m in manifests)
    for k, (arm, manifests) in enumerate(arms.items(), start=1):
        axes = figure.add_subplot(1, len(arms), k)
        base = np.zeros(len(manifests))
        for color, phase in zip(COLORS, PHASES, strict=False):
            height = np.array([m.record["seconds"].get(phase, 0.0) for m in manifests])
            axes.bar(
                [m.cycle + 1 for m in manifests], height, bottom=base, color=color, label=phase, width=0.9
            )
            base += height
        axes.set_title(f"{arm}: seconds a cycle", fontsize=9)
        axes.set_ylim(0, top * 1.05)
        axes.legend(fontsize=7, frameon=False, ncols=4)
    return _svg(figure)


def selection_curves(selected: dict[str, list[list[str]]], pool: int) -> str:
    """How selection moves over the pool: share of tiles seen at least once, and share repeated from the cycle before.

    Args:
        selected: arm -> tile ids of each cycle.
        pool: tiles that could be selected.
    """
    figure = _figure(6.8, 2.4)
    seen_axes, repeat_axes = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for color, (arm, cycles) in zip(COLORS, selected.items(), strict=False):
        seen: set[str] = set()
        coverage, repeats = [], []
        for before, now in zip([[], *cycles], cycles, strict=False):
            seen |= set(now)
            coverage.append(len(seen) / pool)
            repeats.append(len(set(before) & set(now)) / len(now))
        seen_axes.plot(range(1, len(cycles) + 1), coverage, color=color, label=arm)
        repeat_axes.plot(range(2, len(cycles) + 1), repeats[1:], color=color)
    for axes, title in (
        (seen_axes, "share of the pool seen so far"),
        (repeat_axes, "share repeated from the cycle before"),
    ):
        axes.set_title(title, fontsize=9)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("cycle", fontsize=8)
    seen_axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def share_bars(pool: dict[str, float], arms: dict[str, dict[str, float]], title: str) -> str:
    """Shares of the selected tiles beside those of the pool.

    Args:
        pool: name (class or region) -> share.
        arms: the same for each arm.
        title: of the figure.
    """
    names = list(pool)
    figure = _figure(10.2, 2.4)
    axes = figure.add_subplot()
    groups = {"pool": pool, **arms}
    width = 0.8 / len(groups)
    colors = dict(zip(arms, COLORS, strict=False)) | {"pool": "#999999"}
    for k, (group, shares) in enumerate(groups.items()):
        at = np.arange(len(names)) + (k - (len(groups) - 1) / 2) * width
        axes.bar(at, [shares.get(n, 0.0) for n in names], width, color=colors[group], label=group)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _curve(axes: Any, values: list[float], color: str, label: str) -> None:
    cycles = range(1, len(values) + 1)
    axes.plot(cycles, values, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(cycles, moving_average(values), color=color, linewidth=1.6, label=label)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.tick_params(labelsize=7)
        if axes.get_xlabel() == "cycle":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "raysed"}):
        figure.savefig(
            out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return out.getvalue()[out.getvalue().index("<svg") :]
