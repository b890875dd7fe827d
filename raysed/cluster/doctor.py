"""Is a cluster fit for a paid run?  Facts from its nodes, one line a check."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import ray
import torch

from raysed.cluster import checks, nodes
from raysed.cluster.checks import Line, Node, failed, passed, skipped
from raysed.cluster.connect import connect
from raysed.cluster.scoring import BATCH
from raysed.config import Experiment
from raysed.core import memory, networks
from raysed.errors import RaysedError, ResourcesError
from raysed.io.store import Store

NEEDS_CLUSTER = ("versions", "resources", "gpu memory", "auth", "ports", "token file", "disk", "clocks")


def examine(experiment: Experiment) -> list[Line]:
    """All lines for the cluster that jobs would use; a local Ray is started where there is none.

    Args:
        experiment: what is to run there; `data.uri` and `run` may be None.
    """
    data, run = experiment.data.uri, experiment.run
    places = {"config": experiment.to_dict()}
    try:
        connect()
        found = nodes.gather(data, run)
    except (RaysedError, ray.exceptions.RayError) as error:  # a node may lack raysed
        code = error.exit_code if isinstance(error, RaysedError) else ResourcesError.exit_code
        here = [
            Node(
                address="this machine",
                versions={},
                storage={"data": nodes.probe_read(data), "run": nodes.probe_write(run)},
            )
        ]
        lines = [
            failed(
                "cluster",
                str(error).split("\n", 1)[0] or f"a node does not answer within {nodes.PATIENCE:.0f} s",
                code,
            )
        ]
        lines += [skipped(name, "needs the cluster") for name in NEEDS_CLUSTER]
        return [*lines, *_storage_lines(experiment, here)[0], checks.secrets(places)]
    stored, store = _storage_lines(experiment, found)
    port, without, with_token = nodes.ask_dashboard()
    return [
        passed("cluster", f"{len(found)} up: {' '.join(n.address for n in found)}"),
        checks.versions(found),
        *_resource_lines(experiment, found, store),
        *stored,
        checks.auth(found, without, with_token),
        checks.ports(found, port),
        checks.token_files(found),
        checks.secrets(places | nodes.places()),
        checks.disk(found),
        checks.clocks(found),
    ]


def _storage_lines(experiment: Experiment, found: Sequence[Node]) -> tuple[list[Line], Store | None]:
    data, shared = experiment.data.uri, experiment.cluster.shared_filesystem
    read = checks.storage("data", data, found, shared=shared)
    lines = [read, checks.storage("run", experiment.run, found, shared=shared)]
    if data is None or read.status == "fail":
        return [*lines, skipped("data", "needs a tile store")], None
    try:
        store = Store.open(data)
        return [*lines, checks.data(data, *nodes.sample_tiles(store))], store
    except RaysedError as error:
        return [*lines, failed("data", str(error), error.exit_code)], None


def _resource_lines(experiment: Experiment, found: Sequence[Node], store: Store | None) -> list[Line]:
    offers, most = nodes.offers()
    if most is None and found[0].kubernetes:
        # the operator scales the groups; what they may become stands in its file, not here
        lines = [skipped("resources", "scaled by KubeRay: check rayjob.yaml with --cluster-file")]
    else:
        lines = [checks.resources(experiment, offers, most)]
    if checks.device_of(experiment.cluster, offers) == "cpu":
        return [*lines, skipped("gpu memory", "networks run on CPUs")]
    classes, side = (len(store.dataset.classes), store.dataset.tile_size) if store else (8, 256)
    return [*lines, checks.gpu_memory(gpu_need(experiment, classes, side), found)]


def gpu_need(experiment: Experiment, classes: int, side: int) -> int:
    """Estimated GPU memory of a training worker and a scorer, bytes.

    Args:
        experiment: names the network and the micro-batch.
        classes: C.
        side: of a tile, pixels.
    """
    net = networks.build(experiment.model.arch, classes, experiment.seed)
    dtype = torch.float32 if experiment.optim.precision == "fp32" else torch.bfloat16
    worker = memory.step_bytes(net, experiment.optim.micro_batch, side, dtype)
    # a scorer frees activations as it goes: its skip connections and the layer at work stay, a quarter at most
    scorer = memory.CONTEXT + 4 * sum(p.numel() for p in net.parameters())
    return worker + scorer + memory.saved_bytes(net, BATCH, side, dtype) // 4


def as_json(lines: Sequence[Line]) -> str:
    """All lines and the exit code, as JSON."""
    return json.dumps(
        {"exit_code": checks.exit_code(lines), "lines": [asdict(line) for line in lines]}, indent=1
    )


def as_text(lines: Sequence[Line]) -> str:
    """One line a check."""
    width = max(len(line.check) for line in lines)
    return "\n".join(f"{line.status}  {line.check:{width}}  {line.text}" for line in lines)
