"""A few worker processes beside those that train, which do one thing at a time together."""

import datetime
import os
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raychat.on_ray.crew import last_line
from raychat.on_ray.nodes import not_on
from raychat.training.world import World

NICENESS = 10  # on a CPU: cores that are shared are training's first
SLOWEST_RANK = datetime.timedelta(hours=12)  # that ranks wait for another; one that died is noticed at once


class GroupError(Exception):
    """What the workers were doing has failed, or one of them is no more. The group is of no use afterwards."""


class Group:
    """Room for the workers is asked for at once; `start` them when there `is_room`, and `end` them in any case."""

    def __init__(self, workers: int, *, use_gpu: bool, avoid: Iterable[str] = ()) -> None:
        """One GPU each, or one CPU; not on the nodes `avoid`."""
        self.workers, self._use_gpu = workers, use_gpu
        selector = not_on(avoid)
        self._room = placement_group(
            [{"GPU": 1} if use_gpu else {"CPU": 1}] * workers,
            bundle_label_selector=[selector] * workers if selector else None,
        )
        self._members: list[Any] = []
        self._rendezvous: Any = None
        self._answers: list[Any] = []

    @property
    def is_room(self) -> bool:
        """Whether the cluster has room for all of them."""
        return placement_group_table(self._room)["state"] == "CREATED"

    @property
    def started(self) -> bool:
        """Whether the workers have been started."""
        return bool(self._members)

    def start(self) -> None:
        """Start the workers. They take seconds to come, and what they are told meanwhile waits."""
        member: Any = ray.remote(_Member)
        resources = {"num_cpus": 0, "num_gpus": 1} if self._use_gpu else {"num_cpus": 1}
        self._members = [
            member.options(**resources, scheduling_strategy=PlacementGroupSchedulingStrategy(self._room, rank)).remote(
                rank, self.workers, nice=0 if self._use_gpu else NICENESS
            )
            for rank in range(self.workers)
        ]
        self._rendezvous = self._members[0].rendezvous.remote()

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        """Have every worker call `function(world, *args)`, a function of an importable module."""
        self._answers = [member.call.remote(self._rendezvous, function, *args) for member in self._members]

    def answers(self) -> list[Any] | None:
        """What they return, in order of rank; None while they are at work.

        Raises:
            GroupError: one of them failed.
        """
        ready, busy = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
        try:
            ray.get(ready)
            return None if busy else ray.get(self._answers)
        except ray.exceptions.RayError as error:
            raise GroupError(last_line(error)) from error

    def end(self) -> None:
        """End the workers, whatever they do, and give the room back."""
        for member in self._members:
            ray.kill(member)
        self._members = []
        remove_placement_group(self._room)


class _Member:
    """One worker."""

    def __init__(self, rank: int, workers: int, *, nice: int) -> None:
        self.world = World(rank, workers)
        self._store: Any = None
        os.nice(nice)

    def rendezvous(self) -> tuple[str, int] | None:
        """Of the first worker: where the others find it; None when there are no others."""
        if self.world.world_size == 1:
            return None
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def call(self, rendezvous: tuple[str, int] | None, function: Callable[..., Any], *args: Any) -> Any:
        """`function(world, *args)`, in a process group of all workers where they are several."""
        if rendezvous:
            self._join(*rendezvous)
        return function(self.world, *args)

    def _join(self, host: str, port: int) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            return
        store = self._store or dist.TCPStore(host, port, is_master=False)
        dist.init_process_group(
            "gloo", store=store, rank=self.world.rank, world_size=self.world.world_size, timeout=SLOWEST_RANK
        )
