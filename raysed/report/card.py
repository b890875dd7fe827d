"""The card of an exported model: what it is, what it learnt from, how good it is, how to use it."""

import json
from typing import Any

from raysed.io.model import Record, smp_encoder
from raysed.report.summary import DEFINITIONS, SCALARS

_LICENCE = """The licence of the data was not recorded and is yours to check before you pass the model on.  OpenEarthMap's labels are
CC BY-NC-SA 4.0 or the source's own, region by region."""
_SMP = """```python
import segmentation_models_pytorch as smp

net = smp.from_pretrained(FOLDER).eval()
logits = net((image - mean) / std)  # image: (B, 3, H, W) RGB in 0..1
```
mean {mean}, std {std}.

"""


def card(record: Record, onnx_difference: float | None = None) -> str:
    """`README.md` of a model folder; `onnx_difference` if there is a `model.onnx`."""
    environment = record.environment
    lines = [
        f"# {record.arch}, {len(record.classes)} classes, trained on {record.dataset}",
        "",
        f"Weights after cycle {record.cycle} of a raysed run ({record.experiment['select']['strategy']} selection, "
        f"seed {record.experiment['seed']}), commit {environment.get('commit', 'unknown')}.",
        "",
        *_origin(record),
        "## Input",
        "",
        f"RGB, 8 bits; tiles of {record.tile_size} px.  A tile pixel is {_number(record.scale[0])} x {_number(record.scale[1])} source pixels"
        + (
            f" and {_number(record.metres)} m (median)."
            if record.metres
            else "; metres a pixel are not known."
        ),
        "",
        "## Use",
        "",
        "    python jobs/predict.py FOLDER --source IMAGES --target MAPS",
        "",
        _smp(record) + "## Classes",
        "",
        "| value | class | colour | validation IoU |",
        "|---|---|---|---|",
        *(
            f"| {c.source_id} | {_cell(c.name)} | {c.color} | {_number(record.metrics['iou'].get(c.name))} |"
            for c in record.classes
        ),
        "",
        f"Value {record.nodata} is nodata in maps; {', '.join(map(str, record.ignore)) or 'none'} ignored in labels.",
        "",
        "## Metrics",
        "",
        f"On the {record.metrics.get('tiles', 'unknown number of')} validation tiles, after this very cycle (a run's headline is the mean of its last ten).",
        "",
        "| metric | value | meaning |",
        "|---|---|---|",
        *(
            f"| {name} | {_number(record.metrics[name])} | {DEFINITIONS[name]} |"
            for name in SCALARS
            if name in record.metrics
        ),
        *([""] * (onnx_difference is not None)),
        *(
            [f"`model.onnx` differs from torch by at most {onnx_difference:.2g} in logits."]
            if onnx_difference is not None
            else []
        ),
        "",
        "## Data",
        "",
        f"`{_cell(record.dataset)}`, content hash {record.dataset_hash}.",
        _LICENCE,
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps({"experiment": record.experiment, "environment": environment}, indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def _origin(record: Record) -> list[str]:
    model = record.experiment.get("model", {})
    if not model.get("init"):
        return []
    return [f"The run started from the model with weights {model['sha256'][:12]} (`{model['init']}`).", ""]


def _smp(record: Record) -> str:
    rounded = [[round(v, 4) for v in values] for values in (record.mean, record.std)]
    return _SMP.format(mean=rounded[0], std=rounded[1]) if smp_encoder(record.arch) else ""


def _number(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
