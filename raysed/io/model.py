"""A trained network as a folder that others can load: `model.safetensors`, `config.json`, and `README.md`, its card.

For the networks of segmentation-models-pytorch `smp.from_pretrained(folder)` gives the network itself: it takes the image after
scaling, `(image - mean) / std` with the image in 0..1, and returns logits.  smp hands every entry of `config.json` to the
network but those that begin with an underscore, so what raysed needs stands under `_raysed`.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysed.config import ModelConfig
from raysed.core.networks import ENCODERS, HEADS, Network, build
from raysed.core.tiles import LandClass
from raysed.errors import DataError, UsageError
from raysed.io import checkpoint
from raysed.io.ledger import Ledger, Manifest, folder
from raysed.io.sources import PLAIN, Rule, ground_size
from raysed.io.storage import Storage, digest
from raysed.io.store import Store

FORMAT = 1
CONFIG, WEIGHTS, CARD, ONNX = "config.json", "model.safetensors", "README.md", "model.onnx"
SAMPLE = 10_000
"""Tiles of the store, evenly spaced, that the scale is taken from."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a model besides its weights."""

    arch: str
    classes: tuple[LandClass, ...]
    """In the order of the output's channels; `source_id` is the value of the class in labels and maps."""
    ignore: tuple[int, ...]
    """Label values that mean unknown."""
    tile_size: int
    """Side of the tiles trained on, pixels."""
    scale: tuple[float, float]
    """Source pixels a pixel of such a tile, (row, column), the median."""
    metres: float | None
    """Metres a pixel of such a tile, the median; None where no source had a projected CRS."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Input scaling: (image - mean) / std, RGB in 0..1."""
    sha256: str
    """Of `model.safetensors`."""
    dataset: str
    dataset_hash: str
    cycle: int
    """The run's cycle, counted from 0 as its folder is."""
    metrics: dict[str, Any]
    """Of the validation tiles after that cycle, by name."""
    experiment: dict[str, Any]
    """The run's configuration."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions and commit that the cycle was trained with."""
    rule: Rule = PLAIN
    """How the images trained on became 8-bit RGB; those to be mapped become so too."""

    @property
    def nodata(self) -> int:
        """Value of a map where there is nothing to say: the first ignored one, or the highest that is no class."""
        taken = {c.source_id for c in self.classes}
        return next(v for v in (*self.ignore, *range(255, -1, -1)) if v not in taken)

    def to_json(self) -> bytes:
        """`config.json`."""
        fields: dict[str, Any] = {"_raysed": {"format": FORMAT, **asdict(self)}}
        if encoder := smp_encoder(self.arch):
            own = {"encoder_name": encoder, "encoder_weights": None, "classes": len(self.classes)}
            fields = {"_model_class": "Unet", **own, **fields}
        return (json.dumps(fields, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Record":
        """Inverse of `to_json`.

        Raises:
            DataError: not one, or of another format.
        """
        try:
            fields = json.loads(data)["_raysed"]
            if fields.pop("format") != FORMAT:
                raise DataError(f"{where}: another model format, this version reads {FORMAT}: export it anew")
            fields["classes"] = tuple(LandClass(**c) for c in fields["classes"])
            for name in ("ignore", "scale", "mean", "std"):
                fields[name] = tuple(fields[name])
            fields["rule"] = Rule.of(fields.get("rule", {}))
            return cls(**fields)
        except (ValueError, KeyError, TypeError, UsageError) as error:
            raise DataError(
                f"{where}: not a raysed model description ({type(error).__name__}: {error})"
            ) from error


@dataclass(frozen=True)
class Model:
    """A record and the weights that belong to it."""

    record: Record
    weights: dict[str, Tensor]
    """State dict of `Network.net`."""

    def network(self) -> Network:
        """The network with these weights, on the CPU, ready to predict.

        Raises:
            DataError: the weights do not fit the architecture.
        """
        record = self.record
        network = build(record.arch, len(record.classes), seed=0)
        try:
            network.net.load_state_dict(self.weights)
        except RuntimeError as error:
            raise DataError(_misfit(record.arch, error)) from error
        _set_scaling(network, record)
        return network.eval()


def _misfit(arch: str, error: RuntimeError) -> str:
    return f"the weights do not fit {arch}: {str(error).splitlines()[-1].strip()}"


def _set_scaling(network: Network, record: Record) -> None:
    for name in ("mean", "std"):
        getattr(network, name).copy_(torch.tensor(getattr(record, name)).reshape(3, 1, 1))


def smp_encoder(arch: str) -> str | None:
    """Encoder of an architecture that is a Unet of segmentation-models-pytorch, else None."""
    return ENCODERS.get(arch) or arch.partition(":")[2] or None


def load(uri: str) -> Model:
    """The model of a folder that `jobs/export.py` has written.

    Raises:
        UsageError: no such folder.
        DataError: another format, or weights that are not those of its config.json.
    """
    storage = Storage(uri)
    try:
        text = storage.read(CONFIG)
        if b'"configs"' in text and not storage.exists(WEIGHTS):
            raise UsageError(f"{storage.uri} is a run: make a model folder of it with jobs/export.py")
        record = Record.from_json(text, f"{storage.uri}/{CONFIG}")
        data = storage.read(WEIGHTS)
    except FileNotFoundError as error:
        raise UsageError(f"{storage.uri} is no model folder ({CONFIG} or {WEIGHTS} is missing)") from error
    if digest(data) != record.sha256:
        raise DataError(
            f"{storage.uri}/{WEIGHTS} does not have the sha256 that {CONFIG} says: export it anew"
        )
    return Model(record, checkpoint.unpack(data, f"{storage.uri}/{WEIGHTS}"))


def load_init(config: ModelConfig) -> Model:
    """The model that a run starts from.

    Raises:
        UsageError: no such folder, another architecture, or other weights than those the run is said to start from.
        DataError: a damaged model.
    """
    found = load(str(config.init))
    where, record = Storage(str(config.init)).uri, found.record
    if record.arch != config.arch:
        raise UsageError(
            f"--init {where} is a model of {record.arch}, --arch says {config.arch}: give --arch {record.arch}, or another model"
        )
    if config.sha256 not in (None, record.sha256):
        raise UsageError(
            f"--init {where} holds weights {record.sha256[:12]}, model.sha256 says {config.sha256[:12]}: give the model that it "
            "was, or --model.sha256 none"
        )
    return found


def start_from(network: Network, model: Model, classes: tuple[LandClass, ...]) -> None:
    """Give a fresh network of the same architecture the weights of a model; with other classes its last layer stays fresh."""
    kept = model.weights
    if not same_classes(model.record, classes):
        kept = {n: t for n, t in kept.items() if not n.startswith(HEADS)}
    try:
        network.net.load_state_dict({**network.net.state_dict(), **kept})
    except RuntimeError as error:
        raise DataError(_misfit(model.record.arch, error)) from error
    _set_scaling(network, model.record)


def same_classes(record: Record, classes: tuple[LandClass, ...]) -> bool:
    """Whether the classes have the same names in the same order: then the last layer means the same."""
    return [c.name for c in record.classes] == [c.name for c in classes]


def init_notes(record: Record, store: Store) -> list[str]:
    """What differs between a model and the tile store that a run takes it to, one line each."""
    notes = []
    classes, rule = store.dataset.classes, store.dataset.rule
    if not same_classes(record, classes):
        was, now = (", ".join(c.name for c in some) for some in (record.classes, classes))
        notes.append(f"the classes were {was} and are {now}: the last layer begins anew")
    scale, metres = _scale(store)
    sizes = [(a, b, "source pixels") for a, b in zip(record.scale, scale, strict=True)]
    if record.metres is not None and metres is not None:
        sizes = [(record.metres, metres, "m")]
    for before, here, unit in sizes:
        if not math.isclose(before, here, rel_tol=0.01):
            notes.append(f"it was trained on {before:.3g} {unit} a pixel, the store has {here:.3g}")
            break
    if rule != record.rule:
        notes.append(f"it was trained on {record.rule}, the store was made with {rule}")
    return [f"note: --init: {note}" for note in notes]


def load_any(uri: str, cycle: int | None = None, data: str | None = None) -> Model:
    """The model of a model folder or of a run; the arguments are those of `of_run`.

    Raises:
        UsageError: it is neither, or a model folder was asked for a cycle.
    """
    storage = Storage(uri)
    try:
        fields = json.loads(storage.read(CONFIG))
    except FileNotFoundError as error:
        raise UsageError(f"{storage.uri} is neither a run nor a model folder (no {CONFIG})") from error
    except ValueError as error:
        raise DataError(f"{storage.uri}/{CONFIG}: not JSON ({error})") from error
    if "configs" in fields:
        return of_run(uri, cycle, data)
    if cycle is not None or data is not None:
        raise UsageError(f"{storage.uri} is a model folder: --cycle and --data go with a run")
    return load(uri)


def of_run(uri: str, cycle: int | None = None, data: str | None = None) -> Model:
    """The model of a run.

    Args:
        uri: run directory.
        cycle: number of its folder; None takes the newest whose weights verify.
        data: the run's tile store, if it has moved.

    Raises:
        UsageError: no run or store there, another store, a cycle that is not there or whose weights were not kept.
        DataError: no weights that verify.
    """
    ledger = Ledger(Storage(uri))
    manifest, data_of_weights = weights_of_run(ledger, cycle)
    experiment, dataset_hash = ledger.config(manifest.cycle)
    store = Store.open(data or str(experiment.data.uri), dataset_hash)
    state = checkpoint.unpack(data_of_weights, f"{folder(manifest.cycle)}/{WEIGHTS}")
    weights = {n.removeprefix("net."): t for n, t in state.items() if n.startswith("net.")}
    scale, metres = _scale(store)
    record = Record(
        arch=experiment.model.arch,
        classes=store.dataset.classes,
        ignore=store.dataset.ignore,
        tile_size=store.dataset.tile_size,
        scale=scale,
        metres=metres,
        mean=tuple(state["mean"].flatten().tolist()),
        std=tuple(state["std"].flatten().tolist()),
        sha256=digest(checkpoint.pack(weights)),
        dataset=store.dataset.name,
        dataset_hash=dataset_hash,
        cycle=manifest.cycle,
        metrics={k: v for k, v in manifest.record["val"].items() if k != "counts"},
        experiment={**experiment.to_dict(), "run": ledger.storage.uri},
        environment=manifest.record.get("environment", {}),
        rule=store.dataset.rule,
    )
    return Model(record, weights)


def weights_of_run(ledger: Ledger, cycle: int | None) -> tuple[Manifest, bytes]:
    """The weights of a cycle, or the newest that verify; arguments and errors are those of `of_run`."""
    ledger.config()  # no run here: says so
    manifests = ledger.manifests()
    if not manifests:
        raise UsageError(f"{ledger.storage.uri} has no committed cycle yet")
    there = ledger.storage.list()
    held = [m.cycle for m in manifests if WEIGHTS in m.files and m.path(WEIGHTS) in there]
    if cycle is not None:
        if cycle not in held:
            kept = ", ".join(map(str, held))
            raise UsageError(f"{ledger.storage.uri} has no weights of cycle {cycle}, it has those of {kept}")
        return manifests[cycle], ledger.read(manifests[cycle], WEIGHTS)
    faults = []
    for number in reversed(held):
        try:
            return manifests[number], ledger.read(manifests[number], WEIGHTS)
        except DataError as error:
            faults.append(str(error))
    raise DataError(
        f"{ledger.storage.uri} has no weights that verify ({'; '.join(faults[:2]) or 'none are left'})"
    )


def _scale(store: Store) -> tuple[tuple[float, float], float | None]:
    """Median source pixels, and median metres, a tile pixel."""
    every = max(1, -(-len(store.index) // SAMPLE))
    rows = store.index.take(np.arange(0, len(store.index), every)).select(["scale", "crs", "transform"])
    scales, metres = [], []
    for row in rows.to_pylist():
        if row["scale"]:
            scales.append(row["scale"])
        if size := ground_size(row["crs"], row["transform"]):
            metres.append(float(np.sqrt(size[0] * size[1])))
    height, width = np.median(scales, axis=0).tolist() if scales else (1.0, 1.0)
    return (height, width), float(np.median(metres)) if metres else None


def save(model: Model, uri: str, card: str, *, overwrite: bool, onnx: bytes | None = None) -> str:
    """Write a model folder; `config.json` is the last file, and none without it is a model.  Returns its URI.

    Raises:
        UsageError: there is something already.
    """
    storage = Storage(uri)
    check_free(storage, overwrite=overwrite)
    for name in (CONFIG, ONNX):
        storage.remove(name)
    storage.write(WEIGHTS, checkpoint.pack(model.weights))
    if onnx is not None:
        storage.write(ONNX, onnx)
    storage.write(CARD, card.encode())
    storage.write(CONFIG, model.record.to_json())
    return storage.uri


def check_free(storage: Storage, *, overwrite: bool) -> None:
    """Refuse to write over anything but, if asked to, a model.

    Raises:
        UsageError: there is something.
    """
    there = storage.list()
    if there and not overwrite:
        raise UsageError(
            f"{storage.uri} exists ({len(there)} files): choose another --target, or give --overwrite"
        )
    foreign = sorted(there.keys() - {CONFIG, WEIGHTS, CARD, ONNX})
    if foreign:
        raise UsageError(f"{storage.uri} holds more than a model ({foreign[0]}): choose another --target")


def to_onnx(model: Model) -> tuple[bytes, float]:
    """The network with its input scaling as ONNX, and the largest difference of its logits by onnxruntime from torch's.

    Input `image`: (batch, 3, side, side) float32 RGB in 0..1; output `logits`: (batch, C, side, side); any batch.

    Raises:
        UsageError: the packages are missing.
    """
    import io
    import warnings

    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--onnx needs {error.name}: pip install 'raysed[onnx]'") from error
    network, side = model.network(), model.record.tile_size
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (images[:2],),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    out = io.BytesIO()
    onnx.save(program.model_proto, out)
    session = onnxruntime.InferenceSession(out.getvalue(), providers=["CPUExecutionProvider"])
    difference = 0.0
    with torch.inference_mode():
        for batch in (images, images[:1]):  # neither is the batch it was exported with
            [found] = session.run(["logits"], {"image": batch.numpy()})
            difference = max(difference, float(np.abs(found - network(batch).numpy()).max()))
    return out.getvalue(), difference
