"""Rows that come through Ray Data are those of a plain process, row for row, whatever happens to the read tasks."""

import dataclasses
import itertools
import os
import re
import shutil
import time

import numpy as np
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raychat.config import Config
from raychat.data.batches import local_batches
from raychat.data.order import Order, lanes_for
from raychat.data.prepare import make_in_process, prepare
from raychat.data.shards import RowReader
from raychat.errors import DataError
from raychat.on_ray import stream
from raychat.on_ray.stream import PackedRows, RankStream, Span
from raychat.training.job import BatchPlan

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ROWS_PER_BATCH = 8


@pytest.fixture(scope="module")
def manifest(tiny_flags, prepared_base):
    config = Config.from_flat(tiny_flags | {"base_dir": str(prepared_base)})
    return prepare(config, with_gpus=False, maker=make_in_process, echo=lambda line: None).manifest


@pytest.fixture(scope="module")
def order(manifest):
    return Order([shard.rows for shard in manifest.split("train")], seed=7, lanes=lanes_for(ROWS_PER_BATCH))


@pytest.fixture
def short_datasets(monkeypatch):
    """Two blocks of two steps to a dataset, so that a few steps take several of both."""
    monkeypatch.setattr(stream, "MAX_STEPS_PER_BLOCK", 2)
    monkeypatch.setattr(stream, "TASKS_PER_DATASET", 2)


def plan_for(manifest, order, *, cursor=0, num_batches=4, rank=0, world_size=1):
    return BatchPlan(
        tokens_dir=str(manifest.folder),
        seed=order.seed,
        lanes=order.lanes,
        cursor=cursor,
        num_batches=num_batches,
        rows_per_batch=ROWS_PER_BATCH,
        rank=rank,
        world_size=world_size,
    )


def rows_here(manifest, order, plan):
    """The batches of `plan` as a plain process reads them."""
    endless = local_batches(
        RowReader(manifest, "train"),
        order,
        cursor=plan.cursor,
        rows_per_batch=plan.rows_per_batch,
        rank=plan.rank,
        world_size=plan.world_size,
    )
    return list(itertools.islice(endless, plan.num_batches))


def assert_same_batches(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.rows_consumed, one.epoch) == (other.rows_consumed, other.epoch)
        assert one.rows.dtype == other.rows.dtype
        np.testing.assert_array_equal(one.rows, other.rows)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_rank_gets_the_rows_of_a_plain_process(manifest, order, short_datasets, world_size):
    """From a cursor in the middle, over the end of an epoch, and over the seams of chained datasets."""
    cursor = order.epoch_rows - 3 * ROWS_PER_BATCH
    assert cursor > 0
    whole = rows_here(manifest, order, plan_for(manifest, order, cursor=cursor, num_batches=7))
    assert {batch.epoch for batch in whole} == {0, 1}
    parts = []
    for rank in range(world_size):
        plan = plan_for(manifest, order, cursor=cursor, num_batches=7, rank=rank, world_size=world_size)
        ranks_stream = RankStream(rank, world_size)
        parts.append(list(ranks_stream.batches(plan)))
        assert len(ranks_stream.datasets) == 2
        assert_same_batches(parts[-1], rows_here(manifest, order, plan))
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step].rows for part in parts]), batch.rows)


def test_every_row_came_through_the_executor_of_a_dataset(manifest, order, short_datasets):
    """Counted by the operators that Ray Data ran: they put out as many rows as the caller took in, and read them once."""
    ranks_stream = RankStream(1, 3)
    taken = sum(
        len(batch.rows)
        for batch in ranks_stream.batches(plan_for(manifest, order, num_batches=7, rank=1, world_size=3))
    )
    counted = 0
    for dataset in ranks_stream.datasets:
        summary = dataset._get_stats_summary()
        assert [operator.operator_name for operator in summary.operators_stats] == ["ReadPackedRows"]
        counted += summary.operators_stats[0].output_num_rows.sum
        assert "ReadPackedRows" in dataset.stats()
    assert counted == taken == 7 * 3


def test_a_read_task_that_is_killed_changes_no_row(manifest, order, short_datasets, monkeypatch, tmp_path):
    killed, read_block = tmp_path / "killed", stream.read_block

    def dies_once(plan, steps):
        if steps.first == 2 and not killed.exists():
            killed.touch()
            os._exit(1)
        return read_block(plan, steps)

    monkeypatch.setattr(stream, "read_block", dies_once)
    plan = plan_for(manifest, order, num_batches=7)
    found = list(RankStream(0, 1).batches(plan))
    assert killed.exists()
    assert_same_batches(found, rows_here(manifest, order, plan))


def test_read_tasks_run_where_no_cpu_is_free(cluster, manifest, order):
    """Training workers own all CPUs of their nodes; a read task that asked for one would wait for ever."""
    everything = placement_group([{"CPU": cluster.cpus}])
    ray.get(everything.ready(), timeout=60)
    try:
        assert ray.available_resources().get("CPU", 0) == 0
        plan = plan_for(manifest, order)
        found = list(RankStream(0, 1).batches(plan))
    finally:
        remove_placement_group(everything)
    assert_same_batches(found, rows_here(manifest, order, plan))


def test_blocks_come_in_order_though_an_early_one_is_late(manifest, order, short_datasets, monkeypatch, tmp_path):
    """Two read tasks run at once; the first waits until the second has begun."""
    second, read_block = tmp_path / "second", stream.read_block

    def first_is_late(plan, steps):
        if steps.first == 2:
            second.touch()
        deadline = time.monotonic() + 60
        while steps.first == 0 and not second.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return read_block(plan, steps)

    monkeypatch.setattr(stream, "read_block", first_is_late)
    plan = plan_for(manifest, order)
    found = list(RankStream(0, 1).batches(plan))
    assert second.exists()
    assert_same_batches(found, rows_here(manifest, order, plan))


def test_a_read_task_says_how_many_rows_it_gives(manifest, order):
    """Ray Data plans with it, and nothing else about a task is known before it runs."""
    plan = plan_for(manifest, order, num_batches=5, rank=2, world_size=3)
    tasks = PackedRows(plan, Span(0, 5), 2).get_read_tasks(parallelism=100)
    assert [task.metadata.num_rows for task in tasks] == [sum(len(block) for block in task()) for task in tasks]
    assert [task.metadata.num_rows for task in tasks] == [6, 6, 3]


def test_a_node_without_the_shards_is_told_so(manifest, order, tmp_path):
    plan = plan_for(manifest, order)
    with pytest.raises(DataError, match="a folder that all nodes share"):
        next(RankStream(0, 1).batches(dataclasses.replace(plan, tokens_dir=str(tmp_path))))


def test_what_a_read_task_finds_wrong_arrives_as_it_was_raised(manifest, order, tmp_path):
    """A shard of the right size whose bytes are no Arrow file: only reading it tells."""
    shutil.copytree(manifest.folder, tmp_path / "tokens")
    for shard in manifest.split("train"):
        (tmp_path / "tokens" / shard.file).write_bytes(bytes(shard.bytes))
    plan = plan_for(manifest, order)
    with pytest.raises(DataError) as error:
        next(RankStream(0, 1).batches(dataclasses.replace(plan, tokens_dir=str(tmp_path / "tokens"))))
    assert type(error.value) is DataError
    message = r"Token shard \S+ cannot be read \(.*\): delete it and \S+manifest.json, and it is made again\."
    assert re.fullmatch(message, str(error.value))
