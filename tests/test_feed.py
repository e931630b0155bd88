"""Batches come out as they went in, cut into passes; read ahead or not, an error comes where the batch would have."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from raychat.data.batches import Batch
from raychat.training import feed
from raychat.training.feed import Feed

CPU = torch.device("cpu")


@pytest.fixture(params=["in line", "ahead"])
def ahead(request, monkeypatch):
    """A feed as on a CPU, and with the thread that it has on CUDA."""
    if request.param == "ahead":
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        return torch.device("cuda")
    return CPU


class Source:
    """Batches 0 to `count` of `rows` rows each, then the `end`; knows how many were asked for, and whether it was closed."""

    def __init__(self, count: int, rows: int = 5, end: Exception | None = None) -> None:
        self.made, self.closed = 0, False
        self.batches = self._batches(count, rows, end)

    def _batches(self, count: int, rows: int, end: Exception | None) -> Iterator[Batch]:
        try:
            for number in range(count):
                self.made += 1
                yield Batch(np.full((rows, 4), number, dtype=np.uint16), rows_consumed=(number + 1) * rows, epoch=0)
            if end:
                raise end
        finally:
            self.closed = True


def test_rows_come_in_order_in_passes_of_the_device_batch(ahead):
    found = list(Feed(Source(3).batches, 2, ahead))
    assert [passes.batch.rows_consumed for passes in found] == [5, 10, 15]
    assert [[len(rows) for rows in passes.rows] for passes in found] == [[2, 2, 1]] * 3
    for passes in found:
        assert torch.equal(torch.cat(passes.rows), torch.from_numpy(passes.batch.rows.astype(np.int32)))


def test_an_error_comes_after_the_batches_before_it_and_again(ahead):
    fed = Feed(Source(2, end=OSError("the disk is gone")).batches, 2, ahead)
    assert [next(fed).batch.rows_consumed for _ in range(2)] == [5, 10]
    with pytest.raises(OSError, match="the disk is gone"):
        next(fed)


def test_closing_closes_the_source_and_ends_the_thread(ahead):
    source = Source(100)
    fed = Feed(source.batches, 2, ahead)
    next(fed)
    fed.close()
    assert source.closed
    assert source.made <= 4  # one asked for, one ready, one in hand, one that close made room for
    assert not [thread for thread in threading.enumerate() if thread.name == "batches-ahead"]


def test_a_source_that_hangs_does_not_hold_the_end_up(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(feed, "CLOSE_S", 0.05)
    release = threading.Event()

    def hanging() -> Iterator[Batch]:
        release.wait()
        yield from ()

    fed = Feed(hanging(), 2, torch.device("cuda"))
    fed.close()
    release.set()
