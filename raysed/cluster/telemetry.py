"""What a run says while it runs: events from rank 0 to the driver, a line a cycle, TensorBoard files."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raysed.config import Experiment
from raysed.io.codec import decode_picture
from raysed.io.ledger import Ledger, Manifest
from raysed.io.storage import Storage

GAUGES = {
    "raysed_cycle": "Cycles committed",
    "raysed_train_loss": "Focal loss of the last cycle's training tiles, mean over known pixels",
    "raysed_val_loss": "Focal loss on the validation tiles, mean over known pixels",
    "raysed_val_miou": "Mean IoU over the classes present in the validation tiles",
    "raysed_tiles_per_second": "Tiles a second of the last cycle, by phase",
    "raysed_stall_share": "Share of the last cycle spent waiting for tiles",
    "raysed_scorers": "Scoring actors that are up, those given back left out",
}
"""Prometheus gauges of a run, labelled by arm; Ray exports them as `ray_<name>` on the metrics port of the driver's node."""


def gauge_values(manifest: Manifest, scorers: int) -> Iterator[tuple[str, str, float]]:
    """(gauge, phase or "", value) of a committed cycle."""
    record = manifest.record
    seconds, val = record["seconds"], record["val"]
    yield "raysed_cycle", "", manifest.cycle + 1
    yield "raysed_train_loss", "", record["train"]["loss"]
    yield "raysed_val_loss", "", val["loss"]
    yield "raysed_val_miou", "", val["miou"]
    yield "raysed_stall_share", "", seconds.get("stall", 0.0) / seconds["total"]
    yield "raysed_scorers", "", scorers
    scored = record["scores"]["tiles"] if record["scores"] else 0
    for phase, tiles in (("score", scored), ("train", record["tiles"]), ("evaluate", val["tiles"])):
        if tiles and seconds.get(phase):
            yield "raysed_tiles_per_second", phase, tiles / seconds[phase]


RESTARTS = 3
"""Times that workers may be started again without any commit between."""


class Monitor:
    """An actor where rank 0 posts events and the driver waits for them; and where the driver asks the run to stop.

    An event is a dict with a `kind`: "started", "phase" (cycle, phase), "inside" (a commit inside a cycle), "cycle" (arm,
    manifest, scorers), "say" (text), "failed" (error, text), "done".

    Args:
        allowed: cycles that may run before somebody allows more; None is all.
    """

    def __init__(self, allowed: int | None = None) -> None:
        from ray.util.metrics import Gauge

        self.gauges = {name: Gauge(name, text, tag_keys=("arm", "phase")) for name, text in GAUGES.items()}
        self.events: list[dict[str, Any]] = []
        """Those that the driver has yet to hear: a run of weeks keeps no others."""
        self.heard, self.failed = 0, False
        self.changed = threading.Condition()
        self.allowed, self.stopping = allowed, False
        self.groups, self.fruitless, self.last_error = 0, 0, ""
        self.workers = 0
        """Of the newest group."""
        self._beat = time.monotonic()

    def beat(self) -> bool:
        """Rank 0 lives; whether it is asked to stop."""
        self._beat = time.monotonic()
        return self.stopping

    def silent(self) -> tuple[float, bool]:
        """Seconds since rank 0 was last known to live, or since workers were asked for; and whether any have begun."""
        return time.monotonic() - self._beat, self.groups > 0

    def expect(self) -> None:
        """Workers are asked for now."""
        self._beat = time.monotonic()

    def begin(self, workers: int) -> int:
        """A group of workers begins; its number, from 1, or 0 if those before it ended one by one without any commit.

        A group that makes room for a larger one has not failed.
        """
        self.groups += 1
        self._beat = time.monotonic()
        if not 0 < self.workers < workers:
            self.fruitless += 1
        self.workers = workers
        self.post({"kind": "started"})
        if self.fruitless > RESTARTS + 1:
            text = f"the training workers have ended {RESTARTS + 1} times since the last commit: {self.last_error or 'they died'}"
            self.post({"kind": "failed", "error": "RaysedError", "text": text})
        return 0 if self.has_failed() else self.groups

    def lost(self, error: str) -> None:
        """A rank has raised."""
        self.last_error = error

    def post(self, event: dict[str, Any]) -> None:
        """Add an event."""
        if event["kind"] in ("cycle", "inside"):
            self.fruitless = 0
        if event["kind"] == "cycle":
            for name, phase, value in gauge_values(event["manifest"], event["scorers"]):
                self.gauges[name].set(value, {"arm": event["arm"], "phase": phase})
        with self.changed:
            self.failed |= event["kind"] == "failed"
            self.events.append(event)
            self.changed.notify_all()

    def wait(self, seen: int, timeout: float) -> list[dict[str, Any]]:
        """Events after the first `seen`, as soon as there is one, or none after `timeout` seconds; the first ones are forgotten."""
        with self.changed:
            del self.events[: seen - self.heard]
            self.heard = seen
            self.changed.wait_for(lambda: bool(self.events), timeout)
            return list(self.events)

    def allow(self, cycles: int | None, *, stop: bool) -> None:
        """So many cycles may run, and none after this one if the run is to stop."""
        with self.changed:
            self.allowed, self.stopping = cycles, self.stopping or stop
            self.changed.notify_all()

    def should_stop(self, cycle: int) -> bool:
        """Whether a cycle must not run any more; waits until it may or must not."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or self.allowed is None or cycle < self.allowed)
            return self.stopping

    def has_failed(self) -> bool:
        """Whether a rank has posted the error that ends the run."""
        return self.failed


class Progress:
    """One plain line a cycle, with the time that is left.

    Args:
        arms: names and experiments in the order they run.
        committed: cycles of each that a run before has committed.
        say: prints a line.
    """

    def __init__(
        self, arms: list[tuple[str, Experiment]], committed: dict[str, int], say: Callable[[str], None]
    ) -> None:
        self.left = {name: experiment.cycles - committed[name] for name, experiment in arms}
        self.seconds: dict[str, list[float]] = {name: [] for name, _ in arms}
        self.cycles = {name: experiment.cycles for name, experiment in arms}
        self.width = max(len(name) for name, _ in arms)
        self.say = say

    def cycle(self, arm: str, manifest: Manifest) -> None:
        """Print the line of a cycle that has just been committed."""
        record, number = manifest.record, manifest.cycle
        seconds, val = record["seconds"], record["val"]
        self.left[arm] = self.cycles[arm] - number - 1
        self.seconds[arm].append(seconds["total"])
        known = [s for s in val["iou"].items() if s[1] is not None]
        worst = min(known, key=lambda s: s[1]) if known else ("-", 0.0)
        phases = " ".join(
            f"{k} {seconds[k]:.1f}" for k in ("score", "train", "stall", "evaluate", "commit") if k in seconds
        )
        self.say(
            f"{arm:>{self.width}} {number + 1:>3}/{self.cycles[arm]}  loss {record['train']['loss']:.4f}  mIoU {val['miou']:.3f}  "
            f"worst {worst[0]} {worst[1]:.3f}  {seconds['total']:.1f} s ({phases})  ETA {clock(self.eta())}"
        )

    def eta(self) -> float:
        """Seconds left, from the warm cycles seen; an arm that has not begun counts like the slowest seen."""
        warm = {a: sorted(s[1:] or s)[len(s[1:] or s) // 2] for a, s in self.seconds.items() if s}
        return sum(left * warm.get(arm, max(warm.values())) for arm, left in self.left.items())


def clock(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class TensorBoard:
    """Event files of a run, rebuilt from the manifests at every start, so that a resumed run shows each cycle once.

    Args:
        run: the run directory; files are written here on disk and copied there after each cycle.
        manifests: of the cycles committed so far.
    """

    def __init__(self, run: Storage, manifests: list[Manifest]) -> None:
        from tensorboardX import SummaryWriter

        for path in run.list("tensorboard"):
            run.remove(path)
        self.run = run
        self.folder = tempfile.TemporaryDirectory(prefix="raysed-tensorboard-")
        self.writer = SummaryWriter(self.folder.name, flush_secs=3600)
        for manifest in manifests:
            self._add(manifest)
        if manifests:
            self._publish()

    def cycle(self, manifest: Manifest) -> None:
        """Add a cycle."""
        self._add(manifest)
        self._publish()

    def close(self) -> None:
        """Close the files; the writer's flush can leave the last event behind, closing it does not."""
        self.writer.close()
        self._copy()
        self.folder.cleanup()

    def _add(self, manifest: Manifest) -> None:
        record = manifest.record
        scalars = {f"train/{k}": v for k, v in record["train"].items()}
        scalars |= {f"val/{k}": v for k, v in record["val"].items() if isinstance(v, (int, float))}
        scalars |= {f"val_iou/{k}": v for k, v in record["val"]["iou"].items() if v is not None}
        scalars |= {f"seconds/{k}": v for k, v in record["seconds"].items()}
        if record["scores"] and record["scores"]["entropy_mean"] is not None:  # losses alone have none
            scalars["scores/entropy_mean"] = record["scores"]["entropy_mean"]
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, manifest.cycle, walltime=time.time())
        if "examples.png" in manifest.files:
            pixels = decode_picture(Ledger(self.run).read(manifest, "examples.png"))
            self.writer.add_image("examples", pixels, manifest.cycle, dataformats="HWC")

    def _publish(self) -> None:
        self.writer.flush()
        self._copy()

    def _copy(self) -> None:
        for path in Path(self.folder.name).iterdir():
            self.run.write(f"tensorboard/{path.name}", path.read_bytes())
