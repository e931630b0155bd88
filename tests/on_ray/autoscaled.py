"""A cluster on this machine whose nodes come when they are asked for, and go when they idle.

A head without workers, autoscaler v2, and Ray's fake nodes: raylets that the autoscaler starts and ends as it would
machines. Ray has the same in `ray.cluster_utils.AutoscalingCluster`, which begins and ends with `ray stop --force`.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ray._raylet import GcsClient

from on_ray.heads import place, started_head
from raychat.on_ray.raylets import ALIVE, SYSTEM_CONFIG

HEAD_ID = "f" * 51 + "00000"  # that Ray's fake nodes have for the head


@dataclass(frozen=True)
class AutoscaledCluster:
    """Where it listens, and the process of the head."""

    gcs: str
    dashboard: str
    head: subprocess.Popen
    folder: Path
    most: int

    def let_go_after(self, idle_s: float) -> None:
        """Nodes go after `idle_s` seconds without work. The autoscaler reads its file again and again."""
        whole = self._file.with_suffix(".new")
        whole.write_text(json.dumps(_configuration(self.gcs, most=self.most, idle_s=idle_s)))
        whole.rename(self._file)

    @property
    def _file(self) -> Path:
        return self.folder / "autoscaling.yaml"

    def log(self) -> str:
        """The end of what the head and the autoscaler have said."""
        files = (self.folder / "output", self.folder / "session_latest" / "logs" / "monitor.log")
        return "\n".join(file.read_text()[-6000:] for file in files if file.exists())

    def nodes(self) -> set[str]:
        """Ids of the nodes that are alive, without the head."""
        alive = GcsClient(address=self.gcs).get_all_node_info(timeout=30, state_filter=ALIVE)
        return {node.hex() for node in alive} - {HEAD_ID}


@contextlib.contextmanager
def autoscaled_cluster(environment: Mapping[str, str], *, most: int, idle_s: float) -> Iterator[AutoscaledCluster]:
    """A head, and up to `most` nodes of one CPU, which go after `idle_s` seconds without work."""
    fake = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    with place() as at:
        file = at.folder / "autoscaling.yaml"
        file.write_text(json.dumps(_configuration(at.gcs, most=most, idle_s=idle_s)))
        options = {
            "num_cpus": 0,
            "object_store_memory": 2**27,
            "autoscaling_config": file,
            "system_config": json.dumps(SYSTEM_CONFIG),
        }
        with started_head(at, dict(environment) | fake, **options) as head:
            yield AutoscaledCluster(at.gcs, at.dashboard, head, at.folder, most)


def _configuration(gcs: str, *, most: int, idle_s: float) -> dict[str, object]:
    """What a cluster YAML says, for nodes that are fake."""
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {f"{name}_commands": [] for name in commands} | {
        "cluster_name": "fake",
        "max_workers": most,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "spot": {
                "resources": {"CPU": 1, "object_store_memory": 2**27},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
    }
