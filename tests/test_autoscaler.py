"""Ray's Reconciler and scheduler with the groups of cluster/*.yaml, and a cloud that refuses to start machines."""

import time
from pathlib import Path
from unittest import mock

import pytest
import yaml
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage
from ray.autoscaler.v2.instance_manager.node_provider import CloudInstance, LaunchNodeError
from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceState, NodeState, NodeStatus
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind

from raychat.on_ray.autoscaler import RefusalMonitor

CLUSTER = Path(__file__).resolve().parents[1] / "cluster"


class Cloud:
    """Refuses the machines of some groups, as a cloud without capacity does; the others come."""

    def __init__(self, refused):
        self.refused, self.asked = refused, []
        self.machines = {"head": CloudInstance("head", "head", NodeKind.HEAD, True)}
        self.errors = []

    def notify(self, events):
        for event in events:
            if event.new_instance_status == Instance.REQUESTED:
                self.asked.append(event.instance_type)
                if event.instance_type in self.refused:
                    now = int(time.time() * 1e9)
                    self.errors.append(LaunchNodeError(event.instance_type, 1, event.launch_request_id, now))
                else:
                    name = f"machine-{len(self.machines)}"
                    self.machines[name] = CloudInstance(name, event.instance_type, NodeKind.WORKER, True)


def asked_in_turn(name, refused, monitor, rounds=8):
    """The groups that a job with one GPU has the autoscaler ask for, and the machines that there are in the end."""
    config = AutoscalingConfig(yaml.safe_load((CLUSTER / f"{name}.yaml").read_text()), skip_content_hash=True)
    cloud = Cloud(refused)
    manager = InstanceManager(InstanceStorage("cluster", InMemoryStorage()), [cloud, monitor])
    one = ResourceRequestUtil.make({"GPU": 1})
    head = NodeState(node_id=b"h", instance_id="head", ray_node_type_name="head", status=NodeStatus.RUNNING)
    head.total_resources["node:__internal_head__"] = 1
    state = ClusterResourceState(
        cluster_resource_state_version=1,
        node_states=[head],
        pending_resource_requests=ResourceRequestUtil.group_by_count([one]),
    )
    scheduler = ResourceDemandScheduler(event_logger=None)
    for _ in range(rounds):
        errors, cloud.errors = cloud.errors, []
        Reconciler.reconcile(
            instance_manager=manager,
            scheduler=scheduler,
            cloud_resource_monitor=monitor,
            cloud_provider=mock.MagicMock(),
            ray_cluster_resource_state=state,
            non_terminated_cloud_instances=cloud.machines,
            autoscaling_config=config,
            cloud_provider_errors=errors,
            ray_install_errors=[],
            ray_stop_errors=[],
        )
    return cloud.asked, [machine.node_type for machine in cloud.machines.values()]


@pytest.mark.parametrize(("name", "other"), [("aws", "l4_small_spot"), ("gcp", "l4_large_spot")])
def test_where_no_spot_machine_can_be_had_one_on_demand_comes(name, other):
    asked, machines = asked_in_turn(name, {"l4_spot", other}, RefusalMonitor())
    assert asked == ["l4_spot", other, "l4_on_demand"]
    assert machines == ["head", "l4_on_demand"]


def test_a_group_that_refused_is_asked_again_after_all_others():
    every = {"l4_spot", "l4_small_spot", "l4_on_demand"}
    monitor = RefusalMonitor()
    asked, machines = asked_in_turn("aws", every, monitor)
    assert asked[:4] == ["l4_spot", "l4_small_spot", "l4_on_demand", "l4_spot"]
    assert machines == ["head"]
    assert set(monitor.get_recoverable_resource_availabilities()) == every
