"""Images to class maps: plan, map by blocks on an actor pool, put together.

INPUT: images and a model.  FAN-OUT: one call a block of windows, on a pool of actors that hold the network.  An image of one
block becomes its map in that call; of a larger one each block becomes a piece, and a task puts the pieces together when the
last is there.  OUTPUT: a target folder of maps.  What is in it:

    NAME.tif NAME.tif.aux.xml       the map, written last: it commits the image; NAME.png for a PNG or JPEG
    NAME.entropy.tif NAME.probabilities.tif
    made/HASH/NAME@IMAGE            written first: these outputs are of this model, these settings and this image
    pieces/HASH/NAME@IMAGE/         blocks of a map that is not finished
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from raysed import errors
from raysed.cluster.connect import autoscaling, check_paths, connect
from raysed.cluster.mapper import (
    BlockMapper,
    Plan,
    Settings,
    Task,
    assemble,
    count,
    extras,
    plan_image,
    reason_of,
)
from raysed.cluster.room import candidates, none_has_room, placed, secure_task
from raysed.cluster.tasks import TASK_CPUS
from raysed.config import ClusterConfig
from raysed.core import metrics
from raysed.core.windows import Block
from raysed.errors import RaysedError, ResourcesError, StorageError, UsageError
from raysed.io.imagery import Image
from raysed.io.model import Model
from raysed.io.sources import BadSource
from raysed.io.storage import Storage

HEADERS = 16
"""Headers read at once."""
ACTOR_CPUS = 0.9
"""CPUs that Ray reserves for an actor on CPUs; its threads are the node's CPUs divided by its actors."""
ACTORS = {"cuda": {"CPU": 1.0, "GPU": 1.0}, "cpu": {"CPU": ACTOR_CPUS}}
"""What Ray reserves for an actor, by device."""


class Mapper:
    """An actor that maps blocks: builds the network once.

    Args:
        task: what to make.
        weights: reference of the state dict of `Network.net` as arrays.
        device: `cpu` or `cuda`.
        threads: torch threads.
    """

    def __init__(self, task: Task, weights: dict[str, Any], device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        arrays = ray.get(weights["reference"])
        self.task = task
        self.mapper = BlockMapper(task, {n: torch.from_numpy(np.array(w)) for n, w in arrays.items()}, device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """INPUT: blocks.  OUTPUT: what became of each, see `_answer`."""
        return {"answer": [self.answer(**json.loads(text)) for text in batch["item"]]}

    def answer(
        self,
        image: dict[str, Any],
        label: dict[str, Any] | None,
        block: tuple[tuple[int, int], tuple[int, int]],
        whole: bool,
    ) -> str:
        made = Image(**image)
        work = lambda: self.mapper.make(made, Block(*block), whole=whole)  # noqa: E731
        return _answer(self.task, made, Image(**label) if label and whole else None, work)


def _answer(task: Task, image: Image, label: Image | None, work: Callable[[], None]) -> str:
    """What became of a piece of work on an image, as JSON: its name; `counts` if there is a label and so a map; `bad`, why it
    gives no map or no counts; or `error` and `text`, to be raised: Ray Data loses the cause of what a task raises.
    """
    found: dict[str, Any] = {"name": image.name}
    try:
        work()
        if label:
            found["counts"] = count(task, image, label).tolist()
    except BadSource as error:
        found["bad"] = str(error)
    except RaysedError as error:
        found |= {"error": type(error).__name__, "text": str(error)}
    except OSError as error:  # of the disk on which maps are made: storage and sources raise their own
        text = f"{image.path}: its map cannot be made in {tempfile.gettempdir()} (TMPDIR chooses another place): {error}"
        found |= {"error": StorageError.__name__, "text": text}
    return json.dumps(found)


def put_together(task: Task, plan: Plan) -> str:
    """INPUT: an image whose pieces are all there.  OUTPUT: what became of it, see `_answer`."""
    return _answer(task, plan.image, plan.label, lambda: assemble(task, plan.image, plan.pieces))


def compare(task: Task, image: Image, label: Image) -> str:
    """INPUT: an image whose map is there.  OUTPUT: counts, see `_answer`."""
    return _answer(task, image, label, lambda: None)


class Outcome:
    """What has become of the images so far."""

    def __init__(self, classes: int) -> None:
        self.bad: dict[str, str] = {}
        self.counts = np.zeros((classes, classes), np.int64)
        self.scored = 0

    def take(self, answer: str) -> str:
        """Add an answer; the name of its image.

        Raises:
            RaysedError: what the work has raised on purpose.
        """
        found = json.loads(answer)
        if "error" in found:
            raise errors.rebuilt(found["error"], found["text"])
        if "bad" in found:
            self.bad[found["name"]] = found["bad"]
        if "counts" in found:
            self.counts += np.array(found["counts"])
            self.scored += 1
        return found["name"]


def predict(
    model: Model,
    images: Sequence[Image],
    target: str,
    settings: Settings,
    *,
    labels: dict[str, Image] | None = None,
    workers: int | None = None,
    device: str = "auto",
    wait_nodes: float | None = None,
    overwrite: bool = False,
    shared_filesystem: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Make the maps of images, or finish those begun.

    Args:
        model: what maps them.
        images: to map.
        target: URI of the folder of maps.
        settings: what to write.
        labels: of images by name; with them the maps are scored.
        workers: actors; None means one a GPU or CPU, and more as the cluster grows.
        device: `auto`, `cpu` or `cuda`; auto is cuda where the cluster has a GPU, or its autoscaler may start one.
        wait_nodes: seconds to wait for room, as `ClusterConfig.wait_nodes`.
        overwrite: make all maps anew, in place of whatever is there.
        shared_filesystem: all nodes of the cluster see the same files.
        say: prints a line.

    Returns:
        maps made now, maps that were there, bad images with their reasons, seconds, and metrics if there are labels.

    Raises:
        UsageError: outputs are there that are not of this model, these settings and these images.
        ResourcesError: the cluster has no room.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}")
    began = time.monotonic()
    storage, labels = Storage(target), labels or {}
    task = Task(model.record, settings, storage.uri)
    todo = unmade(storage, task, images, labels.values(), overwrite=overwrite)
    model.network()  # weights that do not fit are told before the cluster is asked
    connect()
    roots = {i.root for i in (*images, *labels.values())}
    check_paths({uri: uri for uri in (storage.uri, *sorted(roots))}, shared=shared_filesystem)
    outcome = Outcome(len(model.record.classes))
    plans = _plans(todo, labels, task, outcome)
    _say_notes(plans, task, say)
    finished = {i.name for i in images} - {i.name for i in todo}
    scored = [i for i in images if i.name in finished and i.name in labels]
    work, left = _work(plans, task)
    say(
        f"{len(plans)} images, {sum(p.pixels for p in plans) / 1e6:.1f} Mpx, {len(work)} blocks to map, "
        f"{sum(len(p.blocks) for p in plans) - len(work)} are there already"
    )
    answers: Iterator[str] = iter(())
    if work:
        answers = _answers(model, task, work, _crew(len(work), workers, device, wait_nodes, say))
    elif plans or scored:
        secure_task(say, wait_nodes)
    small = ray.remote(compare).options(num_cpus=TASK_CPUS)
    together = ray.remote(put_together).options(num_cpus=TASK_CPUS, max_retries=3)
    running = [small.remote(task, i, labels[i.name]) for i in scored]
    running += [together.remote(task, p) for p in plans if not left[p.image.name]]
    large = {p.image.name: p for p in plans if len(p.blocks) > 1}
    try:
        for name in _taken(answers, len(work), outcome, say):
            left[name] -= 1
            if name in large and not left[name] and name not in outcome.bad:
                running.append(together.remote(task, large[name]))
        for answer in ray.get(running):
            outcome.take(answer)
    except BaseException:  # no task may go on when the job has ended: the next one would meet it
        for reference in running:
            ray.cancel(reference, force=True)
        raise
    for image in (i for i in todo if i.name in outcome.bad):
        for path in storage.list(task.pieces(image)):
            storage.remove(path)
    for name, reason in sorted(outcome.bad.items()):
        say(f"{name} cannot be used: {reason}")
    result: dict[str, Any] = {
        "maps": len({i.name for i in todo} - outcome.bad.keys()),
        "there before": len(finished),
        "bad": outcome.bad,
        "seconds": round(time.monotonic() - began, 1),
    }
    if outcome.scored:
        names = [c.name for c in model.record.classes]
        scores = metrics.scores(outcome.counts, names)
        result["metrics"] = {"images": outcome.scored, **scores, "counts": outcome.counts.tolist()}
        storage.write("metrics.json", (json.dumps(result["metrics"], indent=1) + "\n").encode())
    say(
        f"{storage.uri}: {result['maps']} maps made, {len(finished)} were there, {len(outcome.bad)} images cannot be used, "
        f"{result['seconds']} s"
    )
    return result


def unmade(
    storage: Storage,
    task: Task,
    images: Sequence[Image],
    labels: Iterable[Image] = (),
    *,
    overwrite: bool,
) -> list[Image]:
    """Images whose maps are to be made; outputs of others are refused, or removed if asked to.

    Args:
        storage: the target.
        task: what to make.
        images: to be mapped.
        labels: that the maps are compared with.
        overwrite: make all anew, also those that are finished.

    Raises:
        UsageError: a map would replace an image, a label or another map, or outputs are there that are not of this model, these
            settings and these images.
    """
    there = storage.list()
    sources = {_real(f"{i.root}/{i.path}") for i in (*images, *labels)}
    stale: list[str] = []
    todo, makers = [], dict[str, Image]()
    for image in images:
        outputs = task.outputs(image)
        for path in outputs:
            if _real(f"{storage.uri}/{path}") in sources:
                raise UsageError(
                    f"{storage.uri}/{path} would replace an image or a label: choose another --target"
                )
            if (other := makers.setdefault(path, image)) is not image:
                raise UsageError(f"{image.path} and {other.path} would both give {storage.uri}/{path}")
        own = task.marker(image) in there
        if own and not overwrite and all(p in there for p in outputs):
            continue
        todo.append(image)
        if overwrite or not own:
            stale += [p for p in (*outputs, f"{outputs[-1]}.aux.xml") if p in there]
    if stale and not overwrite:
        raise UsageError(
            f"{storage.uri}/{stale[0]} exists{f', with {len(stale) - 1} more,' if len(stale) > 1 else ''} and was not made "
            "from this image by this model with these settings: choose another --target, or give --overwrite"
        )
    markers = {i.name: task.marker(i) for i in todo}
    # the outputs first: without a marker they are nobody's; the markers always: those of maps that were deleted would claim these
    others = [p for p in there if p.startswith("made/") and p != markers.get(_marked(p), p)]
    theirs = {_marked(p) for p in others}
    for image in (i for i in todo if i.name in theirs):  # layers of that model and those settings
        stale += [p for p in extras(image) if p in there and p not in makers]
    pieces = {i.name: task.pieces(i) for i in todo}
    for path in (p for p in there if p.startswith("pieces/")):
        folder = path.rpartition("/")[0]
        if folder != pieces.get(_marked(folder), folder):
            others.append(path)
    for path in (*stale, *others):
        storage.remove(path)
    return todo


def _real(uri: str) -> str:
    """A local path without links, by which two names of a file are one."""
    return uri if "://" in uri else os.path.realpath(uri)


def _marked(marker: str) -> str:
    """Name of the image of a marker."""
    _, _, below = marker.partition("/")
    return below.partition("/")[2].rpartition("@")[0]


def _plans(todo: list[Image], labels: dict[str, Image], task: Task, outcome: Outcome) -> list[Plan]:
    """Plans of the images that can be used: headers are read here, several at once, a cold start of tasks takes longer."""

    def plan(image: Image) -> Plan | None:
        try:
            return plan_image(image, labels.get(image.name), task)
        except BadSource as error:
            outcome.bad[image.name] = reason_of(error)
            return None

    with ThreadPoolExecutor(HEADERS) as pool:
        return [p for p in pool.map(plan, todo) if p]


def _work(plans: list[Plan], task: Task) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Blocks to map, as `Mapper` takes them, and how many of each image."""
    held = Storage(task.target).list(f"pieces/{task.key}") if plans else {}
    left: dict[str, int] = {}
    work: list[dict[str, str]] = []
    for plan in plans:
        there = [f"{task.pieces(plan.image)}/{piece}" in held for piece in plan.pieces]
        left[plan.image.name] = there.count(False)
        fields = {"image": asdict(plan.image), "label": plan.label and asdict(plan.label)}
        work += [
            {"item": json.dumps({**fields, "block": [b.rows, b.cols], "whole": len(there) == 1})}
            for b, done in zip(plan.blocks, there, strict=True)
            if not done
        ]
    return work, left


@dataclass(frozen=True)
class Crew:
    """The actors that map."""

    device: str
    """`cpu` or `cuda`."""
    size: int
    """How many begin."""
    grows: bool
    """More are started as the cluster grows."""
    threads: int
    """Torch threads of each."""


def _crew(
    blocks: int, workers: int | None, device: str, wait_nodes: float | None, say: Callable[[str], None]
) -> Crew:
    """Wait until the actors asked for, or one, find room: Ray Data would wait for ever without an error.

    Raises:
        ResourcesError: there is no room, and none to be expected.
    """
    cluster, scaling = ClusterConfig(device=device, wait_nodes=wait_nodes), autoscaling()  # type: ignore[arg-type]
    least = min(workers or 1, blocks)
    for kind in candidates(cluster):
        unit, have = _units(kind)
        if have < least and not scaling:
            raise ResourcesError(
                f"{least} workers ask for a {unit} each, the cluster has {have}: lower --workers, or add nodes"
            )
        if placed([ACTORS[kind]] * least, cluster.patience(autoscaling=scaling), say, _REMEDY):
            _, have = _units(kind)
            size = min(workers or have, blocks)
            return Crew(kind, size, workers is None, 1 if kind == "cuda" else _threads(size))
    raise ResourcesError(
        f"{least} workers ask for a {unit} each, {none_has_room()}: lower --workers, or add nodes"
    )


_REMEDY = "add nodes, wait until other jobs have ended, lower --workers or raise --wait-nodes"


def _units(device: str) -> tuple[str, int]:
    """What an actor has for itself, and how many of them the cluster has."""
    unit = "GPU" if device == "cuda" else "CPU"
    return unit, int(ray.cluster_resources().get(unit, 0))


def _threads(actors: int) -> int:
    """Torch threads of each of so many actors on CPUs, spread over the nodes that have any."""
    cpus = [n["Resources"]["CPU"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    return max(1, int(sum(cpus) // len(cpus)) // -(-actors // len(cpus)))


def _taken(
    answers: Iterator[str], blocks: int, outcome: Outcome, say: Callable[[str], None]
) -> Iterator[str]:
    """The name of the image of each block that is mapped; what became of it is noted, and how long the rest will take is said."""
    started, last = time.monotonic(), 0.0
    for done, answer in enumerate(answers, start=1):
        yield outcome.take(answer)
        passed = time.monotonic() - started
        if passed - last > 10 or done == blocks:
            last = passed
            say(f"block {done}/{blocks}  ETA {passed / done * (blocks - done):.0f} s")


def _say_notes(plans: list[Plan], task: Task, say: Callable[[str], None]) -> None:
    record = task.record
    if nowhere := [p.image.name for p in plans if not p.has_crs]:
        say(f"note: {len(nowhere)} images have no CRS ({nowhere[0]}), so their maps have none")
    if record.metres and (unknown := [p.image.name for p in plans if not p.by_metres]):
        say(
            f"note: {len(unknown)} images do not say their metres a pixel ({unknown[0]}); they are taken to be like the training "
            f"images: {record.scale[0]:.3g} x {record.scale[1]:.3g} source pixels a model pixel"
        )


def _answers(model: Model, task: Task, work: list[dict[str, str]], crew: Crew) -> Iterator[str]:
    """Answers of the actors, in the order of the work."""
    pool = ray.data.ActorPoolStrategy(
        min_size=crew.size, max_size=None if crew.grows else crew.size, max_tasks_in_flight_per_actor=2
    )
    reference = ray.put({n: t.numpy() for n, t in model.weights.items()})
    source = ray.data.from_items(work, override_num_blocks=len(work))
    mapper: Any = Mapper  # mypy knows a narrower kind of batch function than Ray takes
    asked = ACTORS[crew.device]
    answers = source.map_batches(
        mapper,
        batch_size=1,
        compute=pool,
        num_cpus=asked["CPU"],
        num_gpus=asked.get("GPU", 0),
        fn_constructor_kwargs={
            "task": task,
            "weights": {"reference": reference},
            "device": crew.device,
            "threads": crew.threads,
        },
    )
    for row in answers.iter_rows():
        yield row["answer"]
