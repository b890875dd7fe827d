"""Reaching a Ray cluster, or starting a local one."""

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

import ray
import ray.data
import ray.exceptions

from raysed.errors import ResourcesError, UsageError
from raysed.io.storage import Storage

OBJECT_STORE = 2 << 30
"""Object store of a Ray started here, bytes."""
TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"
"""GLIBC_TUNABLES of the processes of a Ray started here, unless the user has set some: they keep the memory of activations for the next step, in
huge pages.  Otherwise glibc gives it back after every step, and page faults take up to a third of a step on CPUs (results/LOG.md).
"""


def connect() -> None:
    """Connect to the cluster of RAY_ADDRESS, or to the one that `ray start` left on this machine; else, or if RAY_ADDRESS is
    `local`, start a local Ray.

    Another program's own local Ray is left alone: Ray's `address="auto"` would join it, and die with it.  Does nothing twice.
    """
    if not ray.is_initialized():
        given = os.environ.get("RAY_ADDRESS")
        address = given or ray._private.utils.read_ray_address()
        own: dict[str, Any] = {}
        if address in (None, "local"):
            own = _local()
            os.environ.setdefault("GLIBC_TUNABLES", TUNABLES)  # Ray's processes have it from this one
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, **own}
        try:
            ray.init(address=address or "local", **settings)
        except ray.exceptions.AuthenticationError as error:
            said = str(error).partition(". ")[0]
            raise UsageError(f"no token for the Ray cluster ({said}): {_TOKEN}") from error
        except (ConnectionError, RuntimeError) as error:
            if "Version mismatch" in str(error):
                said = " ".join(str(error).split())[:400]
                raise ResourcesError(
                    f"{said}: install the versions of constraints.txt on every node"
                ) from error
            if isinstance(error, ConnectionError) and address and _listens(address):
                raise UsageError(
                    f"something listens at {address} and refuses this process; if it is a Ray cluster, its token is another one: {_TOKEN}"
                ) from error
            remedy = (
                "check RAY_ADDRESS"
                if given
                else "`ray start` was run on this machine and its cluster is gone: start it again, or set RAY_ADDRESS=local"
            )
            said = " ".join(str(error).split())[:200]
            raise ResourcesError(f"no Ray cluster can be reached at {address} ({said}): {remedy}") from error
        except Exception as error:  # Ray has no class for it
            if "timed out during startup" not in str(error):
                raise
            raise ResourcesError(
                "Ray did not start on this machine within its half minute, which is too busy or has too little memory: try again"
            ) from error
    quiet_data()


_TOKEN = "set RAY_AUTH_MODE=token and give this process the token of the head, in ~/.ray/auth_token or the file RAY_AUTH_TOKEN_PATH"


def _listens(address: str) -> bool:
    """Ray says the same of a cluster that is not there and of one that refuses the token; a TCP connection tells them apart."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return False
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except OSError:
        return False


def _local() -> dict[str, Any]:
    cpus = len(os.sched_getaffinity(0))
    return {
        "num_cpus": cpus,
        "object_store_memory": OBJECT_STORE,
        # tasks and actors that take fractions of a CPU need more processes than CPUs; Ray warns at 4 times this number
        # and ends idle ones beyond one a CPU after a second: read tasks would start new ones every cycle, for 3 s of a core each
        "_system_config": {"worker_maximum_startup_concurrency": 8, "num_workers_soft_limit": 8 * cpus},
    }


def autoscaler() -> Any:
    """What the cluster's autoscaler (Ray's v2) has last reported, as Ray's own message; empty if there is none."""
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    reply = GetClusterStatusReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_status())  # type: ignore[attr-defined]
    return reply.autoscaling_state


def autoscaling() -> bool:
    """Whether an autoscaler can start nodes."""
    return autoscaler().autoscaler_state_version > 0


SHARED = "give an s3:// URI, or --shared-filesystem if all nodes see the same files"
"""What to do about a local path on several nodes."""


def check_paths(places: Mapping[str, str], *, shared: bool, remedy: str = SHARED) -> None:
    """Every node reads and writes, so a path must mean the same on all of them.

    Args:
        places: what is shown -> URI.
        shared: all nodes see the same files.
        remedy: what to do.

    Raises:
        UsageError: a local path, and several nodes.
    """
    nodes = sum(n["Alive"] for n in ray.nodes())
    several = f"has {nodes} nodes" if nodes > 1 else "may start more nodes" if autoscaling() else ""
    for shown, uri in places.items():
        if several and not shared and Storage(uri).is_local:
            raise UsageError(f"{shown} is a local path, but the cluster {several}: {remedy}")


def quiet_data() -> None:
    """Ray Data in this process: rows keep their order, no progress bars, no chatter."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
