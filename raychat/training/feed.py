"""Batches on their way to the device: cut into passes, and with CUDA made ready by a thread while the device computes.

The next batch is read, converted and put into page-locked memory during the step before. A copy from there does not hold
the host up. On a CPU, where a batch takes a thousandth of a step, there is no thread: it would only take turns with
training.
"""

import queue
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from raychat.data.batches import Batch

CLOSE_S = 5.0  # to wait for a batch that is being read


@dataclass(frozen=True)
class Passes:
    """A batch of this rank, and its rows as tensors on the host, one for each pass."""

    batch: Batch
    rows: list[Int[Tensor, "n T1"]]


class Feed:
    """Iterates over the `Passes` of `batches`, `size` rows each. `close` ends both; a batch that was read ahead is lost."""

    def __init__(self, batches: Iterator[Batch], size: int, device: torch.device) -> None:
        self._batches, self._size, self._pinned = batches, size, device.type == "cuda"
        self._ahead = _Ahead(self._made()) if self._pinned else None
        self._passes: Iterator[Passes] = self._ahead or self._made()

    def __iter__(self) -> Iterator[Passes]:
        return self

    def __next__(self) -> Passes:
        return next(self._passes)

    def close(self) -> None:
        """Stop reading."""
        ended = self._ahead is None or self._ahead.close()
        if ended and isinstance(self._batches, Generator):
            self._batches.close()

    def _made(self) -> Iterator[Passes]:
        for batch in self._batches:
            firsts = range(0, len(batch.rows), self._size)
            yield Passes(batch, [self._tensor(batch.rows[first : first + self._size]) for first in firsts])

    def _tensor(self, rows: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(rows.astype(np.int32))
        return tensor.pin_memory() if self._pinned else tensor


class _Ahead:
    """What an iterator gives, one item ahead of who asks. Its errors come up where the item would have."""

    def __init__(self, items: Iterator[Passes]) -> None:
        self._ready: queue.Queue[Passes | BaseException | None] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name="batches-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Passes]:
        return self

    def __next__(self) -> Passes:
        item = self._ready.get()
        if isinstance(item, Passes):
            return item
        self._ready.put(item)  # for whoever asks again
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> bool:
        """End the thread, which finishes the item it is at; False when that takes too long: it dies with the process."""
        self._closed.set()
        deadline = time.monotonic() + CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Empty):
                self._ready.get_nowait()
            self._thread.join(timeout=0.01)
        return not self._thread.is_alive()

    def _run(self, items: Iterator[Passes]) -> None:
        end: BaseException | None = None
        try:
            for item in items:
                self._ready.put(item)
                if self._closed.is_set():
                    return
        except BaseException as error:  # noqa: BLE001  whatever it is, it belongs to who asks for the item
            end = error
        self._ready.put(end)
