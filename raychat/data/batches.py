"""Batches of one rank, read straight from the token shards: what a plain process and torchrun train on."""

from collections.abc import Iterator
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


def validation_rows(
    reader: RowReader, *, rows: int, device_batch_size: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """This rank's part of the first `rows` validation rows in file order, in passes of (n, T+1)."""
    lo, hi = rank_slice(rows, rank, world_size)
    for first in range(lo, hi, device_batch_size):
        yield reader.rows(np.arange(first, min(first + device_batch_size, hi), dtype=np.int64))
