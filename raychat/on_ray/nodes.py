"""Which machines a cluster has for workers, which are about to be taken away, and which are gone already."""

import concurrent.futures
import os
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray._private.state
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NODE_ID_LABEL = "ray.io/node-id"  # every node has it
NO_DEADLINE_S = 120.0  # a drain without a deadline: what Ray assumes as well
PROBE_S = 1.0
KILL_S = 10.0


@dataclass(frozen=True)
class Node:
    """A machine that the cluster counts as alive. `deadline_s`: Unix time at which it is taken away, if it is."""

    node_id: str
    host: str
    address: str
    port: int
    cpus: int
    gpus: int
    deadline_s: float | None

    def slots(self, use_gpu: bool) -> int:
        """Workers that fit on it."""
        return self.gpus if use_gpu else self.cpus


def nodes() -> dict[str, Node]:
    """The nodes that the cluster counts as alive, by id."""
    draining = ray._private.state.state.get_draining_nodes()  # id -> deadline in ms, 0 where there is none
    found = {}
    for entry in ray.nodes():
        if not entry["Alive"]:
            continue
        node_id, resources = entry["NodeID"], entry["Resources"]
        deadline = draining.get(node_id)
        found[node_id] = Node(
            node_id=node_id,
            host=entry["NodeManagerHostname"],
            address=entry["NodeManagerAddress"],
            port=entry["NodeManagerPort"],
            cpus=int(resources.get("CPU", 0)),
            gpus=int(resources.get("GPU", 0)),
            deadline_s=None if deadline is None else deadline / 1000 or time.time() + NO_DEADLINE_S,
        )
    return found


class Checks(Protocol):
    """What decides which nodes may take part: see node_checks.py."""

    @property
    def unfit(self) -> set[str]:
        """Ids of those that may not."""
        ...

    @property
    def pending(self) -> bool:
        """Whether nodes are being checked at this moment."""
        ...

    def tick(self, there: Iterable[Node]) -> None:
        """Check those that are new, and take in what was found."""
        ...


class NodeWatch:
    """The cluster's nodes, looked at again and again; remembers deadlines, and nodes that were found to be gone.

    A machine that vanishes is alive for the cluster until several health checks have failed, which takes some 15 s.
    """

    def __init__(self, use_gpu: bool, checks: "Checks | None" = None) -> None:
        """`checks`: of nodes that join, before workers are started on them."""
        self.use_gpu, self.checks = use_gpu, checks
        self.nodes: dict[str, Node] = {}
        self._deadlines: dict[str, float] = {}
        self._gone: set[str] = set()
        self.look()

    def look(self) -> None:
        """Look again."""
        self.nodes = nodes()
        for node in self.nodes.values():
            if node.deadline_s is not None:
                self._deadlines.setdefault(node.node_id, node.deadline_s)
        if self.checks:
            self.checks.tick(self.nodes.values())

    @property
    def unfit(self) -> set[str]:
        """Nodes that are there and may not take part."""
        return self.checks.unfit if self.checks else set()

    @property
    def checked(self) -> bool:
        """Whether no node is being checked at this moment."""
        return not (self.checks and self.checks.pending)

    def deadline_s(self, node_id: str) -> float | None:
        """Unix time at which the node is taken away, as it was first said."""
        return self._deadlines.get(node_id)

    def is_alive(self, node_id: str) -> bool:
        """Whether the node is there, draining or not."""
        return node_id in self.nodes and node_id not in self._gone

    def probe(self) -> None:
        """Find out at once which of the nodes that count as alive do not answer."""
        some = list(self.nodes.values())
        with concurrent.futures.ThreadPoolExecutor(max(1, min(32, len(some)))) as pool:
            there = pool.map(answers, some)
        self._gone = {node.node_id for node, answer in zip(some, there, strict=True) if not answer}

    def good(self) -> list[Node]:
        """Nodes that workers may be started on: they are there and stay."""
        return [
            node
            for node in self.nodes.values()
            if self.is_alive(node.node_id) and not self.deadline_s(node.node_id) and node.node_id not in self.unfit
        ]

    def slots(self) -> int:
        """Workers that the good nodes hold."""
        return sum(node.slots(self.use_gpu) for node in self.good())

    def machines(self, workers: int) -> int:
        """Machines that so many workers need, the largest first."""
        need, count = workers, 0
        for size in sorted((node.slots(self.use_gpu) for node in self.good()), reverse=True):
            if need <= 0:
                break
            need, count = need - size, count + 1
        return max(1, count)

    def avoid(self) -> list[str]:
        """Nodes that the cluster would still start workers on, and that are gone, about to go, or unfit."""
        good = {node.node_id for node in self.good()}
        return sorted(node_id for node_id in self.nodes if node_id not in good)


def answers(node: Node) -> bool:
    """Whether the node's raylet takes a connection."""
    try:
        socket.create_connection((node.address, node.port), timeout=PROBE_S).close()
    except OSError:
        return False
    return True


class Requests:
    """Room for more workers, asked of the cluster and its autoscaler, and kept free once it is there.

    Each worker has a placement group of its own, so that those that can be had are not held up by the others. They keep
    off the nodes `away_from`: room that our own workers leave for a moment, when they are restarted, is not to be had.
    """

    def __init__(self, use_gpu: bool) -> None:
        self._bundle = {"GPU": 1} if use_gpu else {"CPU": 1}
        self._groups: list[PlacementGroup] = []
        self._selector: dict[str, str] | None = None
        self._count, self._since = 0, time.monotonic()

    @property
    def asked(self) -> int:
        """Workers that room is asked for."""
        return len(self._groups)

    def set(self, workers: int, away_from: Iterable[str] = ()) -> None:
        """Ask for room for so many workers, no more and no fewer."""
        selector = not_on(away_from)
        if (len(self._groups), self._selector) == (workers, selector):
            return
        self._count, self._since = 0, time.monotonic()
        while len(self._groups) > (workers if selector == self._selector else 0):
            remove_placement_group(self._groups.pop())
        self._selector = selector
        while len(self._groups) < workers:
            self._groups.append(placement_group([self._bundle], bundle_label_selector=[selector] if selector else None))

    def granted(self) -> tuple[int, float]:
        """How many of them there is room for, and for how many seconds it has been so many."""
        # Not `group.wait(0)`: it mostly answers too late for its own timeout.
        count = sum(placement_group_table(group)["state"] == "CREATED" for group in self._groups)
        if count != self._count:
            self._count, self._since = count, time.monotonic()
        return count, time.monotonic() - self._since


def not_on(node_ids: Iterable[str]) -> dict[str, str] | None:
    """The label selector that keeps off these nodes, or None for none."""
    names = ",".join(sorted(node_ids))
    return {NODE_ID_LABEL: f"!in({names})"} if names else None


def kill_process(node_id: str, pid: int) -> bool:
    """End a process on a node, also one that is stopped and hears nothing. False when that did not work."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        ray.get(task.remote(pid), timeout=KILL_S)
    except (ray.exceptions.RayError, OSError):
        return False
    return True


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
