"""jobs/pretrain.py whose steps take STEP_S longer while a file is there: slow while a test acts, fast afterwards.

python paced_pretrain.py FILE STEP_S [flags of jobs/pretrain.py]
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def paced_worker(file: Path, step_s: float) -> Callable[[dict[str, Any]], None]:
    """A `train_worker` that is slow while `file` exists. Ray sends it by value: nothing here is imported."""

    def worker(spec: dict[str, Any]) -> None:
        import time

        from raychat.on_ray import stream
        from raychat.on_ray.worker import train_worker

        batches = stream.RankStream.batches

        def paced(self, plan):
            for batch in batches(self, plan):
                if file.exists():
                    time.sleep(step_s)
                yield batch

        stream.READ_TASKS_AT_ONCE = 1  # as many processes fewer to wait for
        stream.RankStream.batches = paced
        train_worker(spec)

    return worker


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from raychat.on_ray import crew

    crew.train_worker = paced_worker(Path(sys.argv[1]), float(sys.argv[2]))
    job = ROOT / "jobs" / "pretrain.py"
    sys.argv = [str(job), *sys.argv[3:]]
    runpy.run_path(str(job), run_name="__main__")
