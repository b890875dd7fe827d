"""`report.html`: one self-contained page about a run, for a phone or a desk, light or dark; it asks no network for anything."""

import json
from collections import Counter
from html import escape
from typing import Any

from raysed.errors import RaysedError
from raysed.io.ledger import Ledger, Manifest
from raysed.io.storage import Storage
from raysed.io.store import Store
from raysed.report import figures
from raysed.report.gallery import Picture, gallery
from raysed.report.summary import SCALARS, arms_of, summarise

DEFINITIONS = {
    "miou": "mean of the class IoU over the classes that have pixels in the validation truth; void pixels are ignored",
    "iou_micro": "IoU over the pixels of all classes together",
    "iou_frequency_weighted": "class IoU weighted by the class's share of truth pixels",
    "pixel_accuracy": "share of the known pixels that are right",
    "iou_variance": "population variance of the class IoU, in squared percentage points, as in the paper's table 2",
    "iou_cv": "standard deviation of the class IoU over its mean: evenness that does not reward low values",
    "iou_worst": "IoU of the worst class",
    "soft_iou": "legacy soft IoU without argmax, averaged over batches, absent classes counting 0, as in OpenEarthMap's code",
    "loss": "validation focal loss a known pixel",
}
CURVES = [("train", "loss"), *(("val", name) for name in ("loss", *SCALARS[:-1]))]
STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--paper:#fff;--line:#d9dde2;--soft:#f4f6f8;--quiet:#5b6470}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--paper:#15181c;--line:#333a42;--soft:#1d2126;--quiet:#9aa4af}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:40px 0 8px}
p{margin:.4em 0;max-width:75ch}.quiet{color:var(--quiet);font-size:.9em}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:4px 12px 4px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}.swatch{display:inline-block;width:.9em;height:.9em;border:1px solid var(--quiet);margin-right:.5em;vertical-align:-.1em}
.figure{background:#fff;border:1px solid var(--line);border-radius:6px;padding:8px;margin:8px 0;overflow-x:auto}.figure svg{width:100%;min-width:640px;height:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:16px}.tile{background:var(--soft);border-radius:6px;padding:8px}
.tile div{display:grid;grid-template-columns:repeat(4,1fr);gap:4px}.tile img{width:100%;display:block;image-rendering:pixelated}.tile small{color:var(--quiet)}
pre{background:var(--soft);padding:12px;border-radius:6px;overflow-x:auto;font-size:.85em}dt{font-weight:600}dd{margin:0 0 .5em}
"""


def write_report(run: Storage) -> str:
    """Write `report.html` of a run and return where it is.

    Raises:
        UsageError: no run here.
    """
    run.write("report.html", page(run).encode())
    return f"{run.uri}/report.html"


def page(run: Storage) -> str:
    """The page as text."""
    summary, arms = summarise(run), arms_of(run)
    committed = {name: manifests for name, (_, manifests) in arms.items() if manifests}
    title = escape(f"raysed run {run.uri.rpartition('/')[2]}")
    body = [f"<h1>{title}</h1>", _subtitle(summary)]
    if committed:
        own, last = arms[list(committed)[-1]][0], committed[list(committed)[-1]][-1]
        store, note = _store(summary)
        body += [
            _section("Result", _headline(summary)),
            _section("Classes", _classes(summary, store)),
            _section(
                "Curves",
                _figure(figures.metric_curves(committed, CURVES)),
                "Thin: each cycle. Thick: mean of the last ten.",
            ),
            _section("IoU by class", _figure(figures.class_curves(committed))),
            _section("Seconds", _figure(figures.seconds_bars(committed)), _ratios(summary)),
            _section("Selection", _selection(arms, store)),
            _section(
                "Tiles",
                _gallery(own, last, store),
                note or "Image, label, prediction, entropy (bright is unsure).",
            ),
        ]
    else:
        body.append("<p>No cycle is committed yet.</p>")
    body += [
        _section("What the numbers mean", _definitions()),
        _section("Configuration", _configuration(summary)),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>"
    )


def _section(title: str, content: str, note: str = "") -> str:
    below = f'<p class="quiet">{escape(note)}</p>' if note else ""
    return f"<h2>{escape(title)}</h2>{below}{content}"


def _figure(svg: str) -> str:
    return f'<div class="figure">{svg}</div>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table; cells are HTML already."""
    top = "".join(f"<th>{h}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _subtitle(summary: dict[str, Any]) -> str:
    config = summary["config"]
    parts = [config["model"]["arch"], f"seed {config['seed']}", f"data {summary['dataset_hash'][:12]}"]
    if "hardware" in summary:
        hardware = summary["hardware"]
        parts += [
            f"{hardware['cores']} cores of {hardware['cpu']}",
            str(hardware["precision"]),
            f"commit {summary['commit']}",
        ]
    return f'<p class="quiet">{escape(" · ".join(parts))}</p>'


def _headline(summary: dict[str, Any]) -> str:
    arms = summary["arms"]
    rows = [[escape(k), *(f"{a['metrics'][k]:.4f}" for a in arms.values())] for k in SCALARS]
    rows.append(["fluctuation of miou", *(f"{a['fluctuation']:.4f}" for a in arms.values())])
    rows.append(["cycles", *(str(a["cycles"]) for a in arms.values())])
    rows.append(["tiles a cycle", *(str(a["tiles_per_cycle"]) for a in arms.values())])
    last = max(a["mean_of_last"] for a in arms.values())
    return _table([f"mean of the last {last} cycles", *map(escape, arms)], rows)


def _classes(summary: dict[str, Any], store: Store | None) -> str:
    arms = summary["arms"]
    colors = {c.name: c.color for c in store.dataset.classes} if store else {}
    rows = []
    for name in next(iter(arms.values()))["iou"]:
        swatch = (
            f'<span class="swatch" style="background:{escape(colors[name])}"></span>'
            if name in colors
            else ""
        )
        cells = [f"{swatch}{escape(name)}"]
        for arm in arms.values():
            iou, found = arm["iou"][name], arm["first_correct_cycle"][name]
            cells += ["-" if iou is None else f"{iou:.4f}", "-" if found is None else str(found + 1)]
        rows.append(cells)
    head = ["class", *(h for arm in arms for h in (f"IoU {escape(arm)}", "found in cycle"))]
    return _table(head, rows)


def _ratios(summary: dict[str, Any]) -> str:
    return "; ".join(f"{k}: {v:.2f}" for k, v in summary["ratios"].items())


def _store(summary: dict[str, Any]) -> tuple[Store | None, str]:
    try:
        return Store.open(str(summary["config"]["data"]["uri"])), ""
    except RaysedError as error:
        return (
            None,
            f"The tile store cannot be read ({error}), so tiles, regions and classes of the selection are left out.",
        )


def _selection(arms: dict[str, tuple[Ledger, list[Manifest]]], store: Store | None) -> str:
    selected = {
        name: [ledger.table(m, "selected.parquet")["tile_id"].to_pylist() for m in manifests]
        for name, (ledger, manifests) in arms.items()
        if manifests
    }
    if store is None:
        return ""
    pool = store.split("train")
    regions = dict(zip(pool["tile_id"].to_pylist(), pool["region"].to_pylist(), strict=True))
    pixels = {t: p for t, p in zip(pool["tile_id"].to_pylist(), pool["pixels"].to_pylist(), strict=True) if p}
    names = [c.name for c in store.dataset.classes]
    parts = [figures.selection_curves(selected, len(pixels))]
    chosen = {arm: [t for cycle in cycles for t in cycle] for arm, cycles in selected.items()}
    parts.append(
        figures.share_bars(
            _class_shares(list(pixels), pixels, names),
            {arm: _class_shares(ids, pixels, names) for arm, ids in chosen.items()},
            "share of pixels by class, selected tiles and pool",
        )
    )
    top = [r for r, _ in Counter(regions[t] for t in pixels).most_common(24)]
    parts.append(
        figures.share_bars(
            _region_shares(list(pixels), regions, top),
            {arm: _region_shares(ids, regions, top) for arm, ids in chosen.items()},
            "share of tiles by region (the 24 largest), selected tiles and pool",
        )
    )
    return "".join(_figure(p) for p in parts)


def _class_shares(ids: list[str], pixels: dict[str, list[int]], names: list[str]) -> dict[str, float]:
    total = [sum(column) for column in zip(*(pixels[t][1:] for t in ids), strict=True)]
    return {n: v / max(sum(total), 1) for n, v in zip(names, total, strict=True)}


def _region_shares(ids: list[str], regions: dict[str, str], top: list[str]) -> dict[str, float]:
    counts = Counter(regions[t] for t in ids)
    return {r: counts[r] / len(ids) for r in top}


def _gallery(ledger: Ledger, last: Manifest, store: Store | None) -> str:
    if store is None:
        return ""
    return f'<div class="tiles">{"".join(map(_tile, gallery(ledger, last, store)))}</div>'


def _tile(picture: Picture) -> str:
    kinds = ("image", "label", "prediction", "entropy")
    images = "".join(f'<img alt="{kind}" src="{getattr(picture, kind)}">' for kind in kinds)
    return f'<div class="tile"><div>{images}</div><small>{escape(picture.tile_id)}: {escape(picture.caption)}</small></div>'


def _definitions() -> str:
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in DEFINITIONS.items()) + "</dl>"


def _configuration(summary: dict[str, Any]) -> str:
    shown = {k: summary.get(k) for k in ("command", "commit", "hardware", "versions", "config")}
    return f"<pre>{escape(json.dumps(shown, indent=1))}</pre>"
