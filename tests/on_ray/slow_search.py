"""jobs/search.py whose trials run slow_pretrain.py."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from raychat.on_ray import search

    run, script = search.run, Path(__file__).with_name("slow_pretrain.py")
    search.run = lambda spec, *, script=script, echo, _slow=script: run(spec, script=_slow, echo=echo)
    job = ROOT / "jobs" / "search.py"
    sys.argv = [str(job), *sys.argv[1:]]
    runpy.run_path(str(job), run_name="__main__")
