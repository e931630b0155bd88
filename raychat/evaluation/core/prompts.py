"""From an item to token rows: examples in front, BOS first, and which tokens of each row are scored.

The rendering and the scored spans are the lineage's, to the byte, so that results can be compared item by item.
"""

import random
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from raychat.evaluation.core.bundle import Item, Task

SHOT_SEED = 1234  # plus the index of the item: the examples of an item are the same in every run


class Codec(Protocol):
    """The part of a tokenizer that CORE needs."""

    @property
    def bos_id(self) -> int:
        """The token that begins every document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos."""
        ...


@dataclass(frozen=True)
class Row:
    """A text to score: `ids[start:end]` are the scored tokens, with 1 <= start <= end = len(ids)."""

    ids: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """One past the last scored token."""
        return len(self.ids)


@dataclass(frozen=True)
class Question:
    """An item as the model sees it: one row per option; `index` counts the items of its task as they are evaluated."""

    index: int
    line: int
    rows: tuple[Row, ...]
    gold: int
    greedy: bool
    """language modelling: right if every scored token is the likeliest, instead of the option of the lowest mean loss"""


def texts(task: Task, index: int) -> list[str]:
    """The text of every option of item `index`, each behind the same examples."""
    # Places among the other items: a list of these for each of 20,000 items would take longer than a small model does.
    drawn = random.Random(SHOT_SEED + index).sample(range(len(task.items) - 1), task.shots)
    shots = "".join(_solved(task.items[i + (i >= index)], task.delimiter) + "\n\n" for i in drawn)
    return [shots + prompt + task.delimiter + continuation for prompt, continuation in task.items[index].options]


def question(task: Task, index: int, tokenizer: Codec, reach: int) -> Question:
    """Item `index` of `task` in tokens. Rows longer than `reach` lose tokens at their beginning, bos first.

    What is left of the scored tokens then stays scored, except for the first token of a row: nothing predicts it.
    """
    item, written = task.items[index], texts(task, index)
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in written]
    if task.kind == "language_modeling":
        # Without the continuation the prompt is stripped: the space before a word belongs to the word's token.
        prompt = written[0].removesuffix(item.options[0][1]).rstrip()
        starts = [_common([rows[0], [tokenizer.bos_id, *tokenizer.encode(prompt)]])]
    elif task.kind == "schema":
        suffix = _common([row[::-1] for row in rows])
        starts = [len(row) - suffix for row in rows]
    else:
        starts = [_common(rows)] * len(rows)
    cut = [_cut(row, start, reach) for row, start in zip(rows, starts, strict=True)]
    return Question(index, item.line, tuple(cut), item.gold, task.kind == "language_modeling")


def _solved(item: Item, delimiter: str) -> str:
    prompt, continuation = item.options[item.gold]
    return prompt + delimiter + continuation


def _common(rows: list[list[int]]) -> int:
    """Length of the longest beginning that all `rows` share."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))


def _cut(ids: list[int], start: int, reach: int) -> Row:
    gone = max(0, len(ids) - reach)
    return Row(tuple(ids[gone:]), max(1, start - gone))
