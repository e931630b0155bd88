"""What must hold for the files in cluster/ and neither Ray nor Kubernetes checks. Each function says what is wrong."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from raychat.planning.prices import Machine

Json = Mapping[str, Any]
WORLD = ("0.0.0.0/0", "::/0")
SSH = 22
LEAST_DISK_GB = 100  # torch with CUDA, the corpus, spilled objects
LONGEST_IDLE_MIN = 30
GRACE_MARGIN_S = 20
# What the kubelet of a spot machine leaves its pods, of the 30 s that Google gives; a node pool may be told to give more
# (https://docs.cloud.google.com/kubernetes-engine/docs/concepts/spot-vms).
GKE_SPOT_S = 15
KUBERAY_METRICS_PORT = 8080  # unless rayStartParams say otherwise
KUBERAY_LABELS = {"ray.io/is-ray-node": "yes", "ray.io/cluster": None, "ray.io/node-type": None, "ray.io/group": None}

# Fields of Google's `instances.insert` that the launcher file uses, with theirs: another one is a typing error or needs a look
# at https://cloud.google.com/compute/docs/reference/rest/v1/instances/insert before it is added here.
GCP_FIELDS: dict[str, Any] = {
    "machineType": str,
    "disks": [
        {
            "boot": bool,
            "autoDelete": bool,
            "type": str,
            "initializeParams": {"diskSizeGb": int, "diskType": str, "sourceImage": str},
        }
    ],
    "scheduling": {
        "provisioningModel": ("SPOT", "STANDARD"),
        "instanceTerminationAction": ("DELETE", "STOP"),
        "onHostMaintenance": ("TERMINATE", "MIGRATE"),
        "automaticRestart": bool,
    },
    "serviceAccounts": [{"email": str, "scopes": [str]}],
}


def machine_type(provider: str, node: Json) -> str:
    """Name of the machine type in `node_config`."""
    return node.get("InstanceType" if provider == "aws" else "machineType", "")


def is_spot(provider: str, node: Json) -> bool:
    """Whether machines of this `node_config` are on spot."""
    if provider == "aws":
        return node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    scheduling = node.get("scheduling", {})
    return isinstance(scheduling, dict) and scheduling.get("provisioningModel") == "SPOT"


def group_problems(config: Json, prices: Mapping[str, Machine]) -> Iterator[str]:
    """Head without GPU and on demand; groups from 0 with the GPUs their machines have; a fallback for what is on spot."""
    provider, head = config["provider"]["type"], config["head_node_type"]
    on_demand: dict[str, int] = {}
    spot: list[tuple[str, str, int]] = []
    for name, group in config["available_node_types"].items():
        node, resources = group["node_config"], group["resources"]
        machine = prices.get(machine_type(provider, node))
        if machine is None or machine.on_demand is None:
            yield f"{name}: {machine_type(provider, node)!r} is not in the price table"
            continue
        if (resources.get("GPU"), resources.get("CPU")) != (machine.gpus, machine.cores):
            yield f"{name}: {machine.name} has {machine.gpus} GPUs and {machine.cores} cores, not {resources}"
        if name == head:
            if is_spot(provider, node) or machine.gpus or group.get("max_workers") != 0:
                yield f"{name}: the head is to be one machine on demand, without GPU"
            continue
        if group.get("min_workers") != 0 or "max_workers" not in group:
            yield f"{name}: it is to grow from 0 to a number that is given"
        if is_spot(provider, node):
            spot.append((name, machine.gpu, group.get("priority", 0)))
        else:
            on_demand[machine.gpu] = max(on_demand.get(machine.gpu, -1), group.get("priority", 0))
    for name, gpu, priority in spot:
        if priority <= on_demand.get(gpu, priority):
            yield f"{name}: no group on demand with {gpu} and a lower priority"


def life_problems(config: Json) -> Iterator[str]:
    """What costs on, or lasts too short."""
    if not 0 < config.get("idle_timeout_minutes", 0) <= LONGEST_IDLE_MIN:
        yield f"idle_timeout_minutes is to be at most {LONGEST_IDLE_MIN}"
    if config["provider"]["type"] == "aws" and config["provider"].get("cache_stopped_nodes", True):
        yield "cache_stopped_nodes keeps machines whose disks cost on"
    if not any("RAYCHAT_POWER_OFF_S=" in command for command in config.get("worker_setup_commands", [])):
        yield "machines whose head has gone are not ended"
    for name, group in config["available_node_types"].items():
        node = group["node_config"]
        kept = config["provider"]["type"] == "aws" and node.get("InstanceInitiatedShutdownBehavior") != "terminate"
        if group["resources"].get("GPU") and kept:
            yield f"{name}: a machine that powers itself off stays, with its disk"
        disks = [
            (disk["Ebs"]["VolumeSize"], disk["Ebs"].get("DeleteOnTermination"))
            for disk in node.get("BlockDeviceMappings", [])
        ]
        disks += [(disk["initializeParams"]["diskSizeGb"], disk.get("autoDelete")) for disk in node.get("disks", [])]
        if not disks or any(size < LEAST_DISK_GB or not deleted for size, deleted in disks):
            yield f"{name}: a disk of at least {LEAST_DISK_GB} GB that goes with its machine"


def port_problems(provider: Json) -> Iterator[str]:
    """Ports that are open to the world."""
    for rule in provider.get("security_group", {}).get("IpPermissions", []):
        ranges = [
            entry.get("CidrIp") or entry.get("CidrIpv6")
            for key in ("IpRanges", "Ipv6Ranges")
            for entry in rule.get(key, [])
        ]
        if set(ranges) & set(WORLD) and (rule.get("FromPort"), rule.get("ToPort")) != (SSH, SSH):
            yield f"ports {rule.get('FromPort')} to {rule.get('ToPort')} are open to the world"


def access_problems(config: Json) -> Iterator[str]:
    """Ports open to the world, no token, a metadata server that anything on the machine can ask."""
    yield from port_problems(config["provider"])
    if "~/.ray/auth_token" not in config.get("file_mounts", {}):
        yield "the token is not brought to the machines"
    for kind in ("head", "worker"):
        commands = config.get(f"{kind}_start_ray_commands", [])
        if not any(re.match(r"~/raychat/cluster/node\.sh ray start ", command) for command in commands):
            yield f"{kind}: node.sh, which sets the token's mode and starts the watcher, does not start Ray"
        for command in commands:
            host = re.search(r"--dashboard-host[= ](\S+)", command)
            if host and host[1] not in ("127.0.0.1", "localhost"):
                yield f"{kind}: the dashboard listens on {host[1]}"
    if not any("--autoscaling-config=" in command for command in config.get("head_start_ray_commands", [])):
        yield "the head starts no autoscaler"
    if config["provider"]["type"] == "aws":
        for name, group in config["available_node_types"].items():
            if group["node_config"].get("MetadataOptions", {}).get("HttpTokens") != "required":
                yield f"{name}: the metadata server answers without a token"


def aws_field_problems(node: Any, shape: Any, where: str) -> Iterator[str]:
    """`node` against botocore's model of EC2's RunInstances, all the way down."""
    if shape.type_name == "structure":
        for key, value in node.items():
            if key in shape.members:
                yield from aws_field_problems(value, shape.members[key], f"{where}.{key}")
            else:
                yield f"{where}: EC2 has no {key!r}"
    elif shape.type_name == "list":
        for item in node:
            yield from aws_field_problems(item, shape.member, where)
    elif getattr(shape, "enum", None) and node not in shape.enum:
        yield f"{where}: {node!r} is none of EC2's values"


def gcp_field_problems(node: Any, allowed: Any, where: str) -> Iterator[str]:
    """`node` against `GCP_FIELDS`."""
    if isinstance(allowed, dict):
        if not isinstance(node, dict):
            yield f"{where} is to be a mapping"
            return
        for key, value in node.items():
            if key in allowed:
                yield from gcp_field_problems(value, allowed[key], f"{where}.{key}")
            else:
                yield f"{where}: {key!r} is not known"
    elif isinstance(allowed, list):
        for item in node if isinstance(node, list) else [None]:
            yield from gcp_field_problems(item, allowed[0], where)
    elif isinstance(allowed, tuple):
        if node not in allowed:
            yield f"{where}: {node!r} is none of {allowed}"
    elif type(node) is not allowed:
        yield f"{where}: {node!r} is to be {allowed.__name__}"


def launcher_problems(config: Json, prices: Mapping[str, Machine], run_instances: Any) -> list[str]:
    """All of the above; `run_instances` is botocore's shape of its input."""
    problems = [*group_problems(config, prices), *life_problems(config), *access_problems(config)]
    for name, group in config["available_node_types"].items():
        node = group["node_config"]
        if config["provider"]["type"] == "aws":
            problems += aws_field_problems(node, run_instances, name)
        else:
            problems += gcp_field_problems(node, GCP_FIELDS, name)
            types = [disk["initializeParams"].get("diskType", "") for disk in node.get("disks", [])]
            if not all(
                kind.startswith(f"zones/{config['provider']['availability_zone']}/diskTypes/") for kind in types
            ):
                problems.append(f"{name}: a disk of no type is pd-standard, which GPU machines do not take")
            if is_spot("gcp", node) and node["scheduling"].get("instanceTerminationAction") != "DELETE":
                problems.append(f"{name}: what is left of a spot machine that was taken costs on")
            if group["resources"].get("GPU") and "TERMINATE" not in str(node.get("scheduling")):
                problems.append(f"{name}: Google starts no GPU machine that is to be moved to another host")
    return problems


def strict(schema: Any) -> Any:
    """A schema of Kubernetes that refuses fields that it does not list, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def _grace(pod: Json) -> tuple[int, int]:
    """Seconds of the preStop hook's sleep, and of Ray's drain window, of the first container."""
    container = pod["containers"][0]
    command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    window = [e["value"] for e in container.get("env", []) if e["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    return (int(command[1]) if len(command) == 2 and command[0] == "sleep" else 0), int(window[0]) if window else 30


def _is_on_spot(pod: Json) -> bool:
    return pod.get("nodeSelector", {}).get("cloud.google.com/gke-provisioning") == "spot"


def pod_problems(name: str, pod: Json) -> Iterator[str]:
    """Of one worker group: time to save, shared memory, where it may run, its watcher."""
    sleep, window = _grace(pod)
    if pod.get("terminationGracePeriodSeconds", 30) < sleep + window + GRACE_MARGIN_S or not sleep:
        yield f"{name}: Ray is killed before its drain window has passed"
    if _is_on_spot(pod) and sleep + window > GKE_SPOT_S:
        yield f"{name}: the pod has {GKE_SPOT_S} s, and would be told of more"
    if pod.get("restartPolicy") != "Never":
        yield f"{name}: a node that left Ray comes back under its pod, which the autoscaler then ends"
    watchers = [
        c.get("command", []) for c in pod["containers"] if "raychat.on_ray.node_watcher" in c.get("command", [])
    ]
    if [part for command in watchers for part in command if part.startswith("--grace-s")] != [f"--grace-s={sleep}"]:
        yield f"{name}: the watcher is to announce what the preStop hook leaves"
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0].get("volumeMounts", [])}
    if volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {}).get("medium") != "Memory":
        yield f"{name}: /dev/shm is 64 MB, too small for Ray and NCCL"
    keys = {toleration["key"] for toleration in pod.get("tolerations", [])}
    if "nvidia.com/gpu" not in keys or (_is_on_spot(pod) and "cloud.google.com/gke-spot" not in keys):
        yield f"{name}: it does not tolerate the taints of its machines"
    if "cloud.google.com/gke-accelerator" not in pod.get("nodeSelector", {}):
        yield f"{name}: any GPU will do, so a run may get several kinds"
    for container in pod["containers"]:
        if {key: value for key, value in container["resources"]["limits"].items() if key != "cpu"} != {
            key: value for key, value in container["resources"]["requests"].items() if key != "cpu"
        }:
            yield f"{name}: {container['name']} may take memory that its machine has not"


def cluster_problems(spec: Json) -> list[str]:
    """A RayCluster's spec: access, head, groups."""
    problems: list[str] = []
    if spec.get("authOptions", {}).get("mode") != "token":
        problems.append("requests need no token")
    head, pods = (
        spec["headGroupSpec"],
        {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]},
    )
    if head.get("serviceType") != "ClusterIP":
        problems.append("the head is reached from outside the cluster")
    pod = head["template"]["spec"]
    if (
        _is_on_spot(pod)
        or "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        or not pod.get("nodeSelector")
    ):
        problems.append("the head is on a spot machine, or takes a GPU")
    if not pod.get("shareProcessNamespace"):
        problems.append("head: jobs that have ended stay as zombies, for which `ray job stop` waits")
    priorities: dict[bool, list[int]] = {True: [], False: []}
    for group in spec["workerGroupSpecs"]:
        name, own = group["groupName"], group["template"]["spec"]
        problems += pod_problems(name, own)
        priorities[_is_on_spot(own)].append(group.get("priority", 0))
        gpus = own["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        if group["minReplicas"] != 0 or group["rayStartParams"].get("num-gpus") != gpus:
            problems.append(f"{name}: it is to grow from 0, and to tell Ray of its GPUs")
    if not priorities[False] or min(priorities[True], default=0) <= max(priorities[False]):
        problems.append("machines on demand come before those on spot")
    containers = [c for own in (pod, *pods.values()) for c in own["containers"]]
    if len({c["image"] for c in containers}) != 1:
        problems.append("several images")
    secrets = [
        e["name"]
        for c in containers
        for e in c.get("env", [])
        if re.search("TOKEN|SECRET|PASSWORD|KEY", e["name"]) and "value" in e
    ]
    if secrets:
        problems.append(f"secrets in the manifest: {secrets}")
    return problems


def monitor_problems(monitor: Json, spec: Json) -> Iterator[str]:
    """A PodMonitor against the RayCluster's spec: it finds every pod, and the port on which Ray serves there."""
    selected = monitor["spec"]["selector"]
    if set(selected) != {"matchLabels"}:
        yield f"it selects by {', '.join(selected)}, which is not checked"
    for label, value in selected.get("matchLabels", {}).items():
        if KUBERAY_LABELS.get(label) != value:
            yield f"not every pod of Ray has the label {label}: {value}"
    for label in monitor["spec"].get("podTargetLabels", []):
        if label not in KUBERAY_LABELS:
            yield f"pods of Ray have no label {label}"
    wanted = {endpoint.get("port") for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        name, served = group.get("groupName", "head"), group["rayStartParams"].get("metrics-export-port")
        ports = {
            port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0].get("ports", [])
        }
        if [ports.get(port) for port in wanted] != [int(served or KUBERAY_METRICS_PORT)]:
            yield f"{name}: Ray serves its metrics on another port than the monitor asks"
