"""Which rank this process is, and the few things that ranks do together. One process needs no process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

START_TIMEOUT = timedelta(hours=12)  # of collectives: ranks wait while rank 0 tokenizes a corpus


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run; `local_*` count those on this machine, `device_index` is its GPU.

    `group` is the process group that it talks through; None: the default one.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device_index: int = 0
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def from_environment() -> "World":
        """The world that torchrun describes in the environment, or a single process."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, world_size, local_rank, local_world_size = (
            int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)
        )
        return World(rank, world_size, local_rank, local_world_size, device_index=local_rank)

    @contextmanager
    def process_group(self, device_type: str) -> Iterator[None]:
        """The default process group for ranks on such devices, in the block; a single rank needs none."""
        if self.world_size == 1:
            yield
            return
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=START_TIMEOUT)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def apart(self, timeout: timedelta) -> "World":
        """The same ranks on a gloo group of their own, for another thread to talk through. Every rank calls this."""
        if self.world_size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timeout))

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Sums of `values` over the ranks, in float64 where the device has it."""
        if self.world_size == 1:
            return values
        dtype = torch.float32 if device.type == "mps" else torch.float64
        tensor = torch.tensor(values, dtype=dtype, device=device)
        dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def broadcast(self, value: Any) -> Any:
        """`value` of rank 0, a picklable object, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, on every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        boxes: list[Any] = [None] * self.world_size
        dist.all_gather_object(boxes, value, group=self.group)
        return boxes
