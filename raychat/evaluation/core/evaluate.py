"""The CORE metric (DCLM, arXiv:2406.11794) of a model: all tasks, spread over the ranks, on every rank the same result."""

import time
from collections.abc import Callable, Iterator
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

# Characters of the questions that a rank holds in tokens at a time, each option counted: about 2 million tokens of 40 bytes.
# The longest come first, so a slice holds questions of similar length, and enough of them for several passes.
SLICE_CHARACTERS = 8_000_000


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
    shares = [_slices(task, weight, world) for task, weight in zip(tasks, weights, strict=True)]
    results: dict[str, TaskResult] = {}
    with ExitStack() as stack:
        stack.enter_context(high_precision(model))
        advance: Callable[[float], None] = lambda amount: None  # noqa: E731
        if world.rank == 0:
            mine = sum(w[i] for w, slices in zip(weights, shares, strict=True) for some in slices for i in some)
            advance = stack.enter_context(Progress("CORE", mine, "characters", echo=echo)).advance
        for task, weight, slices in zip(tasks, weights, shares, strict=True):
            start = time.perf_counter()
            found: list[ItemResult] = []
            for batch in _passes(task, slices, tokenizer, model.cos.size(0), size, world):
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


def _passes(
    task: Task, slices: list[list[int]], tokenizer: Codec, reach: int, batch_tokens: int, world: Ranks
) -> Iterator[list[Question]]:
    """The questions of this rank in batches, one slice in tokens at a time; every rank gets as many, some of them empty."""
    for indices in slices:
        mine = batches([question(task, index, tokenizer, reach) for index in indices], batch_tokens)
        yield from mine + [[]] * (max(world.gather(len(mine))) - len(mine))
        del mine  # before the next slice is made


def _weights(task: Task) -> list[int]:
    """About how much work each item is: characters of its longest option, and of what the others add."""
    weights = []
    for index, item in enumerate(task.items):
        written = texts(task, index)
        weights.append(len(written[0]) + sum(len(continuation) for _, continuation in item.options[1:]))
    return weights


def _slices(task: Task, weights: list[int], world: Ranks) -> list[list[int]]:
    """The items of this rank, as many slices as on any other: dealt by weight to and fro, the heaviest first.

    Ranks then have as much to do, in passes of similar lengths.
    """
    order, size = sorted(range(len(weights)), key=lambda i: (-weights[i], i)), world.world_size
    slices: list[list[int]] = []
    room = 0
    for n, first in enumerate(range(0, len(order), size)):
        dealt = order[first : first + size][:: 1 if n % 2 == 0 else -1]
        characters = max(weights[i] * len(task.items[i].options) for i in dealt)
        if not slices or characters > room:
            slices.append([])
            room = SLICE_CHARACTERS
        room -= characters
        slices[-1] += dealt[world.rank : world.rank + 1]
    return slices
