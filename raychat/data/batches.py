"""Batches of one rank, read straight from the token shards: what a plain process and torchrun train on."""

from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass

import numpy as np

from raychat.data.order import Order, rank_slice
from raychat.data.shards import RowReader


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch.

    `rows` is (n, T+1); inputs are all but the last token of a row, targets all but the first. `rows_consumed` counts
    the rows of all ranks, this batch included; `epoch` is that of its first row, from 0.
    """

    rows: np.ndarray
    rows_consumed: int
    epoch: int


def local_batches(
    reader: RowReader, order: Order, *, cursor: int, rows_per_batch: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """This rank's batches from `cursor` on, without end."""
    lo, hi = rank_slice(rows_per_batch, rank, world_size)
    while True:
        ids = order.batch(cursor, rows_per_batch, lo, hi)
        epoch = order.epoch(cursor)
        cursor += rows_per_batch
        yield Batch(reader.rows(ids), cursor, epoch)


def left_out(skipped: Collection[int], *, cursor: int, rows_per_batch: int) -> int:
    """How many of the global batches from `cursor` on are left out because a cursor in `skipped` lies in them."""
    return len({(row - cursor) // rows_per_batch for row in skipped if row >= cursor})


def leave_out(
    batches: Iterator[Batch], skipped: Collection[int], *, rows_per_batch: int
) -> Generator[Batch, None, None]:
    """`batches` without those that a cursor in `skipped` lies in; closes them when it is closed itself."""
    try:
        for batch in batches:
            first = batch.rows_consumed - rows_per_batch
            if not any(first <= row < batch.rows_consumed for row in skipped):
                yield batch
    finally:
        if isinstance(batches, Generator):
            batches.close()


def validation_passes(rows: int, *, device_batch_size: int, world_size: int) -> int:
    """How many passes `validation_rows` gives the rank that has the most of them."""
    return -(-rows // (world_size * device_batch_size))


def validation_rows(
    reader: RowReader, *, rows: int, device_batch_size: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """This rank's part of the first `rows` validation rows in file order, in passes of (n, T+1)."""
    lo, hi = rank_slice(rows, rank, world_size)
    for first in range(lo, hi, device_batch_size):
        yield reader.rows(np.arange(first, min(first + device_batch_size, hi), dtype=np.int64))
