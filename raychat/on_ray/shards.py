"""Token shards made by a Ray Data job: one task for each unit of the corpus, in any order, on any node."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import ray.data

from raychat.data.shards import ShardInfo, ShardTask, make_shard
from raychat.on_ray import task_errors
from raychat.on_ray.stream import quiet_ray_data


def make_on_ray(tasks: list[ShardTask]) -> Iterator[ShardInfo]:
    """Shards as they are done. A task that dies is run again by Ray; a shard is whole or absent, so that is safe.

    Raises:
        DataError: what a task found wrong with the corpus.
        OSError: what its machine refused, such as a full disk.
    """
    if not tasks:
        return

    def make(row: dict[str, Any]) -> dict[str, Any]:
        with task_errors.in_task():
            return dataclasses.asdict(make_shard(tasks[row["id"]]))

    quiet_ray_data()
    with task_errors.of_tasks():
        numbers = ray.data.range(len(tasks), override_num_blocks=len(tasks))
        for row in numbers.map(make, num_cpus=1).iter_rows():
            yield ShardInfo(**row)
