"""What the nodes of a cluster say of themselves: gathered by one small actor on each, for the doctor."""

import contextlib
import hashlib
import ipaddress
import json
import os
import platform
import secrets
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysed.cluster.checks import Node, Offer, Socket, TokenFile
from raysed.io.storage import Storage
from raysed.io.store import BadTile, Store, read_tiles

PATIENCE = 120.0
"""Seconds a node may take to answer."""
SAMPLE = 64
"""Tiles whose hash is checked."""


class Reporter:
    """Lives on one node and says what it sees."""

    def node(self, address: str, data: str | None, run: str | None) -> Node:
        """Everything but the clock."""
        here: Any = ray._private.worker._global_node
        session = here.get_session_dir_path()
        return Node(
            address=address,
            versions=_versions(),
            token_mode=is_token_auth_enabled(),
            token=token_file(),
            sockets=_sockets(session),
            addresses=_addresses(),
            kubernetes="KUBERNETES_SERVICE_HOST" in os.environ,
            free_disk={session: shutil.disk_usage(session).free},
            gpu_bytes=_gpus(),
            storage={"data": probe_read(data), "run": probe_write(run)},
        )

    def now(self) -> float:
        """Its clock."""
        return time.time()


def gather(data: str | None, run: str | None) -> list[Node]:
    """Ask every node of the connected cluster; the head first.

    Args:
        data: tile store to read from there, if any.
        run: run directory to write to from there, if any.

    Raises:
        ray.exceptions.GetTimeoutError: a node does not answer.
    """
    alive = sorted(
        (n for n in ray.nodes() if n["Alive"]), key=lambda n: "node:__internal_head__" not in n["Resources"]
    )
    actor: Any = ray.remote(Reporter)
    reporters = [
        actor.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
        ).remote()
        for n in alive
    ]
    asked = [r.node.remote(n["NodeManagerAddress"], data, run) for r, n in zip(reporters, alive, strict=True)]
    found = ray.get(asked, timeout=PATIENCE)
    skews = [_skew(reporter) for reporter in reporters]
    for reporter in reporters:
        ray.kill(reporter)
    return [replace(node, skew=skew) for node, skew in zip(found, skews, strict=True)]


def _skew(reporter: Any) -> float:
    before = time.time()
    there = ray.get(reporter.now.remote(), timeout=PATIENCE)
    after = time.time()
    return there - min(max(there, before), after)


def probe_read(uri: str | None) -> str:
    """What is wrong with reading a tile store from here, empty if nothing."""
    if uri is None:
        return ""
    try:
        Storage(uri).read("dataset.json")
    except FileNotFoundError:
        return (
            f"no finished tile store at {uri} (no dataset.json): make one with jobs/prepare.py --target {uri}"
        )
    except Exception as error:  # whatever goes wrong is the finding
        return f"{_said(error)}: check endpoint, credentials, bucket"
    return ""


def probe_write(uri: str | None) -> str:
    """What is wrong with committing to a run directory from here, empty if nothing; leaves no trace."""
    if uri is None:
        return ""
    name, mine, other = f"doctor-{secrets.token_hex(8)}", secrets.token_bytes(16), secrets.token_bytes(16)
    try:
        run = Storage(uri)
        new = run.is_local and not Path(run.uri).exists()
        if not run.create(name, mine):
            return (
                f"{uri}: the first put of a new object was refused as if it existed: storage whose reads are not consistent "
                "cannot hold a run"
            )
        try:
            if run.create(name, other):
                return (
                    f"{uri}: a second conditional put replaced the first, so two drivers could commit: use storage that honours "
                    "If-None-Match"
                )
            if run.read(name) != mine:
                return f"{uri}: other bytes came back than were written"
        finally:
            run.remove(name)
            if new:
                with contextlib.suppress(OSError):
                    os.rmdir(run.uri)
    except Exception as error:  # whatever goes wrong is the finding
        return f"{_said(error)}: check endpoint, credentials, bucket, and the right to put and delete there"
    return ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def sample_tiles(store: Store) -> tuple[list[str], int, int]:
    """(faults, tiles read, tiles there) of an even sample of a store."""
    ids = store.index["tile_id"].to_pylist()
    chosen = ids[:: max(1, len(ids) // SAMPLE)][:SAMPLE]
    tiles = read_tiles(store.storage, store.locations(chosen), store.dataset.tile_size)
    return [f"{t.tile_id}: {t.reason}" for t in tiles if isinstance(t, BadTile)], len(chosen), len(ids)


def ask_dashboard() -> tuple[int | None, int | None, int | None]:
    """(port, HTTP status of the job list without the token, with it); None each if no dashboard runs."""
    url = ray._private.worker.get_dashboard_url()
    if not url:
        return None, None, None
    port = int(url.rpartition(":")[2])
    try:
        return port, _status(url, {}), _status(url, get_auth_headers_if_auth_enabled({}))
    except urllib.error.URLError:  # it listens on the loopback of the head, and this is another node
        return None, None, None


def _status(url: str, headers: dict[str, str]) -> int:
    request = urllib.request.Request(f"http://{url}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def offers() -> tuple[list[Offer], int | None]:
    """What the connected cluster has or, where Ray's launcher scales it, may start; and how many nodes at once."""
    config = _autoscaling_config()
    alive = [n for n in ray.nodes() if n["Alive"]]
    if config is None:
        return [Offer(n["NodeManagerAddress"], n["Resources"], 1) for n in alive], None
    head, types = config["head_node_type"], config["available_node_types"]
    found = [Offer(head, types[head]["resources"], 1)]
    found += [
        Offer(n, k["resources"], k.get("max_workers", config["max_workers"]))
        for n, k in types.items()
        if n != head
    ]
    return found, config["max_workers"] + 1


def _autoscaling_config() -> dict[str, Any] | None:
    """The launcher's file of this cluster, if its autoscaler runs on this machine."""
    gcs = ray.get_runtime_context().gcs_address
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        given = [a.partition("=")[2] for a in line if a.startswith("--autoscaling-config=")]
        if given and given[0] and any(gcs in a for a in line):
            return yaml.safe_load(Path(given[0]).expanduser().read_text())
    return None


def places() -> dict[str, Any]:
    """Where Ray shows values to everybody: this job's runtime environment and metadata."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return {
        "runtime_env": dict(ray.get_runtime_context().runtime_env),
        "job": submitted,
    }


def token_file() -> TokenFile | None:
    """The file this process takes its token from; None if it is given by the environment, or there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if not path.exists():
        return None
    return TokenFile(str(path), path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "ray": version("ray"), "torch": version("torch")}
    with contextlib.suppress(PackageNotFoundError):
        found["raysed"] = version("raysed")
    # the version of a checkout stays the same while its files change
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return found | {"code": digest.hexdigest()[:8]}


def _sockets(session: str) -> list[Socket]:
    """Listening sockets of the processes of one Ray session on this machine."""
    raylet = psutil.Process().parent()
    family = [raylet, *raylet.children(recursive=True)] if raylet else []
    owners = {p.pid: _title(p) for p in family if _lives(p)}
    for process in psutil.process_iter(["cmdline"]):
        if any(session in a or Path(session).name in a for a in process.info["cmdline"] or []):
            owners[process.pid] = _title(process)
    return sorted(
        {
            Socket(owners[c.pid], c.laddr.ip, c.laddr.port)
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.pid in owners
        },
        key=lambda s: (s.port, s.address),
    )


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _title(process: psutil.Process) -> str:
    """Name of a process, of a Python program its file."""
    with contextlib.suppress(psutil.Error):
        line = process.cmdline()
        scripts = [Path(a).stem for a in line[1:] if a.endswith(".py")]
        return scripts[0] if scripts else process.name()
    return "?"


def _addresses() -> list[str]:
    found = (a.address for group in psutil.net_if_addrs().values() for a in group)
    kept = []
    for address in found:
        with contextlib.suppress(ValueError):  # a hardware address
            ipaddress.ip_address(address.partition("%")[0])
            kept.append(address)
    return kept


def _gpus() -> list[int]:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in said.split()]
