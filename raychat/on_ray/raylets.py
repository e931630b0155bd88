"""A cluster of several nodes on this machine, whose nodes can be taken away and given back: for drills and tests.

Each node is a raylet with workers of its own, and the head (GCS and a raylet that takes no work) outlives them all:
drivers that are given `address` connect to the head. Ray has the same in `ray.cluster_utils.Cluster`, which also writes
down its address where any later `ray.init()` of this machine would find and join it.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._private.node import Node as RayNode
from ray._private.parameter import RayParams
from ray._raylet import GcsClient  # pyrefly: ignore[missing-module-attribute]
from ray.core.generated import autoscaler_pb2
from ray.experimental import internal_kv

from raychat.on_ray.cluster import ENVIRONMENT
from raychat.on_ray.processes import kill_tree

OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least is 75 MiB
# A killed raylet refuses connections: GCS finds out within period x threshold. Its defaults (3 s, 5 times) make it 15 s.
# The timeout stays long: on a machine under load, a raylet that answers late is not dead.
SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
    "health_check_timeout_ms": 10_000,
}
KNOWN_DEAD_S = 60.0
ALIVE = 0  # GcsNodeInfo.GcsNodeState


@dataclass(frozen=True)
class Node:
    """A node of the cluster: one raylet and the processes that it started."""

    node_id: str
    raylet_pid: int
    handle: RayNode = field(repr=False, compare=False)


class Raylets:
    """A head without worker slots, and nodes one by one. Use it as a context manager.

    Only who has the token of this user (~/.ray/auth_token) can join: `os.environ` says so to processes started later.

    The processes end with the thread that made them, also when that is killed: make and `add` from one that lives on.
    """

    def __init__(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # As `ray.init()` does for a cluster that it starts. Processes that are to join find it in this environment.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it says that the safe default holds
        if enable_token_auth_by_default():
            ensure_token_if_auth_enabled(create_token_if_missing=True)
        self._nodes: list[Node] = []
        self._head = _start(num_cpus=0, head=True, _system_config=dict(SYSTEM_CONFIG))
        self.address: str = self._head.handle.gcs_address
        self._gcs = GcsClient(address=self.address)

    def __enter__(self) -> "Raylets":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def head(self) -> Node:
        """The node that drivers connect to."""
        return self._head

    @property
    def nodes(self) -> list[Node]:
        """The nodes that were added and neither killed nor removed, in the order they came."""
        return list(self._nodes)

    def add(
        self,
        *,
        num_cpus: int = 1,
        labels: Mapping[str, str] | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> Node:
        """Start one more node, and return when the cluster knows it."""
        node = _start(
            num_cpus=num_cpus,
            labels=dict(labels or {}),
            resources=dict(resources or {}),
            gcs_address=self.address,
        )
        self._nodes.append(node)
        return node

    def drain(self, node: Node, deadline_s: float) -> None:
        """Give notice that `node` goes away in `deadline_s` seconds, as a preemption notice does. Nothing is killed."""
        drain_node(self.address, node.node_id, deadline_s)

    def kill(self, node: Node) -> None:
        """End `node` as a machine that vanishes: raylet, agents and workers at once, without a word to anybody."""
        self._nodes.remove(node)
        kill_tree(node.raylet_pid)
        node.handle.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)  # reaps the raylet

    def remove(self, node: Node) -> None:
        """Shut `node` down in an orderly way."""
        self._nodes.remove(node)
        node.handle.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)

    def is_alive(self, node: Node) -> bool:
        """Whether the cluster counts `node` among the living."""
        alive = self._gcs.get_all_node_info(timeout=30, state_filter=ALIVE)
        return any(node_id.hex() == node.node_id for node_id in alive)

    def wait_dead(self, node: Node, timeout_s: float = KNOWN_DEAD_S) -> float:
        """Wait until the cluster counts `node` among the dead; the seconds that took.

        Raises:
            TimeoutError: it still counts as alive.
        """
        begun = time.monotonic()
        while self.is_alive(node):
            if time.monotonic() - begun > timeout_s:
                raise TimeoutError(f"The cluster has not noticed for {timeout_s:g}s that node {node.node_id} is gone.")
            time.sleep(0.05)
        return time.monotonic() - begun

    def close(self) -> None:
        """End all nodes, the head last."""
        for node in self.nodes:
            self.remove(node)
        self._head.handle.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


def drain_node(gcs_address: str, node_id: str, deadline_s: float) -> None:
    """Tell the cluster at `gcs_address` that a node is taken away in `deadline_s` seconds.

    Raises:
        RuntimeError: the cluster refused, or the node is gone already.
    """
    deadline_ms = int((time.time() + deadline_s) * 1000)
    reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # pyrefly: ignore[missing-attribute]
    accepted, why_not = GcsClient(address=gcs_address).drain_node(node_id, reason, "drill", deadline_ms)
    if not accepted:
        raise RuntimeError(f"Ray refused to drain node {node_id}: {why_not}")


def _start(*, head: bool = False, **parameters: Any) -> Node:
    params = RayParams(
        num_gpus=0,
        object_store_memory=OBJECT_STORE_BYTES,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
        include_dashboard=False,
        dashboard_port=0,  # pyrefly: ignore[bad-argument-type] # it is started all the same
        include_log_monitor=False,  # pyrefly: ignore[bad-argument-type]
        no_monitor=True,
        **parameters,
    )
    # Ray makes the node's cluster the one that this whole process asks for its own small data. It may be connected to another
    # one, and would wait for an answer from this one when it is long gone.
    connected = internal_kv.global_gcs_client
    try:
        handle = RayNode(params, head=head, shutdown_at_exit=True, spawn_reaper=True)
    finally:
        internal_kv.global_gcs_client = connected or internal_kv.global_gcs_client
    raylet = handle.all_processes[ray._private.ray_constants.PROCESS_TYPE_RAYLET][0].process
    return Node(str(handle.node_id), raylet.pid, handle)
