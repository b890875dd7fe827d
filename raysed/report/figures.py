"""Figures of a run as SVG text.  An arm has the same colour everywhere; colours are safe for the colour-blind.

Text stays text (a quarter of the bytes of outlines, and a page can colour it); lines and ticks are a grey that reads on light
and dark.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raysed.io.ledger import Manifest

Arms = dict[str, list[Manifest]]
WINDOW = 10
"""Cycles of the moving average, as in the paper's figures."""
ARM_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
POOL_COLOR = "#999999"
PHASES = {
    "score": "#882255",
    "select": "#CC6677",
    "stall": "#DDCC77",
    "train": "#44AA99",
    "evaluate": "#88CCEE",
    "commit": "#6655BB",
    "other": "#999999",
}
"""Phase of a cycle -> colour; none is the colour of an arm."""
PANEL = (3.4, 2.2)
"""Width and height of a panel, inches."""
WIDE = 4.4
"""Width of a wide panel, inches."""
_GREY = "#8a8f96"
_STYLE = mpl.rc_context(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "raysed",
        "text.parse_math": False,  # a $ in a class name is a dollar sign
        "font.family": ["DejaVu Sans", "sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.edgecolor": _GREY,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": _GREY,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.5,
        "xtick.color": _GREY,
        "ytick.color": _GREY,
        "xtick.labelcolor": "black",
        "ytick.labelcolor": "black",
        "legend.frameon": False,
        "path.simplify_threshold": 0.3,
    }
)


def color_of(arms: Sequence[str] | Mapping[str, Any], arm: str) -> str:
    """Colour of an arm, by its place among all arms."""
    return ARM_COLORS[list(arms).index(arm) % len(ARM_COLORS)]


def style_of(arms: Sequence[str] | Mapping[str, Any], arm: str) -> str:
    """Line style of an arm: colours come again after a few arms, in another style."""
    return ("-", "--", ":")[list(arms).index(arm) // len(ARM_COLORS) % 3]


def moving_average(values: Sequence[float], window: int = WINDOW) -> np.ndarray:
    """Mean of the last `window` values up to each position (fewer at the start); nan does not count."""
    windows = [
        [v for v in values[max(0, i - window) : i] if not math.isnan(v)] for i in range(1, len(values) + 1)
    ]
    return np.array([sum(w) / len(w) if w else math.nan for w in windows])


@_STYLE
def metric_curves(arms: Arms, metrics: Sequence[tuple[str, str]], *, legend: bool = True) -> str:
    """Curves over cycles, raw thin and moving average thick, one panel a metric.

    Args:
        arms: name -> committed cycles.
        metrics: (group, name) of the record, such as ("val", "miou").
        legend: name the arms in the first panel.
    """
    panels = [(f"{group} {n}" if n == "loss" else n, (group, n)) for group, n in metrics]
    return _svg(_curves(arms, panels, columns=3, legend=legend))


@_STYLE
def class_curves(arms: Arms, names: Sequence[str], *, legend: bool = True) -> str:
    """Validation IoU of classes over cycles, one panel a class."""
    figure = _curves(arms, [(n, ("val", "iou", n)) for n in names], columns=4, legend=legend)
    for axes in figure.axes:
        axes.set_ylim(0, 1)
    return _svg(figure)


@_STYLE
def band_curves(panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> str:
    """Validation mIoU over a cost, one panel a cost: mean over seeds, and a band from the lowest to the highest.

    Args:
        panels: name of the cost -> arm -> (S, T) cost and (S, T) mIoU.
    """
    figure = _figure(WIDE * len(panels), 1.3 * PANEL[1], fixed_margins=False)
    every = list(next(iter(panels.values())))  # a panel may lack arms
    for axes, (title, arms) in zip(_axes(figure, len(panels), len(panels)), panels.items(), strict=True):
        for arm, (cost, values) in arms.items():
            at, color, style = cost.mean(0), color_of(every, arm), style_of(every, arm)
            if len(values) > 1:
                axes.fill_between(at, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
            axes.plot(at, values.mean(0), style, color=color, linewidth=1.6, label=arm)
        axes.set_title("miou")
        axes.set_xlabel(title)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return _svg(figure)


@_STYLE
def seconds_bars(arms: Arms, shown: Sequence[str], *, legend: bool = True) -> str:
    """Seconds by phase of every cycle, stacked, one panel an arm.

    Args:
        arms: name -> committed cycles; they share one scale.
        shown: arms that get a panel.
        legend: name the phases below.
    """
    figure = _figure(WIDE * len(shown), PANEL[1], fixed_margins=len(shown) == 1 and not legend)
    for axes, arm in zip(_axes(figure, len(shown), len(shown)), shown, strict=True):
        manifests = arms[arm]
        base = np.zeros(len(manifests))
        for phase, color in PHASES.items():
            top = base + [m.record["seconds"].get(phase, 0.0) for m in manifests]
            axes.stairs(
                top, np.arange(len(top) + 1) + 0.5, baseline=base, fill=True, color=color, label=phase
            )
            base = top
        axes.set_title(f"{arm}: seconds a cycle")
        _cycles(axes)
    highest = max(m.record["seconds"]["total"] for manifests in arms.values() for m in manifests)
    for axes in figure.axes:
        axes.set_ylim(0, highest * 1.05)
    if legend:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES)
        )
    return _svg(figure)


@_STYLE
def share_curves(arms: dict[str, list[float]], title: str, *, first: int) -> str:
    """One share (0..1) over cycles.

    Args:
        arms: name -> values.
        title: of the panel.
        first: number of the cycle of the first value.
    """
    figure = _figure(WIDE, PANEL[1], fixed_margins=True)
    axes = _axes(figure, 1, 1)[0]
    for arm, values in arms.items():
        at = range(first, first + len(values))
        axes.plot(at, values, color=color_of(arms, arm), marker="." if len(values) == 1 else None)
    axes.set_title(title)
    axes.set_ylim(0, 1.02)
    _cycles(axes)
    return _svg(figure)


@_STYLE
def share_bars(
    pool: dict[str, float], arms: dict[str, dict[str, float]], title: str, *, legend: bool = True
) -> str:
    """Shares of the selected tiles beside those of the pool, as horizontal bars.

    Args:
        pool: name (class or region) -> share.
        arms: the same for each arm.
        title: of the figure.
        legend: name pool and arms below.
    """
    figure = _figure(WIDE, 0.5 + (0.16 * len(arms) + 0.22) * len(pool), fixed_margins=False)
    axes = _axes(figure, 1, 1)[0]
    groups = {"pool": (POOL_COLOR, pool)} | {a: (color_of(arms, a), s) for a, s in arms.items()}
    thick = 0.8 / len(groups)
    for k, (group, (color, shares)) in enumerate(groups.items()):
        at = np.arange(len(pool)) + (k - (len(groups) - 1) / 2) * thick
        hatch = "" if group == "pool" else {"-": "", "--": "///", ":": "..."}[style_of(arms, group)]
        axes.barh(at, [shares.get(n, 0.0) for n in pool], thick, color=color, label=group, hatch=hatch)
    axes.set_yticks(range(len(pool)), [_short(n) for n in pool])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_title(title)
    if legend:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _svg(figure)


@_STYLE
def parallel_coordinates(
    points: Sequence[Mapping[str, float]], logarithmic: Sequence[str], kept: Sequence[bool], base: int | None
) -> str:
    """One line a point over one axis a name; the last axis is the score and gives the colour.

    Args:
        points: name -> value, the same names in each.
        logarithmic: names whose axis is logarithmic.
        kept: whether a point's line is drawn solid.
        base: the point to compare with, drawn black.
    """
    names = list(points[0])
    values = np.array([[p[n] for n in names] for p in points], float)
    for k, name in enumerate(names):
        if name in logarithmic:
            values[:, k] = np.log10(values[:, k])
    low, high = values.min(0), values.max(0)
    heights = (values - low) / np.where(high > low, high - low, 1)
    figure = _figure(1.9 * len(names), 3.4, fixed_margins=False)
    axes = _axes(figure, 1, 1)[0]
    for k, line in sorted(enumerate(heights), key=lambda v: (v[0] == base, v[1][-1])):
        color = "#000000" if k == base else mpl.colormaps["viridis"](line[-1])
        axes.plot(
            line,
            color=color,
            linewidth=2.2 if k == base else 1.4,
            linestyle="-" if kept[k] else (0, (2, 2)),
            alpha=1 if kept[k] else 0.6,
            marker=".",
        )
    for k, name in enumerate(names):
        axes.axvline(k, color=_GREY, linewidth=0.8)
        for height, value in ((-0.03, low[k]), (1.03, high[k])):
            shown = 10**value if name in logarithmic else value
            axes.text(k, height, f"{shown:.3g}", ha="center", va="top" if height < 0 else "bottom")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    axes.set_ylim(-0.12, 1.12)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return _svg(figure)


@_STYLE
def timeline(seen: Sequence[dict[str, Any]], cycles: Sequence[tuple[float, float, int]]) -> str:
    """Nodes, actors by class, and tiles a second of every cycle over the seconds of a cluster's life, one below the other.

    Args:
        seen: second, nodes, actors {"<node> <class>": count}.
        cycles: (second it began, seconds it took, tiles it trained on).
    """
    figure = _figure(2 * WIDE, 3 * 1.4, fixed_margins=False)
    nodes, actors, speed = _axes(figure, 3, 1)
    seconds = [s["second"] for s in seen]
    nodes.step(seconds, [s["nodes"] for s in seen], where="post", color=ARM_COLORS[0])
    nodes.set_title("nodes, the head among them")
    for color, name in zip(ARM_COLORS, ("RayTrainWorker", "Scorer"), strict=False):
        counts = [sum(n for k, n in s["actors"].items() if k.endswith(f" {name}")) for s in seen]
        actors.step(seconds, counts, where="post", color=color, label=name)
    actors.set_title("training workers and scorers")
    actors.legend(loc="upper left")
    for began, took, tiles in cycles:
        speed.bar(began, tiles / took, took, align="edge", color=ARM_COLORS[2], edgecolor="white")
    speed.set_title("tiles trained a second, by cycle")
    speed.set_xlabel("seconds")
    for axes in (nodes, actors, speed):
        axes.set_xlim(0, max([*seconds, *(b + t for b, t, _ in cycles)], default=1.0))
        axes.set_ylim(bottom=0)
    return _svg(figure)


def _curves(
    arms: Arms,
    panels: Sequence[tuple[str, tuple[str, ...]]],
    *,
    columns: int,
    legend: bool,
) -> Figure:
    """Panels of a title and the keys that lead to the value in a cycle's record; a value of None leaves a gap."""
    columns = min(columns, len(panels))
    figure = _figure(
        PANEL[0] * columns, PANEL[1] * -(-len(panels) // columns), fixed_margins=len(panels) == 1
    )
    for axes, (title, keys) in zip(_axes(figure, len(panels), columns), panels, strict=True):
        for arm, manifests in arms.items():
            at = [m.cycle + 1 for m in manifests]
            found: list[Any] = [reduce(getitem, keys, m.record) for m in manifests]
            values = [math.nan if v is None else v for v in found]
            color, style = color_of(arms, arm), style_of(arms, arm)
            axes.plot(at, values, color=color, alpha=0.45, linewidth=0.8)
            mark = "." if len(at) == 1 else None
            axes.plot(at, moving_average(values), style, color=color, linewidth=1.8, label=arm, marker=mark)
        axes.set_title(_short(title))
        _cycles(axes)
    if legend:
        figure.axes[0].legend()
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _cycles(axes: Any) -> None:
    axes.set_xlabel("cycle")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _figure(width: float, height: float, *, fixed_margins: bool) -> Figure:
    """A figure in inches.  Fixed margins suit a single panel with numbers at its axes and halve the time to draw it."""
    figure = Figure(figsize=(width, height), layout=None if fixed_margins else "constrained")
    FigureCanvasSVG(figure)
    if fixed_margins:
        figure.subplots_adjust(0.52 / width, 0.42 / height, 1 - 0.08 / width, 1 - 0.26 / height)
    return figure


def _axes(figure: Figure, count: int, columns: int) -> list[Any]:
    return [figure.add_subplot(-(-count // columns), columns, k) for k in range(1, count + 1)]


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    return re.sub(
        r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg
    )  # 1/100 point will do
