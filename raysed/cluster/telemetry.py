"""What a run says while it runs: events from rank 0 to the driver, a line a cycle, TensorBoard files."""

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysed.config import Experiment
from raysed.io.ledger import Manifest
from raysed.io.storage import Storage


class Monitor:
    """An actor where rank 0 posts events and the driver waits for them; and where the driver asks the run to stop.

    An event is a dict with a `kind`: "phase" (cycle, phase), "cycle" (arm, cycle, record), "say" (text), "failed" (exit_code,
    text), "done".
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self.stopping = False

    def post(self, event: dict[str, Any]) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def wait(self, seen: int, timeout: float) -> list[dict[str, Any]]:
        """Events after the first `seen`, as soon as there is one, or none after `timeout` seconds."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.events) > seen, timeout)
            return self.events[seen:]

    def stop(self) -> None:
        self.stopping = True

    def should_stop(self) -> bool:
        return self.stopping


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
            f"{arm:>8} {number + 1:>3}/{self.cycles[arm]}  loss {record['train']['loss']:.4f}  mIoU {val['miou']:.3f}  "
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
            self._copy()

    def cycle(self, manifest: Manifest) -> None:
        """Add a cycle."""
        self._add(manifest)
        self._copy()

    def close(self) -> None:
        """Close the files."""
        self.writer.close()
        self.folder.cleanup()

    def _add(self, manifest: Manifest) -> None:
        record = manifest.record
        scalars = {f"train/{k}": v for k, v in record["train"].items()}
        scalars |= {f"val/{k}": v for k, v in record["val"].items() if isinstance(v, (int, float))}
        scalars |= {f"val_iou/{k}": v for k, v in record["val"]["iou"].items() if v is not None}
        scalars |= {f"seconds/{k}": v for k, v in record["seconds"].items()}
        if record["scores"]:
            scalars["scores/entropy_mean"] = record["scores"]["entropy_mean"]
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, manifest.cycle, walltime=time.time())

    def _copy(self) -> None:
        self.writer.flush()
        for path in Path(self.folder.name).iterdir():
            self.run.write(f"tensorboard/{path.name}", path.read_bytes())
