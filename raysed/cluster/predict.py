"""Images to class maps: plan, map by blocks on an actor pool, put together.

INPUT: images and a model.  FAN-OUT: one call a block of windows, on a pool of actors that hold the network.  An image of one
block becomes its map in that call; of a larger one each block becomes a piece, and a task puts the pieces together when the
last is there.  OUTPUT: a target folder of maps.  What is in it:

    NAME.tif NAME.tif.aux.xml       the map, written last: it commits the image; NAME.png for a PNG or JPEG
    NAME.entropy.tif NAME.probabilities.tif
    made/HASH/NAME@BYTES            written first: these outputs are of this model, these settings and this image
    pieces/HASH/NAME@BYTES/         blocks of a map that is not finished
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import ray.data

from raysed import errors
from raysed.cluster.connect import connect
from raysed.cluster.mapper import Mapper, Settings, Task, assemble, count, plan_images
from raysed.cluster.tasks import TASK_CPUS, check_paths, run_tasks
from raysed.core import metrics
from raysed.errors import DataError, ResourcesError, UsageError
from raysed.io.imagery import Image
from raysed.io.model import Model
from raysed.io.storage import Storage

ACTOR_CPUS = 0.9
"""CPUs that Ray reserves for an actor on CPUs; its threads are the node's CPUs divided by its actors."""


def predict(
    model: Model,
    images: Sequence[Image],
    target: str,
    settings: Settings,
    *,
    labels: dict[str, Image] | None = None,
    workers: int | None = None,
    device: str = "auto",
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
        device: `auto`, `cpu` or `cuda`.
        overwrite: replace outputs of other models, settings or images.
        shared_filesystem: all nodes of the cluster see the same files.
        say: prints a line.

    Returns:
        maps made now, maps that were there, bad images with their reasons, seconds, and metrics if there are labels.

    Raises:
        UsageError: outputs are there that are not of this model, these settings and these images.
        ResourcesError: the cluster has nothing to run on.
    """
    began = time.monotonic()
    storage = Storage(target)
    task = Task(model.record, settings, storage.uri)
    todo = _unmade(storage, task, images, overwrite=overwrite)
    model.network()  # weights that do not fit are told before the cluster is asked
    connect()
    if not shared_filesystem:
        check_paths(storage, *(Storage(root) for root in sorted({i.root for i in images})))
    made, bad = _map(model, todo, task, labels=labels or {}, workers=workers, device=device, say=say)
    there = [i for i in images if i.name not in bad]
    result: dict[str, Any] = {
        "maps": made,
        "there before": len(images) - len(todo),
        "bad": bad,
        "seconds": round(time.monotonic() - began, 1),
    }
    if labels:
        result["metrics"] = _score(there, task, labels, bad, say)
        storage.write("metrics.json", (json.dumps(result["metrics"], indent=1) + "\n").encode())
    say(
        f"{storage.uri}: {made} maps made, {result['there before']} were there, {len(bad)} images without a map, "
        f"{result['seconds']} s"
    )
    return result


def _unmade(storage: Storage, task: Task, images: Sequence[Image], *, overwrite: bool) -> list[Image]:
    """Images whose maps are not finished; outputs of others are refused, or removed if asked to."""
    there = storage.list()
    own = {f"{i.root}/{i.path}" for i in images}
    foreign: list[str] = []
    todo = []
    for image in images:
        outputs = task.outputs(image)
        hit = [p for p in outputs if f"{storage.uri}/{p}" in own]
        if hit:
            raise UsageError(
                f"the map {storage.uri}/{hit[0]} would replace an image: choose another --target"
            )
        if task.marker(image) in there:
            if not all(p in there for p in outputs):
                todo.append(image)
            continue
        todo.append(image)
        foreign += [p for p in (*outputs, f"{outputs[-1]}.aux.xml") if p in there]
    if foreign and not overwrite:
        raise UsageError(
            f"{storage.uri}/{foreign[0]} exists{f', with {len(foreign) - 1} more,' if len(foreign) > 1 else ''} and was not made "
            "from this image by this model with these settings: choose another --target, or give --overwrite"
        )
    for image in todo if foreign else []:
        for path in there:
            if (
                path.startswith("made/")
                and path.partition("/")[2].partition("/")[2].rpartition("@")[0] == image.name
            ):
                storage.remove(path)
    for path in foreign:
        storage.remove(path)
    return todo


def _map(
    model: Model,
    todo: list[Image],
    task: Task,
    *,
    labels: dict[str, Image],
    workers: int | None,
    device: str,
    say: Callable[[str], None],
) -> tuple[int, dict[str, str]]:
    """Maps made, and images that gave none with their reasons."""
    if not todo:
        return 0, {}
    items = [
        {
            "item": json.dumps(
                {"image": asdict(i), "label": asdict(labels[i.name]) if i.name in labels else None}
            )
        }
        for i in todo
    ]
    plans = list(run_tasks(plan_images, items, 16, {"task": task}))
    bad = {p["name"]: p["reason"] for p in plans if "reason" in p}
    plans = [p for p in plans if "reason" not in p]
    _say_notes(plans, task, say)
    images, storage = {i.name: i for i in todo}, Storage(task.target)
    left: dict[str, int] = {}
    work: list[dict[str, str]] = []
    held = storage.list(f"pieces/{task.key}")
    ready: list[str] = []
    for plan in plans:
        image = images[plan["name"]]
        blocks = plan["blocks"]
        missing = [b["block"] for b in blocks if f"{task.pieces(image)}/{b['piece']}" not in held]
        left[image.name] = len(missing)
        if not missing:
            ready.append(image.name)
        fields = {"image": asdict(image), "whole": len(blocks) == 1}
        work += [{"item": json.dumps({**fields, "block": block})} for block in missing]
    total = sum(p["pixels"] for p in plans)
    say(
        f"{len(plans)} images, {total / 1e6:.1f} Mpx, {len(work)} blocks to map"
        + (f", {len(held)} are there already" if held else "")
    )
    alone = {p["name"] for p in plans if len(p["blocks"]) == 1}
    putting = _Assembly(task, images)
    for name in ready:
        putting.start(name)
    made = 0
    started, last = time.monotonic(), 0.0
    for done, answer in enumerate(_answers(model, task, work, workers, device), start=1):
        name = _name(answer, bad)
        left[name] -= 1
        if name in alone:
            made += name not in bad
        elif not left[name] and name not in bad:
            putting.start(name)
        passed = time.monotonic() - started
        if passed - last > 10 or done == len(work):
            last = passed
            say(f"block {done}/{len(work)}  ETA {passed / done * (len(work) - done):.0f} s")
    made += putting.finish(bad)
    for name in [n for n in bad if n in images]:
        for path in storage.list(task.pieces(images[name])):
            storage.remove(path)
    for name, reason in sorted(bad.items()):
        say(f"no map of {name}: {reason}")
    return made, bad


def _say_notes(plans: list[dict[str, Any]], task: Task, say: Callable[[str], None]) -> None:
    record = task.record
    nowhere = [p["name"] for p in plans if not p["place"]]
    if nowhere:
        say(f"note: {len(nowhere)} images have no CRS ({nowhere[0]}), so their maps have none")
    by_pixels = sum(p["scale"] == "pixels" for p in plans)
    if record.metres and by_pixels:
        say(
            f"note: {by_pixels} images do not say their metres a pixel; they are taken to be of the training images' "
            f"scale, {record.scale[0]:.3g} x {record.scale[1]:.3g} source pixels a model pixel"
        )


def _name(answer: dict[str, Any], bad: dict[str, str]) -> str:
    """Name of the image that an answer is about; a reason goes into `bad`, an error is raised."""
    if "error" in answer:
        raise errors.rebuilt(answer["error"], answer["text"])
    if "reason" in answer:
        bad[answer["name"]] = answer["reason"]
    return answer["name"]


class _Assembly:
    """Tasks that put pieces together, while others are mapped."""

    def __init__(self, task: Task, images: dict[str, Image]) -> None:
        self.task, self.images = task, images
        self.remote: Any = ray.remote(assemble).options(num_cpus=TASK_CPUS, max_retries=3)
        self.running: list[Any] = []

    def start(self, name: str) -> None:
        self.running.append(self.remote.remote(self.task, self.images[name]))

    def finish(self, bad: dict[str, str]) -> int:
        """Maps made."""
        names = [_name(answer, bad) for answer in ray.get(self.running)]
        return sum(n not in bad for n in names)


def _answers(
    model: Model, task: Task, work: list[dict[str, str]], workers: int | None, device: str
) -> Iterator[dict[str, Any]]:
    """Answers of the actors, in the order of the work."""
    if not work:
        return
    resources = ray.cluster_resources()
    gpu = device == "cuda" or (device == "auto" and resources.get("GPU", 0) >= 1)
    unit, have = ("GPU", int(resources.get("GPU", 0))) if gpu else ("CPU", int(resources.get("CPU", 0)))
    if have < (workers or 1):
        raise ResourcesError(
            f"{workers or 1} workers ask for a {unit} each, the cluster has {have}: lower --workers, or add nodes"
        )
    size = min(workers or have, len(work))
    pool = ray.data.ActorPoolStrategy(
        min_size=size, max_size=workers and size, max_tasks_in_flight_per_actor=2
    )
    nodes = [n for n in ray.nodes() if n["Alive"]]
    threads = 1 if gpu else max(1, int(resources["CPU"] // len(nodes)) // -(-size // len(nodes)))
    reference = ray.put({n: t.numpy() for n, t in model.weights.items()})
    source = ray.data.from_items(work, override_num_blocks=len(work))
    mapper: Any = Mapper  # mypy knows a narrower kind of batch function than Ray takes
    answers = source.map_batches(
        mapper,
        batch_size=1,
        compute=pool,
        num_cpus=1 if gpu else ACTOR_CPUS,
        num_gpus=1 if gpu else 0,
        fn_constructor_kwargs={
            "task": task,
            "weights": {"reference": reference},
            "device": "cuda" if gpu else "cpu",
            "threads": threads,
        },
    )
    for row in answers.iter_rows():
        yield json.loads(row["answer"])


def _score(
    images: list[Image], task: Task, labels: dict[str, Image], bad: dict[str, str], say: Callable[[str], None]
) -> dict[str, Any]:
    """C8 metrics of the maps that have labels, over all of them together."""
    known = [i for i in images if i.name in labels]
    items = [{"item": json.dumps({"image": asdict(i), "label": asdict(labels[i.name])})} for i in known]
    classes = task.record.classes
    counts = np.zeros((len(classes), len(classes)), np.int64)
    scored = 0
    for row in run_tasks(count, items, 4, {"task": task}):
        if "reason" in row:
            bad[row["name"]] = row["reason"]
            say(f"no score of {row['name']}: {row['reason']}")
            continue
        counts += np.array(row["counts"])
        scored += 1
    if not scored:
        raise DataError(f"none of the {len(known)} labels can be used")
    say(f"{scored} of {len(images)} maps have labels")
    return {"images": scored, **metrics.scores(counts, [c.name for c in classes]), "counts": counts.tolist()}
