"""Is a cluster file filled in, valid and closed?  `cluster.yaml` of Ray's launcher and `rayjob.yaml` of KubeRay."""

import contextlib
import copy
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raysed.cluster.checks import Line, Offer, failed, find_secrets, passed, resources
from raysed.config import Experiment
from raysed.errors import UsageError

_PLACEHOLDER = re.compile(r"<[A-Z][A-Z0-9_]*>")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_file(path: str, experiment: Experiment) -> list[Line]:
    """All lines for one file.

    Args:
        path: of a cluster.yaml or of a RayJob.
        experiment: what the cluster is meant to hold.

    Raises:
        UsageError: no such file, or not YAML.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--cluster-file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--cluster-file {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UsageError(
            f"--cluster-file {path}: expected a mapping of fields, got {type(tree).__name__ if tree is not None else 'nothing'}"
        )
    first = placeholders(tree, path)
    if tree.get("kind") == "RayJob":
        return [first, *rayjob_lines(tree, experiment)]
    valid, prepared = schema(tree)
    if prepared is None:
        return [first, valid]
    return [first, valid, *launcher_lines(prepared, experiment)]


def placeholders(tree: Any, path: str) -> Line:
    """Nothing is left to fill in."""
    names = sorted({name for text in _strings(tree) for name in _PLACEHOLDER.findall(text)})
    if names:
        return failed(
            "placeholders", f"{path} is not filled in: {', '.join(names)}: put your own values there"
        )
    return passed("placeholders", "all filled in")


def schema(tree: Mapping[str, Any]) -> tuple[Line, dict[str, Any] | None]:
    """What Ray's own launcher says of the file, and the file with Ray's defaults filled in (None if it is refused)."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # it warns of mounted files, which matters to Docker alone
            prepared = prepare_config(copy.deepcopy(dict(tree)))
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        where = ".".join(str(p) for p in error.absolute_path) or "the top level"
        return failed("schema", f"Ray refuses the file at {where}: {error.message.splitlines()[0]}"), None
    except Exception as error:  # Ray has no common class for what it finds wrong with a file
        said = " ".join(str(error).split())
        return failed("schema", f"Ray refuses the file: {type(error).__name__}: {said}"), None
    return passed("schema", "valid for Ray's launcher"), prepared


def launcher_lines(config: Mapping[str, Any], experiment: Experiment) -> list[Line]:
    """Our own rules for a file of Ray's launcher, with Ray's defaults filled in."""
    types = config["available_node_types"]
    head = config["head_node_type"]
    lines = [commands(config), plain_secrets(config), scaling(config)]
    if config["provider"]["type"] == "aws":
        configs = {name: kind["node_config"] for name, kind in types.items()}
        lines += [
            network(config, configs),
            roles(configs, head),
            _each(
                "metadata",
                configs,
                lambda c: c.get("MetadataOptions", {}).get("HttpTokens") == "required",
                "must have MetadataOptions {HttpTokens: required}: without IMDSv2 a forged request reads the node's credentials",
            ),
            _each(
                "disks",
                configs,
                lambda c: (
                    bool(c.get("BlockDeviceMappings"))
                    and all(d.get("Ebs", {}).get("Encrypted") is True for d in c["BlockDeviceMappings"])
                ),
                "must have BlockDeviceMappings with Ebs {Encrypted: true}",
            ),
        ]
    offers = [Offer(head, types[head]["resources"], 1)]
    offers += [
        Offer(name, kind["resources"], kind.get("max_workers", config["max_workers"]))
        for name, kind in types.items()
        if name != head
    ]
    return [*lines, resources(experiment, offers, config["max_workers"] + 1)]


def scaling(config: Mapping[str, Any]) -> Line:
    """A head that stays and trains nothing, workers that are there only while there is work."""
    types, head = config["available_node_types"], config["head_node_type"]
    starts = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    wrong = [
        (types[head]["resources"].get("CPU") != 0, f"resources of {head} must have CPU: 0: work on the head ends the run with it"),
        (any("--num-cpus=0" not in c for c in starts), "head_start_ray_commands must say --num-cpus=0, as the node type does"),
        ("InstanceMarketOptions" in types[head]["node_config"], f"{head} must not be a spot node: the run ends with it"),
        (bool(config["provider"].get("cache_stopped_nodes", True)), "provider.cache_stopped_nodes must be false: stopped nodes keep disks that cost"),
        *((kind.get("min_workers", 0) > 0, f"min_workers of {name} must be 0: it stays and costs") for name, kind in types.items() if name != head),
    ]  # fmt: skip
    for broken, rule in wrong:
        if broken:
            return failed("scaling", rule)
    return passed("scaling", "a head on demand without CPUs, workers from 0")


def _each(check: str, configs: Mapping[str, Any], holds: Any, rule: str) -> Line:
    wrong = [name for name, config in configs.items() if not holds(config)]
    if wrong:
        return failed(check, f"node_config of {', '.join(wrong)} {rule}")
    return passed(check, f"{len(configs)} node types")


def network(config: Mapping[str, Any], configs: Mapping[str, Any]) -> Line:
    """Private addresses, own security groups, nothing open to the world.

    Whether a subnet maps public addresses stands in the account, not in the file.
    """
    if any(word in text for text in _strings(config) for word in ("0.0.0.0/0", "::/0")):
        return failed(
            "network", "a rule is open to the world (0.0.0.0/0 or ::/0): name the addresses that need it"
        )
    if "security_group" in config["provider"]:
        return failed(
            "network",
            "provider.security_group makes a group that opens SSH to the world beside your rules: remove it, give SecurityGroupIds",
        )
    if config["provider"].get("use_internal_ips") is not True:
        return failed(
            "network",
            "provider.use_internal_ips must be true: else Ray takes only subnets that give every node a public address",
        )
    open_ones = [
        name
        for name, c in configs.items()
        if any(i.get("AssociatePublicIpAddress") for i in c.get("NetworkInterfaces", []))
    ]
    if open_ones:
        return failed("network", f"NetworkInterfaces of {', '.join(open_ones)} ask for a public address")
    for key in ("SecurityGroupIds", "SubnetIds"):
        line = _each(
            "network",
            configs,
            lambda c, key=key: bool(c.get(key)),
            f"must have {key}: Ray would make its own",
        )
        if line.status == "fail":
            return line
    return passed(
        "network",
        "private addresses between nodes, own security groups; the subnets must not map public addresses (MapPublicIpOnLaunch false)",
    )


def roles(configs: Mapping[str, Any], head: str) -> Line:
    """Every node has a profile of yours, and a worker not the head's."""
    line = _each(
        "roles",
        configs,
        lambda c: bool(c.get("IamInstanceProfile")),
        "must have IamInstanceProfile: Ray would make a role with full access to EC2 and S3",
    )
    same = [
        n
        for n, c in configs.items()
        if n != head and c.get("IamInstanceProfile") == configs[head].get("IamInstanceProfile")
    ]
    if line.status == "pass" and same:
        return failed(
            "roles", f"{', '.join(same)} must not have the head's IamInstanceProfile, which starts machines"
        )
    return line


def commands(config: Mapping[str, Any]) -> Line:
    """Head and workers start with the token demanded, the dashboard on loopback."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[key]:
            if "ray start" not in command:
                continue
            if "RAY_AUTH_MODE=token" not in re.sub(r"(^|\s)#.*", "", command):
                return failed(
                    "auth",
                    f"{key} must set RAY_AUTH_MODE=token before `ray start`: else whoever reaches a port runs code",
                )
            host = re.search(r"--dashboard-host[= ](\S+)", command)
            if host and host[1] not in _LOOPBACK:
                return failed(
                    "auth",
                    f"{key} opens the dashboard on {host[1]}: use --dashboard-host=127.0.0.1 and `ray dashboard`",
                )
    return passed("auth", "token demanded on head and workers, dashboard on loopback")


def plain_secrets(tree: Any) -> Line:
    """No secret stands in the file."""
    found = find_secrets(tree)
    if found:
        return failed(
            "secrets",
            f"{', '.join(sorted(set(found)))} looks like a secret: mount a file or name a secret instead",
        )
    return passed("secrets", "none in the file")


def rayjob_lines(job: Mapping[str, Any], experiment: Experiment) -> list[Line]:
    """Our own rules for a RayJob; the schema is the operator's to check."""
    spec = job.get("spec", {})
    cluster = spec.get("rayClusterSpec", {})
    head, groups = cluster.get("headGroupSpec", {}), cluster.get("workerGroupSpecs", [])
    pods = {"head": head.get("template", {}), "submitter": spec.get("submitterPodTemplate", {})}
    pods |= {g.get("groupName", f"group {i}"): g.get("template", {}) for i, g in enumerate(groups)}
    offers = [Offer("head", _container_resources(head), 1)]
    offers += [
        Offer(str(g.get("groupName")), _container_resources(g), g.get("maxReplicas", 0)) for g in groups
    ]
    return [
        _rayjob_auth(cluster),
        plain_secrets(job),
        _images(pods),
        _users(pods),
        _service(head, cluster),
        _retries(spec),
        _groups(cluster, groups),
        resources(experiment, offers),
    ]


def _rayjob_auth(cluster: Mapping[str, Any]) -> Line:
    options = cluster.get("authOptions", {})
    if options.get("mode") != "token" or not options.get("secretName"):
        return failed(
            "auth",
            "rayClusterSpec.authOptions must be {mode: token, secretName: NAME}: else whoever reaches a port runs code",
        )
    return passed("auth", f"token of secret {options['secretName']}")


def _images(pods: Mapping[str, Any]) -> Line:
    for name, container in _containers(pods):
        image = str(container.get("image", ""))
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest") and not _PLACEHOLDER.search(image):
            return failed(
                "images",
                f"image {image!r} of {name} moves under a run: give a tag other than latest, or a digest",
            )
    return passed("images", "pinned")


def _users(pods: Mapping[str, Any]) -> Line:
    for name, pod in pods.items():
        if pod.get("spec", {}).get("securityContext", {}).get("runAsNonRoot") is not True:
            return failed("users", f"pod {name} must have securityContext {{runAsNonRoot: true}}")
        if pod["spec"].get("hostNetwork"):
            return failed(
                "users", f"pod {name} must not have hostNetwork: its ports would be those of the machine"
            )
    for name, container in _containers(pods):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False:
            return failed(
                "users", f"container of {name} must have securityContext {{allowPrivilegeEscalation: false}}"
            )
        if context.get("privileged") or context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
            return failed(
                "users", f"securityContext of a container of {name} makes it root, whatever its pod says"
            )
    return passed("users", "no root")


def _service(head: Mapping[str, Any], cluster: Mapping[str, Any]) -> Line:
    kinds = [
        head.get("serviceType", "ClusterIP"),
        head.get("headService", {}).get("spec", {}).get("type", "ClusterIP"),
    ]
    if any(k != "ClusterIP" for k in kinds) or head.get("enableIngress"):
        return failed(
            "network",
            "the head's service must be ClusterIP and without ingress: reach the dashboard by kubectl port-forward",
        )
    return passed("network", "no service outside the cluster")


def _groups(cluster: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Line:
    """Workers come and go, and those with GPUs are spot."""
    if cluster.get("enableInTreeAutoscaling") is not True:
        return failed(
            "scaling", "rayClusterSpec must have enableInTreeAutoscaling: true: else no worker comes or goes"
        )
    for number, group in enumerate(groups):
        name = group.get("groupName", f"group {number}")
        if group.get("minReplicas", 0) > 0:
            return failed("scaling", f"minReplicas of {name} must be 0: it stays and costs")
        pod = group.get("template", {}).get("spec", {})
        if _container_resources(group).get("GPU") and not (pod.get("nodeSelector") or pod.get("affinity")):
            return failed("scaling", f"{name} has GPUs and no nodeSelector: say that it runs on spot nodes")
    return passed("scaling", f"{len(groups)} groups from 0")


def _retries(spec: Mapping[str, Any]) -> Line:
    if not spec.get("backoffLimit"):
        return failed(
            "retries", "backoffLimit must be at least 1: a lost head ends the run, a retry continues it"
        )
    if spec.get("shutdownAfterJobFinishes") is not True:
        return failed("retries", "shutdownAfterJobFinishes must be true: else the nodes stay and cost")
    return passed("retries", f"{spec['backoffLimit']}, and the nodes go with the job")


def _containers(pods: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, pod in pods.items():
        for kind in ("initContainers", "containers"):
            for container in pod.get("spec", {}).get(kind, []):
                yield name, container


def _container_resources(group: Mapping[str, Any]) -> dict[str, float]:
    """What `ray start` will offer in a group's pods: start parameters over the limits of the first container."""
    containers = group.get("template", {}).get("spec", {}).get("containers", [{}])
    limits = containers[0].get("resources", {}).get("limits", {})
    start = group.get("rayStartParams", {})
    found = {"CPU": _quantity(start.get("num-cpus", limits.get("cpu", 0)))}
    gpus = _quantity(start.get("num-gpus", limits.get("nvidia.com/gpu", 0)))
    return found | ({"GPU": gpus} if gpus else {})


def _quantity(text: Any) -> float:
    """A count as Kubernetes writes it: 4, "4" or "3500m"."""
    whole = str(text)
    return float(whole.removesuffix("m")) / (1000 if whole.endswith("m") else 1)


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(tree, Sequence):
        for value in tree:
            yield from _strings(value)
