"""Training rows through Ray Data: every rank streams its own part of the global order, block by block.

A read task makes one block: this rank's rows of a span of steps, in order. Which rows those are is a pure function of
the plan, so a task that is killed and run again gives the same block, and so does another number of workers for the
same steps. Read tasks ask for no CPU: on nodes whose CPUs all belong to training workers they would otherwise hang.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.train import DataConfig
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychat.data.batches import Batch
from raychat.data.order import Order, rank_slice
from raychat.data.shards import RowReader, needed_manifest
from raychat.on_ray import task_errors
from raychat.training.job import BatchPlan

BLOCK_BYTES = 8 * 2**20  # fat blocks cost less per row
MAX_STEPS_PER_BLOCK = 32
TASKS_PER_DATASET = 512  # Ray puts every task of a dataset into its store when it plans: long runs are chained
READ_TASKS_AT_ONCE = 2


@dataclass(frozen=True)
class Span:
    """Steps `first` to `stop` of a plan, counted from its cursor."""

    first: int
    stop: int


class PackedRows(Datasource):
    """The rows of one rank for a span of steps, as one read task for each `steps_per_block` steps."""

    def __init__(self, plan: BatchPlan, span: Span, steps_per_block: int) -> None:
        super().__init__()
        self.plan, self.span, self.steps_per_block = plan, span, steps_per_block

    def estimate_inmemory_data_size(self) -> int | None:
        """Not needed: the blocks are of a size that was chosen."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """One task a block, whatever parallelism is suggested: the order depends on it."""
        lo, hi = rank_slice(self.plan.rows_per_batch, self.plan.rank, self.plan.world_size)
        tasks = []
        for first in range(self.span.first, self.span.stop, self.steps_per_block):
            steps = Span(first, min(first + self.steps_per_block, self.span.stop))
            rows = (hi - lo) * (steps.stop - steps.first)
            tasks.append(ReadTask(self.reader(steps), BlockMetadata(num_rows=rows, size_bytes=None, exec_stats=None)))
        return tasks

    def reader(self, steps: Span) -> Callable[[], list[pa.Table]]:
        """What reads one block."""
        plan = self.plan

        def read() -> list[pa.Table]:
            with task_errors.in_task():
                return [read_block(plan, steps)]

        return read


def read_block(plan: BatchPlan, steps: Span) -> pa.Table:
    """This rank's rows of these steps, step after step, in a column `tokens`."""
    reader, order = _opened(plan.tokens_dir, plan.seed, plan.lanes)
    lo, hi = rank_slice(plan.rows_per_batch, plan.rank, plan.world_size)
    ids = [
        order.batch(plan.cursor + step * plan.rows_per_batch, plan.rows_per_batch, lo, hi)
        for step in range(steps.first, steps.stop)
    ]
    rows = reader.rows(np.concatenate(ids))
    kind = pa.list_(pa.from_numpy_dtype(rows.dtype), reader.row_len)
    return pa.table({"tokens": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=kind)})


@dataclass
class RankStream:
    """What a rank gets as its shard of the `train` dataset. `datasets` remembers what was executed, for its stats."""

    rank: int
    world_size: int
    datasets: list[Any] = field(default_factory=list)

    def batches(self, plan: BatchPlan) -> Iterator[Batch]:
        """The batches of `plan`, read ahead by Ray Data while the caller trains."""
        reader, order = _opened(plan.tokens_dir, plan.seed, plan.lanes)
        lo, hi = rank_slice(plan.rows_per_batch, plan.rank, plan.world_size)
        cursor = plan.cursor
        for block in self._blocks(plan, steps_per_block((hi - lo) * reader.row_len * reader.dtype.itemsize)):
            flat = block.column("tokens").combine_chunks().flatten().to_numpy(zero_copy_only=True)
            rows = flat.reshape(-1, reader.row_len)
            for first in range(0, len(rows), hi - lo):
                epoch = order.epoch(cursor)
                cursor += plan.rows_per_batch
                yield Batch(rows[first : first + hi - lo], cursor, epoch)

    def _blocks(self, plan: BatchPlan, per_block: int) -> Iterator[pa.Table]:
        per_dataset = per_block * TASKS_PER_DATASET
        for first in range(0, plan.num_batches, per_dataset):
            span = Span(first, min(first + per_dataset, plan.num_batches))
            with task_errors.of_tasks():
                dataset = open_dataset(PackedRows(plan, span, per_block))
                self.datasets.append(dataset)
                yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def open_dataset(source: PackedRows) -> ray.data.Dataset:
    """The dataset of `source`, set to keep its order and to need no CPU.

    It is read on the node of who reads it, where that can be: spread over all nodes, as Ray does it, its tasks would also run
    on the head, blocks cross the network, and every rank wait for processes on every other node.
    """
    blocks = -(-(source.span.stop - source.span.first) // source.steps_per_block)
    quiet_ray_data()
    here = ray.get_runtime_context().get_node_id()
    with (
        warnings.catch_warnings()
    ):  # Ray 2.60 has no other place for a node that is preferred, and 2.64 will have none for this
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = ray.data.read_datasource(
            source,
            num_cpus=0,
            concurrency=min(blocks, READ_TASKS_AT_ONCE),
            override_num_blocks=blocks,
            ray_remote_args={"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True)},
        )
    dataset.context.execution_options.preserve_order = True
    return dataset


def quiet_ray_data() -> None:
    """Keep Ray Data's own progress, and tracebacks of what it raises anyway, out of a log with a line for every step."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def steps_per_block(bytes_per_step: int) -> int:
    """Steps that a block of about 8 MiB holds, 1 to 32."""
    return max(1, min(MAX_STEPS_PER_BLOCK, BLOCK_BYTES // max(1, bytes_per_step)))


class RowsDataConfig(DataConfig):
    """Gives every rank a RankStream of its own. Ray calls this again after each restart, with the new world size."""

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """One stream a rank; the order does not depend on `datasets`."""
        return [{"train": RankStream(rank, world_size)} for rank in range(world_size)]


@functools.lru_cache(maxsize=2)  # a process that reads blocks reads many of the same shards
def _opened(folder: str, seed: int, lanes: int) -> tuple[RowReader, Order]:
    manifest = needed_manifest(folder)
    return RowReader(manifest, "train"), Order([s.rows for s in manifest.split("train")], seed=seed, lanes=lanes)
