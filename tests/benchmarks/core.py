"""How fast CORE is beside one option per forward pass with logits at every position, and which lever gives how much.

  python tests/benchmarks/core.py --core-bundle DIR --tokenizer DIR [--items 20] [--rounds 3] [--tasks copa,piqa]

Each way of computing adds one lever to the one before: `naive`; `read` (logits only where they are read); `share` (what the
options have in common is computed once); `batch` (questions of similar length share a pass); `workers` (two processes of
one thread instead of one of two). They take turns task by task, so that a change of the machine's speed meets all alike,
and change their order from round to round; their verdicts are compared. The model has the shapes of `--depth 4` with random
weights. With --output, rounds are added to those that the file holds: a long measurement can be made in pieces.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raychat.data.tokenizer import Tokenizer
from raychat.evaluation.core.bundle import Bundle, load_bundle
from raychat.evaluation.core.evaluate import default_batch_tokens, evaluate_core
from raychat.evaluation.core.prompts import Question, question
from raychat.evaluation.core.results import CoreResult
from raychat.evaluation.core.scoring import answer, answer_alone
from raychat.model import GPT, GPTConfig

Verdicts = list[bool]


class Ranks:
    """The process group as `evaluate_core` wants to see it."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, on every rank."""
        boxes = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(boxes, value)
        return boxes


def random_model(vocab_size: int) -> GPT:
    """Depth 4, T = 2048; what begins at zero is random too, or all blocks would do nothing."""
    model = GPT(GPTConfig(sequence_len=2048, vocab_size=vocab_size, n_layer=4, n_head=2, n_kv_head=2, n_embd=256))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("c_proj.weight", "lm_head.weight")):
                parameter.normal_(0, 0.04, generator=generator)
        model.smear_lambda.fill_(0.5)
    return model


@torch.no_grad()
def naive_answer(model: GPT, asked: Question) -> bool:
    """Whether the model is right: each option in a pass of its own, with the logits of every position."""
    losses, greedy = [], True
    for row in asked.rows:
        ids = torch.tensor([row.ids])
        logits = model(ids)[0, row.start - 1 : -1]
        goals = ids[0, row.start :]
        greedy = greedy and bool((logits.argmax(dim=-1) == goals).all())
        losses.append(F.cross_entropy(logits, goals).item())
    return greedy if asked.greedy else losses.index(min(losses)) == asked.gold


def one_process(model: GPT, tokenizer: Tokenizer) -> dict[str, Callable[[Bundle], Verdicts]]:
    """The ways of computing one task in this process. All of them pay for rendering and tokens."""

    def questions(bundle: Bundle) -> list[Question]:
        task = bundle.tasks[0]
        return [question(task, i, tokenizer, model.cos.size(0)) for i in range(len(task.items))]

    def batched(bundle: Bundle) -> Verdicts:
        result = evaluate_core(model, tokenizer, bundle, max_per_task=-1, world=Ranks(), echo=lambda line: None)
        return _verdicts(result)

    return {
        "naive": lambda bundle: [naive_answer(model, q) for q in questions(bundle)],
        "read": lambda bundle: [answer_alone(model, q).correct for q in questions(bundle)],
        "share": lambda bundle: [answer(model, [q])[0].correct for q in questions(bundle)],
        "batch": batched,
    }


class Crew:
    """Two processes of one thread each, which evaluate a task together when asked."""

    def __init__(self, tokenizer: Path, size: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            target = (rank, size, f"{self._folder.name}/meet", tokenizer, there)
            self._processes.append(context.Process(target=_crew_member, args=target, daemon=True))
            self._processes[-1].start()
            self._pipes.append(here)
        for pipe in self._pipes:
            pipe.recv()

    def evaluate(self, bundle: Bundle) -> Verdicts:
        """The verdicts on the one task of `bundle`."""
        for pipe in self._pipes:
            pipe.send(bundle)
        return [pipe.recv() for pipe in self._pipes][0]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _crew_member(rank: int, size: int, rendezvous: str, tokenizer: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    codec = Tokenizer.load(tokenizer)
    model = random_model(codec.vocab_size)
    pipe.send(True)
    while (bundle := pipe.recv()) is not None:
        result = evaluate_core(model, codec, bundle, max_per_task=-1, world=Ranks(rank, size), echo=lambda line: None)
        pipe.send(_verdicts(result))
    dist.destroy_process_group()


def _verdicts(result: CoreResult | None) -> Verdicts:
    return [item.correct for task in result.tasks.values() for item in task.items] if result else []


def measure(
    bundle: Bundle, ways: dict[str, Callable[[Bundle], Verdicts]], echo: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Seconds per task and way; says where a verdict differs from that of the first way."""
    seconds: dict[str, dict[str, float]] = {}
    for task in bundle.tasks:
        single, found = replace(bundle, tasks=(task,)), {}
        seconds[task.label] = {}
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way(single)
            seconds[task.label][name] = time.perf_counter() - start
        echo(f"{task.label:<34}" + "".join(f"{name} {s:8.2f}s  " for name, s in seconds[task.label].items()))
        first = next(iter(found))
        for name, verdicts in found.items():
            if verdicts != found[first]:
                echo(f"  {name} differs from {first} at {[i for i, v in enumerate(verdicts) if v != found[first][i]]}")
    return seconds


def table(rounds: list[dict[str, dict[str, float]]], ways: list[str]) -> list[str]:
    """Per way: seconds of all tasks, and how many times faster than the first way and than the one before.

    Medians over the rounds, lowest and highest in brackets; a ratio is one of times of the same round.
    """
    totals = {way: [sum(task[way] for task in seconds.values()) for seconds in rounds] for way in ways}

    def spread(values: list[float], digits: int) -> str:
        low, middle, high = min(values), statistics.median(values), max(values)
        return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    lines = [f"{len(rounds)} rounds: median (lowest to highest)"]
    for way, before in zip(ways, [ways[0], *ways], strict=False):
        faster, step = (
            [slow / fast for slow, fast in zip(totals[other], totals[way], strict=True)] for other in (ways[0], before)
        )
        lines.append(
            f"{way:<10}{spread(totals[way], 1):>24} s   {spread(faster, 1):>20} x {ways[0]}   {spread(step, 2):>22} x {before}"
        )
    return lines


def main() -> None:
    """Measure, and print a table; with --output also its numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--core-bundle", required=True, help="folder of the bundle")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer, best of 32768 tokens")
    parser.add_argument("--items", type=int, default=20, help="items per task, at least 11; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--tasks", default="", help="labels, separated by commas; default: all")
    parser.add_argument("--ways", default="naive,read,share,batch,workers", help="which ways, in turn")
    parser.add_argument("--output", type=Path, help="JSON file for the seconds of all rounds")
    flags = parser.parse_args()
    echo = lambda line: print(line, flush=True)  # noqa: E731, T201  a benchmark speaks to the terminal
    bundle = load_bundle(flags.core_bundle, Path(), echo).cut(flags.items)
    wanted = flags.tasks.split(",") if flags.tasks else [task.label for task in bundle.tasks]
    bundle = replace(bundle, tasks=tuple(task for task in bundle.tasks if task.label in wanted))
    tokenizer = Tokenizer.load(flags.tokenizer)
    ways = one_process(random_model(tokenizer.vocab_size), tokenizer)
    crew = Crew(flags.tokenizer) if "workers" in flags.ways else None
    if crew:
        ways["workers"] = crew.evaluate
    ways = {name: ways[name] for name in flags.ways.split(",")}
    echo(f"{torch.get_num_threads()} threads, passes of {default_batch_tokens(torch.device('cpu')):,} tokens")
    rounds = json.loads(flags.output.read_text()) if flags.output and flags.output.is_file() else []
    for _ in range(flags.rounds):
        order = list(ways)[:: -1 if len(rounds) % 2 else 1]
        rounds.append(measure(bundle, {name: ways[name] for name in order}, echo))
        if flags.output:
            flags.output.write_text(json.dumps(rounds, indent=1) + "\n")
    for line in table(rounds, list(ways)):
        echo(line)
    if crew:
        crew.close()


if __name__ == "__main__":
    main()
