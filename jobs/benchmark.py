"""Real training steps of a configuration on this machine, without Ray: how fast, how much memory, and where the time goes.

  python jobs/benchmark.py --depth 4 --head-dim 64 --max-seq-len 512 --vocab-size 8192 --device-batch-size 8 --steps 20
  python jobs/benchmark.py ... --rows rows.npy --init weights.pt      the same numbers for two programs to train on
  python jobs/benchmark.py ... --sweep compile=on,off dtype=float32,bfloat16    a table of all combinations
  python jobs/benchmark.py ... --profile traces                       a trace, and the time by part of the model
  torchrun --nproc-per-node 2 jobs/benchmark.py ...                   several ranks

All other flags are those of jobs/pretrain.py. A step is one pass of every rank unless --total-batch-size says otherwise. The
text is that of the run's corpus. The last line that is printed is the result as JSON; its keys are in docs/speed.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.benchmark import sweep
from raychat.benchmark.options import Options, prepared, steps_of
from raychat.checks import require
from raychat.config import Config


def main(args: Sequence[str]) -> int:
    """Measure one configuration, or all of a sweep."""
    own, rest = parser().parse_known_args(args)
    options = Options(steps=own.steps, rows=own.rows, init=own.init, profile=own.profile)
    config = cli.parse(rest, prog="python jobs/benchmark.py", description=__doc__ or "")
    if own.sweep:
        require(not own.profile, "--profile takes one configuration apart, and --sweep runs several: give one of them.")
        return measure_all(sweep.cases(own.sweep), without_sweep(args))
    return measure(config, options)


def parser() -> argparse.ArgumentParser:
    """The flags that are not those of a run."""
    made = argparse.ArgumentParser(
        prog="python jobs/benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--steps", type=int, default=-1, help="steps to run; default: --num-iterations where it is given, else 20")
    add(
        "--rows", default="", metavar="FILE.npy", help="token ids (N, T+1); step i takes the rows from i*B on, modulo N"
    )
    add("--init", default="", metavar="FILE.pt", help="state dict to begin with; default: random weights from --seed")
    add(
        "--profile", default="", metavar="DIR", help="write a trace of the last steps there, and print the time by part"
    )
    add("--sweep", nargs="+", default=[], metavar="SETTING=A,B", help="measure all combinations, each in a new process")
    return made


def measure(config: Config, options: Options) -> int:
    """Run the steps on this rank; rank 0 prints."""
    from raychat.benchmark.run import Bench  # after --help: torch takes seconds to load
    from raychat.training.device import refuse_gpu_sized, resolve
    from raychat.training.world import World

    world = World.from_environment()
    config = prepared(config, world.world_size)
    steps = steps_of(config, options)
    resolved = resolve(config, local_world_size=world.local_world_size)
    refuse_gpu_sized(Config.from_flat({"num_iterations": steps}, base=config), resolved)
    echo = tell if world.rank == 0 else ignore
    with world.process_group(resolved.device_type):
        bench = Bench.make(config, options, world, echo)
        profiler = None
        if options.profile and world.rank == 0:
            from raychat.benchmark.profile import PartsProfiler

            profiler = PartsProfiler(Path(options.profile), bench.model, bench.optimizer)
        echo(f"{resolved.device_name}, {resolved.threads} threads | {resolved.dtype} | attention: {resolved.attention}")
        samples = bench.run(steps, echo, profiler)
        result = bench.report(samples)
    if profiler:
        result["parts"] = profiler.finish(echo)
    echo(json.dumps(result))
    return 0


def measure_all(cases: Sequence[dict[str, str]], flags: Sequence[str]) -> int:
    """Run the cases; print the table, and all results as one line of JSON. 1 when one of them failed."""
    results = []
    for number, case in enumerate(cases, start=1):
        tell(f"{number}/{len(cases)}: " + " ".join(f"{name}={value}" for name, value in case.items()))
        results.append(sweep.measure(case, [str(Path(__file__).resolve()), *flags], tell))
    tell("\n" + sweep.table(results) + "\n")
    tell(json.dumps(results))
    return 1 if any("error" in result for result in results) else 0


def without_sweep(args: Sequence[str]) -> list[str]:
    """`args` without --sweep and its values."""
    kept, inside = [], False
    for arg in args:
        if arg.startswith("--"):
            inside = arg.partition("=")[0] == "--sweep"
        if not inside:
            kept.append(arg)
    return kept


def tell(line: str) -> None:
    """Print at once: a sweep reads along."""
    print(line, flush=True)


def ignore(line: str) -> None:
    """Ranks other than 0 print nothing."""


if __name__ == "__main__":
    cli.run_job(main)
