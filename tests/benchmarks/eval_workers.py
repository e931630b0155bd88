"""What `--eval-workers 1` costs training: a run on Ray, of which every fourth block of steps is beside an evaluation.

  python tests/benchmarks/eval_workers.py --cycles 7

The worker that trains has the first core of this machine to itself, with all its threads (as root: ahead of all that does not
belong to this benchmark); the evaluation worker, the driver and Ray share the second one. Blocks of steps take turns:

  beside   begins with the checkpoint, which the evaluation worker evaluates for about as long as the block lasts
  alone    nothing but training
  busy     nothing is handed over, but a process of the same work, at the same priority, keeps the second core busy
  alone

`busy` is what sharing the machine costs (memory bandwidth, caches, clock), `beside` less `busy` what the hand-over costs:
the copy and writing of the checkpoint, events, results. The first two cycles, in which threads warm up and the evaluation
worker starts, are left out. Linux only.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raychat import cli
from raychat.config import Config
from raychat.errors import RaychatError
from raychat.export.evaluate import Request, evaluate_source
from raychat.export.source import find_source
from raychat.on_ray import driver
from raychat.on_ray.group import NICENESS
from raychat.tracking.journal import records_from
from raychat.training.world import World

BLOCKS = ("beside", "alone", "busy", "alone")
TRAINING_CORE, OTHER_CORE = 0, 1
WARM_UP = 2  # cycles: there is no checkpoint to evaluate in the first, and the worker that does it starts in the second
LOOK_S = 0.05
AHEAD = -15  # niceness of the worker that trains: what else happens on its core is no part of the measurement
TRAINING_OVER_EVALUATION = 2.0  # times that a training step takes as long as evaluating its tokens
COVERED = 0.75  # share of a block that the evaluation of its checkpoint is to take


def flags_of(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run, kept in `folder`: an evaluation at the beginning of each cycle, and no checkpoints but for it."""
    tokens = int(COVERED * TRAINING_OVER_EVALUATION * args.steps * args.total_batch_size)
    return {
        "base_dir": str(args.base_dir or folder),
        "storage_path": str(folder / "runs"),
        "model_tag": "beside",
        "run": "dummy",
        "corpus": args.corpus,
        "depth": args.depth,
        "max_seq_len": 512,
        "vocab_size": 4096,
        "window_pattern": "L",
        "device_type": "cpu",
        "device_batch_size": 4,
        "total_batch_size": args.total_batch_size,
        "num_iterations": len(BLOCKS) * args.steps * args.cycles,
        "eval_workers": 1,
        "eval_every": len(BLOCKS) * args.steps,
        "eval_tokens": args.eval_tokens or tokens,
        "core_metric_every": -1,
        "sample_every": -1,
        "save_every": -1,
        "num_workers": 1,
    }


class Rival:
    """A process that evaluates one checkpoint again and again, as long as it is wanted."""

    def __init__(self) -> None:
        self._process: Any = None

    def start(self, checkpoint: Path, config: Config, tokens_dir: Path) -> None:
        """Get ready, and wait."""
        target = (checkpoint, tokens_dir, config.eval.eval_tokens, config.batch.device_batch_size)
        self._process = multiprocessing.get_context("spawn").Process(
            target=_evaluate_for_ever, args=target, daemon=True
        )
        self._process.start()
        self.go(False)

    def go(self, wanted: bool) -> None:
        """Go on, or stand still."""
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGCONT if wanted else signal.SIGSTOP)

    def end(self) -> None:
        """Be gone."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _evaluate_for_ever(checkpoint: Path, tokens_dir: Path, eval_tokens: int, device_batch_size: int) -> None:
    os.nice(NICENESS)
    request = Request(
        source=find_source(path=str(checkpoint)),
        kinds=("bpb",),
        core=None,
        tokens_dir=str(tokens_dir),
        eval_tokens=eval_tokens,
        device_batch_size=device_batch_size,
    )
    while True:
        evaluate_source(World(), request)


class Watch(threading.Thread):
    """Reads the journal of the run while it is written, binds the worker that trains to its core, and calls the rival."""

    def __init__(self, config: Config, steps: int) -> None:
        super().__init__(daemon=True, name="watch")
        self.config, self.steps = config, steps
        self.records: list[dict[str, Any]] = []
        self.rival, self._over = Rival(), threading.Event()

    def run(self) -> None:
        """Until `close`."""
        offset, path = 0, self.config.run_dir / "metrics.jsonl"
        while not self._over.wait(LOOK_S):
            if not path.exists():
                continue
            for record, end in records_from(path, offset):
                offset = end
                self.records.append(record)
                self._heed(record)

    def close(self) -> None:
        """No more is read."""
        self._over.set()
        self.join()
        self.rival.end()

    def _heed(self, record: dict[str, Any]) -> None:
        if record.get("event") == "ranks":
            for rank in record["ranks"]:
                _put_ahead(rank["pid"], TRAINING_CORE)
        elif record.get("event") == "checkpoint" and self.rival._process is None:
            kept = self.config.run_dir.with_name("kept")
            shutil.copytree(self.config.run_dir, kept)
            tokens = next((self.config.base_dir / "tokens").glob("*/manifest.json")).parent
            self.rival.start(kept, self.config, tokens)
        elif "train/dt" in record:
            self.rival.go(block_of(record["step"] + 1, self.steps) == "busy")


def _put_ahead(pid: int, core: int) -> None:
    """Bind all threads that the process has, and those that they will start, and let them go first where that is allowed."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # that one has ended meanwhile, or this user may not
            os.sched_setaffinity(int(thread.name), {core})
            os.setpriority(os.PRIO_PROCESS, int(thread.name), AHEAD)
    with contextlib.suppress(OSError):  # where sessions are weighed against each other, and processes within them only
        Path(f"/proc/{pid}/autogroup").write_text(str(AHEAD))


def block_of(step: int, steps: int) -> str:
    """What goes on beside `step`."""
    return BLOCKS[step // steps % len(BLOCKS)]


@dataclass(frozen=True)
class Cycle:
    """Seconds that training took for the blocks of a cycle, and how evaluation and checkpoint lay in theirs."""

    beside: float
    alone: float
    """the mean of the two"""
    busy: float
    saving: float
    """that the steps of `beside` during which the checkpoint was written took longer than as many of `busy`"""
    evaluation: float
    """from the beginning of the block to the result"""
    stall: float
    """that training stood still for the checkpoint"""

    @property
    def lost(self) -> float:
        """Percent of the throughput beside an evaluation."""
        return 100 * (1 - self.alone / self.beside)

    @property
    def shared(self) -> float:
        """Percent of the throughput that is lost to the same work on the other core, with nothing handed over."""
        return 100 * (1 - self.alone / self.busy)

    @property
    def handed_over(self) -> float:
        """Seconds that an evaluation costs beyond what sharing the machine does."""
        return self.beside - self.busy


def cycles(records: list[dict[str, Any]], steps: int) -> list[Cycle]:
    """What the journal says of each whole cycle but the first two."""
    at = {record["step"]: record["time"] for record in records if "train/dt" in record}
    told = {record["step"]: record["time"] for record in records if record.get("event") == "evaluated"}
    saved = {record["step"]: record for record in records if record.get("event") == "checkpoint"}
    found, length = [], len(BLOCKS) * steps
    for first in range(WARM_UP * length, max(at) - length + 2, length):
        edges = [at[first + n * steps - 1] for n in range(len(BLOCKS) + 1)]
        beside, before, busy, after = (end - start for start, end in zip(edges, edges[1:], strict=False))
        written = edges[0] + saved[first]["total_s"]
        during = sum(at[step - 1] < written for step in range(first, first + steps))
        cycle = Cycle(
            beside=beside,
            alone=(before + after) / 2,
            busy=busy,
            saving=at[first + during - 1] - edges[0] - during * busy / steps,
            evaluation=told.get(first, float("inf")) - edges[0],
            stall=saved[first]["stall_s"],
        )
        found.append(cycle)
    return found


def typical(records: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Median seconds of a step, by what goes on beside it; after the first two cycles.

    A few steps that something else on the machine held up do not show in them, as they do in whole blocks.
    """
    times: dict[str, list[float]] = {}
    saved = {r["step"]: r["step"] + math.ceil(steps / 5) for r in records if r.get("event") == "checkpoint"}
    for record in (r for r in records if "train/dt" in r and r["step"] >= WARM_UP * len(BLOCKS) * steps):
        step = record["step"]
        first = step // steps * steps
        name = "beside, first fifth" if step < saved.get(first, 0) else block_of(step, steps)
        times.setdefault(name, []).append(record["train/dt"])
    return {name: statistics.median(values) for name, values in times.items()}


def report(found: list[Cycle], steps: int) -> list[str]:
    """A line per cycle and the medians."""
    lines = []
    for n, cycle in enumerate(found, 1):
        lines.append(
            f"cycle {n}: {1000 * cycle.alone / steps:.1f} ms a step alone, {1000 * cycle.beside / steps:.1f} beside "
            f"({cycle.lost:+.2f}%), {1000 * cycle.busy / steps:.1f} busy ({cycle.shared:+.2f}%); the result came after "
            f"{cycle.evaluation:.1f} of {cycle.beside:.1f} s, training stood still for {1000 * cycle.stall:.0f} ms"
        )
        if not 0.6 < cycle.evaluation / cycle.beside < 1.05:
            lines.append("  the evaluation is to last about as long as its block: change --eval-tokens in proportion")
    percents = {
        "lost beside an evaluation": [cycle.lost for cycle in found],
        "lost beside the same work, nothing handed over": [cycle.shared for cycle in found],
    }
    for name, values in percents.items():
        lines.append(f"{name}: median {statistics.median(values):.2f}%, from {min(values):.2f}% to {max(values):.2f}%")
    times = {
        "what is handed over costs": [cycle.handed_over for cycle in found],
        "of which while the checkpoint is written": [cycle.saving for cycle in found],
    }
    for name, values in times.items():
        middle, low, high = (1000 * pick(values) for pick in (statistics.median, min, max))
        lines.append(f"{name}: median {middle:.0f} ms an evaluation, from {low:.0f} to {high:.0f}")
    return lines


def main(argv: list[str]) -> int:
    """Run, and print a line per cycle and the medians."""
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks/eval_workers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cycles", type=int, default=7, help="of four blocks, two of them for warming up; default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=20, help="per block; default: %(default)s")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--total-batch-size", type=int, default=2048, help="tokens of a step; default: %(default)s")
    parser.add_argument("--eval-tokens", type=int, default=0, help="default: what fills most of a block")
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--base-dir", type=Path, help="where the prepared data stay; default: temporary")
    parser.add_argument("--output", type=Path, help="JSON file for the seconds of each cycle")
    args = parser.parse_args(argv)
    if os.cpu_count() == 1 or not hasattr(os, "sched_setaffinity"):
        raise RaychatError("This benchmark binds processes to two cores. It needs Linux and a second core.")
    echo = lambda line: print(line, flush=True)  # noqa: E731, T201  a benchmark speaks to the terminal
    os.sched_setaffinity(0, {OTHER_CORE})  # inherited by all that Ray starts
    with tempfile.TemporaryDirectory(prefix="raychat-eval-workers-") as folder:
        config = Config.from_flat(flags_of(args, Path(folder)))
        watch = Watch(config, args.steps)
        watch.start()
        try:
            driver.run(config, echo=echo)
        finally:
            watch.close()
        found = cycles(watch.records, args.steps)
    for line in report(found, args.steps):
        echo(line)
    middle = [f"{1000 * dt:.1f} ms {name}" for name, dt in typical(watch.records, args.steps).items()]
    echo("median step: " + ", ".join(middle))
    if args.output:
        args.output.write_text(json.dumps([vars(cycle) for cycle in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run_job(main)
