"""Where a drill takes place: on a cluster of its own on this machine, or on a user's."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychat.config import Config
from raychat.on_ray import cluster as clusters
from raychat.on_ray.processes import is_running, kill_tree
from raychat.on_ray.raylets import Node, Raylets, drain_node

TASK_S = 30.0


class Site(Protocol):
    """What can be done to the machines of a cluster. Processes are named by node and id."""

    address: str
    ends_nodes: bool
    """whether a node that was told to go is ended at its deadline by the drill; else the cluster's owner does that"""

    def kill_process(self, node_id: str, pid: int) -> None:
        """SIGKILL one process."""

    def is_running(self, node_id: str, pid: int) -> bool:
        """Whether a process is there."""

    def drain(self, node_id: str, deadline_s: float) -> None:
        """Give notice that a node goes in so many seconds."""

    def kill_node(self, node_id: str) -> None:
        """Let a node vanish."""

    def replace(self) -> None:
        """Bring another node for one that is gone."""


class OwnSite:
    """Raylets on this machine: one node with one CPU for each worker, so that a node fault hits one rank."""

    ends_nodes = True

    def __init__(self, raylets: Raylets, workers: int) -> None:
        self.address, self._raylets = raylets.address, raylets
        for _ in range(workers):
            raylets.add(num_cpus=1)

    def kill_process(self, node_id: str, pid: int) -> None:
        """SIGKILL one process, with whatever it started."""
        kill_tree(pid)

    def is_running(self, node_id: str, pid: int) -> bool:
        """Whether a process is there."""
        return is_running(pid)

    def drain(self, node_id: str, deadline_s: float) -> None:
        """Give notice."""
        self._raylets.drain(self._node(node_id), deadline_s)

    def kill_node(self, node_id: str) -> None:
        """Let a node vanish."""
        self._raylets.kill(self._node(node_id))

    def replace(self) -> None:
        """Start another node."""
        self._raylets.add(num_cpus=1)

    def _node(self, node_id: str) -> Node:
        return next(node for node in self._raylets.nodes if node.node_id == node_id)


class UserSite:
    """A cluster that is there already. Only what belongs to the drill's own run is hit, through tasks on its nodes."""

    ends_nodes = False

    def __init__(self, address: str) -> None:
        self.address = address

    def kill_process(self, node_id: str, pid: int) -> None:
        """SIGKILL one process, with whatever it started."""
        _on_node(node_id, kill_tree, pid)

    def is_running(self, node_id: str, pid: int) -> bool:
        """Whether a process is there; one on a node that does not answer is not."""
        with contextlib.suppress(ray.exceptions.RayError):
            return bool(_on_node(node_id, is_running, pid))
        return False

    def drain(self, node_id: str, deadline_s: float) -> None:
        """Give notice; who owns the cluster takes the node away, or does not."""
        drain_node(ray.get_runtime_context().gcs_address, node_id, deadline_s)

    def kill_node(self, node_id: str) -> None:
        """Let a node's raylet and all its processes vanish, the task that does it included."""
        with contextlib.suppress(ray.exceptions.RayError):
            _on_node(node_id, _kill_own_raylet)

    def replace(self) -> None:
        """Nothing: other nodes are the cluster's business."""


def _on_node(node_id: str, function: Any, *arguments: Any) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    return ray.get(task.remote(*arguments), timeout=TASK_S)


def _kill_own_raylet() -> None:
    import os

    kill_tree(os.getppid())


@contextlib.contextmanager
def open_site(address: str, workers: int) -> Iterator[Site]:
    """The user's cluster at `address`, or a new one on this machine for as long as the block runs."""
    if address:
        with clusters.connect(Config.from_flat({"address": address}), echo=logging.getLogger(__name__).info):
            yield UserSite(address)
    else:
        with Raylets() as raylets:
            yield OwnSite(raylets, workers)
