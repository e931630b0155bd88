"""The batches of a plan, read from the token shards by the process that trains on them: what needs no Ray reads so."""

from collections.abc import Iterator

from raychat.data.batches import Batch, local_batches
from raychat.data.order import Order
from raychat.data.shards import RowReader, needed_manifest
from raychat.training.job import BatchPlan


def read_here(plan: BatchPlan) -> Iterator[Batch]:
    """The batches of `plan`, without end."""
    manifest = needed_manifest(plan.tokens_dir)
    order = Order([shard.rows for shard in manifest.split("train")], seed=plan.seed, lanes=plan.lanes)
    return local_batches(
        RowReader(manifest, "train"),
        order,
        cursor=plan.cursor,
        rows_per_batch=plan.rows_per_batch,
        rank=plan.rank,
        world_size=plan.world_size,
    )
