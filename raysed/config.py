"""The configuration of a run: frozen dataclasses, the paper's values as defaults, a docstring with the unit under each field.

A variant is `dataclasses.replace` or `with_overrides`, never a mutation.  Checks that need no data stand in `__post_init__`.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from raysed.errors import UsageError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    uri: str | None = None
    """Tile store: a local path or s3://bucket/prefix."""
    bad_tile_budget: float = 0.001
    """Share of the tiles that may be unusable before the run stops (exit 4)."""
    validation: Literal["all", "dev", "report"] = "all"
    """Which validation tiles count: all, or those of one half of the source images, by hash of their name."""
    held_out: str | None = None
    """Regions, with commas between, that are not trained on; their tiles alone, whatever their split, are then validated on.  A
    source stays in the half that it is in without."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.bad_tile_budget <= 1,
            f"data.bad_tile_budget must lie in 0..1, got {self.bad_tile_budget}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    arch: str = "efficientunet-b0"
    """unet, efficientunet-b0, efficientunet-b4, or unet:<any encoder of segmentation-models-pytorch>."""
    encoder_weights: str | None = None
    """Encoder weights to start from: none (from scratch), a name that smp knows such as imagenet (downloaded), or a
    .safetensors or .pth file of a state dict, local or s3://."""
    init: str | None = None
    """Model folder of jobs/export.py whose weights a run starts from (fine-tuning); with other classes its last layer begins anew."""
    sha256: str | None = None
    """Hash of the weights of init; filled in when a run begins, so that no other model continues it."""

    def __post_init__(self) -> None:
        _require(
            self.init is None or self.encoder_weights is None,
            f"model.init {self.init!r} brings all weights: model.encoder_weights must be none, got {self.encoder_weights!r}",
        )
        _require(
            self.init is not None or self.sha256 is None, "model.sha256 goes with model.init: give --init"
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    gamma: float = 2.0
    """Focusing power of the focal loss; 0 is weighted cross-entropy."""
    alpha_power: float = 0.5
    """Class weight is (pixel frequency)^-alpha_power, mean 1 over present classes; 0 weights all classes alike."""

    def __post_init__(self) -> None:
        _require(self.gamma >= 0, f"loss.gamma must not be negative, got {self.gamma}")
        _require(0 <= self.alpha_power <= 1, f"loss.alpha_power must lie in 0..1, got {self.alpha_power}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 5e-5
    """Adam step size; beta1 0.9, beta2 0.999."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run; cosine decays to zero at the last step."""
    batch: int = 16
    """Tiles an optimiser step, over all workers."""
    micro_batch: int = 8
    """Tiles a forward pass.  A step is batch / micro_batch of them whatever the worker count, so batch norm sees the same groups."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto is bf16 where the device is fastest in it for this network, else fp16 on GPUs and fp32 on CPUs."""
    rollbacks: int = 1
    """Times that training which diverges (more than 3 steps in a row without a finite gradient, or a loss that is not finite) goes
    back to the last commit, at half the learning rate."""
    ordered_sums: bool = False
    """Sum gradients in micro-batch order, so that any worker count gives the same bits; slower than DDP's all-reduce."""
    ema: float = 0.0
    """Decay a step of a moving average of the weights, which then scores, is evaluated and is committed; 0 is off.  A young
    average decays faster."""
    norm_tiles: int = 0
    """Labelled training tiles, drawn uniformly each cycle whatever it trains on, from which batch norm of the averaged weights is
    estimated anew; 0 averages the running statistics too."""
    weight_decay: float = 0.0
    """Decoupled weight decay of kernels, times the learning rate a step."""
    clip: float | None = None
    """Highest norm of a step's gradient over all parameters; none is no limit."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        _require(self.rollbacks >= 0, f"optim.rollbacks must not be negative, got {self.rollbacks}")
        _require(0 <= self.ema < 1, f"optim.ema must lie in [0, 1), got {self.ema}")
        _require(
            self.norm_tiles == 0 or (self.ema > 0 and self.norm_tiles >= 0),
            f"optim.norm_tiles is a number of tiles and goes with optim.ema, got {self.norm_tiles} and ema {self.ema}",
        )
        _require(self.weight_decay >= 0, f"optim.weight_decay must not be negative, got {self.weight_decay}")
        _require(self.clip is None or self.clip > 0, f"optim.clip must be positive or none, got {self.clip}")
        _require(self.micro_batch >= 1, f"optim.micro_batch must be at least 1, got {self.micro_batch}")
        _require(
            self.batch >= 1 and self.batch % self.micro_batch == 0,
            f"optim.batch must be a multiple of optim.micro_batch, got {self.batch} and {self.micro_batch}",
        )

    @property
    def micro_batches(self) -> int:
        """Micro-batches a step."""
        return self.batch // self.micro_batch


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    turns: bool = True
    """Turn by a random one of 0, 90, 180, 270 degrees."""
    max_noise_variance: float = 0.04
    """Upper end of the variance of Gaussian noise, image in 0..1; 0 is off."""
    max_hue_shift: float = 30.0
    """Largest hue shift either way, degrees; 0 is off."""
    max_saturation_shift: float = 0.15
    """Largest saturation shift either way, of 0..1; 0 is off."""
    max_value_shift: float = 0.15
    """Largest value (brightness) shift either way, of 0..1; 0 is off."""

    def __post_init__(self) -> None:
        for name in ("max_noise_variance", "max_hue_shift", "max_saturation_shift", "max_value_shift"):
            _require(
                getattr(self, name) >= 0, f"augment.{name} must not be negative, got {getattr(self, name)}"
            )


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    strategy: str = "uniform"
    """How a cycle's tiles are chosen.  Without scores: uniform (passive), epoch-queue, class-random, region-random; by scores of
    the pool: entropy (the paper's active selection), margin, power-entropy, clasp-pe, class-gap, k-center, defensive-entropy; by
    what training leaves behind: infobatch, top-loss, reducible-loss, defensive, defensive-reducible."""
    options: str = ""
    """Numbers of the strategy that differ from its defaults, with plus signs between, such as mixture=0.3+tail=1: of defensive,
    defensive-entropy and defensive-reducible mixture, first_mixture, last_mixture, warm_up, tail, cap, stratified, gap_power, weight_power; of clasp-pe
    first, last, stratified; of power-entropy beta; of class-gap power; of class-random temperature, share; of infobatch pruned, tail."""
    protocol: Literal["reselect", "pool"] = "reselect"
    """reselect: all labels are there, every cycle selects anew (the paper's).  pool: labels are bought round by round, see pool.*."""
    fraction: float = 0.2
    """Share of the training tiles that a cycle trains on."""
    tiles: int | None = None
    """Tiles a cycle trains on; none means by fraction."""
    scores: Literal["fresh", "overlapped", "byproduct"] = "fresh"
    """Where a strategy's scores come from: fresh passes over the whole pool before each cycle; overlapped does so while the
    cycle before trains, with weights one cycle old; byproduct takes what training visits tell and refreshes the oldest."""
    refresh: float = 0.1
    """Share of the pool, the oldest scores first, that scorers renew before each cycle when scores are byproduct."""
    side: Literal["auto", "full", "half"] = "auto"
    """Side at which scorers look at tiles: half costs about a third; auto is half when scores are byproduct and
    full otherwise.  Where half is less than the network takes, it is full."""
    reference: str | None = None
    """Run whose newest weights say what loss of a tile training cannot take away, for reducible-loss and defensive-reducible; of
    the same architecture.  Best are two with a plus sign between, each with the regions held out that the other trains on: a tile is
    then judged by the run that has not trained on it."""

    def __post_init__(self) -> None:
        _require(0 < self.fraction <= 1, f"select.fraction must lie in (0, 1], got {self.fraction}")
        _require(0 <= self.refresh <= 1, f"select.refresh must lie in 0..1, got {self.refresh}")
        _require(self.tiles is None or self.tiles >= 1, f"select.tiles must be at least 1, got {self.tiles}")

    def budget(self, pool: int) -> int:
        """Tiles a cycle out of a pool of so many.

        Raises:
            UsageError: more than there are, or an empty pool.
        """
        _require(pool > 0, "the pool is empty: the store has no labelled tile in split train")
        wanted = self.tiles if self.tiles is not None else max(1, int(self.fraction * pool))
        _require(wanted <= pool, f"select.tiles asks for {wanted} tiles a cycle, the pool has {pool}")
        return wanted


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    start: float = 0.02
    """Share of the training tiles whose labels are bought before the first round, by chance."""
    buy: float = 0.02
    """Share of the training tiles whose labels each further round buys, as the strategy says."""
    cycles: int = 10
    """Cycles a round."""
    retrain: bool = False
    """Begin each round with the initial weights instead of those of the round before; a cosine then goes over one round."""
    labels: str | None = None
    """Folder, local or s3://, into which people put the labels of the tiles picked; none takes those of the store."""

    def __post_init__(self) -> None:
        _require(0 < self.start <= 1, f"pool.start must lie in (0, 1], got {self.start}")
        _require(0 < self.buy <= 1, f"pool.buy must lie in (0, 1], got {self.buy}")
        _require(self.cycles >= 1, f"pool.cycles must be at least 1, got {self.cycles}")

    def begins(self, cycle: int) -> bool:
        """Whether a round begins with this cycle."""
        return cycle % self.cycles == 0

    def buys(self, cycle: int, tiles: int) -> int:
        """Labels that a cycle buys out of a pool of so many tiles."""
        share = self.start if cycle == 0 else self.buy
        return max(1, int(share * tiles)) if self.begins(cycle) else 0


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    workers: int = 1
    """Training workers (data-parallel ranks)."""
    min_workers: int | None = None
    """Fewest workers: the run goes on with as many as find room, up to `workers`; none means exactly `workers`."""
    scorers: int | None = None
    """Scoring actors; none means one a GPU, or one a CPU up to 2 a worker."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks run; auto is cuda if the cluster has a GPU for every worker."""
    worker_cpus: float = 0.6
    """CPUs that Ray reserves for a training worker (its threads are set by the node's CPUs, not by this); more than half, so
    that two never meet on one."""
    scorer_cpus: float = 0.05
    """CPUs that Ray reserves for a scorer; scorers work while the workers wait."""
    reader_cpus: float = 0.25
    """CPUs that Ray reserves for a task that reads and augments tiles."""
    worker_gpus: float = 0.9375
    """Share of a GPU for a training worker; so large that Ray, which divides a node's sum of GPUs by it, counts one worker a GPU."""
    scorer_gpus: float = 0.0625
    """Share of a GPU for a scorer."""
    threads: int | None = None
    """Torch threads of a worker, and most of a scorer; none means the node's CPUs divided by its workers, or its scorers."""
    cache_gib: float = 2.0
    """Memory a scorer, and a worker for validation, may use for decoded tiles, GiB."""
    chunk: int = 256
    """Tiles a worker drains from its stream at once; the next chunk is read while this one trains."""
    commit_every_steps: int | None = None
    """Steps between commits inside a cycle, so that a lost node costs no more; none commits at its end only."""
    wait_nodes: float | None = None
    """Seconds to wait for the cluster to offer what was asked for (exit 7 after that); none means 900 where an autoscaler can
    start nodes and 120 elsewhere."""
    shared_filesystem: bool = False
    """Local paths are the same files on every node."""

    def __post_init__(self) -> None:
        _require(self.workers >= 1, f"cluster.workers must be at least 1, got {self.workers}")
        _require(
            self.min_workers is None or 1 <= self.min_workers <= self.workers,
            f"cluster.min_workers must be between 1 and cluster.workers {self.workers}, got {self.min_workers}",
        )
        _require(
            self.scorers is None or self.scorers >= 1,
            f"cluster.scorers must be at least 1, got {self.scorers}",
        )
        _require(self.chunk >= 1, f"cluster.chunk must be at least 1, got {self.chunk}")
        _require(
            self.commit_every_steps is None or self.commit_every_steps >= 1,
            f"cluster.commit_every_steps must be at least 1, got {self.commit_every_steps}",
        )
        _require(
            self.threads is None or self.threads >= 1,
            f"cluster.threads must be at least 1, or none, got {self.threads}",
        )
        _require(
            self.wait_nodes is None or self.wait_nodes >= 0,
            f"cluster.wait_nodes must not be negative, got {self.wait_nodes}",
        )
        _require(self.cache_gib >= 0, f"cluster.cache_gib must not be negative, got {self.cache_gib}")
        for name in ("worker_cpus", "scorer_cpus", "reader_cpus", "worker_gpus", "scorer_gpus"):
            _require(getattr(self, name) > 0, f"cluster.{name} must be positive, got {getattr(self, name)}")

    def patience(self, *, autoscaling: bool) -> float:
        """Seconds to wait for nodes."""
        return self.wait_nodes if self.wait_nodes is not None else 900.0 if autoscaling else 120.0

    def device_with(self, gpus: float) -> str:
        """cpu or cuda, in a cluster of so many GPUs."""
        return self.device if self.device != "auto" else "cuda" if gpus >= self.fewest else "cpu"

    @property
    def fewest(self) -> int:
        """Workers without which the run does not go on."""
        return self.min_workers or self.workers

    def worker(self, device: str) -> dict[str, float]:
        """Resources that Ray reserves for a training worker, by their names."""
        return {"CPU": self.worker_cpus} | ({"GPU": self.worker_gpus} if device == "cuda" else {})

    def scorer(self, device: str) -> dict[str, float]:
        """Resources that Ray reserves for a scorer."""
        return {"CPU": self.scorer_cpus} | ({"GPU": self.scorer_gpus} if device == "cuda" else {})

    def bundles(self, device: str, scorers: int) -> list[dict[str, float]]:
        """What must find room at once: the fewest workers, so many scorers and one read task."""
        reader = {"CPU": self.reader_cpus}
        return [*[self.worker(device)] * self.fewest, *[self.scorer(device)] * scorers, reader]

    def demand(self, device: str, scorers: int) -> dict[str, float]:
        """The resources of all bundles together."""
        bundles = self.bundles(device, scorers)
        return {k: sum(b.get(k, 0.0) for b in bundles) for k in bundles[0]}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that determines a run.  `Experiment()` is the paper's passive baseline."""

    run: str | None = None
    """Run directory: a local path or s3://bucket/prefix.  The same directory continues the run."""
    seed: int = 0
    """Initial weights, order, augmentation and selection all follow from it."""
    cycles: int = 100
    """Training cycles."""
    baseline: bool = False
    """Also run the matched uniform arm (same seed, weights, tiles a cycle) and report both."""
    allow_config_change: bool = False
    """Continue a run although its configuration or data set has changed."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _require(self.cycles >= 1, f"cycles must be at least 1, got {self.cycles}")
        _require(
            self.select.protocol == "reselect" or self.select.scores == "fresh",
            f"select.protocol pool scores once a round: select.scores must be fresh, got {self.select.scores}",
        )
        _require(
            self.cluster.workers <= self.optim.micro_batches,
            f"{self.cluster.workers} workers need at least as many micro-batches a step, but optim.batch {self.optim.batch} / "
            f"optim.micro_batch {self.optim.micro_batch} is {self.optim.micro_batches}: lower --optim.micro-batch or raise --optim.batch",
        )

    @property
    def buys_labels(self) -> bool:
        """Whether labels are bought round by round."""
        return self.select.protocol == "pool"

    def schedule_span(self, cycle: int) -> tuple[int, int]:
        """First cycle and number of cycles over which the learning rate of a cycle decays."""
        if not (self.buys_labels and self.pool.retrain):
            return 0, self.cycles
        first = cycle // self.pool.cycles * self.pool.cycles
        return first, min(self.pool.cycles, self.cycles - first)

    def begins_anew(self, cycle: int) -> bool:
        """Whether a cycle begins with the initial weights again."""
        return cycle > 0 and self.schedule_span(cycle)[0] == cycle

    def restarts(self, cycles: int) -> list[int]:
        """Which of so many cycles begin anew."""
        return [c for c in range(cycles) if self.begins_anew(c)]

    @property
    def asks_people(self) -> bool:
        """Whether the labels bought come from people; then the pool is all training tiles, labelled in the store or not."""
        return self.buys_labels and self.pool.labels is not None

    def progress(self, cycle: int) -> float:
        """0 in the first cycle and 1 in the last."""
        return cycle / max(self.cycles - 1, 1)

    def scores_before(self, cycle: int) -> bool:
        """Whether a cycle may select by scores, given a strategy that does."""
        return not self.buys_labels or (cycle > 0 and self.pool.begins(cycle))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as in `config.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], where: str = "config") -> "Experiment":
        """From a (partial) nested dict, over the defaults.

        Raises:
            UsageError: unknown field or wrong type, with the nearest name.
        """
        return with_overrides(cls(), dict(flatten(fields)), where)

    def differences(self, other: "Experiment") -> dict[str, tuple[Any, Any]]:
        """Dotted field -> (own value, the other's value), for fields that differ."""
        mine, theirs = dict(flatten(self.to_dict())), dict(flatten(other.to_dict()))
        return {k: (v, theirs[k]) for k, v in mine.items() if v != theirs[k]}


@dataclass(frozen=True)
class Field:
    """One leaf of the configuration."""

    name: str
    """Dotted name."""
    kind: Any
    """Its annotation."""
    default: Any
    doc: str


@cache
def fields_of(cls: type = Experiment, prefix: str = "") -> tuple[Field, ...]:
    """All leaves of a config class in order of definition."""
    docs, hints = _docs(cls), get_type_hints(cls)
    found: list[Field] = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found += fields_of(hints[f.name], f"{prefix}{f.name}.")
        else:
            found.append(Field(prefix + f.name, hints[f.name], f.default, docs[f.name]))
    return tuple(found)


def _docs(cls: type) -> dict[str, str]:
    """Field name -> the string under it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return {
        node.target.id: " ".join(str(text.value.value).split())
        for node, text in itertools.pairwise(tree.body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of the leaves of a nested dict."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def with_overrides(base: Experiment, values: Mapping[str, Any], where: str) -> Experiment:
    """A copy of `base` with dotted fields replaced; `where` names their origin in errors.

    Raises:
        UsageError: unknown field (with the nearest name), wrong type, or a value a check refuses.
    """
    known = {f.name: f for f in fields_of()}
    tree: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"{where}: unknown field {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
            )
        *groups, leaf = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = _typed(known[name], value, where)
    return _replace(base, tree)


def _replace(base: Any, tree: Mapping[str, Any]) -> Any:
    changes = {k: _replace(getattr(base, k), v) if isinstance(v, dict) else v for k, v in tree.items()}
    return dataclasses.replace(base, **changes)


def _typed(spec: Field, value: Any, where: str) -> Any:
    """The value as the field's type; strings are parsed, `none` is None where allowed."""
    options = get_args(spec.kind) if get_origin(spec.kind) is not Literal else ()
    optional = type(None) in options
    if value is None or (optional and value == "none"):
        if optional:
            return None
        raise UsageError(f"{where}: {spec.name} must not be none")
    kind = next((o for o in options if o is not type(None)), spec.kind)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UsageError(f"{where}: {spec.name} must be one of {', '.join(get_args(kind))}, got {value!r}")
    try:
        if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and not isinstance(value, (bool, float)):
            return int(value)
        if kind is str and isinstance(value, str):
            return value
    except (ValueError, KeyError):
        pass
    raise UsageError(f"{where}: {spec.name} must be {kind.__name__}, got {value!r}")


def load_config(text: str, where: str) -> Experiment:
    """Experiment from the text of a JSON file, as `config.json` of a run or the best configuration of a sweep."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON, line {error.lineno}: {error.msg}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    configs = fields.get("configs")  # a run's config.json: all it has run under, the newest last
    return Experiment.from_dict(configs[-1]["experiment"] if configs else fields, where)
