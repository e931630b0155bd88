"""A few worker processes beside those that train, which do one thing at a time together."""

import datetime
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raychat.on_ray.crew import last_line
from raychat.on_ray.nodes import not_on
from raychat.on_ray.silence import Silence
from raychat.progress import format_duration
from raychat.training.world import World

NICENESS = 10  # on a CPU: cores that are shared are training's first
LISTEN_S = 2.0  # how often the workers are asked how far they are
SLOWEST_RANK = datetime.timedelta(hours=12)  # that ranks wait for another; one that died is noticed at once


class GroupError(Exception):
    """What the workers were doing has failed, or they hang, or one is no more. The group is of no use afterwards."""


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
        self._beats: list[int] = []
        self._asked: list[Any] = []
        self._silence, self._listened = Silence(), 0.0

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
        remote: Any = ray.remote  # whose types know less than it does
        member = remote(concurrency_groups={"pulse": 1})(_Member)  # a thread that answers while another works
        resources = {"num_cpus": 0, "num_gpus": 1} if self._use_gpu else {"num_cpus": 1}
        self._members = [
            member.options(**resources, scheduling_strategy=PlacementGroupSchedulingStrategy(self._room, rank)).remote(
                rank, self.workers, nice=0 if self._use_gpu else NICENESS
            )
            for rank in range(self.workers)
        ]
        self._rendezvous = self._members[0].rendezvous.remote()
        self._beats = [0] * self.workers
        self._asked = [member.beats.remote() for member in self._members]

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        """Have every worker call `function(world, *args, beat=...)`, a function of an importable module.

        It must call `beat` again and again while it gets on: see silence.py for how often.
        """
        self._silence = Silence()
        self._answers = [member.call.remote(self._rendezvous, function, *args) for member in self._members]

    def answers(self) -> list[Any] | None:
        """What they return, in order of rank; None while they are at work.

        Raises:
            GroupError: one of them failed, or they hang.
        """
        ready, busy = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
        try:
            ray.get(ready)
            if not busy:
                return ray.get(self._answers)
            self._listen()
        except ray.exceptions.RayError as error:
            raise GroupError(last_line(error)) from error
        if self._silence.too_long:
            raise GroupError(f"the workers have not got on for {format_duration(self._silence.seconds)}: they hang")
        return None

    def _listen(self) -> None:
        """Ask the workers how far they are, and do not wait for those that are too deep in something to say it."""
        if time.monotonic() - self._listened < LISTEN_S:
            return
        self._listened = time.monotonic()
        ready, _ = ray.wait(self._asked, num_returns=len(self._asked), timeout=0)
        for rank, member in enumerate(self._members):
            if self._asked[rank] in ready:
                self._beats[rank] = ray.get(self._asked[rank])
                self._asked[rank] = member.beats.remote()
        self._silence.heard(sum(self._beats))

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
        self._nice, self._beats = nice, 0

    @ray.method(concurrency_group="pulse")
    def beats(self) -> int:
        """How often the work has said that it goes on."""
        return self._beats

    def rendezvous(self) -> tuple[str, int] | None:
        """Of the first worker: where the others find it; None when there are no others."""
        if self.world.world_size == 1:
            return None
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def call(self, rendezvous: tuple[str, int] | None, function: Callable[..., Any], *args: Any) -> Any:
        """`function(world, *args, beat=...)`, in a process group of all workers where they are several."""
        # Of this thread, which is not the one that made this object. Only root may lower it.
        os.setpriority(os.PRIO_PROCESS, 0, max(self._nice, os.getpriority(os.PRIO_PROCESS, 0)))
        if rendezvous:
            self._join(*rendezvous)
        return function(self.world, *args, beat=self._beat)

    def _beat(self) -> None:
        self._beats += 1

    def _join(self, host: str, port: int) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            return
        store = self._store or dist.TCPStore(host, port, is_master=False)
        dist.init_process_group(
            "gloo", store=store, rank=self.world.rank, world_size=self.world.world_size, timeout=SLOWEST_RANK
        )
