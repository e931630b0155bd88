"""One rank of a run, as Ray Train calls it."""

from typing import Any

import ray.train
import ray.train.torch

from raychat.errors import RaychatError
from raychat.on_ray.inbox import StopPoll
from raychat.training.build import Job, train
from raychat.training.events import Ended, Event, Failed
from raychat.training.loop import Signal
from raychat.training.world import World


def train_worker(spec: dict[str, Any]) -> None:
    """Train the job in `spec["job"]` as the rank that Ray Train's context says, and tell `spec["inbox"]`."""
    job, inbox = Job(**spec["job"]), spec["inbox"]
    context = ray.train.get_context()
    world = World(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        device_index=ray.train.torch.get_device().index or 0,
    )

    def send(event: Event) -> None:
        sent = inbox.put.remote(event)
        if isinstance(event, Ended):  # the last word: Ray may end this process before it is on its way
            ray.get(sent)

    try:
        train(
            job,
            world=world,
            batches=ray.train.get_dataset_shard("train").batches,
            sink=send,
            poll=StopPoll(inbox) if world.rank == 0 else lambda: Signal.NONE,
        )
    except RaychatError as error:
        ray.get(inbox.put.remote(Failed(str(error), error.exit_code)))
        raise
