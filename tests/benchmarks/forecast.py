"""How far a plan is off: `--dry-run-steps 20`, then the real run of 200 steps, for small configurations.

  python tests/benchmarks/forecast.py --rounds 3                 without Ray
  python tests/benchmarks/forecast.py --sizes d2 --on-ray        with Ray

Both run as processes of their own, as a user would start them. Forecast and actual are those of the run's summary.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raychat import cli

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "d2": {"depth": 2, "max_seq_len": 256, "device_batch_size": 8, "total_batch_size": 2048},
    "d3": {"depth": 3, "max_seq_len": 256, "device_batch_size": 8, "total_batch_size": 2048},
    "d4": {"depth": 4, "max_seq_len": 512, "device_batch_size": 4, "total_batch_size": 2048},
}
COMMON = {
    "preset": "d4-cpu",
    "vocab_size": 4096,
    "num_iterations": 200,
    "eval_every": 100,
    "eval_tokens": 16384,
    "warmup_steps": 10,
    "run": "dummy",
    "num_workers": 1,
}
PARTS = ("time_s", "steps_s", "evaluation_s", "checkpoints_s", "startup_s", "memory_bytes")


def main(argv: list[str]) -> int:
    """Run, and print a line per round and the medians."""
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks/forecast.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", default="d2,d3,d4", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--on-ray", action="store_true", help="jobs/pretrain.py in place of python -m raychat.training")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="raychat-forecast-") as folder:
        for size in args.sizes.split(","):
            rounds = [one_round(size, Path(folder), number, on_ray=args.on_ray) for number in range(args.rounds)]
            for name in PARTS:
                found = [values[name] for values in rounds]
                off = [value["off_percent"] for value in found]
                spread = f"{statistics.median(off):+.1f}% ({min(off):+.1f}% to {max(off):+.1f}%)"
                shown = ", ".join(f"{value['mid']:.4g} -> {value['actual']:.4g}" for value in found)
                sys.stdout.write(f"{size} {name}: {shown}: {spread}\n")
            sys.stdout.flush()
    return 0


def one_round(size: str, base: Path, number: int, *, on_ray: bool) -> dict[str, dict[str, float]]:
    """A dry run and the run, whose forecast is returned."""
    flags = {**COMMON, **SIZES[size], "base_dir": str(base), "model_tag": f"{size}-{number}"}
    typed = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    job = [str(ROOT / "jobs" / "pretrain.py")] if on_ray else ["-m", "raychat.training"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for more in (["--dry-run-steps", "20"], []):
        done = subprocess.run([sys.executable, *job, *typed, *more], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr)
    return json.loads((base / "runs" / f"{size}-{number}" / "summary.json").read_text())["forecast"]


if __name__ == "__main__":
    cli.run_job(main)
