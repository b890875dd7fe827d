"""Room for a run on a cluster: what it needs at once, proven before anything starts; an autoscaler starts the nodes for it."""

import time
from collections.abc import Callable

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raysed.cluster.checks import described
from raysed.cluster.connect import autoscaler, autoscaling
from raysed.cluster.nodes import offers
from raysed.cluster.tasks import TASK_CPUS
from raysed.config import ClusterConfig
from raysed.errors import ResourcesError


def secure(cluster: ClusterConfig, *, scoring: bool, say: Callable[[str], None]) -> tuple[str, int]:
    """Wait until workers, scorers and a read task find room at once: Ray would wait for ever without an error.

    Args:
        cluster: what is asked for.
        scoring: whether there is anything to score.
        say: prints a line when nodes have to be started first.

    Returns:
        Device (cpu or cuda) and number of scorers.

    Raises:
        ResourcesError: there is no room, and none to be expected.
    """
    scaling = autoscaling()
    for device in candidates(cluster):
        scorers = scorer_count(cluster, device) if scoring else 0
        if not scaling and len(ray.nodes()) == 1:
            check_sum(cluster, device, scorers)
        if placed(cluster.bundles(device, scorers), cluster.patience(autoscaling=scaling), say, _REMEDY):
            return device, scorers
    raise ResourcesError(_short(cluster, device, scorers, none_has_room()))


_REMEDY = "add nodes, wait until other jobs have ended, ask for less (--workers, --scorers) or raise --cluster.wait-nodes"


def secure_task(say: Callable[[str], None], wait_nodes: float | None = None) -> None:
    """Wait until a task of Ray Data finds room: it would wait for ever without an error.

    Args:
        say: prints a line when nodes have to be started first.
        wait_nodes: seconds, as `ClusterConfig.wait_nodes`.

    Raises:
        ResourcesError: there is no room, and none to be expected.
    """
    patience = ClusterConfig(wait_nodes=wait_nodes).patience(autoscaling=autoscaling())
    if not placed([{"CPU": TASK_CPUS}], patience, say, "add nodes, or wait until other jobs have ended"):
        raise ResourcesError(f"a task asks for {TASK_CPUS:g} CPU, {none_has_room()}: add nodes")


def candidates(cluster: ClusterConfig) -> list[str]:
    """Devices in the order they are tried: the first one that can be had counts."""
    now = cluster.device_with(ray.cluster_resources().get("GPU", 0))
    return ["cuda", "cpu"] if cluster.device == "auto" and now == "cpu" and autoscaling() else [now]


def scorer_count(cluster: ClusterConfig, device: str) -> int:
    """Scoring actors, if there is anything to score: one a GPU that is free, or one a CPU up to two a worker; at least one a worker
    that is still to find its node.
    """
    have = ray.cluster_resources()
    if device == "cuda":
        units = max(ray.available_resources().get("GPU", 0), cluster.fewest)
    else:
        units = min(have.get("CPU", 0) or cluster.fewest, 2 * cluster.workers)
    return cluster.scorers or max(1, int(units))


def placed(bundles: list[dict[str, float]], patience: float, say: Callable[[str], None], remedy: str) -> bool:
    """Whether the bundles found room; it is given back at once. False if an autoscaler says that they never will.

    Raises:
        ResourcesError: they found none for `patience` seconds; with the remedy.
    """
    # it goes with this process, should that die: no node is kept for nobody
    group = placement_group(bundles, strategy="PACK")
    began, told = time.monotonic(), False
    try:
        while not group.wait(1):
            if any(group.id.hex() in r.details for r in autoscaler().infeasible_gang_resource_requests):
                return False
            waited = time.monotonic() - began
            if waited > patience:
                have = ", ".join(
                    f"{v:g} {k}" for k, v in ray.available_resources().items() if k in ("CPU", "GPU")
                )
                raise ResourcesError(
                    f"no room for {_text(bundles)} within {patience:.0f} s, the cluster has {have or 'no CPU'} free: {remedy}"
                )
            if waited > 5 and not told:
                say(f"waiting up to {patience:.0f} s for nodes with room for {_text(bundles)}")
                told = True
    finally:
        remove_placement_group(group)
    return True


def check_sum(cluster: ClusterConfig, device: str, scorers: int) -> None:
    """Prove that the cluster as it is has as much as workers, scorers and a read task ask for together.

    Raises:
        ResourcesError: it has less.
    """
    have, wanted = ray.cluster_resources(), cluster.demand(device, scorers)
    crowded = device == "cpu" and cluster.fewest > have.get("CPU", 0)
    if crowded or any(v > have.get(k, 0) for k, v in wanted.items()):
        offered = ", ".join(f"{have.get(k, 0):g} {k}" for k in wanted)
        also = " and a CPU for each worker" if crowded else ""
        raise ResourcesError(_short(cluster, device, scorers, f"the cluster has {offered}", also))


def _short(cluster: ClusterConfig, device: str, scorers: int, there: str, also: str = "") -> str:
    asked = ", ".join(f"{v:g} {k}" for k, v in cluster.demand(device, scorers).items())
    return (
        f"{cluster.fewest} workers, {scorers} scorers and a read task ask for {asked}{also}, {there}: lower --workers or "
        "--scorers, or add nodes"
    )


def none_has_room() -> str:
    """What to say when an autoscaler has said that something will never find room."""
    return f"no node that the autoscaler may start has room for that; there are {described(*offers())}"


def _text(bundles: list[dict[str, float]]) -> str:
    kinds = {", ".join(f"{v:g} {k}" for k, v in b.items()): bundles.count(b) for b in bundles}
    return " + ".join(f"{count} x ({kind})" for kind, count in kinds.items())
