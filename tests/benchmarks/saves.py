"""What asynchronous saves cost: a save every ten steps against none, on a small model, without Ray.

  OMP_NUM_THREADS=2 python tests/benchmarks/saves.py --pairs 5

Blocks of steps with and without saves take turns, so that what else happens on the machine meets both. The first save of
a block begins with its first step: all that a save costs, copy and writing, falls into its own block.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raychat import cli
from raychat.config import Config
from raychat.optim import build_optimizer
from raychat.storage import Store
from raychat.training.build import build_model
from raychat.training.device import resolve
from raychat.training.saver import Saver
from raychat.training.world import World


class Trial:
    """A model in training on random rows, and its saver."""

    def __init__(self, config: Config, root: Path) -> None:
        self.config, self.step = config, 0
        resolved = resolve(config, local_world_size=1)
        torch.set_num_threads(resolved.threads)
        self.device = torch.device(resolved.device_type)
        self.model = build_model(config, resolved, self.device)
        self.optimizer = build_optimizer(self.model)
        self.saver = Saver(Store.of(root), World(), keep=2, fence=lambda: False)
        self.title = (
            f"d{config.model.depth}, {sum(p.numel() for p in self.model.parameters()):,} parameters, {resolved.dtype}, "
            f"{resolved.threads} threads, {resolved.device_name}"
        )

    def train(self) -> None:
        """One step."""
        T, size, tokens = self.config.model.max_seq_len, self.config.batch.device_batch_size, self.config.batch
        for _ in range(tokens.total_batch_size // T // size):
            rows = torch.randint(self.config.model.vocab_size, (size, T + 1), device=self.device)
            loss = self.model(rows[:, :-1], rows[:, 1:], reduction="sum") / tokens.total_batch_size
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def block(self, steps: int, save_every: int) -> float:
        """Tokens per second over `steps` steps with a save every so many of them; 0: none."""
        start = time.perf_counter()
        for number in range(steps):
            if save_every and number % save_every == 0:
                self.saver.begin(self.model, self.optimizer, {"step": self.step, "state": {}})
            self.train()
        took = time.perf_counter() - start
        while outcome := self.saver.finished():
            if outcome.error:
                raise SystemExit(outcome.error)
            sys.stdout.write(
                f"  save of {outcome.bytes / 1e6:,.0f} MB: training waited {outcome.stall_s:.3f} s, "
                f"written after {outcome.total_s:.2f} s\n"
            )
        return steps * self.config.batch.total_batch_size / took


def main(argv: list[str]) -> int:
    """Run, and print a line per pair and the median."""
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks/saves.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=5, help="of blocks; default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="per block; default: %(default)s")
    parser.add_argument("--save-every", type=int, default=10, help="steps; default: %(default)s")
    args = parser.parse_args(argv)
    flags = {"depth": args.depth, "max_seq_len": 512, "vocab_size": 8192}
    config = Config.from_flat(flags | {"device_batch_size": 4, "total_batch_size": 8192})
    slowdowns = []
    with tempfile.TemporaryDirectory(prefix="raychat-saves-") as folder:
        trial = Trial(config, Path(folder))
        sys.stdout.write(f"{trial.title}\n")
        trial.block(2, 1)  # the host copy is made, and threads have started
        for pair in range(args.pairs):
            order = (0, args.save_every) if pair % 2 == 0 else (args.save_every, 0)
            rate = {every: trial.block(args.steps, every) for every in order}
            slowdowns.append(100 * (1 - rate[args.save_every] / rate[0]))
            sys.stdout.write(
                f"pair {pair + 1}: {rate[0]:,.0f} tok/s without saves, {rate[args.save_every]:,.0f} with: "
                f"{slowdowns[-1]:.2f}% slower\n"
            )
            sys.stdout.flush()
        trial.saver.close()
    sys.stdout.write(
        f"median {statistics.median(slowdowns):.2f}% slower, from {min(slowdowns):.2f}% to {max(slowdowns):.2f}%\n"
    )
    return 0


if __name__ == "__main__":
    cli.run_job(main)
