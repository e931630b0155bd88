"""The memory forecast against the measured peak of real training steps on this CPU.

  python tests/benchmarks/memory.py --repeats 3 --threads 1,2

Every figure is the peak resident memory (what a run reports as `peak_memory_bytes`) of a fresh process that builds model
and optimizer as a run does and trains on random tokens. The error is given twice: of the whole, and of what is above the
process itself, which a small model would otherwise hide behind.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raychat import cli
from raychat.config import Config
from raychat.planning import model_shape, recipe
from raychat.planning.memory import PROCESS, MemoryForecast, forecast_memory

STEPS = 3
FIELDS = ("depth", "max_seq_len", "vocab_size", "device_batch_size", "passes", "dtype", "loss", "grad_checkpoint")
CASES = (
    (2, 256, 32768, 16, 1, "float32", "full", False),
    (4, 512, 8192, 8, 1, "float32", "full", False),
    (4, 512, 8192, 16, 1, "bfloat16", "chunked", False),
    (6, 512, 8192, 8, 1, "float32", "chunked", True),
    (8, 256, 8192, 8, 1, "bfloat16", "full", True),
    (8, 512, 4096, 4, 2, "float32", "chunked", False),
)


def config_of(case: dict[str, Any]) -> Config:
    """The run of a case: `passes` passes a step."""
    flags = {key: value for key, value in case.items() if key != "passes"}
    total = case["passes"] * case["device_batch_size"] * case["max_seq_len"]
    return Config.from_flat({**flags, "head_dim": 64, "total_batch_size": total, "device_type": "cpu"})


def forecast(case: dict[str, Any]) -> MemoryForecast:
    """What the plan says."""
    return forecast_memory(
        model_shape(config_of(case).model),
        device_batch_size=case["device_batch_size"],
        rows_per_rank=case["passes"] * case["device_batch_size"],
        workers=1,
        device="cpu",
        dtype=case["dtype"],
        loss=case["loss"],
        grad_checkpoint=case["grad_checkpoint"],
        compiled=False,
    )


def train(case: dict[str, Any], threads: int) -> int:
    """Train in this process; its peak resident memory in bytes."""
    import torch

    from raychat.optim import build_optimizer
    from raychat.training.build import build_model
    from raychat.training.device import peak_memory_bytes, resolve

    torch.set_num_threads(threads)
    config, device = config_of(case), torch.device("cpu")
    run, generator = recipe(config), torch.Generator().manual_seed(0)
    model = build_model(config, resolve(config, local_world_size=1), device)
    rates = dict.fromkeys(("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay"), 0.01)
    optimizer = build_optimizer(model, **rates)
    size, T = case["device_batch_size"], case["max_seq_len"]
    for _ in range(STEPS):
        for _ in range(case["passes"]):
            rows = torch.randint(case["vocab_size"], (size, T + 1), generator=generator)
            loss = model(rows[:, :-1], rows[:, 1:], reduction="sum")
            (loss / run.total_batch_size).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_memory_bytes(device)


def measured(case: dict[str, Any], threads: int) -> int:
    """`train` in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(case), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main(argv: list[str]) -> int:
    """Measure all cases, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks/memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", default="1,2", help="default: %(default)s")
    parser.add_argument("--cases", default="1,2,3,4,5,6", help="default: %(default)s")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        sys.stdout.write(str(train(json.loads(args.one), int(args.threads))))
        return 0
    sys.stdout.write(
        "| case | threads | forecast MB | measured MB | spread MB | error | above the process | peak at |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    for number in map(int, args.cases.split(",")):
        case = dict(zip(FIELDS, CASES[number - 1], strict=True))
        for threads in map(int, args.threads.split(",")):
            sys.stdout.write(row(case, threads, [measured(case, threads) for _ in range(args.repeats)]))
            sys.stdout.flush()
    return 0


def row(case: dict[str, Any], threads: int, peaks: list[int]) -> str:
    """A line of the table."""
    plan, peak, process = forecast(case), sorted(peaks)[len(peaks) // 2], PROCESS[case["dtype"]]
    name = (
        f"d{case['depth']}, T={case['max_seq_len']}, V={case['vocab_size']}, {case['passes']} x {case['device_batch_size']} "
        f"rows, {case['dtype']}, {case['loss']}{', recomputed' if case['grad_checkpoint'] else ''}"
    )
    error, above = plan.total / peak - 1, (plan.total - process) / (peak - process) - 1
    return (
        f"| {name} | {threads} | {plan.total / 1e6:.0f} | {peak / 1e6:.0f} | {(max(peaks) - min(peaks)) / 1e6:.0f} "
        f"| {error:+.1%} | {above:+.1%} | {plan.moment} |\n"
    )


if __name__ == "__main__":
    cli.run_job(main)
