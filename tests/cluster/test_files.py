"""The cluster files, through Ray's own schema and cloud code, and our rules for them: each rule is broken once."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from raysed.cluster.checks import exit_code
from raysed.cluster.files import check_file
from raysed.config import ClusterConfig, Experiment, OptimConfig
from raysed.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
VALUES = {
    "REGION": "eu-central-1",
    "AMI_ID": "ami-0123456789abcdef0",
    "PRIVATE_SUBNET_ZONE_A": "subnet-0aaaaaaaaaaaaaaaa",
    "PRIVATE_SUBNET_ZONE_B": "subnet-0bbbbbbbbbbbbbbbb",
    "SECURITY_GROUP_ID": "sg-0123456789abcdef0",
    "HEAD_INSTANCE_PROFILE_ARN": "arn:aws:iam::123456789012:instance-profile/raysed-head",
    "WORKER_INSTANCE_PROFILE_ARN": "arn:aws:iam::123456789012:instance-profile/raysed-worker",
    "WORKER_ROLE_ARN": "arn:aws:iam::123456789012:role/raysed-worker",
    "BUCKET": "our-bucket",
    "SOURCE_PREFIX": "labelled",
    "ACCOUNT_ID": "123456789012",
    "IMAGE_WITH_TAG_OR_DIGEST": "example.org/raysed:0.1.0",
    "SPOT_LABEL": "cloud.google.com/gke-spot",
    "SPOT_VALUE": "true",
}


def filled(name: str, values: dict[str, str] = VALUES) -> dict:
    """A file of the repository with its placeholders replaced."""
    text = (ROOT / name).read_text()
    return yaml.safe_load(re.sub(r"<([A-Z_]+)>", lambda m: values.get(m[1], m[0]), text))


@pytest.fixture
def check(tmp_path):
    def lines(tree, experiment=None):
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(tree))
        return {line.check: line for line in check_file(str(path), experiment or Experiment())}

    return lines


def types(tree, *, head=True):
    return [
        kind["node_config"] for name, kind in tree["available_node_types"].items() if head or name != "head"
    ]


@pytest.mark.parametrize("name", ["cluster.yaml", "rayjob.yaml"])
def test_filled_in_files_pass(name, check):
    lines = check(filled(name))
    assert {line.check: line.text for line in lines.values() if line.status != "pass"} == {}
    assert exit_code(list(lines.values())) == 0


def test_what_is_not_filled_in_is_named():
    lines = {line.check: line for line in check_file(str(ROOT / "cluster.yaml"), Experiment())}
    assert lines["placeholders"].status == "fail"
    assert "<AMI_ID>, <BUCKET>" in lines["placeholders"].text
    assert "LIKE_THIS" not in lines["placeholders"].text  # a comment
    assert exit_code(list(lines.values())) == 2


def _typo(tree):
    tree["idle_timeout_minuets"] = tree.pop("idle_timeout_minutes")


def _typo_in_type(tree):
    tree["available_node_types"]["cpu"]["max_worker"] = 3


def _no_group(tree):
    del types(tree)[2]["SecurityGroupIds"]


def _no_subnet(tree):
    del types(tree)[2]["SubnetIds"]


def _own_rules(tree):
    tree["provider"]["security_group"] = {"GroupName": "mine"}


def _public(tree):
    tree["provider"]["use_internal_ips"] = False


def _world(tree):
    tree["setup_commands"].append("ufw allow from 0.0.0.0/0 to any port 8265")


def _no_profile(tree):
    del types(tree)[3]["IamInstanceProfile"]


def _head_profile(tree):
    types(tree)[1]["IamInstanceProfile"] = types(tree)[0]["IamInstanceProfile"]


def _old_metadata(tree):
    types(tree)[1]["MetadataOptions"]["HttpTokens"] = "optional"


def _plain_disk(tree):
    types(tree)[1]["BlockDeviceMappings"] = [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 100}}]


def _no_disk(tree):
    del types(tree)[1]["BlockDeviceMappings"]


def _worker_without_token(tree):
    tree["worker_start_ray_commands"] = ["ray stop", "ray start --address=$RAY_HEAD_IP:6379"]


def _open_dashboard(tree):
    head = tree["head_start_ray_commands"]
    head[1] = head[1].replace("127.0.0.1", "0.0.0.0")


def _default_commands(tree):
    del tree["head_start_ray_commands"]  # Ray's default opens the dashboard


def _inline_token(tree):
    tree["setup_commands"].append("export RAY_AUTH_TOKEN=0123456789")


def _inline_key(tree):
    tree["setup_commands"].append("aws configure set aws_access_key_id AKIAABCDEFGHIJKLMNOP")


def _working_head(tree):
    tree["available_node_types"]["head"]["resources"]["CPU"] = 4


def _head_with_cpus(tree):
    tree["head_start_ray_commands"] = [
        c.replace(" --num-cpus=0", "") for c in tree["head_start_ray_commands"]
    ]


def _spot_head(tree):
    types(tree)[0]["InstanceMarketOptions"] = {"MarketType": "spot"}


def _stopped_nodes(tree):
    tree["provider"]["cache_stopped_nodes"] = True


def _stopped_by_default(tree):
    del tree["provider"]["cache_stopped_nodes"]


def _workers_that_stay(tree):
    tree["available_node_types"]["gpu-l4"]["min_workers"] = 2


def _public_interface(tree):
    types(tree)[2]["NetworkInterfaces"] = [{"DeviceIndex": 0, "AssociatePublicIpAddress": True}]


def _token_in_a_comment(tree):
    tree["worker_start_ray_commands"] = ["ray start --address=$RAY_HEAD_IP:6379 # RAY_AUTH_MODE=token"]


@pytest.mark.parametrize(
    ("break_it", "check_name", "said"),
    [
        (_working_head, "scaling", "CPU: 0"),
        (_head_with_cpus, "scaling", "--num-cpus=0"),
        (_spot_head, "scaling", "spot"),
        (_stopped_nodes, "scaling", "cache_stopped_nodes"),
        (_stopped_by_default, "scaling", "cache_stopped_nodes"),
        (_workers_that_stay, "scaling", "min_workers of gpu-l4"),
        (_public_interface, "network", "public address"),
        (_token_in_a_comment, "auth", "worker_start_ray_commands must set RAY_AUTH_MODE=token"),
        (_typo, "schema", "idle_timeout_minuets"),
        (_typo_in_type, "schema", "max_worker"),
        (_no_group, "network", "SecurityGroupIds"),
        (_no_subnet, "network", "SubnetIds"),
        (_own_rules, "network", "SSH"),
        (_public, "network", "use_internal_ips"),
        (_world, "network", "0.0.0.0/0"),
        (_no_profile, "roles", "gpu-l4 must have"),
        (_head_profile, "roles", "cpu must not have the head's"),
        (_old_metadata, "metadata", "HttpTokens"),
        (_plain_disk, "disks", "Encrypted"),
        (_no_disk, "disks", "Encrypted"),
        (_worker_without_token, "auth", "worker_start_ray_commands must set RAY_AUTH_MODE=token"),
        (_open_dashboard, "auth", "0.0.0.0"),
        (_default_commands, "auth", "head_start_ray_commands"),
        (_inline_token, "secrets", "setup_commands"),
        (_inline_key, "secrets", "setup_commands"),
    ],
)
def test_each_rule_of_the_launcher_file_can_fail(break_it, check_name, said, check):
    tree = copy.deepcopy(filled("cluster.yaml"))
    break_it(tree)
    line = check(tree)[check_name]
    assert (line.status, line.code) == ("fail", 2)
    assert said in line.text
    assert "AKIA" not in line.text
    assert "0123456789" not in line.text


def test_node_types_that_cannot_hold_the_run(check):
    tree = filled("cluster.yaml")
    greedy = Experiment(cluster=ClusterConfig(worker_gpus=8, device="cuda"))
    line = check(tree, greedy)["resources"]
    assert (line.status, line.code) == ("fail", 7)
    assert "no node can hold a worker" in line.text
    assert "2 x gpu-l4-x4 (48 CPU 4 GPU)" in line.text
    many = Experiment(
        optim=OptimConfig(batch=64, micro_batch=1), cluster=ClusterConfig(workers=40, device="cuda")
    )
    assert "at most 17 at once" in check(tree, many)["resources"].text
    assert check(tree, many)["resources"].status == "fail"


def _no_auth(job):
    del job["spec"]["rayClusterSpec"]["authOptions"]


def _latest(job):
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = (
        "raysed:latest"
    )


def _untagged(job):
    job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"] = "example.org:5000/raysed"


def _root(job):
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["template"]["spec"]["securityContext"] = {}


def _escalates(job):
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    group["template"]["spec"]["containers"][0]["securityContext"] = {}


def _balancer(job):
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["serviceType"] = "LoadBalancer"


def _once(job):
    job["spec"]["backoffLimit"] = 0


def _stays(job):
    job["spec"]["shutdownAfterJobFinishes"] = False


def _inline_secret(job):
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"})


def _runtime_secret(job):
    job["spec"]["runtimeEnvYAML"] = "env_vars:\n  WANDB_API_KEY: abc"


def _pod(job, group=1):
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][group]["template"]["spec"]


def _fixed(job):
    job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] = False


def _not_spot(job):
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        group["template"]["spec"].pop("nodeSelector", None)


def _pods_that_stay(job):
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["minReplicas"] = 8


def _host_network(job):
    _pod(job)["hostNetwork"] = True


def _root_container(job):
    _pod(job)["containers"][0]["securityContext"] |= {"runAsUser": 0, "runAsNonRoot": False}


def _root_before(job):
    _pod(job)["initContainers"] = [
        {"name": "before", "image": "busybox:1.36", "securityContext": {"privileged": True}}
    ]


def _latest_before(job):
    _pod(job)["initContainers"] = [{"name": "before", "image": "busybox"}]


@pytest.mark.parametrize(
    ("break_it", "check_name"),
    [
        (_fixed, "scaling"),
        (_not_spot, "scaling"),
        (_pods_that_stay, "scaling"),
        (_host_network, "users"),
        (_root_container, "users"),
        (_root_before, "users"),
        (_latest_before, "images"),
        (_no_auth, "auth"),
        (_latest, "images"),
        (_untagged, "images"),
        (_root, "users"),
        (_escalates, "users"),
        (_balancer, "network"),
        (_once, "retries"),
        (_stays, "retries"),
        (_inline_secret, "secrets"),
        (_runtime_secret, "secrets"),
    ],
)
def test_each_rule_of_the_rayjob_can_fail(break_it, check_name, check):
    job = copy.deepcopy(filled("rayjob.yaml"))
    break_it(job)
    assert check(job)[check_name].status == "fail"


def test_a_rayjob_whose_pods_cannot_hold_the_run(check):
    line = check(filled("rayjob.yaml"), Experiment(cluster=ClusterConfig(worker_gpus=2, device="cuda")))[
        "resources"
    ]
    assert (line.status, line.code) == ("fail", 7)


@pytest.mark.parametrize("text", ["", "[1, 2", "- a", None])
def test_a_file_that_is_none(text, tmp_path):
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(str(path))):
        check_file(str(path), Experiment())


def test_the_job_prints_json_and_exits_with_the_code():
    command = [sys.executable, "jobs/doctor.py", "--cluster-file", "cluster.yaml", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    said = json.loads(done.stdout)
    assert done.returncode == said["exit_code"] == 2
    assert {line["check"] for line in said["lines"]} >= {"placeholders", "schema", "network", "resources"}


def test_the_head_is_kept_and_trains_nothing_and_the_rest_is_spot():
    tree = filled("cluster.yaml")
    head, *workers = tree["available_node_types"].values()
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert all(w["min_workers"] == 0 for w in workers)
    gpus = [w for w in workers if "GPU" in w["resources"]]
    assert all(w["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for w in workers)
    assert len({w["node_config"]["InstanceType"].partition(".")[0] for w in gpus}) >= 2
    assert len({w["resources"]["GPU"] for w in gpus}) >= 2


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_the_start_commands_are_shell_and_flags_that_ray_knows(key):
    from ray.scripts.scripts import start

    known = {o for p in start.params for o in p.opts}
    for command in filled("cluster.yaml")[key]:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        words = shlex.split(command.rpartition(";")[2])
        assert {w.partition("=")[0] for w in words if w.startswith("--")} <= known


@pytest.mark.parametrize("started", [True, False])
def test_a_worker_that_does_not_start_is_known_to_the_autoscaler(started, tmp_path):
    """By the exit code of its command; `ray` and the watch for EC2's notice have stand-ins."""
    notice = tmp_path / "raysed/deploy/aws/spot-notice.sh"
    notice.parent.mkdir(parents=True)
    for path, text in (
        (tmp_path / "ray", f"exit {int(not started)}"),
        (notice, f"echo $1 > {tmp_path}/watched"),
    ):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    command = filled("cluster.yaml")["worker_start_ray_commands"][1].replace(
        "/tmp/spot-notice.log", f"{tmp_path}/log"
    )
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "RAY_HEAD_IP": "10.0.0.1",
    }
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, check=False, timeout=30
    )
    assert (done.returncode == 0) == started
    until = time.monotonic() + (10 if started else 0.3)
    while not (tmp_path / "watched").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / "watched").exists() == started


def test_the_files_that_are_mounted_exist():
    mounts = filled("cluster.yaml")["file_mounts"]
    assert all((ROOT / local).exists() for local in mounts.values() if not local.startswith("~"))


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """An emulated AWS with a private network, a group and two profiles; (values of the placeholders, client of EC2, of IAM)."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws import config as ray_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(ray_aws.time, "sleep", lambda seconds: None)
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        region = VALUES["REGION"]
        ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnets = [
            ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{i}.0/24", AvailabilityZone=region + zone)[
                "Subnet"
            ]["SubnetId"]
            for i, zone in enumerate("ab")
        ]
        group = ec2.create_security_group(GroupName="own", Description="own", VpcId=vpc)["GroupId"]
        own = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[own])
        arns = {}
        for kind in ("head", "worker"):
            made = iam.create_instance_profile(InstanceProfileName=f"raysed-{kind}")
            arns[f"{kind.upper()}_INSTANCE_PROFILE_ARN"] = made["InstanceProfile"]["Arn"]
        zones = {"PRIVATE_SUBNET_ZONE_A": subnets[0], "PRIVATE_SUBNET_ZONE_B": subnets[1]}
        image = ec2.describe_images()["Images"][0]["ImageId"]
        yield VALUES | zones | arns | {"SECURITY_GROUP_ID": group, "AMI_ID": image}, ec2, iam
        for cached in (ray_aws._get_subnets_or_die,):
            cached.cache_clear()


def bootstrapped(tree):
    """What `ray up` would make of the file before it starts the head."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(tree)
    validate_config(prepared)
    return bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(prepared))


def state(ec2, iam):
    """Roles, profiles, and groups with their rules."""
    groups = ec2.describe_security_groups()["SecurityGroups"]
    return {
        "roles": [r["RoleName"] for r in iam.list_roles()["Roles"]],
        "profiles": sorted(
            p["InstanceProfileName"] for p in iam.list_instance_profiles()["InstanceProfiles"]
        ),
        "groups": {g["GroupId"]: json.dumps(g["IpPermissions"], sort_keys=True) for g in groups},
    }


def test_ray_up_makes_no_role_and_touches_no_group(aws):
    values, ec2, iam = aws
    before = state(ec2, iam)
    config = bootstrapped(filled("cluster.yaml", values))
    after = state(ec2, iam)
    assert after == before
    assert after["roles"] == []
    assert "0.0.0.0/0" not in json.dumps(after["groups"])
    configs = [kind["node_config"] for kind in config["available_node_types"].values()]
    assert {tuple(c["SecurityGroupIds"]) for c in configs} == {(values["SECURITY_GROUP_ID"],)}
    assert config["available_node_types"]["gpu-l4-x4"]["resources"]["GPU"] == 4
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0


def test_ray_up_without_our_group_and_profile_would_open_ssh_and_make_a_role(aws):
    values, ec2, iam = aws
    tree = filled("cluster.yaml", values)
    for config in types(tree):
        del config["SecurityGroupIds"], config["IamInstanceProfile"]
    bootstrapped(tree)
    after = state(ec2, iam)
    assert after["roles"] == ["ray-autoscaler-v1"]
    assert "0.0.0.0/0" in json.dumps(after["groups"])


def test_nodes_start_with_what_the_file_says(aws):
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    values, ec2, _ = aws
    config = bootstrapped(filled("cluster.yaml", values))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind in ("head", "gpu-l4"):
        provider.create_node(config["available_node_types"][kind]["node_config"], {"ray-node-name": kind}, 1)
    made = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert sorted(i["InstanceType"] for i in made) == ["g6.2xlarge", "m7i.xlarge"]
    for instance in made:
        assert [g["GroupId"] for g in instance["SecurityGroups"]] == [values["SECURITY_GROUP_ID"]]
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert {t["Key"]: t["Value"] for t in instance["Tags"]}["ray-cluster-name"] == "raysed"
        volume = instance["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]
        assert ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["Encrypted"] is True


def policies():
    return sorted((ROOT / "deploy" / "aws").glob("*-policy.json"))


def statements(path):
    return json.loads(path.read_text())["Statement"]


def listed(value):
    return [value] if isinstance(value, str) else value


@pytest.mark.parametrize("path", policies(), ids=lambda p: p.stem)
def test_policies_name_their_actions_and_their_resources(path):
    for statement in statements(path):
        actions = listed(statement["Action"])
        assert not any("*" in a for a in actions), statement["Sid"]
        harmless = all(a.startswith(("ec2:Describe", "ssm:", "ssmmessages:")) for a in actions)
        assert harmless or "*" not in listed(statement["Resource"]), statement["Sid"]
        assert all(not a.startswith("iam:") or a == "iam:PassRole" for a in actions)
    assert re.findall(r"<([A-Z_]+)>", path.read_text())  # placeholders, no account of anybody


def test_only_the_head_starts_machines_and_only_its_own():
    worker, head = (statements(ROOT / f"deploy/aws/{kind}-policy.json") for kind in ("worker", "head"))
    assert all(a.startswith("s3:") for s in worker for a in listed(s["Action"]))
    for statement in head:
        actions = listed(statement["Action"])
        if "ec2:TerminateInstances" in actions:
            assert statement["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "raysed"}}
        if "iam:PassRole" in actions:
            assert listed(statement["Resource"]) == ["<WORKER_ROLE_ARN>"]
        if statement["Sid"] == "StartOwnWorkers":  # the profile that cluster.yaml gives to workers
            assert statement["Condition"]["ArnEquals"] == {
                "ec2:InstanceProfile": "<WORKER_INSTANCE_PROFILE_ARN>"
            }


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here; the nodes have it")
def test_a_spot_notice_becomes_a_drain(tmp_path):
    """EC2's metadata service has a stand-in, and so have `ray` and `python`; the notice comes at the second look."""
    looks = []

    class Metadata(BaseHTTPRequestHandler):
        def do_PUT(self):
            self.answer(200 if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else 400, b"secret")

        def do_GET(self):
            looks.append((self.path, self.headers["X-aws-ec2-metadata-token"]))
            self.answer(200 if len(looks) > 1 else 404, b"{}")

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    for name, text in (("ray", f'echo "$@" >> {tmp_path}/said'), ("python", "echo 0123abcd")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "METADATA": f"http://127.0.0.1:{server.server_port}",
            "EVERY": "0.1",
        }
        subprocess.run(
            [ROOT / "deploy/aws/spot-notice.sh", "10.0.0.1:6379"], env=environment, check=True, timeout=30
        )
        server.shutdown()
    assert looks == [("/latest/meta-data/spot/instance-action", "secret")] * 2
    said = (tmp_path / "said").read_text().split()
    assert said[:5] == ["drain-node", "--address", "10.0.0.1:6379", "--node-id", "0123abcd"]
    assert "DRAIN_NODE_REASON_PREEMPTION" in said


def test_only_prepare_may_write_tiles_and_a_missing_object_is_not_a_refusal():
    for kind, writes in (("worker", False), ("head", False), ("predict", False), ("prepare", True)):
        found = statements(ROOT / f"deploy/aws/{kind}-policy.json")
        on_tiles = {
            a for s in found for a in listed(s["Action"]) if any("tiles" in r for r in listed(s["Resource"]))
        }
        assert ("s3:PutObject" in on_tiles, "s3:DeleteObject" in on_tiles) == (writes, writes), kind
        for statement in found:  # a HEAD has no prefix, and S3 answers 403 to who may not list
            if statement["Action"] == "s3:ListBucket":
                assert list(statement["Condition"]) == ["StringLikeIfExists"]


@pytest.mark.parametrize(
    ("more", "reads", "writes"),
    [
        ((), ("tiles", "runs"), ("runs",)),
        (("prepare",), ("labelled", "tiles"), ("tiles",)),
        (("predict",), ("runs", "models", "scenes", "maps"), ("models", "maps")),
    ],
)
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_the_prefixes_of_the_readme_may_be_read_and_written(kind, more, reads, writes):
    found = [
        s
        for name in (kind, *more)
        for s in filled(f"deploy/aws/{name}-policy.json")["Statement"]
        if any(a.startswith("s3:") for a in listed(s["Action"]))
    ]

    def may(action, prefix):
        objects = [r for s in found if action in listed(s["Action"]) for r in listed(s["Resource"])]
        return any(fnmatchcase(f"arn:aws:s3:::our-bucket/{prefix}/a/b.tif", r) for r in objects)

    def may_list(prefix):
        kept = [s["Condition"]["StringLikeIfExists"] for s in found if s["Action"] == "s3:ListBucket"]
        return any(fnmatchcase(f"{prefix}/", p) for c in kept for p in c["s3:prefix"])

    for prefix in reads:
        assert may("s3:GetObject", prefix), prefix
        assert may_list(prefix), prefix
        assert f"s3://bucket/{prefix}" in (ROOT / "README.md").read_text()
    for prefix in ("labelled", "scenes", "tiles", "runs", "models", "maps"):
        allowed = {"runs", *writes}
        assert may("s3:PutObject", prefix) == (prefix in allowed), prefix
    assert not may("s3:GetObject", "elsewhere")


def test_the_policy_allows_the_machines_of_the_file():
    start = next(s for s in statements(ROOT / "deploy/aws/head-policy.json") if s["Sid"] == "StartOwnWorkers")
    allowed = start["Condition"]["StringLike"]["ec2:InstanceType"]
    for config in types(filled("cluster.yaml"), head=False):
        assert config["InstanceType"].partition(".")[0] + ".*" in allowed


def test_the_image_is_pinned_and_runs_without_root():
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if line]
    base = next(words[1] for words in lines if words[0] == "FROM")
    assert re.search(r":\d+\.\d+\.\d+", base)
    assert [words for words in lines if words[0] == "USER"][-1][1] == "1000"
    assert any("constraints.txt" in words for words in lines if words[0] in ("COPY", "RUN"))
