"""Prepare the data of a run and train nothing: corpus, tokenizer and token shards, as jobs/pretrain.py would.

  python jobs/prepare_data.py --preset d4-cpu --corpus my/texts
  python jobs/prepare_data.py --preset d4-cpu --corpus my/texts --verify     reads every shard again, to its checksum

What is there already is not made again. Flags are those of jobs/pretrain.py, and --verify.
"""

import contextlib
import sys
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.planning import format_plan, make_plan, recipe
from raychat.progress import Progress

VERIFY = "--verify"


def main(args: list[str]) -> int:
    """Parse, and print the plan or prepare."""
    flags = [arg for arg in args if arg != VERIFY]  # no setting of a run, so no field of Config
    config = cli.parse(flags, prog="python jobs/prepare_data.py", description=__doc__ or "")
    if config.run.dry_run:
        print(format_plan(make_plan(config)))
        return 0
    recipe(config)  # refuses what cannot be before anything is read
    from raychat.data.prepare import prepare  # after the checks: ray and torch take seconds to load
    from raychat.data.shards import verify_shard
    from raychat.on_ray.driver import LazyCluster

    with contextlib.ExitStack() as stack:
        cluster = LazyCluster(config, stack, echo)
        manifest = prepare(config, with_gpus=cluster.has_gpus(), maker=cluster.make_shards, echo=echo).manifest
    if VERIFY in args:
        with Progress("verifying", sum(shard.bytes for shard in manifest.shards) / 1e6, "MB", echo=echo) as progress:
            for shard in manifest.shards:
                verify_shard(manifest.store, shard)
                progress.advance(shard.bytes / 1e6)
    echo(f"prepared: {manifest.store}")
    return 0


def echo(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    cli.run_job(main)
