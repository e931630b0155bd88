"""One rank of a run, as Ray Train calls it."""

import os
import socket
import threading
import time
import uuid
from typing import Any

import ray.train
import ray.train.torch

from raychat.errors import RaychatError
from raychat.on_ray.inbox import Hello, OrderPoll, Rank
from raychat.training.build import train
from raychat.training.events import Ended, Event, Failed
from raychat.training.job import Job
from raychat.training.state import Signal
from raychat.training.world import World

BEAT_S = 2.0
ASK_FOR_JOB_S = 0.05


def train_worker(spec: dict[str, Any]) -> None:
    """Train as the rank that Ray Train's context says; `spec["inbox"]` is where the job comes from and events go."""
    inbox = spec["inbox"]
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    world = World(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        device_index=device.index or 0,
    )
    if device.type == "cuda":  # before the first collective, which nccl runs on the device
        import torch

        torch.cuda.set_device(device)

    def send(event: Event) -> None:
        sent = inbox.put.remote(event)
        if isinstance(event, Ended):  # the last word: Ray may end this process before it is on its way
            ray.get(sent)

    try:
        job = _ask_for_job(inbox, world)
        train(
            job,
            world=world,
            batches=ray.train.get_dataset_shard("train").batches,
            sink=send,
            poll=OrderPoll(inbox) if world.rank == 0 else lambda: Signal.NONE,
        )
    except RaychatError as error:
        ray.get(inbox.put.remote(Failed(str(error), error.exit_code)))
        raise


def _ask_for_job(inbox: Any, world: World) -> Job:
    """Tell the driver who is there, and wait for the job of this group."""
    group = world.broadcast(uuid.uuid4().hex)
    threading.Thread(target=_beat, args=(inbox, group, world.rank), daemon=True, name="beat").start()
    me = Rank(group, world.rank, os.getpid(), socket.gethostname(), ray.get_runtime_context().get_node_id())
    ranks = world.gather(me)
    job = None
    if world.rank == 0:
        ray.get(inbox.put.remote(Hello(group, tuple(ranks))))
        while (job := ray.get(inbox.job_of.remote(group))) is None:
            time.sleep(ASK_FOR_JOB_S)
    return world.broadcast(job)


def _beat(inbox: Any, group: str, rank: int) -> None:
    """Tell the driver that this process runs; one that is stopped or stuck in the kernel falls silent."""
    while True:
        inbox.beat.remote(group, rank)
        time.sleep(BEAT_S)
