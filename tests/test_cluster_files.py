"""The files of cluster/: what Ray, EC2, Kubernetes and linters say of them, and checks of our own with planted errors."""

import copy
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cluster_checks as checks
import pytest
import yaml

from raychat.planning.prices import load_prices

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
CRDS = ROOT.parent / "shared" / "reference" / "kuberay"
LAUNCHERS = ("aws", "gcp")
NODE_SH = CLUSTER / "node.sh"


def read(name):
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.fixture(scope="module")
def run_instances():
    session = pytest.importorskip("botocore.session", reason="botocore comes with moto").get_session()
    return session.get_service_model("ec2").operation_model("RunInstances").input_shape


def prepared(config):
    """What `ray up` makes of it before it asks a cloud; raises what Ray finds wrong."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    made = prepare_config(copy.deepcopy(config))
    validate_config(made)
    return made


# The launcher's files


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_the_launchers_files(name):
    made = prepared(read(f"{name}.yaml"))
    assert made["head_node_type"] in made["available_node_types"]
    assert not list(checks.access_problems(made))
    assert any("RAYCHAT_BASE_DIR=" in command for command in made["setup_commands"]), (
        "~/.cache is no place that all nodes see"
    )
    text = (CLUSTER / f"{name}.yaml").read_text()
    assert text.count("YOUR-BUCKET") == 1, "one place to edit"


def test_ray_refuses_what_is_misspelt():
    for path in (("idle_timeout_minute",), ("available_node_types", "l4_spot", "max_worker")):
        config = read("aws.yaml")
        place = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = 1
        with pytest.raises(Exception, match=path[-1]):
            prepared(config)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_launchers_files_hold_what_ray_does_not_check(name, run_instances):
    assert checks.launcher_problems(prepared(read(f"{name}.yaml")), load_prices(), run_instances) == []


OPEN = {"IpRanges": [{"CidrIp": "10.0.0.0/8"}], "Ipv6Ranges": [{"CidrIpv6": "::/0"}]}
PLANTED = {
    "aws": [
        ("l4_spot.node_config.InstanceTyp", "g6.2xlarge", "no 'InstanceTyp'"),
        ("l4_spot.node_config.InstanceType", "g6.3xlarge", "not in the price table"),
        ("l4_spot.node_config.InstanceMarketOptions.MarketTyp", "spot", "no 'MarketTyp'"),
        ("l4_spot.node_config.InstanceMarketOptions.MarketType", "Spot", "none of EC2's values"),
        ("l4_spot.node_config.BlockDeviceMappings.0.Ebs.VolumeSize", 8, "a disk of at least"),
        ("l4_spot.node_config.MetadataOptions.HttpTokens", "optional", "without a token"),
        ("l4_spot.resources.GPU", 8, "has 1 GPUs"),
        ("l4_spot.min_workers", 1, "from 0"),
        ("l4_on_demand.priority", 3, "lower priority"),
        ("head.node_config.InstanceMarketOptions", {"MarketType": "spot"}, "the head is to be"),
        ("head.node_config.InstanceType", "g6.xlarge", "the head is to be"),
    ],
    "gcp": [
        ("l4_spot.node_config.machinetype", "g2-standard-8", "'machinetype' is not known"),
        ("l4_spot.node_config.machineType", "g2-standard-9", "not in the price table"),
        ("l4_spot.node_config.scheduling", [{"preemptible": True}], "is to be a mapping"),
        ("l4_spot.node_config.scheduling.provisioningModel", "spot", "none of"),
        ("l4_spot.node_config.scheduling.instanceTerminationAction", "STOP", "costs on"),
        ("l4_spot.node_config.disks.0.initializeParams.diskType", "pd-balanced", "pd-standard"),
        ("l4_on_demand.node_config.scheduling.onHostMaintenance", "MIGRATE", "no GPU machine"),
        ("l4_spot.node_config.disks.0.autoDelete", False, "goes with its machine"),
        ("h100_on_demand.priority", 2, "lower priority"),
        ("head.node_config.scheduling", {"provisioningModel": "SPOT"}, "the head is to be"),
    ],
    "top": [
        ("idle_timeout_minutes", 600, "idle_timeout_minutes"),
        ("provider.cache_stopped_nodes", True, "cost on"),
        ("provider.security_group", {"IpPermissions": [OPEN | {"FromPort": 8265, "ToPort": 8265}]}, "8265"),
        ("provider.security_group", {"IpPermissions": [OPEN | {"FromPort": 22, "ToPort": 9999}]}, "9999"),
        ("worker_setup_commands", [], "are not ended"),
        ("available_node_types.l4_spot.node_config.InstanceInitiatedShutdownBehavior", "stop", "powers itself off"),
        ("file_mounts", {}, "token"),
        ("head_start_ray_commands", ["ray start --head --dashboard-host=0.0.0.0"], "dashboard listens on 0.0.0.0"),
        ("head_start_ray_commands", ["~/raychat/cluster/node.sh ray start --head"], "no autoscaler"),
        ("worker_start_ray_commands", ["ray start --address=$RAY_HEAD_IP:6379"], "watcher"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "path", "value", "found"), [(name, *planted) for name, every in PLANTED.items() for planted in every]
)
def test_planted_errors_are_found(name, path, value, found, run_instances):
    config = read("gcp.yaml" if name == "gcp" else "aws.yaml")
    config["available_node_types"] = {
        key: copy.deepcopy(group) for key, group in config["available_node_types"].items()
    }
    place = config if name == "top" else config["available_node_types"]
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in way:
        place = place[key]
    place[last] = value
    problems = checks.launcher_problems(config, load_prices(), run_instances)
    assert any(found in problem for problem in problems), problems


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_autoscaler_takes_spot_first_and_no_more_than_the_file_allows(name):
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(read(f"{name}.yaml"), skip_content_hash=True)

    def launched(gpus):
        one = ResourceRequestUtil.make({"GPU": 1})
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_worker_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([one] * gpus),
        )
        reply = ResourceDemandScheduler(event_logger=None).schedule(request)
        return {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != "head"}

    other = next(
        group
        for group in read(f"{name}.yaml")["available_node_types"]
        if group.startswith("l4_") and "_spot" in group[3:] and group != "l4_spot"
    )
    assert launched(1) == {"l4_spot": 1}
    assert launched(6) == {"l4_spot": 4, other: 2}
    assert sum(launched(100).values()) == read(f"{name}.yaml")["max_workers"]


def test_aws_is_asked_for_what_the_file_says_and_opens_ssh_alone(monkeypatch, tmp_path):
    """Ray's own provider, all the way to the calls, against a simulated EC2."""
    pytest.importorskip("boto3")
    import boto3
    from moto import mock_aws

    for key, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    config = prepared(read("aws.yaml"))
    with mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        iam = boto3.client("iam")
        for profile in ("raychat-head", "raychat-node"):
            iam.create_instance_profile(InstanceProfileName=profile)
        made = bootstrap_aws(config)
        provider = AWSNodeProvider(made["provider"], "raychat")
        for name, group in made["available_node_types"].items():
            kind = "head" if name == "head" else "worker"
            tags = {"ray-node-kind": kind, "ray-node-name": name, "ray-user-node-type": name, "ray-launch-config": "x"}
            provider.create_node(group["node_config"], tags, 1)
        ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
        groups = ec2.describe_security_groups()["SecurityGroups"]
        machines = [machine for one in ec2.describe_instances()["Reservations"] for machine in one["Instances"]]
    rules = next(group["IpPermissions"] for group in groups if group["GroupName"].startswith("ray-autoscaler"))
    assert [rule["FromPort"] for rule in rules if rule["IpRanges"]] == [22]
    for machine in machines:
        name = next(tag["Value"] for tag in machine["Tags"] if tag["Key"] == "ray-user-node-type")
        assert (machine.get("InstanceLifecycle") == "spot") == name.endswith("_spot")
        assert machine["IamInstanceProfile"]["Arn"].endswith("raychat-head" if name == "head" else "raychat-node")
    assert len(machines) == len(config["available_node_types"])


def test_the_account_has_the_roles_that_the_machines_are_started_with():
    class Template(yaml.SafeLoader):
        """CloudFormation's, with its functions as plain values, and without aliases, which it does not know."""

    Template.add_multi_constructor("!", lambda loader, _, node: node.value)
    text = (CLUSTER / "aws-account.yaml").read_text()
    assert not re.search(r": [&*]\w", text)
    resources = yaml.load(text, Template)["Resources"]
    profiles = {
        part["Properties"]["InstanceProfileName"]
        for part in resources.values()
        if part["Type"] == "AWS::IAM::InstanceProfile"
    }
    used = {
        group["node_config"]["IamInstanceProfile"]["Name"]
        for group in read("aws.yaml")["available_node_types"].values()
    }
    assert used == profiles
    assert all(resources["Storage"]["Properties"]["PublicAccessBlockConfiguration"].values())
    assert resources["Storage"]["DeletionPolicy"] == "Retain"
    assert resources["NodeRole"]["Properties"].keys() == {"RoleName", "AssumeRolePolicyDocument", "ManagedPolicyArns"}


# Kubernetes


def crd_problems(kind, manifest):
    path = CRDS / f"{kind}s.v1.schema.json.gz"
    if not path.exists():
        pytest.skip(f"no schema of KubeRay in {CRDS}")
    from jsonschema import Draft202012Validator

    schema = checks.strict(json.loads(gzip.decompress(path.read_bytes())))
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(manifest)]


@pytest.mark.parametrize("kind", ["raycluster", "rayjob"])
def test_kubernetes_accepts_the_manifests_and_refuses_planted_errors(kind):
    manifest = read(f"kuberay/{kind}.yaml")
    assert crd_problems(kind, manifest) == []
    spec = manifest["spec"] if kind == "raycluster" else manifest["spec"]["rayClusterSpec"]
    group = spec["workerGroupSpecs"][0]
    group["maxReplica"] = 3
    group["template"]["spec"]["containers"][0]["lifecycle"]["prestop"] = {}
    group["template"]["spec"]["terminationGracePeriodSeconds"] = "120s"
    spec["authOptions"]["mode"] = "Token"
    found = "\n".join(crd_problems(kind, manifest))
    for planted in ("maxReplica", "prestop", "120s", "Token"):
        assert planted in found


def test_fault_tolerance_of_the_gcs_may_be_uncommented():
    text = (CLUSTER / "kuberay" / "raycluster.yaml").read_text()
    active = re.sub(r"(?m)^(\s*)# (gcsFaultToleranceOptions:|  redis)", r"\1\2", text)
    manifest = yaml.safe_load(active)
    assert manifest["spec"]["gcsFaultToleranceOptions"]["redisAddress"]
    assert crd_problems("raycluster", manifest) == []


def test_the_job_has_the_cluster_that_stands_alone_and_tries_again():
    cluster, job = read("kuberay/raycluster.yaml"), read("kuberay/rayjob.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert checks.cluster_problems(cluster["spec"]) == []
    assert f"backoffLimit: {job['spec']['backoffLimit']}" in (ROOT / "docs" / "faults.md").read_text()
    assert job["spec"]["shutdownAfterJobFinishes"]
    for pod in pods(cluster["spec"]):
        environment = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
        assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert "--budget-usd" in job["spec"]["entrypoint"], "nobody watches it"
    assert {cluster["spec"]["rayVersion"]} == set(
        re.findall(r"(?m)^ray==(.*)$", (ROOT / ".ci" / "constraints.txt").read_text())
    )
    head, *workers = (pod["serviceAccountName"] for pod in pods(cluster["spec"]))
    assert head not in workers, "KubeRay lets the head's account change pods"
    made = yaml.safe_load_all((CLUSTER / "kuberay" / "serviceaccount.yaml").read_text())
    assert {head, *workers} == {account["metadata"]["name"] for account in made}


def pods(spec):
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_errors_planted_in_the_cluster_are_found():
    def planted(change, found):
        spec = json.loads(json.dumps(read("kuberay/raycluster.yaml")["spec"]))
        change(spec, spec["workerGroupSpecs"][0], spec["workerGroupSpecs"][0]["template"]["spec"])
        problems = checks.cluster_problems(spec)
        assert any(found in problem for problem in problems), (found, problems)

    planted(lambda spec, group, pod: spec["authOptions"].update(mode="disabled"), "no token")
    planted(lambda spec, group, pod: spec["headGroupSpec"].update(serviceType="LoadBalancer"), "from outside")
    planted(
        lambda spec, group, pod: pods(spec)[0]["nodeSelector"].update({"cloud.google.com/gke-provisioning": "spot"}),
        "head",
    )
    planted(lambda spec, group, pod: pods(spec)[0].pop("shareProcessNamespace"), "zombies")
    planted(lambda spec, group, pod: pod.update(terminationGracePeriodSeconds=30), "killed before")
    planted(lambda spec, group, pod: pod["containers"][0]["lifecycle"].pop("preStop"), "killed before")
    planted(
        lambda spec, group, pod: pod["containers"][0]["lifecycle"]["preStop"]["exec"].update(command=["sleep", "90"]),
        "15 s",
    )
    planted(lambda spec, group, pod: pod.pop("restartPolicy"), "comes back")
    planted(lambda spec, group, pod: pod["containers"].pop(), "watcher")
    planted(lambda spec, group, pod: pod["volumes"][1]["emptyDir"].pop("medium"), "/dev/shm")
    planted(lambda spec, group, pod: pod["tolerations"].pop(1), "taints")
    planted(lambda spec, group, pod: pod["nodeSelector"].pop("cloud.google.com/gke-accelerator"), "several kinds")
    planted(lambda spec, group, pod: group.update(priority=0), "before those on spot")
    planted(lambda spec, group, pod: group["rayStartParams"].update({"num-gpus": "4"}), "its GPUs")
    planted(
        lambda spec, group, pod: pod["containers"][0]["env"].append({"name": "AWS_SECRET_KEY", "value": "x"}), "secrets"
    )
    planted(lambda spec, group, pod: pod["containers"][0].update(image="other"), "several images")


def test_the_monitor_finds_every_pod_and_the_port_of_its_metrics():
    monitor, spec = read("kuberay/podmonitor.yaml"), read("kuberay/raycluster.yaml")["spec"]
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert monitor["spec"].keys() == {"selector", "podTargetLabels", "podMetricsEndpoints"}
    assert all(endpoint.keys() == {"port", "interval"} for endpoint in monitor["spec"]["podMetricsEndpoints"])
    assert list(checks.monitor_problems(monitor, spec)) == []
    for change, found in (
        (lambda spec, pods: spec["workerGroupSpecs"][1]["rayStartParams"].update({"metrics-export-port": "9"}), "l4-on-dem"),
        (lambda spec, pods: spec["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"].pop(), "head"),
        (lambda spec, pods: pods["podMetricsEndpoints"][0].update(port="metric"), "h100-spot"),
        (lambda spec, pods: pods["selector"]["matchLabels"].update({"ray.io/cluster": "raychat"}), "ray.io/cluster"),
        (lambda spec, pods: pods["podTargetLabels"].append("ray.io/clusters"), "no label ray.io/clusters"),
    ):  # fmt: skip
        planted_in, planted = json.loads(json.dumps(spec)), json.loads(json.dumps(monitor))
        change(planted_in, planted["spec"])
        assert any(found in problem for problem in checks.monitor_problems(planted, planted_in)), found


# Shell and image


def linter(name):
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"no {name} for this machine in the registry (pyproject.toml)")
    return found


def commands_of(config):
    """Shell commands anywhere in a launcher's file."""
    keys = [key for key in config if key.endswith("_commands")]
    return [command for key in keys for command in config[key]]


def test_shellcheck_has_nothing_to_say(tmp_path):
    scripts = [NODE_SH, CLUSTER / "machines.sh"]
    for name in LAUNCHERS:
        script = tmp_path / f"{name}.sh"
        script.write_text("#!/bin/bash\nRAY_HEAD_IP=10.0.0.1\n" + "\n".join(commands_of(read(f"{name}.yaml"))) + "\n")
        scripts.append(script)
    # SC2086: $RAY_HEAD_IP is an address, and Ray's own form of these commands has no quotes.
    done = subprocess.run([linter("shellcheck"), "-e", "SC2086", *scripts], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "bad.sh").write_text("#!/bin/bash\ncd $1/x\n")
    assert subprocess.run([linter("shellcheck"), tmp_path / "bad.sh"], capture_output=True).returncode == 1


def test_hadolint_has_nothing_to_say(tmp_path):
    done = subprocess.run([linter("hadolint"), CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN sudo apt-get install gcc\n")
    assert subprocess.run([linter("hadolint"), tmp_path / "Dockerfile"], capture_output=True).returncode == 1


def test_the_image_holds_what_it_needs_and_runs_as_nobody_special():
    text = (CLUSTER / "Dockerfile").read_text()
    stages = re.split(r"(?m)^FROM ", text)[1:]
    finals = {stage.split()[2]: stage for stage in stages if stage.split()[2] in ("cpu", "cuda")}
    assert set(finals) == {"cpu", "cuda"}
    assert all("\nUSER 1000\n" in stage for stage in finals.values())
    assert text.count("-c .ci/constraints.txt") == 2
    allowed = [
        line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    assert all((ROOT / name).exists() for name in allowed)
    assert {"raychat", "jobs", "pyproject.toml", ".ci/constraints.txt"} <= set(allowed)
