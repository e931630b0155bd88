"""The order of rows: every row once an epoch, the same for any number of workers, reachable at any place."""

import itertools

import numpy as np
import pytest

from raychat.data.order import Order, lanes_for, permutation, rank_slice
from raychat.errors import DataError

SHARD_ROWS = [37, 5, 64, 1, 120, 9]  # 236 rows
ROWS = sum(SHARD_ROWS)
PINNED_PERMUTATION = [2, 4, 7, 5, 1, 3, 6, 0]
PINNED_LANE = [1, 3, 7, 4, 6, 5, 2, 0]
PINNED_FIRST = [222, 220, 31, 26, 127, 135, 106, 38, 194, 193, 210, 215, 164, 163, 105, 141]
PINNED_LATE = [66, 61, 48, 47, 122, 207, 132, 134, 226, 222, 150, 19, 157, 159, 92, 97]


def order_of(lanes=8, seed=42, **changes):
    """An order small enough that chunks and windows end in the middle of everything."""
    return Order(SHARD_ROWS, seed=seed, lanes=lanes, **({"chunk_rows": 16, "window_rows": 11} | changes))


def stream(order, start, stop, rows_per_batch):
    """Row ids of the batches from cursor `start` to `stop`."""
    return np.concatenate([order.batch(at, rows_per_batch) for at in range(start, stop, rows_per_batch)])


@pytest.mark.parametrize("n", [1, 2, 7, 256, 5000])
def test_a_permutation_holds_every_number_once(n):
    assert np.array_equal(np.sort(permutation(n, 42, 3)), np.arange(n))


def test_each_part_of_the_key_changes_the_permutation():
    found = {permutation(50, *key).tobytes() for key in itertools.product((0, 1), repeat=3)}
    assert len(found) == 8
    assert permutation(50, 1, 2).tolist() != permutation(50, 2, 1).tolist()


def test_the_permutation_never_changes_between_versions():
    """A checkpoint holds only a cursor: another order would train on some rows twice and on others never."""
    assert permutation(8, 42).tolist() == PINNED_PERMUTATION
    assert permutation(8, 42, 0, 1).tolist() == PINNED_LANE


def test_the_order_never_changes_between_versions():
    assert order_of().batch(0, 16).tolist() == PINNED_FIRST
    assert order_of().batch(2360, 16).tolist() == PINNED_LATE


def test_the_largest_seed_that_is_allowed_has_an_order():
    assert len(set(order_of(seed=2**63 - 1).batch(0, 64).tolist())) == 64


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
def test_an_epoch_is_distinct_rows_and_leaves_out_fewer_than_lanes(lanes):
    order = order_of(lanes)
    for epoch in range(2):
        ids = stream(order, epoch * order.epoch_rows, (epoch + 1) * order.epoch_rows, lanes)
        assert len(set(ids.tolist())) == len(ids) == order.epoch_rows
        assert set(ids.tolist()) <= set(range(ROWS))
    assert 0 <= ROWS - order.epoch_rows < lanes


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_any_number_of_workers_sees_the_same_global_batches(workers):
    order = order_of()
    for cursor in range(0, 3 * ROWS // 16 * 16, 16):
        parts = [order.batch(cursor, 16, *rank_slice(16, rank, workers)) for rank in range(workers)]
        assert np.concatenate(parts).tolist() == order.batch(cursor, 16).tolist()


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_the_parts_of_a_batch_differ_by_one_row_at_most(workers):
    sizes = [hi - lo for lo, hi in (rank_slice(16, rank, workers) for rank in range(workers))]
    assert sum(sizes) == 16
    assert max(sizes) - min(sizes) <= 1


def test_a_row_read_alone_is_the_row_of_the_stream():
    """Random access, in any sequence, over more than two epochs: the order has no state but its cursor."""
    order, whole = order_of(), stream(order_of(), 0, 40 * 16, 16)
    places = permutation(len(whole), 7)
    assert all(order_of().batch(p // 16 * 16, 16, p % 16, p % 16 + 1)[0] == whole[p] for p in places[:5])
    assert all(order.batch(p // 16 * 16, 16, p % 16, p % 16 + 1)[0] == whole[p] for p in places)


def test_going_on_at_a_cursor_gives_the_rest_of_the_stream():
    assert stream(order_of(), 160, 480, 16).tolist() == stream(order_of(), 0, 480, 16)[160:].tolist()


def test_another_batch_size_takes_the_same_rows_from_the_lanes():
    """One batch of 16 is two of 8: what changes is only how many rows of each lane stand side by side."""
    one = order_of().batch(0, 16).reshape(8, 2)
    two = np.stack([order_of().batch(0, 8), order_of().batch(8, 8)], axis=1)
    assert np.array_equal(one, two)


def test_epochs_and_seeds_have_orders_of_their_own():
    order = order_of()
    first, second = (stream(order, e * order.epoch_rows, (e + 1) * order.epoch_rows, 8).tolist() for e in (0, 1))
    assert first != second
    assert first != stream(order_of(seed=43), 0, order.epoch_rows, 8).tolist()
    assert (order.epoch(order.epoch_rows - 1), order.epoch(order.epoch_rows)) == (0, 1)


def test_neighbours_of_the_corpus_are_apart_in_the_order():
    """In a window of n rows two neighbours meet with chance 2/n, as in any shuffle; here n is all 236 rows."""
    ids = stream(order_of(lanes=1, window_rows=ROWS), 0, ROWS, 1)
    assert np.mean(np.abs(np.diff(ids)) == 1) < 5 * 2 / ROWS


@pytest.mark.parametrize(("rows", "lanes"), [(1, 1), (2, 2), (3, 1), (12, 4), (8, 8), (512, 8), (48, 8)])
def test_lanes_are_the_largest_power_of_two_up_to_eight_that_divides_the_batch(rows, lanes):
    assert lanes_for(rows) == lanes


def test_fewer_rows_than_lanes_are_refused_with_a_way_out():
    with pytest.raises(DataError, match=r"packs into 7 rows, fewer than the 8 lanes .* --max-seq-len"):
        Order([3, 4], seed=0, lanes=8)


def test_a_cursor_between_lanes_is_our_own_mistake():
    with pytest.raises(ValueError, match="multiples of 8 lanes"):
        order_of().batch(4, 16)
