"""The CORE metric (DCLM, arXiv:2406.11794) of a model: all tasks, spread over the ranks, on every rank the same result."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch

from raychat.evaluation.core.bundle import Bundle, Task
from raychat.evaluation.core.prompts import Codec, Question, question, texts
from raychat.evaluation.core.results import CoreResult, ItemResult, TaskResult
from raychat.evaluation.core.scoring import answer, batches
from raychat.model import GPT
from raychat.model.fp8 import high_precision
from raychat.progress import Progress


class Ranks(Protocol):
    """What an evaluation needs to know of the process group; `raychat.training.world.World` is one."""

    @property
    def rank(self) -> int:
        """Of this process."""
        ...

    @property
    def world_size(self) -> int:
        """How many there are."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, on every rank, in rank order."""
        ...


def default_batch_tokens(device: torch.device) -> int:
    """Tokens of a pass, where nobody says: enough to keep a GPU busy, and little enough for the caches of a CPU."""
    return 4096 if device.type == "cpu" else 65536


def evaluate_core(
    model: GPT,
    tokenizer: Codec,
    bundle: Bundle,
    *,
    max_per_task: int,
    world: Ranks,
    batch_tokens: int | None = None,
    between: Callable[[], bool] = lambda: False,
    echo: Callable[[str], None],
) -> CoreResult | None:
    """CORE of `model`, in its compute dtype and never in fp8; the same on every rank. None where `between` ended it.

    `max_per_task` caps the items of every task (-1: all). `batch_tokens` bounds the tokens of a pass with their padding
    (default: by the device); it and the number of ranks change speed and memory, but no verdict. `between` is called
    on every rank equally often, after each pass; all ranks must answer alike, and True means stop.

    Raises:
        ConfigError: `max_per_task` leaves a task too few items. Nothing was computed then.
    """
    tasks = bundle.cut(max_per_task).tasks
    size = batch_tokens or default_batch_tokens(model.lm_head.weight.device)
    weights = [_weights(task) for task in tasks]
    shares = [_share(weight, world.rank, world.world_size) for weight in weights]
    results: dict[str, TaskResult] = {}
    with ExitStack() as stack:
        stack.enter_context(high_precision(model))
        advance: Callable[[float], None] = lambda amount: None  # noqa: E731
        if world.rank == 0:
            mine = sum(weight[index] for weight, share in zip(weights, shares, strict=True) for index in share)
            advance = stack.enter_context(Progress("CORE", mine, "characters", echo=echo)).advance
        for task, weight, share in zip(tasks, weights, shares, strict=True):
            start = time.perf_counter()
            questions = [question(task, index, tokenizer, model.cos.size(0)) for index in share]
            found: list[ItemResult] = []
            for batch in _rounds(batches(questions, size), world):
                found += answer(model, batch) if batch else []
                advance(sum(weight[q.index] for q in batch))
                if between():
                    return None
            parts = world.gather((found, time.perf_counter() - start))
            items = [item for part, _ in parts for item in part]
            results[task.label] = TaskResult.of(task, items, max(seconds for _, seconds in parts))
            if world.rank == 0:
                echo(results[task.label].line())
    return CoreResult(results)


def _rounds(mine: list[list[Question]], world: Ranks) -> list[list[Question]]:
    """The batches of this rank, and empty ones after them until every rank has as many."""
    return mine + [[]] * (max(world.gather(len(mine))) - len(mine))


def _weights(task: Task) -> list[int]:
    """About how much work each item is: characters of its longest option, and of what the others add."""
    weights = []
    for index, item in enumerate(task.items):
        written = texts(task, index)
        weights.append(len(written[0]) + sum(len(continuation) for _, continuation in item.options[1:]))
    return weights


def _share(weights: list[int], rank: int, world_size: int) -> list[int]:
    """The items of `rank`: dealt by weight to and fro, so that ranks have as much to do, in passes of similar lengths."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    rounds = [order[n : n + world_size] for n in range(0, len(order), world_size)]
    dealt = [one if n % 2 == 0 else [*reversed(one)] for n, one in enumerate(rounds)]
    return sorted(one[rank] for one in dealt if rank < len(one))
