"""The order of training rows: a pure function of seed, epoch and row counts, with random access.

One integer, the cursor (rows consumed so far), is the whole state of the data. An epoch permutes chunks of consecutive
rows, cuts the result into `lanes` contiguous parts and shuffles each part in windows; lanes run on endlessly over
epochs. A global batch takes the same number of rows from every lane. Nothing here knows how many workers there are:
a worker takes a slice of each global batch, so any number of workers sees the same rows in the same step.
"""

import functools
from collections.abc import Sequence

import numpy as np

from raychat.errors import DataError

MAX_LANES = 8
CHUNK_ROWS = 256
WINDOW_ROWS = 8192


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64, that depends on `key` alone: not on a library's version or a machine.

    Ranks are those of splitmix64 outputs (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195).
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _splitmix64(state ^ np.array([part], np.uint64))
    return np.argsort(_splitmix64(state + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN), kind="stable")


def lanes_for(rows_per_batch: int) -> int:
    """Lanes for a batch of this many rows: the largest power of two that divides it, at most 8."""
    return min(MAX_LANES, rows_per_batch & -rows_per_batch)


def rank_slice(rows_per_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """First row and end of `rank`'s part of a batch, uneven where it must be."""
    return rank * rows_per_batch // world_size, (rank + 1) * rows_per_batch // world_size


class Order:
    """Row ids of every global batch, for shards of `shard_rows` rows each.

    Args:
        shard_rows: rows of each shard, in order; a row id counts over all of them.
        seed: seed of the order.
        lanes: parts of an epoch that are read side by side; cursor and batch are multiples of it.
        chunk_rows: consecutive rows that stay together (a record batch of a shard).
        window_rows: span of rows that are shuffled together.

    Raises:
        DataError: when there are fewer rows than lanes.
    """

    def __init__(
        self,
        shard_rows: Sequence[int],
        *,
        seed: int,
        lanes: int,
        chunk_rows: int = CHUNK_ROWS,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        self.seed, self.lanes, self.window_rows = seed, lanes, window_rows
        self.num_rows = sum(shard_rows)
        self.lane_rows = self.num_rows // lanes
        if self.lane_rows == 0:
            raise DataError(
                f"The training split packs into {self.num_rows} rows, fewer than the {lanes} lanes of a batch: "
                "use more text, a shorter --max-seq-len or a smaller --total-batch-size."
            )
        starts = np.concatenate([[0], np.cumsum(shard_rows, dtype=np.int64)[:-1]])
        chunks = [
            (start + first, min(chunk_rows, rows - first))
            for start, rows in zip(starts.tolist(), shard_rows, strict=True)
            for first in range(0, rows, chunk_rows)
        ]
        self._chunk_start, self._chunk_len = (np.array(column, np.int64) for column in zip(*chunks, strict=True))
        self._epoch = functools.lru_cache(maxsize=2)(self._permute_chunks)
        self._window = functools.lru_cache(maxsize=4 * lanes)(self._permute_window)

    @property
    def epoch_rows(self) -> int:
        """Rows of one epoch; fewer than `lanes` rows are left out."""
        return self.lane_rows * self.lanes

    def epoch(self, cursor: int) -> int:
        """Which pass over the data the row at `cursor` belongs to, from 0."""
        return cursor // self.epoch_rows

    def batch(self, cursor: int, rows_per_batch: int, lo: int = 0, hi: int | None = None) -> np.ndarray:
        """Row ids, int64, of rows `lo` to `hi` of the global batch that starts at `cursor`; lane after lane."""
        hi = rows_per_batch if hi is None else hi
        if cursor % self.lanes or rows_per_batch % self.lanes:
            raise ValueError(f"cursor {cursor} and batch {rows_per_batch} must be multiples of {self.lanes} lanes")
        per_lane = rows_per_batch // self.lanes
        wanted = np.arange(lo, hi, dtype=np.int64)
        lane, place = wanted // per_lane, cursor // self.lanes + wanted % per_lane
        ids = np.empty_like(wanted)
        for one in np.unique(lane):
            mine = lane == one
            ids[mine] = self._lane_rows(int(one), place[mine])
        return ids

    def _lane_rows(self, lane: int, place: np.ndarray) -> np.ndarray:
        """Row ids at `place` of the endless stream of `lane`."""
        epoch, within = place // self.lane_rows, place % self.lane_rows
        window = within // self.window_rows
        ids = np.empty_like(place)
        for e, w in np.unique(np.stack([epoch, window]), axis=1).T.tolist():
            mine = (epoch == e) & (window == w)
            shuffled = self._window(e, lane, w)
            position = lane * self.lane_rows + w * self.window_rows + shuffled[within[mine] - w * self.window_rows]
            chunks, ends = self._epoch(e)
            nth = np.searchsorted(ends, position, side="right")
            chunk = chunks[nth]
            ids[mine] = self._chunk_start[chunk] + position - (ends[nth] - self._chunk_len[chunk])
        return ids

    def _permute_chunks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self._chunk_len), self.seed, epoch)
        return order, np.cumsum(self._chunk_len[order])

    def _permute_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        return permutation(
            min(self.window_rows, self.lane_rows - window * self.window_rows), self.seed, epoch, lane, window
        )


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
