"""jobs/pretrain.py whose steps take STEP_S at least, so that a test can hit a run in the middle."""

import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def slow_worker(spec: dict[str, Any]) -> None:
    """A `train_worker` with slow batches. Ray sends it by value: nothing of this file is imported there."""
    import time

    from raychat.on_ray import stream
    from raychat.on_ray.worker import train_worker

    batches = stream.RankStream.batches

    def slow(self, plan):
        for batch in batches(self, plan):
            time.sleep(0.5)
            yield batch

    stream.RankStream.batches = slow
    train_worker(spec)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from raychat.on_ray import crew

    crew.train_worker = slow_worker
    job = ROOT / "jobs" / "pretrain.py"
    sys.argv = [str(job), *sys.argv[1:]]
    runpy.run_path(str(job), run_name="__main__")
