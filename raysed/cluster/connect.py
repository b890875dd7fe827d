"""Reaching a Ray cluster, or starting a local one."""

import logging
import os
from typing import Any

import ray
import ray.data

from raysed.errors import ResourcesError

OBJECT_STORE = 2 << 30
"""Object store of a Ray started here, bytes."""


def connect() -> None:
    """Connect to the cluster of RAY_ADDRESS, or to the one that `ray start` left on this machine; else start a local Ray.

    Another program's own local Ray is left alone: Ray's `address="auto"` would join it, and die with it.  Does nothing twice.
    """
    if not ray.is_initialized():
        given = os.environ.get("RAY_ADDRESS")
        address = given or ray._private.utils.read_ray_address()
        own: dict[str, Any] = {} if address else _local()
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, **own}
        try:
            ray.init(address=address or "local", **settings)
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            remedy = (
                "check RAY_ADDRESS"
                if given
                else "`ray start` was run on this machine and its cluster is gone: start it again, or set RAY_ADDRESS=local"
            )
            said = " ".join(str(error).split())[:200]
            raise ResourcesError(f"no Ray cluster can be reached at {address} ({said}): {remedy}") from error
    quiet_data()


def _local() -> dict[str, Any]:
    return {
        "num_cpus": len(os.sched_getaffinity(0)),
        "object_store_memory": OBJECT_STORE,
        # tasks and actors that take fractions of a CPU need more processes than CPUs; Ray warns at 4 times this number
        "_system_config": {"worker_maximum_startup_concurrency": 8},
    }


def quiet_data() -> None:
    """Ray Data in this process: rows keep their order, no progress bars, no chatter."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
