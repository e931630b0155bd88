"""Ray's autoscaler, which here also goes to the next group of machines when a cloud refuses to start one.

  python -m raychat.on_ray.autoscaler --address HEAD:6379 --autoscaling-config FILE        beside `ray start --no-monitor`

Ray 2.60 puts a group behind the others when a machine of it was started and did not come (`ALLOCATION_TIMEOUT`), as pods of
Kubernetes are. AWS and Google Cloud refuse at once (`ALLOCATION_FAILED`), which Ray counts for nothing: it would ask for the
same spot machines for ever, and never on demand.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ray._raylet import GcsClient  # pyrefly: ignore[missing-module-attribute]
from ray.autoscaler.v2 import autoscaler
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.core.generated.instance_manager_pb2 import (
    Instance,  # pyrefly: ignore[missing-module-attribute]
    InstanceUpdateEvent,  # pyrefly: ignore[missing-module-attribute]
)

from raychat.on_ray.raylets import ALIVE

ENDED = (Instance.ALLOCATION_FAILED, Instance.TERMINATED)


class RefusalMonitor(CloudResourceMonitor):
    """Which groups could lately not be had: also those of which the cloud refused a machine."""

    def __init__(self) -> None:
        super().__init__()
        self._group_of: dict[str, str] = {}  # machine to group: the event of a refusal does not name it

    def notify(self, events: list[InstanceUpdateEvent]) -> None:
        """Heed what happened to machines."""
        super().notify(events)
        for event in events:
            if event.instance_type:
                self._group_of[event.instance_id] = event.instance_type
            group = self._group_of.get(event.instance_id)
            if group and event.new_instance_status == Instance.ALLOCATION_FAILED:
                self.allocation_timeout(InstanceUpdateEvent(instance_type=group))
            if event.new_instance_status in ENDED:
                self._group_of.pop(event.instance_id, None)


def main(argv: Sequence[str]) -> None:
    """Run Ray's monitor as `ray start` does, until it is ended."""
    parser = argparse.ArgumentParser(
        prog="python -m raychat.on_ray.autoscaler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--address", required=True, help="host:port of the head")
    parser.add_argument("--autoscaling-config", required=True, help="the file of `ray up`, as it lies on the head")
    args = parser.parse_args(argv)
    nodes = GcsClient(address=args.address).get_all_node_info(timeout=30).values()
    head = next(node for node in nodes if node.is_head_node and node.state == ALIVE)
    autoscaler.CloudResourceMonitor = RefusalMonitor
    sys.argv[1:] = [
        f"--gcs-address={head.node_manager_address}:{args.address.rpartition(':')[2]}",  # which the machines will be told
        f"--autoscaling-config={args.autoscaling_config}",
        f"--logs-dir={Path(head.session_dir) / 'logs'}",
        f"--monitor-ip={head.node_manager_address}",
    ]
    runpy.run_module("ray.autoscaler.v2.monitor", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
