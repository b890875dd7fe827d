"""`report.html`: one self-contained page about a run, for a phone or a desk, light or dark; it asks no network for anything."""

import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from raysed.config import flatten
from raysed.core import diagnostics
from raysed.core.splits import labelled, training_rows
from raysed.errors import RaysedError
from raysed.io.ledger import Ledger, Manifest
from raysed.io.storage import Storage
from raysed.io.store import Store
from raysed.report import figures
from raysed.report.gallery import gallery
from raysed.report.results import CURVES
from raysed.report.style import STYLE
from raysed.report.summary import DEFINITIONS, SCALARS, arms_of, summarise

REGIONS = 16
"""Largest regions of the pool that are shown."""
Committed = dict[str, tuple[Ledger, list[Manifest]]]


def write_report(run: Storage) -> str:
    """Write `report.html` of a run and return where it is.

    Raises:
        UsageError: no run here.
    """
    run.write("report.html", page(run).encode())
    return f"{run.uri}/report.html"


def page(run: Storage) -> str:
    """The page as text.  What cannot be read (a moved store, damaged files) is named in its place."""
    summary = summarise(run)
    committed = {name: (ledger, m) for name, (ledger, m) in arms_of(run).items() if m}
    title = escape(f"raysed: {run.uri.rpartition('/')[2]}")
    body = [f"<h1>{title}</h1>", _subtitle(summary)]
    body += _results(summary, committed) if committed else ["<p>No cycle is committed yet.</p>"]
    body += [
        _section("What the numbers mean", _pairs(DEFINITIONS)),
        _section("Configuration", _pairs(dict(flatten(summary["config"])))),
        _section("Environment", _pairs(_environment(summary))),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>"
    )


def _results(summary: dict[str, Any], committed: Committed) -> list[str]:
    arms = {name: manifests for name, (_, manifests) in committed.items()}
    store, trouble = _store(summary)
    names = list(next(iter(summary["arms"].values()))["iou"])
    curves = [figures.metric_curves(arms, [metric], legend=False) for metric in CURVES]
    classes = [figures.class_curves(arms, [name], legend=False) for name in names]
    thin = f"Thin: each cycle. Thick: mean of the last {figures.WINDOW}."
    last = {name: (ledger, manifests[-1]) for name, (ledger, manifests) in committed.items()}
    return [
        _section("Result", f'<div class="headline">{_headline(summary)}</div>'),
        _section("Classes", _classes(summary, store)),
        _section("Curves", _legend(_colors(arms)) + _panels(curves), thin),
        _section("IoU by class", _legend(_colors(arms)) + _panels(classes), thin),
        _section("Seconds", _seconds(summary) + _bars(arms)),
        _section("Selection", _or_why(lambda: _selection(committed, store)), trouble),
        _section("Tiles", _or_why(lambda: _tiles(last, store)) if store else "", trouble or _guide(last)),
    ]


def _section(title: str, content: str, note: str = "") -> str:
    above = f'<p class="quiet">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{above}{content}</section>"


def _or_why(content: Callable[[], str]) -> str:
    """The content, or why there is none."""
    try:
        return content()
    except RaysedError as error:
        return f'<p class="trouble">Not shown: {escape(str(error))}</p>'


def _panels(svgs: Sequence[str], kind: str = "") -> str:
    """Figures side by side where there is room.  Their XML namespaces and metadata mean nothing in HTML."""
    cleaned = [
        re.sub(r"<metadata>.*?</metadata>|<!--.*?-->| xmlns(:xlink)?=\"[^\"]*\"", "", s, flags=re.S)
        for s in svgs
    ]
    return f'<div class="panels {kind}">{"".join(f"<figure>{s}</figure>" for s in cleaned)}</div>'


def _colors(arms: Sequence[str] | dict[str, Any]) -> dict[str, str]:
    return {arm: figures.color_of(arms, arm) for arm in arms}


def _swatch(color: str) -> str:
    return f'<i style="background:{escape(color)}"></i>'


def _legend(colors: dict[str, str]) -> str:
    return (
        '<p class="legend">'
        + "".join(f"<span>{_swatch(c)}{escape(n)}</span>" for n, c in colors.items())
        + "</p>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are HTML already, those of the first column are its heads."""
    top = "".join(f'<th scope="col">{h}</th>' for h in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{c}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _pairs(values: dict[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items())
    return f'<dl class="pairs">{rows}</dl>'


def _subtitle(summary: dict[str, Any]) -> str:
    config = summary["config"]
    parts = [config["model"]["arch"], f"seed {config['seed']}", f"data set {summary['dataset_hash'][:12]}"]
    if "hardware" in summary:
        hardware = summary["hardware"]
        parts += [f"{hardware['cores']} cores of {hardware['cpu']}", str(hardware["precision"])]
        parts += [f"commit {summary['commit']}"]
    return f'<p class="quiet">{escape(" · ".join(parts))}</p>'


def _environment(summary: dict[str, Any]) -> dict[str, Any]:
    if "hardware" not in summary:
        return {}
    own = {"command": summary["command"], "commit": ", then ".join(summary["commits"])}
    if len(summary["machines"]) > 1:
        own["machines"] = ", then ".join(summary["machines"])
    return {**own, **summary["hardware"], **summary["versions"]}


def _numbers(label: str, values: Sequence[float | None], digits: int) -> list[str]:
    """A row: the values and, of two, their difference."""
    row = [label, *("–" if v is None else f"{v:.{digits}f}" for v in values)]
    if len(values) == 2:
        a, b = values
        row.append(
            "" if a is None or b is None else f"{round(b - a, digits) + 0.0:+.{digits}f}".replace("-", "−")
        )
    return row


def _heads(summary: dict[str, Any], first: str) -> list[str]:
    arms = summary["arms"]
    return [
        first,
        *(f"{_swatch(c)}{escape(a)}" for a, c in _colors(arms).items()),
        *(["difference"] if len(arms) == 2 else []),
    ]


def _headline(summary: dict[str, Any]) -> str:
    arms = list(summary["arms"].values())
    rows = [_numbers(k, [a["metrics"][k] for a in arms], 2 if k == "iou_variance" else 4) for k in SCALARS]
    rows.append(_numbers("fluctuation", [a["fluctuation"] for a in arms], 4))
    blank = [""] if len(arms) == 2 else []
    rows.append(["classes_present", *(str(a["final"]["classes_present"]) for a in arms), *blank])
    rows += [
        [k.replace("_", " "), *(str(a[k]) for a in arms), *blank]
        for k in ("cycles", "tiles_per_cycle", "quarantined")
    ]
    return _table(_heads(summary, f"mean of the last {max(a['mean_of_last'] for a in arms)} cycles"), rows)


def _classes(summary: dict[str, Any], store: Store | None) -> str:
    arms = list(summary["arms"].values())
    colors = {c.name: c.color for c in store.dataset.classes} if store else {}
    rows = []
    for name in arms[0]["iou"]:
        label = (_swatch(colors[name]) if name in colors else "") + escape(name)
        found = [a["first_correct_cycle"][name] for a in arms]
        rows.append(
            [
                *_numbers(label, [a["iou"][name] for a in arms], 4),
                *("–" if f is None else str(f + 1) for f in found),
            ]
        )
    return _table(
        [*_heads(summary, "IoU of class"), *(f"{escape(a)} found in cycle" for a in summary["arms"])], rows
    )


def _seconds(summary: dict[str, Any]) -> str:
    arms = list(summary["arms"].values())
    phases = [p for p in figures.PHASES if any(p in a["seconds"] for a in arms)]
    rows = [
        _numbers(_swatch(figures.PHASES[p]) + p, [a["seconds"].get(p, 0.0) for a in arms], 1) for p in phases
    ]
    rows.append(_numbers("all cycles", [a["seconds_total"] for a in arms], 1))
    for key, label in (("first", "first cycle"), ("median_warm", "median of the others")):
        rows.append(_numbers(label, [a["seconds_a_cycle"][key] for a in arms], 1))
    for kind in ("train", "score", "evaluate"):
        rows.append(_numbers(f"tiles a second, {kind}", [a["tiles_per_second"][kind] for a in arms], 1))
    ratios = "".join(f"<p>{escape(k)}: <strong>{v:.2f}</strong></p>" for k, v in summary["ratios"].items())
    return ratios + _table(_heads(summary, "seconds"), rows)


def _bars(arms: figures.Arms) -> str:
    return _legend(figures.PHASES) + _panels(
        [figures.seconds_bars(arms, [arm], legend=False) for arm in arms], "half"
    )


def _store(summary: dict[str, Any]) -> tuple[Store | None, str]:
    try:
        return Store.open(str(summary["config"]["data"]["uri"]), summary["dataset_hash"]), ""
    except RaysedError as error:
        return None, f"The tile store cannot be read ({error}): what needs it is left out."


def _selection(committed: Committed, store: Store | None) -> str:
    cycles = {
        name: [ledger.table(m, "selected.parquet")["tile_id"].to_pylist() for m in manifests]
        for name, (ledger, manifests) in committed.items()
    }
    colors = _colors(cycles)
    curve = figures.share_curves
    repeated = curve(
        {a: diagnostics.repeats(c) for a, c in cycles.items()},
        "share repeated from the cycle before",
        first=2,
    )
    if store is None:
        return _legend(colors) + _panels([repeated])
    experiment, _ = next(iter(committed.values()))[0].config()
    pool = training_rows(store.index, experiment.data.held_out, unlabelled=experiment.asks_people)
    names = [c.name for c in store.dataset.classes]
    covered = {a: diagnostics.coverage(c, len(pool)) for a, c in cycles.items()}
    chosen = {a: [t for ids in c for t in ids] for a, c in cycles.items()}
    regions = dict(list(diagnostics.region_shares(pool).items())[:REGIONS])
    known = labelled(pool)
    by_class = {a: diagnostics.class_shares(known, names, ids) for a, ids in chosen.items()}
    by_region = {a: diagnostics.region_shares(pool, ids) for a, ids in chosen.items()}
    never = "; ".join(f"{a} never selected {1 - c[-1]:.1%} of {len(pool)} tiles" for a, c in covered.items())
    bars = [
        figures.share_bars(
            diagnostics.class_shares(known, names), by_class, "share of pixels by class", legend=False
        ),
        figures.share_bars(regions, by_region, f"share of tiles by region (at most {REGIONS})", legend=False),
    ]
    return f"<p>{escape(never)}.</p>{_legend({**colors, 'pool': figures.POOL_COLOR})}" + _panels(
        [curve(covered, "share of the pool selected so far", first=1), repeated, *bars], "half"
    )


def _guide(last: dict[str, Any]) -> str:
    return (
        f"Predictions are those of {' and '.join(last)} after their last cycles; the entropy map is that of "
        f"{list(last)[-1]} (dark is sure, yellow is unsure). Black is void."
    )


def _tiles(last: dict[str, tuple[Ledger, Manifest]], store: Store) -> str:
    colors = _legend({c.name: c.color for c in store.dataset.classes})
    tiles = []
    for picture in gallery(last, store):
        images = "".join(
            f'<figure><img alt="{escape(kind)}" src="{uri}"><figcaption>{escape(kind)}</figcaption></figure>'
            for kind, uri in picture.images.items()
        )
        tiles.append(
            f'<div class="tile"><p>{escape(picture.caption)} <small>{escape(picture.tile_id)}</small></p><div>{images}</div></div>'
        )
    return f'{colors}<div class="tiles">{"".join(tiles)}</div>'
