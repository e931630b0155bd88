"""Pretrain a base model on Ray.

  python jobs/pretrain.py --preset demo                      a few minutes on a laptop
  python jobs/pretrain.py --depth 12 --num-workers 8         the scaling laws decide the rest
  ray job submit -- python jobs/pretrain.py --depth 10       on a cluster

Flags stand over presets, presets over defaults.
"""

import sys
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.planning import format_plan, keep_plan, make_plan, recipe


def main(args: list[str]) -> int:
    """Parse, and print the plan or run."""
    config = cli.parse(args, prog="python jobs/pretrain.py", description=__doc__ or "")
    recipe(config)  # what cannot be is refused before ray and torch are loaded
    if config.run.dry_run:
        plan = make_plan(config)
        print(format_plan(plan))
        print(keep_plan(plan, config.run_dir))
        return 0
    from raychat.on_ray import driver, rehearsing  # after the checks: ray and torch take seconds to load

    job = rehearsing.rehearse if config.run.dry_run_steps > 0 else driver.run
    job(config, echo=lambda text: print(text, flush=True))
    return 0


if __name__ == "__main__":
    cli.run_job(main)
