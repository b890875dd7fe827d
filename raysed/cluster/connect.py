"""Reaching a Ray cluster, or starting a local one."""

import logging
import os
from typing import Any

import ray
import ray.data

OBJECT_STORE = 2 << 30
"""Object store of a Ray started here, bytes."""


def connect() -> None:
    """Connect to the cluster of RAY_ADDRESS or of this machine; start a local Ray if there is none.  Does nothing twice."""
    if not ray.is_initialized():
        quiet: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "configure_logging": True,
        }
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS") or "auto", **quiet)
        except ConnectionError:
            if os.environ.get("RAY_ADDRESS"):
                raise
            ray.init(
                num_cpus=len(os.sched_getaffinity(0)),
                object_store_memory=OBJECT_STORE,
                include_dashboard=True,
                **quiet,
            )
    quiet_data()


def quiet_data() -> None:
    """Ray Data in this process: rows keep their order, no progress bars, no chatter."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
