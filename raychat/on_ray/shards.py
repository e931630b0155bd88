"""Token shards made by a Ray Data job: one task for each unit of the corpus, in any order.

They are made on any node, unless what they are made from lies on this one alone: files of its disk are not taken for
shared where an object store is used.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import ray.data

from raychat.data.shards import ShardInfo, ShardTask, make_shard
from raychat.on_ray import task_errors
from raychat.on_ray.nodes import NODE_ID_LABEL
from raychat.on_ray.stream import quiet_ray_data


def make_on_ray(tasks: list[ShardTask]) -> Iterator[ShardInfo]:
    """Shards as they are done. A task that dies is run again by Ray; a shard is whole or absent, so that is safe.

    A node that has no CPUs to give, as a head, makes as many at once as it has cores.

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
        for row in numbers.map(make, **_where(tasks)).iter_rows():
            yield ShardInfo(**row)


def _where(tasks: list[ShardTask]) -> dict[str, Any]:
    """Options of the tasks."""
    if not any("://" in task.folder and "://" not in task.unit.source.path for task in tasks):
        return {"num_cpus": 1}
    here = {NODE_ID_LABEL: ray.get_runtime_context().get_node_id()}
    return {"num_cpus": 0, "concurrency": len(os.sched_getaffinity(0)), "label_selector": here}
