"""What `--packing keep` and `best-fit` make of the same number of steps, over several seeds, without Ray.

  python tests/benchmarks/packing.py --corpus DIR --base-dir DIR --seeds 42,43,44

Every model is evaluated on the validation rows of both packings: rows that begin in the middle of a document are harder
to predict than rows that begin with one, so a model's own validation rows do not compare packings. A run that has been
made in this base directory is not made again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raychat import cli
from raychat.export.evaluate import Request, evaluate_source
from raychat.export.source import find_source
from raychat.training.world import World

ROOT = Path(__file__).resolve().parents[2]
PACKINGS = ("best-fit", "keep")


def train(packing: str, seed: int, args: argparse.Namespace) -> Path:
    """The directory of a finished run."""
    tag = f"{packing}-{seed}"
    flags = {
        "--preset": "d4-cpu",
        "--dtype": "bfloat16",
        "--corpus": args.corpus,
        "--base-dir": args.base_dir,
        "--model-tag": tag,
        "--run": "dummy",
        "--packing": packing,
        "--seed": seed,
        "--num-iterations": args.steps,
        "--total-batch-size": args.total_batch_size,
        "--eval-every": -1,
        "--save-every": -1,
        "--log-every": 20,
    }
    command = [sys.executable, "-m", "raychat.training", *(str(part) for pair in flags.items() for part in pair)]
    subprocess.run(command, cwd=ROOT, check=True)
    return Path(args.base_dir) / "runs" / tag


def val_bpb(run: Path, tokens: Path, eval_tokens: int) -> float:
    """Bits per byte of the last checkpoint of `run` on the first validation rows in `tokens`."""
    request = Request(
        source=find_source(path=str(run)),
        kinds=("bpb",),
        core=None,
        tokens_dir=str(tokens),
        eval_tokens=eval_tokens,
        device_batch_size=8,
    )
    found = evaluate_source(World(), request).bpb
    if found is None:
        raise SystemExit(f"{run} was not evaluated")
    return found


def main(argv: list[str]) -> int:
    """Train what is missing, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks/packing.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--base-dir", required=True)
    parser.add_argument("--seeds", default="42,43,44", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=600, help="default: %(default)s")
    parser.add_argument("--total-batch-size", type=int, default=4096, help="tokens; default: %(default)s")
    parser.add_argument(
        "--eval-tokens", type=int, default=262_144, help="of each validation split; default: %(default)s"
    )
    args = parser.parse_args(argv)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    runs = {(packing, seed): train(packing, seed, args) for seed in seeds for packing in PACKINGS}
    tokens = {packing: tokens_of(runs[packing, seeds[0]], args.base_dir) for packing in PACKINGS}
    head = " | ".join(f"on the rows of {rows}" for rows in PACKINGS)
    sys.stdout.write(f"| trained with | seed | {head} |\n|---|---|---|---|\n")
    for packing in PACKINGS:
        found = [[val_bpb(runs[packing, seed], tokens[rows], args.eval_tokens) for rows in PACKINGS] for seed in seeds]
        for seed, values in zip(seeds, found, strict=True):
            sys.stdout.write(f"| {packing} | {seed} | {' | '.join(f'{value:.4f}' for value in values)} |\n")
        means = [statistics.mean(column) for column in zip(*found, strict=True)]
        sys.stdout.write(f"| {packing} | mean | {' | '.join(f'{mean:.4f}' for mean in means)} |\n")
    return 0


def tokens_of(run: Path, base_dir: str) -> Path:
    """The token shards that `run` was trained on."""
    return Path(base_dir) / "tokens" / json.loads((run / "config.json").read_text())["data_fingerprint"]


if __name__ == "__main__":
    cli.run_job(main)
