"""Token shards made by a Ray Data job: one task for each unit of the corpus, in any order, on any node."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import ray

from raychat.data.shards import ShardInfo, ShardTask, make_shard
from raychat.on_ray.stream import quiet_ray_data


def make_on_ray(tasks: list[ShardTask]) -> Iterator[ShardInfo]:
    """Shards as they are done. A task that dies is run again by Ray; a shard is whole or absent, so that is safe.

    Raises:
        DataError: what a task found wrong with the corpus.
    """
    if not tasks:
        return
    quiet_ray_data()
    dataset = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    made = dataset.map(_make, num_cpus=1)
    try:
        for row in made.iter_rows():
            yield ShardInfo(**row)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None


def _make(row: dict[str, ShardTask]) -> dict[str, Any]:
    return dataclasses.asdict(make_shard(row["task"]))
