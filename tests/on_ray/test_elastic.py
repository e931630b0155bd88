"""One run through the loss of a machine, its return, a notice and a hanging worker, on a cluster of several nodes.

Two workers, a machine each: 2 -> 1 (killed) -> 2 (another one comes), then a worker is stopped in its tracks, and at last
2 -> 1 (taken away with notice). What the run does is read from its journal, and which rows it trained on from the workers.
"""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from on_ray.heads import as_arguments
from raychat.config import Config
from raychat.data.order import Order, rank_slice
from raychat.data.shards import RowReader, read_manifest
from raychat.on_ray import supervisor
from raychat.on_ray.raylets import Raylets
from raychat.tracking.journal import records_from
from raychat.tracking.summary import Summary

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

HERE = Path(__file__).resolve().parent
STEP_S = 0.15
ROWS = 8
NOTICE_S = 13.0  # with shift.SPARE_S left over, some seconds pass before the save
SILENT_S = 10.0  # in place of the supervisor's
PATIENCE_S = 240.0


@dataclass
class Story:
    """The run: its process, its journal, and what the test did to it and when (Unix seconds)."""

    config: Config
    process: subprocess.Popen
    output: Path
    recorded: Path
    times: dict[str, float] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """Everything in the journal so far."""
        path = self.config.run_dir / "metrics.jsonl"
        return [record for record, _ in records_from(path)] if path.exists() else []

    def events(self, kind: str, after: str = "") -> list[dict[str, Any]]:
        """The journal's events of a kind, since the test did `after`."""
        since = self.times.get(after, 0.0)
        return [r for r in self.records() if r.get("event") == kind and r["time"] >= since]

    def wait(self, what: str, condition: Callable[[], Any]) -> Any:
        """The first truth that `condition` gives."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert self.process.poll() is None, f"{what}: the driver has ended\n{self.output.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:g}s\n{self.output.read_text()[-3000:]}"
            time.sleep(0.1)
        return found

    def do(self, name: str, action: Callable[[], Any]) -> Any:
        """Do something to the run, and note when."""
        self.times[name] = time.time()
        return action()

    def trains_with(self, workers: int, after: str = "") -> None:
        """Wait until a group of so many workers that began after that has done its first step, and has saved."""

        def trains() -> bool:
            starts = self.events("start", after)
            if not starts or starts[-1]["world_size"] != workers:
                return False
            since = starts[-1]["time"]
            return all(any(e["time"] > since for e in self.events(kind)) for kind in ("first_step", "checkpoint"))

        self.wait(f"training with {workers} workers after {after or 'the start'}", trains)


@pytest.fixture(scope="module")
def story(tiny_flags, prepared_base, tmp_path_factory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("elastic")
    flags = tiny_flags | {
        "base_dir": str(prepared_base),
        "storage_path": str(folder / "runs"),
        "model_tag": "elastic",
        "num_workers": 2,
        "min_workers": 1,
        "num_iterations": 20_000,
        "eval_every": -1,
        "save_every": 5,
        "device_batch_size": 8,
        "price_per_hour": 3600.0,
    }
    (folder / "recorded").mkdir()
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "")  # put back at the end what the cluster sets, in the environment, for its clients
    patch.delenv("RAY_AUTH_MODE")
    with Raylets() as cluster:
        environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
        nodes = {node.node_id: node for node in (cluster.add() for _ in range(2))}
        arguments = as_arguments(flags | {"address": cluster.address})
        command = [
            sys.executable,
            str(HERE / "recorded_pretrain.py"),
            str(folder / "recorded"),
            str(STEP_S),
            str(SILENT_S),
            *arguments,
        ]
        with (folder / "output").open("w") as log:
            process = subprocess.Popen(
                command, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
            )
        run = Story(Config.from_flat(flags), process, folder / "output", folder / "recorded")

        def node_of(rank: int):
            ranks = run.events("ranks")[-1]["ranks"]
            return nodes[next(entry["node_id"] for entry in ranks if entry["rank"] == rank)]

        try:
            run.trains_with(2)
            run.do("kill", lambda: cluster.kill(node_of(1)))
            run.trains_with(1, after="kill")
            new = run.do("add", cluster.add)
            nodes[new.node_id] = new
            run.trains_with(2, after="add")
            stopped = run.events("ranks")[-1]["ranks"][1]["pid"]
            run.do("stop", lambda: os.kill(stopped, signal.SIGSTOP))
            run.trains_with(2, after="stop")
            leaving = node_of(1)
            run.do("notice", lambda: cluster.drain(leaving, NOTICE_S))
            time.sleep(NOTICE_S)
            run.do("deadline", lambda: cluster.kill(leaving))
            run.trains_with(1, after="notice")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=PATIENCE_S) == 0, run.output.read_text()[-3000:]
            yield run
        finally:
            process.kill()
            process.wait()
            patch.undo()


def test_every_rank_trained_on_the_rows_of_the_plain_order(story):
    """Whatever happened to the machines: the rows of a step are those of the one order, whoever reads them."""
    manifest = read_manifest(Path(story.config.base_dir / "tokens" / next(iter(_fingerprints(story)))))
    reader = RowReader(manifest, "train")
    lines = [json.loads(line) for file in story.recorded.iterdir() for line in file.read_text().splitlines()]
    assert {line["world_size"] for line in lines} == {1, 2}
    order = Order([shard.rows for shard in manifest.split("train")], seed=story.config.run.seed, lanes=_lanes(story))
    for line in lines:
        lo, hi = rank_slice(ROWS, line["rank"], line["world_size"])
        rows = reader.rows(order.batch(line["cursor"], ROWS, lo, hi))
        assert zlib.crc32(rows.tobytes()) == line["crc"], line


def test_no_step_is_missing(story):
    steps = [r["step"] for r in story.records() if "train/loss" in r]
    summary = Summary.read(story.config.run_dir / "summary.json")
    assert steps == list(range(summary.step))
    assert summary.status == "stopped"
    assert summary.rows_consumed == summary.step * ROWS


def test_the_sizes_were_those_that_the_machines_allowed(story):
    sizes = [event["world_size"] for event in story.events("start")]
    assert [size for size, before in zip(sizes, [0, *sizes], strict=False) if size != before] == [2, 1, 2, 1]
    causes = [event["cause"] for event in story.events("failure")]
    assert causes[:2] == ["lost", "resize"]
    assert causes[-2:] == ["hang", "preempted"]


def test_nothing_is_replayed_after_growing(story):
    """It saves before it makes room for more workers."""
    (resize,) = [event for event in story.events("failure") if event["cause"] == "resize"]
    start = next(event for event in story.events("start") if event["time"] >= resize["time"])
    assert start["replayed"] == 0


def test_a_notice_is_answered_by_one_save_before_the_deadline(story):
    (notice,) = story.events("notice")
    assert notice["seconds"] <= NOTICE_S
    until = story.times["deadline"]
    saves = [event for event in story.events("checkpoint", after="notice") if event["time"] < until]
    assert sum(save["synchronous"] for save in saves) == 1
    output = story.output.read_text()
    assert "is taken away in" in output
    assert "goes; training goes on until then" in output


def test_a_rank_that_hangs_is_named_within_a_minute(story):
    (hang,) = story.events("hang")
    said_after = hang["time"] - story.times["stop"]
    assert said_after > SILENT_S - 3
    assert said_after - SILENT_S + supervisor.SILENT_S < 60
    assert (
        f"rank {hang['rank']} on {hang['host']} (process {hang['pid']}) has not been heard of"
        in story.output.read_text()
    )


def test_the_ledger_accounts_for_every_second(story):
    summary = Summary.read(story.config.run_dir / "summary.json")
    parts = ("productive", "replayed", "startup", "checkpoint_stall", "evaluation", "waiting", "other")
    values = {part: getattr(summary, f"{part}_s") for part in parts}
    assert sum(values.values()) == pytest.approx(summary.wall_time_s)
    assert min(values.values()) >= 0
    assert values["replayed"] > 0
    assert values["startup"] > 0
    assert summary.preemptions == 1


def _fingerprints(story: Story) -> set[str]:
    return {json.loads((story.config.run_dir / "config.json").read_text())["data_fingerprint"]}


def _lanes(story: Story) -> int:
    newest = max((story.config.run_dir / "checkpoints").glob("step_*"))
    return json.loads((newest / "checkpoint.json").read_text())["lanes"]
