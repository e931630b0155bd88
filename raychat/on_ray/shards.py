"""Token shards made by a Ray Data job: one task for each unit of the corpus, in any order, on any node."""

import dataclasses
from collections.abc import Iterator

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
    numbers = ray.data.range(len(tasks), override_num_blocks=len(tasks))
    made = numbers.map(lambda row: dataclasses.asdict(make_shard(tasks[row["id"]])), num_cpus=1)
    try:
        for row in made.iter_rows():
            yield ShardInfo(**row)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
