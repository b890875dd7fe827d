"""A soak: one long run under about a fault a minute, drawn by a seed, its memory watched all the while."""

import itertools
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from raysed.cluster.chaos import CYCLES, PATIENCE, Bench, Lost, Row, Trial
from raysed.cluster.faultproxy import Rule
from raysed.cluster.local import LocalCluster
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage

FIRST = 10.0
"""Seconds of the run before the first fault."""
EVERY = (40.0, 80.0)
"""Seconds between two faults, unless the run has not recovered by then."""
SAMPLE_SECONDS = 5.0
DRAWN = ("worker",) * 3 + ("scorer",) * 2 + ("node", "refused", "flipped")
"""What is drawn from: kills of a worker, a scorer and a node, 10 s without storage, bytes that change on the way."""
LASTING = ("driver", "Monitor", "TrainController")
"""Processes that live as long as the run."""
GROWTH = 0.05
"""By which each of them may grow between the second third of the time and the last; the first is warm-up."""
STATE = {"model.safetensors", "optimizer.safetensors", "scores.parquet", "selected.parquet", "state.json"}
"""Files of a cycle from which the next one follows."""


class Soak:
    """One soak.

    Args:
        bench: with a cluster and a proxy.
        minutes: how long.
        seed: of what is drawn.
        say: prints a line.
    """

    def __init__(self, bench: Bench, minutes: float, seed: int, say: Callable[[str], None]) -> None:
        assert bench.cluster
        self.bench, self.minutes, self.seed, self.say = bench, minutes, seed, say
        self.random = random.Random(seed)
        self.trial = Trial(
            bench, f"soak {seed}", "active", root=None, mutant=bench.mutant, flags=("--cycles", "9999")
        )
        self.began = time.time()
        """When the first cycle was committed."""
        self.faults: list[dict[str, Any]] = []
        """second, what, recovered_s: until the next commit."""
        self.memory: list[dict[str, float]] = []
        """second, and MiB that only a kind of process has, of its largest one."""

    def run(self) -> tuple[Row, dict[str, Any]]:
        """Soak and judge."""
        name = "F30 soak"
        try:
            self._soak()
            return self.trial.judged(name, "survived", self.trial.note), self.facts()
        except Lost as error:
            return self.trial.judged(name, "lost", str(error)), self.facts()
        finally:
            if self.bench.proxy:
                self.bench.proxy.clear()
            self.trial.close()

    def _soak(self) -> None:
        trial = self.trial
        self.process = trial.start()
        trial.wait(lambda: trial.events("commit"), "no cycle was committed", every=1.0)
        trial.strike()
        self.began = time.time()
        due = FIRST
        while (second := time.time() - self.began) < self.minutes * 60:
            trial.must(self.process.poll() is None, f"the job ended: {trial.said()}")
            self._sample()
            if second > due:
                due = self._fault() - self.began + self.random.uniform(*EVERY)
            time.sleep(SAMPLE_SECONDS)
        self.process.send_signal(signal.SIGTERM)
        trial.ends(143)
        trial.compared = False  # it has more cycles than the calm one; those of both are compared below
        trial.check()
        calm = Ledger(Storage(self.bench.calm_run("active"))).manifests()
        for ours, theirs in zip(trial.ledger.manifests()[:CYCLES], calm, strict=True):
            both = ours.files.keys() & theirs.files.keys()  # the last cycles of a run hold more than others
            trial.must(both >= STATE, f"cycle {ours.cycle} lacks {STATE - both}")
            differ = [n for n in sorted(both) if ours.files[n]["sha256"] != theirs.files[n]["sha256"]]
            trial.must(not differ, f"cycle {ours.cycle}: {differ} are not those of the calm run")
        facts = self.facts()
        grown = {name: facts["memory"].get(name, {}).get("growth") for name in LASTING}
        for name, growth in grown.items():
            trial.must(growth is not None and growth < GROWTH, f"the memory of {name} grew by {growth}")
        growth = grown["driver"]
        trial.note = f"{self.minutes:g} min, seed {self.seed}: {facts['cycles']} cycles, {len(self.faults)} faults, goodput {facts['goodput']:.0%}, driver {growth:+.1%} memory"

    def _fault(self) -> float:
        """Draw a fault, strike, and wait for the next commit; when it struck."""
        what = self.random.choice(DRAWN)
        struck = {
            "worker": lambda: self._kill("RayTrainWorker"),
            "scorer": lambda: self._kill("Scorer.score"),
            "node": self._kill_node,
            "refused": lambda: self._rule(Rule("refuse", seconds=10)),
            "flipped": lambda: self._rule(Rule("flip", methods=("GET",), path="shards", count=2)),
        }[what]()
        self.trial.wait(
            lambda: self.trial.events("commit")[-1]["at"] > struck,
            f"no commit in {PATIENCE:.0f} s after {what}",
            every=1.0,
        )
        recovered = min(e["at"] for e in self.trial.events("commit") if e["at"] > struck) - struck
        self.faults.append(
            {"second": round(struck - self.began, 1), "what": what, "recovered_s": round(recovered, 1)}
        )
        self.say(f"{self.faults[-1]}")
        return struck

    def _kill(self, title: str) -> float:
        """SIGKILL a process whose title begins so: Ray gives it one while it works; when."""
        found: list[psutil.Process] = []

        def there() -> bool:
            found[:] = [p for p, t in self._processes() if t.startswith(title)]
            return bool(found)

        self.trial.wait(there, f"nothing was {title}")
        self.random.choice(sorted(found, key=lambda p: p.pid)).kill()
        return time.time()

    def _kill_node(self) -> float:
        """SIGKILL a node that trains; another comes ten seconds later."""
        cluster = self._cluster
        living = [i for i, n in enumerate(cluster.nodes) if i and n.popen.poll() is None]
        cluster.kill_node(self.random.choice(living))
        struck = time.time()
        time.sleep(10)
        cluster.add_node()
        return struck

    def _rule(self, rule: Rule) -> float:
        assert self.bench.proxy
        self.bench.proxy.add(rule)
        return time.time()

    @property
    def _cluster(self) -> LocalCluster:
        assert self.bench.cluster
        return self.bench.cluster

    def _processes(self) -> Iterator[tuple[psutil.Process, str]]:
        """Processes of the cluster and what they are doing: class and method."""
        for node in self._cluster.nodes:
            if node.popen.poll() is not None:
                continue
            for process in psutil.Process(node.popen.pid).children(recursive=True):
                try:
                    title = " ".join(process.cmdline()).rstrip()  # Ray pads titles
                except psutil.Error:
                    continue
                if title.startswith("ray::"):
                    yield process, title.removeprefix("ray::")

    def _sample(self) -> None:
        """Note how much memory each kind of process has for itself."""
        held: dict[str, float] = {"second": round(time.time() - self.began, 1)}
        for process, title in [(psutil.Process(self.process.pid), "driver"), *self._processes()]:
            try:
                info = process.memory_info()
            except psutil.Error:
                continue
            name = title.partition(".")[0]
            held[name] = max(held.get(name, 0.0), round((info.rss - info.shared) / 2**20, 1))
        self.memory.append(held)

    def facts(self) -> dict[str, Any]:
        """Cycles, faults, goodput (the share of the time that the committed cycles take undisturbed), memory by process."""
        commits = [e["at"] for e in self.trial.events("commit")]
        if not commits:
            return {}
        committed = len(self.trial.ledger.manifests())
        spans = list(itertools.pairwise(commits))
        struck = [self.began + f["second"] for f in self.faults]
        calm = [b - a for a, b in spans if not any(a <= s <= b for s in struck)]
        pace = statistics.median(calm) if calm else None
        passed = commits[-1] - commits[0]
        return {
            "minutes": self.minutes,
            "seed": self.seed,
            "cycles": committed,
            "cycle_s": pace and round(pace, 2),
            "goodput": round((committed - 1) * pace / passed, 3) if pace and passed else None,
            "faults": self.faults,
            "memory": {n: self._grown(n) for n in sorted({n for s in self.memory for n in s} - {"second"})},
        }

    def _grown(self, name: str) -> dict[str, Any]:
        """Medians of the last two thirds of the time in MiB, what lies between them as a share, and the samples."""
        third, series = self.minutes * 20, [(s["second"], s[name]) for s in self.memory if name in s]
        middle = [v for t, v in series if third <= t < 2 * third]
        last = [v for t, v in series if t >= 2 * third]
        if name not in LASTING or not middle or not last:
            return {"most_mib": max(v for _, v in series), "series": series[:: max(1, len(series) // 60)]}
        one, two = statistics.median(middle), statistics.median(last)
        return {"middle_mib": one, "last_mib": two, "growth": round(two / one - 1, 4), "series": series[:: max(1, len(series) // 60)]}  # fmt: skip
