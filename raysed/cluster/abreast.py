"""Several runs on one cluster, side by side where it has room."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import ray

from raysed.cluster.connect import connect
from raysed.cluster.launch import Stepper, signals_noted
from raysed.cluster.room import candidates, scorer_count
from raysed.config import ClusterConfig, Experiment
from raysed.core.sweep import Demand, at_once
from raysed.errors import EXIT_INTERRUPTED, DivergedError

LOOK_SECONDS = 0.5
"""Between two looks at what has ended."""


def carry_out_all(
    runs: Sequence[tuple[str, Experiment]],
    *,
    say: Callable[[str], None],
    ended: Callable[[int], None],
    hold: str | None = None,
) -> int:
    """Run experiments to their ends, or continue them, as many at once as find room.

    A run on CPUs that does not say how many threads it takes has its node for itself.

    Args:
        runs: name and experiment, in the order in which they begin.
        say: prints a line.
        ended: called with the number of each run that has ended, diverged or been stopped after a commit.
        hold: as for `launch`.

    Returns:
        0; the exit code of a run that diverged; or that of the signal which ended them after a commit each.

    Raises:
        RaysedError: of the first run that failed otherwise, once the others have committed the cycle they were in.
    """
    connect()
    together = min((_together(e.cluster, len(runs)) for _, e in runs), default=1)
    if together > 1:
        say(f"{len(runs)} runs, {together} at once")
    waiting, running = deque(range(len(runs))), dict[int, Stepper]()
    code, failed, caught = 0, list[BaseException](), list[int]()
    with signals_noted(caught):
        while running or (waiting and not caught and not failed):
            while waiting and len(running) < together and not caught and not failed:
                number = waiting.popleft()
                name, experiment = runs[number]
                say(f"\n{name}: {experiment.run}")
                running[number] = Stepper(
                    _shared(experiment, together), None, _labelled(say, name, together), hold
                )
            time.sleep(LOOK_SECONDS)
            for number, run in list(running.items()):
                if caught or failed:
                    run.end()
                if not run.over():
                    continue
                del running[number]
                if isinstance(run.error, DivergedError):
                    say(f"{runs[number][0]} goes no further: {run.error}")
                    code = run.error.exit_code
                elif run.error is not None:
                    failed.append(run.error)
                    continue
                ended(number)
    if failed:
        raise failed[0]
    return EXIT_INTERRUPTED[caught[0]] if caught else code


def _together(cluster: ClusterConfig, runs: int) -> int:
    have = ray.cluster_resources()
    device = candidates(cluster)[0]
    if device == "cpu" and cluster.threads is None:
        return 1
    alone = replace(cluster, scorers=cluster.scorers or cluster.workers)
    demand = alone.demand(device, scorer_count(alone, device))
    cpus = max(demand["CPU"], cluster.workers * (cluster.threads or 1))
    return at_once(Demand(cluster.workers, cpus, demand.get("GPU", 0)), have, runs)


def _shared(experiment: Experiment, together: int) -> Experiment:
    """With no more scorers than leave room for the other runs."""
    cluster = experiment.cluster
    scorers = cluster.scorers or (cluster.workers if together > 1 else None)
    return replace(experiment, cluster=replace(cluster, scorers=scorers))


def _labelled(say: Callable[[str], None], name: str, together: int) -> Callable[[str], None]:
    return say if together == 1 else lambda line: say(f"{name}: {line}")
