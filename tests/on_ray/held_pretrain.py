"""jobs/pretrain.py whose workers wait before a step while a file is there, so that a test can hit the run right then.

    python held_pretrain.py STEP FILE [flags of jobs/pretrain.py]

Afterwards each step takes STEP_S at least: an order to stop must find some left. Workers leave their process ids in
FILE.pid.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEP_S = 0.3


def held_worker(step: int, file: Path) -> Callable[[dict[str, Any]], None]:
    """A `train_worker` that waits before `step` while `file` exists. Ray sends it by value: nothing here is imported."""

    def worker(spec: dict[str, Any]) -> None:
        import os
        import time

        from raychat.on_ray import stream
        from raychat.on_ray.worker import train_worker

        batches = stream.RankStream.batches

        def held(self, plan):
            for batch in batches(self, plan):
                if batch.rows_consumed > step * plan.rows_per_batch:
                    while file.exists():
                        time.sleep(0.05)
                    time.sleep(STEP_S)
                yield batch

        file.with_name(f"{file.name}.pid").write_text(str(os.getpid()))
        stream.READ_TASKS_AT_ONCE = 1  # as many processes fewer to wait for
        stream.RankStream.batches = held
        train_worker(spec)

    return worker


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from raychat.on_ray import crew

    crew.train_worker = held_worker(int(sys.argv[1]), Path(sys.argv[2]))
    job = ROOT / "jobs" / "pretrain.py"
    sys.argv = [str(job), *sys.argv[3:]]
    runpy.run_path(str(job), run_name="__main__")
