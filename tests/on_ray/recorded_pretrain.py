"""jobs/pretrain.py whose workers write down which rows each of them trained on, and take their time over it.

    python recorded_pretrain.py FOLDER STEP_S SILENT_S [flags of jobs/pretrain.py]

A rank appends a line {cursor, rank, world_size, crc} to a file of its own for every batch: the row cursor before it, and
the CRC-32 of its rows. A rank hangs when it has not been heard of for SILENT_S.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def recording_worker(folder: Path, step_s: float) -> Callable[[dict[str, Any]], None]:
    """A `train_worker` that records. Ray sends it by value: nothing here is imported."""

    def worker(spec: dict[str, Any]) -> None:
        import json
        import os
        import time
        import zlib

        from raychat.on_ray import stream
        from raychat.on_ray.worker import train_worker

        batches = stream.RankStream.batches

        def recorded(self, plan):
            with (folder / f"rank-{os.getpid()}.jsonl").open("a", buffering=1) as file:
                for batch in batches(self, plan):
                    time.sleep(step_s)
                    cursor = batch.rows_consumed - plan.rows_per_batch
                    crc = zlib.crc32(batch.rows.tobytes())
                    line = {"cursor": cursor, "rank": plan.rank, "world_size": plan.world_size, "crc": crc}
                    file.write(json.dumps(line) + "\n")
                    yield batch

        stream.READ_TASKS_AT_ONCE = 1  # as many processes fewer to wait for
        stream.RankStream.batches = recorded
        train_worker(spec)

    return worker


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from raychat.on_ray import crew, sizing, supervisor

    crew.train_worker = recording_worker(Path(sys.argv[1]), float(sys.argv[2]))
    supervisor.SILENT_S = float(sys.argv[3])
    sizing.SETTLE_S = 1.5  # nobody else is leaving room on the cluster of a test
    job = ROOT / "jobs" / "pretrain.py"
    sys.argv = [str(job), *sys.argv[4:]]
    runpy.run_path(str(job), run_name="__main__")
