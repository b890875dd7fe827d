"""The doctor's judgements: functions of plain facts, which `nodes.py` gathers, to one line each.

A line says what was found and, if it fails, what to do and the exit code.
"""

import ipaddress
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raysed.config import ClusterConfig, Experiment
from raysed.errors import DataError, ResourcesError, StorageError, UsageError

MIN_DISK = 10 << 30
"""Free bytes a node needs for Ray's spilled objects and logs."""
MAX_SKEW = 5.0
"""Seconds the clocks of two nodes may differ; S3 refuses requests of a clock that is 15 minutes off."""


@dataclass(frozen=True)
class Line:
    """One line of the doctor."""

    check: str
    status: Literal["pass", "fail", "skip"]
    text: str
    code: int = 0
    """Exit code if it fails."""


def passed(check: str, text: str) -> Line:
    """A line of a check that holds."""
    return Line(check, "pass", text)


def failed(check: str, text: str, code: int = UsageError.exit_code) -> Line:
    """A line of a check that does not hold, with the remedy in its text."""
    return Line(check, "fail", text, code)


def skipped(check: str, text: str) -> Line:
    """A line of a check that does not apply, or cannot be made."""
    return Line(check, "skip", text)


def exit_code(lines: Sequence[Line]) -> int:
    """0, or the code of the first line that fails."""
    return next((line.code for line in lines if line.status == "fail"), 0)


@dataclass(frozen=True)
class Socket:
    """A listening TCP socket of a Ray process."""

    process: str
    address: str
    port: int


@dataclass(frozen=True)
class TokenFile:
    """The file a process takes its token from."""

    path: str
    mode: int
    folder_mode: int


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a node says of itself."""

    address: str
    versions: Mapping[str, str]
    token_mode: bool = True
    """Its Ray processes demand the token."""
    token: TokenFile | None = None
    """None where the token comes from the environment."""
    sockets: Sequence[Socket] = ()
    addresses: Sequence[str] = ()
    """Of the machine's interfaces."""
    kubernetes: bool = False
    free_disk: Mapping[str, int] = field(default_factory=dict)
    """Path -> free bytes."""
    gpu_bytes: Sequence[int] = ()
    """Memory of each GPU."""
    skew: float = 0.0
    """Its clock minus the driver's, seconds, less what the round trip can explain."""
    storage: Mapping[str, str] = field(default_factory=dict)
    """`data` and `run` -> what is wrong with it from here, empty if nothing."""


def versions(nodes: Sequence[Node]) -> Line:
    """All nodes run the same code."""
    for name in nodes[0].versions:
        found = defaultdict(list)
        for node in nodes:
            found[node.versions.get(name, "none")].append(node.address)
        if len(found) > 1:
            said = ", ".join(f"{version} on {' '.join(where)}" for version, where in sorted(found.items()))
            return failed(
                "versions",
                f"{name} {said}: install the versions of constraints.txt on every node and restart Ray there",
                ResourcesError.exit_code,
            )
    return passed("versions", ", ".join(f"{k} {v}" for k, v in nodes[0].versions.items()))


@dataclass(frozen=True)
class Offer:
    """Nodes that there are, or that an autoscaler may start."""

    name: str
    resources: Mapping[str, float]
    count: int


def device_of(cluster: ClusterConfig, offers: Sequence[Offer]) -> str:
    """Where networks will run on these nodes."""
    gpus = sum(o.count * o.resources.get("GPU", 0) for o in offers)
    return cluster.device_with(gpus)


def resources(experiment: Experiment, offers: Sequence[Offer], most: int | None = None) -> Line:
    """Workers, scorers and a read task find room at once.

    Args:
        experiment: what asks.
        offers: what there is.
        most: nodes that may run at once; None if all.
    """
    cluster = experiment.cluster
    device = device_of(cluster, offers)
    worker, scorer = cluster.worker(device), cluster.scorer(device)
    scorers = cluster.scorers or 1
    bundles = cluster.bundles(device, scorers)
    size = lambda o: (o.resources.get("GPU", 0), o.resources.get("CPU", 0))  # noqa: E731
    rooms = [dict(o.resources) for o in sorted(offers, key=size, reverse=True) for _ in range(o.count)][:most]
    placed = sum(_place(bundle, rooms) for bundle in bundles)
    asked = f"{cluster.fewest} workers of {_amounts(worker)}, {scorers} scorers of {_amounts(scorer)} and a read task"
    there = described(offers, most)
    if placed == len(bundles):
        return passed("resources", f"{asked} fit into {there}")
    no_room = not any(_place(worker, [dict(o.resources)]) for o in offers)
    return failed(
        "resources",
        f"{asked} do not fit into {there}: "
        + ("no node can hold a worker: " if no_room else "")
        + "lower --workers, --scorers or their shares, or add nodes",
        ResourcesError.exit_code,
    )


def described(offers: Sequence[Offer], most: int | None) -> str:
    """What there is, or may be started, as text; arguments as for `resources`."""
    there = "; ".join(f"{o.count} x {o.name} ({_amounts(o.resources)})" for o in offers) or "no node"
    return there if most is None else f"{there}; at most {most} at once"


def _place(bundle: Mapping[str, float], rooms: list[dict[str, float]]) -> bool:
    for room in rooms:
        if all(room.get(k, 0) >= v - 1e-9 for k, v in bundle.items()):
            for k, v in bundle.items():
                room[k] -= v
            return True
    return False


def _amounts(resources: Mapping[str, float]) -> str:
    return " ".join(f"{v:g} {k}" for k, v in resources.items() if k in ("CPU", "GPU") and v) or "no CPU"


def gpu_memory(need: int, nodes: Sequence[Node]) -> Line:
    """A training worker and a scorer fit on the smallest GPU.

    Args:
        need: estimated bytes.
        nodes: of the cluster.
    """
    sizes = [(size, node.address) for node in nodes for size in node.gpu_bytes]
    if not sizes:
        return skipped("gpu memory", f"no node up has a GPU; a worker and a scorer take about {_gib(need)}")
    least, where = min(sizes)
    said = f"a worker and a scorer take about {_gib(need)} (estimate), the smallest GPU has {_gib(least)} (on {where})"
    if need > least:
        return failed("gpu memory", said + ": lower --optim.micro-batch", ResourcesError.exit_code)
    return passed("gpu memory", said)


def storage(kind: Literal["data", "run"], uri: str | None, nodes: Sequence[Node], *, shared: bool) -> Line:
    """Every node reads the tile store, or writes the run directory with a conditional put.

    Args:
        kind: which.
        uri: where it is, None if not given.
        nodes: of the cluster, each with what it found.
        shared: local paths are the same files on every node.
    """
    check = "storage read" if kind == "data" else "storage write"
    if uri is None:
        return skipped(check, f"no --{kind}, no RAYSED_{kind.upper()}")
    if "://" not in uri and len(nodes) > 1 and not shared:
        return failed(
            check,
            f"--{kind} {uri} is a local path, but the cluster has {len(nodes)} nodes: give an s3:// URI, or "
            "--cluster.shared-filesystem if all nodes see the same files",
        )
    for node in nodes:
        if node.storage.get(kind):
            return failed(check, f"{node.storage[kind]} (on {node.address})", StorageError.exit_code)
    what = "readable" if kind == "data" else "writable, a second conditional put loses,"
    return passed(check, f"{uri} is {what} from {_nodes(nodes)}")


def data(uri: str | None, bad: Sequence[str], sample: int, total: int) -> Line:
    """A sample of the tiles has the bytes that the index says."""
    if uri is None:
        return skipped("data", "no --data, no RAYSED_DATA")
    if bad:
        return failed(
            "data",
            f"{len(bad)} of {sample} sampled tiles of {uri} do not hold, the first is {bad[0]}: prepare the store anew",
            DataError.exit_code,
        )
    return passed("data", f"{sample} of {total} tiles have the sha256 of the index")


def auth(nodes: Sequence[Node], without: int | None, with_token: int | None) -> Line:
    """The cluster demands its token.

    Args:
        nodes: of the cluster.
        without: HTTP status of the dashboard's job list asked without the token, None if there is no dashboard.
        with_token: with it.
    """
    remedy = "set RAY_AUTH_MODE=token before `ray start` on every node"
    open_nodes = [n.address for n in nodes if not n.token_mode]
    if open_nodes:
        return failed("auth", f"no token is demanded on {' '.join(open_nodes)}: {remedy}")
    if without is None:
        return passed("auth", "the token is demanded; no dashboard runs")
    if without not in (401, 403):
        return failed("auth", f"the dashboard answers {without} without the token, 401 expected: {remedy}")
    if with_token != 200:
        return failed(
            "auth",
            f"the dashboard answers {with_token} to the token of this process, 200 expected: give every node the same token file",
        )
    return passed("auth", "dashboard 401 without the token, 200 with it")


def ports(nodes: Sequence[Node], dashboard: int | None) -> Line:
    """The dashboard listens on loopback, and no port of Ray on an interface with a public address.

    A public address that the network translates to a private one (EC2's, a NAT's) is on no interface, and not seen.

    Args:
        nodes: of the cluster.
        dashboard: its port, None if there is none.
    """
    for node in nodes:
        for socket in node.sockets:
            address = ipaddress.ip_address(socket.address.partition("%")[0])
            where = f"{socket.process} listens on {socket.address}:{socket.port} of {node.address}"
            # a pod is reached through its ClusterIP service, and its probes need the dashboard on the pod's address
            if socket.port == dashboard and not address.is_loopback and not node.kubernetes:
                return failed(
                    "ports",
                    f"{where}: start the head with --dashboard-host=127.0.0.1 and reach it by a tunnel",
                )
            public = [a for a in _reached_at(address, node.addresses) if a.is_global]
            if public:
                return failed(
                    "ports",
                    f"{where}, which has the public address {public[0]}: run on a private network, or start Ray with "
                    "--node-ip-address of a private one, and close the port",
                )
    count = sum(len(n.sockets) for n in nodes)
    return passed(
        "ports",
        f"{count} listening sockets of Ray on {_nodes(nodes)}, a public address on no interface of the node",
    )


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _reached_at(listening: _Address, addresses: Sequence[str]) -> Iterator[_Address]:
    if not listening.is_unspecified:
        yield listening
        return
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        if listening.version == 6 or address.version == 4:
            yield address


def token_files(nodes: Sequence[Node]) -> Line:
    """Nobody but its owner reads the token."""
    files = [(n.address, n.token) for n in nodes if n.token]
    for address, file in files:
        if file.mode & 0o077 or file.folder_mode & 0o077:
            folder = file.path.rpartition("/")[0] or "/"
            return failed(
                "token file",
                f"{file.path} on {address} has mode {file.mode:04o} in a folder of mode {file.folder_mode:04o}, 0600 in 0700 expected: "
                f"chmod 700 {folder} && chmod 600 {file.path}",
            )
    if not files:
        return skipped("token file", "the token comes from the environment")
    return passed("token file", f"{files[0][1].path} is private on {_nodes([n for n in nodes if n.token])}")


_SECRET_NAME = re.compile(
    r"(^|[_.-])(token|secret|passwd|password|credentials?|api_?key|access_?key|secret_?key|private_?key)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/@\s:]+:[^/@\s]+@|X-Amz-Signature=|"
    r"\b(ghp|gho|hf|glpat|xox[bp])[_-][A-Za-z0-9_-]{16,}|"
    r"\b\w*(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)(=|: )[\"']?(?![\"'$\s]|$)"
)

_PATH = re.compile(r"(~|/(home|Users|root|etc|var|mnt|run|srv|tmp|opt))/[^\s]*\Z")
"""Of a file; not whatever begins with a slash, as a key in base64 may."""


def find_secrets(tree: Any, name: str = "") -> list[str]:
    """Dotted names of values that look like a secret; never the values."""
    if isinstance(tree, Mapping):
        if isinstance(tree.get("name"), str) and isinstance(
            tree.get("value"), str
        ):  # an env entry of Kubernetes
            return find_secrets(tree["value"], f"{name}.{tree['name']}".strip("."))
        return [found for k, v in tree.items() for found in find_secrets(v, f"{name}.{k}".strip("."))]
    if isinstance(tree, (list, tuple)):
        return [found for v in tree for found in find_secrets(v, name)]
    if not isinstance(tree, str) or not tree:
        return []
    is_path = _PATH.match(tree)  # a file that holds a secret is named by its path
    named = _SECRET_NAME.search(name) and not is_path
    return [name] if named or _SECRET_VALUE.search(tree) else []


def secrets(places: Mapping[str, Any]) -> Line:
    """No secret stands where Ray shows it to everybody: runtime environment, job metadata, configuration.

    Args:
        places: name of the place -> what stands there.
    """
    found = find_secrets(places)
    if found:
        return failed(
            "secrets",
            f"{', '.join(sorted(set(found)))} looks like a secret, and Ray shows it in the dashboard and in logs: take it out, give the "
            "nodes an instance profile, a service account or a mounted file",
        )
    return passed("secrets", f"none in {', '.join(places)}")


def disk(nodes: Sequence[Node]) -> Line:
    """There is room to spill and to log."""
    rooms = [(free, path, n.address) for n in nodes for path, free in n.free_disk.items()]
    least, path, where = min(rooms)
    if least < MIN_DISK:
        return failed(
            "disk",
            f"{path} on {where} has {_gib(least)} free, {_gib(MIN_DISK)} expected: make room, or start Ray with another --temp-dir",
            ResourcesError.exit_code,
        )
    return passed("disk", f"at least {_gib(least)} free")


def clocks(nodes: Sequence[Node]) -> Line:
    """Clocks agree."""
    worst = max(nodes, key=lambda n: abs(n.skew))
    if abs(worst.skew) > MAX_SKEW:
        return failed(
            "clocks",
            f"the clock of {worst.address} is {worst.skew:+.1f} s off this one's, {MAX_SKEW:g} s allowed: run chrony or systemd-timesyncd "
            "on every node",
            ResourcesError.exit_code,
        )
    return passed("clocks", f"within {max(0.1, abs(worst.skew)):.1f} s on {_nodes(nodes)}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _nodes(nodes: Sequence[Node]) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"
