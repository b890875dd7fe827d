"""The doctor: every line made to fail from facts; then a real head with a token."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from ray.util import get_node_ip_address

from raysed.cluster import checks, nodes
from raysed.cluster.checks import Node, Offer, Socket, TokenFile
from raysed.cluster.connect import TUNABLES, connect
from raysed.cluster.doctor import as_text, examine, gpu_need
from raysed.config import ClusterConfig, DataConfig, Experiment, ModelConfig, OptimConfig
from raysed.core import memory, networks
from raysed.errors import ResourcesError
from raysed.io.storage import Storage
from raysed.io.store import Store

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.14.1", "raysed": "0.1.0", "code": "0a1b2c3d"}
PRIVATE = TokenFile("/home/u/.ray/auth_token", 0o600, 0o700)


def node(address="10.0.0.1", **facts):
    return Node(
        **(
            {"address": address, "versions": VERSIONS, "token": PRIVATE, "free_disk": {"/tmp/ray": 50 << 30}}
            | facts
        )
    )


def assert_fails(line, code, *said):
    assert (line.status, line.code) == ("fail", code), line
    for text in said:
        assert text in line.text


@pytest.mark.parametrize("name", VERSIONS)
def test_versions(name):
    other = node("10.0.0.2", versions=VERSIONS | {name: "other"})
    assert checks.versions([node(), node("10.0.0.2")]).status == "pass"
    assert_fails(checks.versions([node(), other]), 7, name, "other on 10.0.0.2", "constraints.txt")


def test_a_version_that_is_missing():
    bare = node("10.0.0.2", versions={k: v for k, v in VERSIONS.items() if k != "raysed"})
    assert_fails(checks.versions([node(), bare]), 7, "raysed", "none on 10.0.0.2")


def test_resources():
    fits = Experiment(optim=OptimConfig(batch=32, micro_batch=8), cluster=ClusterConfig(workers=4, scorers=4))
    assert checks.resources(fits, [Offer("cpu", {"CPU": 4.0}, 1)]).status == "pass"
    assert_fails(
        checks.resources(fits, [Offer("cpu", {"CPU": 2.0}, 1)]), 7, "4 workers of 0.6 CPU", "1 x cpu (2 CPU)"
    )
    assert_fails(checks.resources(fits, []), 7, "no node")


def test_shares_of_gpus_are_packed_by_device():
    gpus = Experiment(
        optim=OptimConfig(batch=32, micro_batch=8), cluster=ClusterConfig(workers=2, scorers=2, device="cuda")
    )
    one = [Offer("gpu", {"CPU": 8.0, "GPU": 1.0}, 1)]
    two = [Offer("gpu", {"CPU": 8.0, "GPU": 1.0}, 2)]
    assert_fails(checks.resources(gpus, one), 7, "0.9375 GPU")
    assert checks.resources(gpus, two).status == "pass"
    assert_fails(checks.resources(gpus, two, most=1), 7, "at most 1 at once")


def test_gpu_memory():
    gpu = node(gpu_bytes=(24 << 30, 16 << 30))
    assert checks.gpu_memory(15 << 30, [gpu]).status == "pass"
    assert_fails(checks.gpu_memory(17 << 30, [gpu]), 7, "17.0 GiB", "16.0 GiB", "--optim.micro-batch")
    assert checks.gpu_memory(1, [node()]).status == "skip"


def test_the_estimate_of_memory_grows_with_the_batch_and_the_network():
    small = Experiment(optim=OptimConfig(batch=16, micro_batch=2))
    large = Experiment(optim=OptimConfig(batch=16, micro_batch=16))
    deep = Experiment(model=ModelConfig(arch="efficientunet-b4"), optim=OptimConfig(batch=16, micro_batch=2))
    assert gpu_need(small, 8, 128) < gpu_need(large, 8, 128)
    assert gpu_need(small, 8, 128) < gpu_need(deep, 8, 128)


def test_saved_bytes_are_what_autograd_keeps():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
    # the input, the output of the ReLU (its own and the next layer's), and three times the logits for the loss
    assert memory.saved_bytes(net, 5, 8) == 4 * 5 * 64 * (3 + 4 + 3 * 2)
    half = memory.saved_bytes(net, 5, 8, torch.bfloat16)
    assert half == 5 * 64 * (2 * (3 + 4) + 4 * 3 * 2)
    assert memory.step_bytes(networks.build("unet", 8, 0), 1, 64) > memory.CONTEXT + 20 * 31_000_000


def test_storage_lines():
    good, bad = (
        node(storage={"data": "", "run": ""}),
        node("10.0.0.2", storage={"data": "gone", "run": "refused"}),
    )
    for kind, said in (("data", "gone"), ("run", "refused")):
        assert checks.storage(kind, "s3://bucket/x", [good], shared=False).status == "pass"
        assert_fails(checks.storage(kind, "s3://bucket/x", [good, bad], shared=False), 6, said, "10.0.0.2")
        assert_fails(checks.storage(kind, "/data", [good, good], shared=False), 2, "local path", "2 nodes")
        assert checks.storage(kind, "/data", [good, good], shared=True).status == "pass"
        assert checks.storage(kind, None, [good], shared=False).status == "skip"


def test_reading(small_store, tmp_path):
    assert nodes.probe_read(small_store) == ""
    assert "no finished tile store" in nodes.probe_read(str(tmp_path / "nothing"))
    assert "StorageError" in nodes.probe_read("/dev/null/store")


def test_writing_leaves_no_trace(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text("{}")
    for name in ("new", "used"):
        assert nodes.probe_write(str(tmp_path / name)) == ""
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["used", "used/config.json"]
    assert "StorageError" in nodes.probe_write("/dev/null/run")


def test_storage_whose_second_put_wins(tmp_path, monkeypatch):
    def overwrite(self, path, data):
        self.write(path, data)
        return True

    monkeypatch.setattr(Storage, "create", overwrite)
    assert "second conditional put replaced the first" in nodes.probe_write(str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_storage_that_refuses_or_garbles(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "create", lambda self, path, data: False)
        assert "refused as if it existed" in nodes.probe_write(str(tmp_path / "run"))
    monkeypatch.setattr(Storage, "read", lambda self, path: b"other")
    assert "other bytes" in nodes.probe_write(str(tmp_path / "run"))


def test_an_error_of_any_kind_is_the_finding(tmp_path, monkeypatch):
    def no_credentials(self, path, data):
        raise LookupError("Unable to locate credentials")

    monkeypatch.setattr(Storage, "create", no_credentials)
    assert "Unable to locate credentials: check endpoint" in nodes.probe_write(str(tmp_path / "run"))


def test_data(small_store, damaged_store):
    faults, sample, total = nodes.sample_tiles(Store.open(small_store))
    assert (faults, sample, total) == ([], 64, 160)
    assert checks.data(small_store, faults, sample, total).status == "pass"
    assert checks.data(None, [], 0, 0).status == "skip"
    assert_fails(checks.data("s3://b/t", ["a_0_0: sha256"], 64, 160), 4, "a_0_0", "1 of 64")


def test_a_damaged_tile_in_the_sample_is_found(damaged_store, monkeypatch):
    uri, tile = damaged_store
    monkeypatch.setattr(nodes, "SAMPLE", 160)
    faults, _, _ = nodes.sample_tiles(Store.open(uri))
    assert len(faults) == 1
    assert faults[0].startswith(tile)


def test_auth():
    assert checks.auth([node()], 401, 200).status == "pass"
    assert checks.auth([node()], None, None).status == "pass"
    assert_fails(
        checks.auth([node(), node("10.0.0.2", token_mode=False)], 401, 200),
        2,
        "10.0.0.2",
        "RAY_AUTH_MODE=token",
    )
    assert_fails(checks.auth([node()], 200, 200), 2, "answers 200 without the token")
    assert_fails(checks.auth([node()], 401, 403), 2, "answers 403 to the token")


def test_ports():
    home = {"addresses": ["127.0.0.1", "10.0.0.1", "fe80::1%eth0", "::1"]}
    gcs = Socket("gcs_server", "0.0.0.0", 6379)
    assert (
        checks.ports([node(sockets=[gcs, Socket("dashboard", "127.0.0.1", 8265)], **home)], 8265).status
        == "pass"
    )
    for wide in ("0.0.0.0", "10.0.0.1", "::"):
        wide_node = node(sockets=[Socket("dashboard", wide, 8265)], **home)
        assert_fails(checks.ports([wide_node], 8265), 2, f"{wide}:8265", "--dashboard-host=127.0.0.1")
    pod = node(sockets=[Socket("dashboard", "0.0.0.0", 8265)], kubernetes=True, **home)
    assert checks.ports([pod], 8265).status == "pass"
    # an address that the network translates is not seen, and not vouched for
    assert checks.ports([pod], 8265).text.endswith("a public address on no interface of the node")


def test_ports_of_a_machine_on_the_internet():
    for listening, address in (
        ("0.0.0.0", "93.184.216.34"),
        ("::", "2606:2800:220:1::1"),
        ("::", "93.184.216.34"),
        ("93.184.216.34", "93.184.216.34"),
    ):
        world = node(sockets=[Socket("raylet", listening, 40001)], addresses=["127.0.0.1", address])
        assert_fails(checks.ports([world], 8265), 2, "raylet listens", address)
    only4 = node(sockets=[Socket("raylet", "0.0.0.0", 40001)], addresses=["10.0.0.1", "2606:2800:220:1::1"])
    assert checks.ports([only4], 8265).status == "pass"


@pytest.mark.parametrize(("mode", "folder"), [(0o644, 0o700), (0o640, 0o700), (0o600, 0o755)])
def test_token_file(mode, folder):
    loose = node(token=TokenFile("/home/u/.ray/auth_token", mode, folder))
    assert checks.token_files([node()]).status == "pass"
    assert_fails(checks.token_files([node(), loose]), 2, "chmod 600 /home/u/.ray/auth_token")
    assert checks.token_files([node(token=None)]).status == "skip"


def test_the_token_file_that_is_looked_at(tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_text("x")
    path.chmod(0o640)
    tmp_path.chmod(0o755)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert nodes.token_file() == TokenFile(str(path), 0o640, 0o755)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert nodes.token_file() is None


@pytest.mark.parametrize(
    "place",
    [
        {"runtime_env": {"env_vars": {"AWS_SECRET_ACCESS_KEY": "canary"}}},
        {"runtime_env": {"env_vars": {"HF_TOKEN": "canary"}}},
        {"runtime_env": {"env_vars": {"AWS_SECRET_ACCESS_KEY": "/canary/bPxRfiCYEXAMPLEKEY"}}},
        {"runtime_env": {"env_vars": {"DB_PASSWORD": "~canary"}}},
        {"runtime_env": {"env_vars": {"wandb_api_key": "canary"}}},
        {"job": {"metadata": {"note": "AKIAABCDEFGHIJKLMNOP"}}},
        {"config": {"data": {"uri": "https://user:canary@host/data"}}},
        {"config": {"weights": "https://host/x?X-Amz-Signature=canary"}},
        {"job": {"entrypoint": "DB_PASSWORD=canary python x.py"}},
        {"job": {"args": ["a", "-----BEGIN RSA PRIVATE KEY-----canary"]}},
    ],
)
def test_secrets(place):
    line = checks.secrets(place)
    assert_fails(line, 2, next(iter(place)))
    assert "canary" not in line.text
    assert "AKIA" not in line.text


def test_what_is_no_secret():
    harmless = {
        "config": Experiment(run="s3://bucket/runs/token").to_dict(),
        "runtime_env": {
            "env_vars": {
                "RAY_AUTH_TOKEN_PATH": "/secrets/token",
                "DB_PASSWORD_FILE": "/secrets/db",
                "MY_TOKEN": "/run/secrets/token",
                "~/.ray/auth_token": "~/.ray/auth_token",
                "TOKENS": "5",
                "A_TOKEN": "",
            }
        },
        "job": {"entrypoint": "RAY_AUTH_TOKEN=$TOKEN python jobs/active.py"},
    }
    assert checks.find_secrets(harmless) == []
    assert checks.secrets(harmless).status == "pass"


def test_disk():
    full = node("10.0.0.2", free_disk={"/tmp/ray/session": 3 << 30})
    assert checks.disk([node()]).status == "pass"
    assert_fails(checks.disk([node(), full]), 7, "/tmp/ray/session on 10.0.0.2", "3.0 GiB")


@pytest.mark.parametrize("skew", [-900.0, 6.0])
def test_clocks(skew):
    assert checks.clocks([node(), node(skew=0.2)]).status == "pass"
    assert_fails(checks.clocks([node(), node("10.0.0.2", skew=skew)]), 7, "10.0.0.2", f"{skew:+.1f} s")


def test_the_code_is_that_of_the_first_line_that_fails():
    lines = [
        checks.passed("a", ""),
        checks.skipped("b", ""),
        checks.failed("c", "", 6),
        checks.failed("d", "", 2),
    ]
    assert checks.exit_code(lines) == 6
    assert checks.exit_code(lines[:2]) == 0


def test_a_cluster_that_cannot_be_reached(small_store, tmp_path, monkeypatch):
    from raysed.cluster import doctor
    from raysed.errors import ResourcesError

    def unreachable():
        raise ResourcesError("no Ray cluster can be reached at 10.9.9.9:6379: check RAY_ADDRESS")

    monkeypatch.setattr(doctor, "connect", unreachable)
    lines = {
        line.check: line
        for line in examine(Experiment(run=str(tmp_path / "r"), data=DataConfig(uri=small_store)))
    }
    assert_fails(lines["cluster"], 7, "10.9.9.9")
    assert {k for k, v in lines.items() if v.status == "skip"} == set(doctor.NEEDS_CLUSTER)
    assert all(lines[k].status == "pass" for k in ("storage read", "storage write", "data", "secrets"))
    assert "fail  cluster" in as_text(list(lines.values()))


def test_mixed_versions_are_one_line(monkeypatch):
    """What Ray raises when the driver's versions are not the cluster's."""
    import ray
    from ray._private.utils import check_version_info

    from raysed.cluster.connect import connect
    from raysed.errors import ResourcesError

    def refuse(**_):
        there = {"ray_version": "2.59.0", "python_version": "3.11.2"}
        check_version_info(there, "the driver")

    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ResourcesError, match=r"2\.59\.0.*install the versions of constraints\.txt"):
        connect()


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """A machine with the autoscaler of a launcher's cluster on it, as `offers` sees it."""
    file = tmp_path / "bootstrap.yaml"
    text = (ROOT / "cluster.yaml").read_text()
    file.write_text(text)
    lines = [
        ["raylet"],
        ["python", "monitor.py", "--gcs-address=10.0.0.1:6379", f"--autoscaling-config={file}"],
    ]
    found = [SimpleNamespace(info={"cmdline": line}) for line in lines]
    alive = {"Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}}
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(nodes.psutil, "process_iter", lambda _: iter(found))
    monkeypatch.setattr(
        nodes, "ray", SimpleNamespace(nodes=lambda: [alive], get_runtime_context=lambda: context)
    )
    return context


def test_an_autoscaled_cluster_offers_what_it_may_start(launched):
    offers, most = nodes.offers()
    assert {o.name: o.count for o in offers} == {
        "head": 1,
        "cpu": 8,
        "gpu-a10g": 8,
        "gpu-l4": 8,
        "gpu-l4-x4": 2,
    }
    assert most == 17
    launched.gcs_address = "10.0.0.2:6379"  # that autoscaler is another cluster's
    assert nodes.offers() == ([Offer("10.0.0.1", {"CPU": 2.0}, 1)], None)


def test_resources_of_pods_are_for_kuberay_to_scale(monkeypatch):
    from raysed.cluster.doctor import _resource_lines

    monkeypatch.setattr(nodes, "offers", lambda: ([Offer("head", {"CPU": 0.0}, 1)], None))
    assert _resource_lines(Experiment(), [node(kubernetes=True)], None)[0].status == "skip"
    assert _resource_lines(Experiment(), [node()], None)[0].status == "fail"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Head:
    """A head of one CPU, its dashboard on loopback, with its own ports, folder and token; ended by the ids of its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = folder / "secret" / "token"  # Ray opens the folder itself to everybody
        self.token.parent.mkdir(mode=0o700)
        self.token.write_text("0123456789abcdef" * 4)
        self.token.chmod(0o600)
        self.address, self.dashboard = f"{get_node_ip_address()}:{free_port()}", free_port()
        self.env = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_ADDRESS": self.address,
            "RAY_TMPDIR": str(folder),
            "OMP_NUM_THREADS": "1",
        }
        for name in ("RAY_AUTH_TOKEN", "RAYSED_DATA", "RAYSED_RUN"):
            self.env.pop(name, None)
        flags = [
            f"--port={self.address.rpartition(':')[2]}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={free_port()}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={folder}",
            "--num-cpus=1",
            f"--object-store-memory={100 << 20}",
            "--disable-usage-stats",
        ]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", *flags]
        subprocess.run(
            command,
            env={k: v for k, v in self.env.items() if k != "RAY_ADDRESS"},
            check=True,
            capture_output=True,
        )

    def status(self, token: str | None) -> int:
        """HTTP status of the dashboard's job list."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"http://127.0.0.1:{self.dashboard}/api/jobs/"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def processes(self) -> list[psutil.Process]:
        """Those that name the folder, and their children."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            if process.pid != os.getpid() and any(
                str(self.folder) in a for a in process.info["cmdline"] or []
            ):
                with suppress(psutil.NoSuchProcess):
                    found |= {p.pid: p for p in (process, *process.children(recursive=True))}
        return list(found.values())

    def stop(self) -> None:
        """End them."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def head():
    folder = Path(
        tempfile.mkdtemp(prefix="rd", dir="/tmp")
    )  # short: the path of a Unix socket ends at 107 characters
    folder.chmod(0o700)
    started = Head(folder)
    try:
        yield started
    finally:
        started.stop()
        time.sleep(0.5)
        started.stop()
        shutil.rmtree(folder, ignore_errors=True)


def doctor(head, *flags, **env):
    command = [sys.executable, "jobs/doctor.py", "--json", *flags]
    return subprocess.run(
        command,
        env=head.env | {"PYTHONPATH": str(ROOT)} | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.ray
def test_a_head_with_a_token(head, small_store, tmp_path):
    assert head.status(None) == 401
    assert head.status("wrong") in (401, 403)
    assert head.status(head.token.read_text()) == 200
    run = str(tmp_path / "run")
    done = doctor(head, "--data", small_store, "--run", run, "--cluster.wait-nodes", "5")
    assert done.stdout, done.stderr
    said = {line["check"]: line for line in json.loads(done.stdout)["lines"]}
    wrong = {k: v["text"] for k, v in said.items() if v["status"] == "fail"}
    assert wrong == {}, done.stderr
    assert done.returncode == 0
    assert said["auth"]["text"] == "dashboard 401 without the token, 200 with it"
    assert not Path(run).exists()


@pytest.mark.ray
def test_the_dashboard_of_a_head_listens_on_loopback(head):
    owned = {p.pid for p in head.processes()}
    listening = {
        (c.laddr.ip, c.laddr.port)
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.pid in owned
    }
    assert {ip for ip, port in listening if port == head.dashboard} == {"127.0.0.1"}
    assert int(head.address.rpartition(":")[2]) in {port for _, port in listening}


@pytest.mark.ray
@pytest.mark.parametrize("token", ["wrong", None])
def test_a_wrong_or_missing_token_is_one_line(head, token, tmp_path):
    path = tmp_path / "token"
    if token:
        path.write_text("f" * 64)
    done = doctor(head, RAY_AUTH_TOKEN_PATH=str(path), RAY_NUM_REDIS_GET_RETRIES="2")  # a second each
    assert done.stdout, done.stderr
    first = json.loads(done.stdout)["lines"][0]
    assert (first["check"], first["status"]) == ("cluster", "fail")
    assert "token" in first["text"]
    assert "\n" not in first["text"]
    assert done.returncode == first["code"] == 2


@pytest.mark.parametrize("own", [None, "glibc.malloc.arena_max=4"])
def test_a_ray_that_does_not_start_is_one_line(monkeypatch, own):
    """It would have kept its memory, unless the user has tuned that."""
    monkeypatch.setenv("GLIBC_TUNABLES", own or "")
    if not own:
        monkeypatch.delenv("GLIBC_TUNABLES")

    def late(**settings):
        assert os.environ["GLIBC_TUNABLES"] == (own or TUNABLES)
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(ResourcesError, match="Ray did not start on this machine"):
        connect()
