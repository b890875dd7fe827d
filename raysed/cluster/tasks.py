"""Ray Data tasks over items: rows in order, errors raised on purpose as themselves."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.data

from raysed import errors
from raysed.errors import RaysedError

TASK_CPUS = 0.5


def run_tasks(
    function: Any, items: list[dict[str, Any]], batch: int, arguments: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of a function mapped over items by Ray Data tasks, in order; an error raised on purpose comes out as itself."""
    if not items:
        return
    source = ray.data.from_items(items, override_num_blocks=-(-len(items) // batch))
    task: Any = answer  # mypy knows a narrower kind of batch function than Ray takes
    answers = source.map_batches(
        task,
        batch_size=batch,
        num_cpus=TASK_CPUS,
        fn_kwargs={"function": function, "arguments": arguments},
    )
    for row in answers.iter_rows():
        found = json.loads(row["answer"])
        if "error" in found:
            raise errors.rebuilt(found["error"], found["text"])
        yield from found["rows"]


def answer(batch: dict[str, np.ndarray], function: Any, arguments: dict[str, Any]) -> dict[str, list[str]]:
    """INPUT: a batch.  OUTPUT: one row, the function's rows or its error: Ray Data loses the cause of what a task raises."""
    try:
        found: dict[str, Any] = {"rows": function(batch, **arguments)}
    except RaysedError as error:
        found = {"error": type(error).__name__, "text": str(error)}
    return {"answer": [json.dumps(found)]}
