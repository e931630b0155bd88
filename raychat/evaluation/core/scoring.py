"""Scores of a batch of CORE questions, and what they answer: forward passes as few and as short as possible.

Three things make it fast. The head, the largest product of a small model, runs where its output is read and nowhere else.
What the options of a question have in common is computed once and continued per option from a cache. Questions of
similar length share a pass.

Rounding depends on the shapes of a pass, so two options whose scores nearly tie could change places with the batch.
Such questions are computed again alone, one unpadded row per pass: the answer then depends on the question only.

Legend: B rows, T positions, N scored tokens, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raychat.evaluation.core.prompts import Question, Row
from raychat.evaluation.core.results import ItemResult
from raychat.model import GPT
from raychat.model.cache import KVCache
from raychat.model.loss import chunked, softcapped_logits

READ_ROWS = 256  # positions whose float32 logits are held at once
# Differences below which rounding may decide: of mean losses in nats, over the root of the number of scored tokens; and of
# logits. Twice the most that scores were seen to move with the batch, at logits up to 12 (docs/evaluation.md), or more.
CLOSE = {torch.float32: (1e-4, 1e-3), torch.float16: (0.0125, 0.03), torch.bfloat16: (0.1, 0.25)}


@dataclass(frozen=True)
class Tree:
    """Rows of one question whose first `stem` tokens are the same and are computed once."""

    rows: tuple[Row, ...]
    stem: int

    @property
    def branch(self) -> int:
        """The most tokens that a row adds to the stem. The last token of a row is only predicted."""
        return max(row.end - 1 for row in self.rows) - self.stem

    @property
    def branches(self) -> int:
        """Rows that add to the stem."""
        return sum(row.end - 1 > self.stem for row in self.rows)


def trees(question: Question) -> list[Tree]:
    """The question as one tree, or as one per row where the rows begin differently (they lost their beginning)."""
    rows = question.rows
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*(row.ids for row in rows), strict=False)))
    if shared == 0:
        return [Tree((row,), row.end - 1) for row in rows]
    return [Tree(rows, min(shared, *(row.end - 1 for row in rows)))]


def batches(questions: Sequence[Question], batch_tokens: int) -> list[list[Question]]:
    """`questions` by length, longest first, in groups of which each takes a pass of at most `batch_tokens` or is alone.

    Padding counts, and so does the cache, in which every branch has a stem of its own.
    """
    order = sorted(questions, key=lambda q: (-max(row.end for row in q.rows), q.index))
    grouped: list[list[Question]] = []
    stem = branch = count = branches = 0
    for question in order:
        forest = trees(question)
        stem, branch = max(stem, *(t.stem for t in forest)), max(branch, *(t.branch for t in forest))
        count, branches = count + len(forest), branches + sum(t.branches for t in forest)
        if not grouped or count * stem + branches * (stem + branch) > batch_tokens:
            grouped.append([])
            stem, branch = max(t.stem for t in forest), max(t.branch for t in forest)
            count, branches = len(forest), sum(t.branches for t in forest)
        grouped[-1].append(question)
    return grouped


@torch.no_grad()
def answer(model: GPT, questions: Sequence[Question]) -> list[ItemResult]:
    """What `model` answers to `questions`, which are of one task, computed together."""
    greedy = questions[0].greedy
    nats, logits = CLOSE[model.compute_dtype]
    forests = [trees(question) for question in questions]
    scores = iter(_scores(model, [tree for forest in forests for tree in forest], greedy))
    results = []
    for question in questions:
        result = _judge(question, [next(scores) for _ in question.rows])
        if _margin(question, result) <= (logits if greedy else nats):
            result = replace(answer_alone(model, question), close=True)
        results.append(result)
    return results


@torch.no_grad()
def answer_alone(model: GPT, question: Question) -> ItemResult:
    """The same one row at a time, in passes without padding or cache: slow, and independent of everything else."""
    distinct = list(dict.fromkeys(question.rows))
    known = {row: _scores(model, [Tree((row,), row.end - 1)], question.greedy)[0] for row in distinct}
    return _judge(question, [known[row] for row in question.rows])


def _judge(question: Question, scores: list[float]) -> ItemResult:
    """The verdict: every token the likeliest (greedy), or the first option of the lowest mean loss."""
    if question.greedy:
        predicted = 0 if scores[0] >= 0 else None
    else:
        # Equal options must not differ by the rounding of their places in a batch.
        scores = [scores[question.rows.index(row)] for row in question.rows]
        predicted = scores.index(min(scores))
    return ItemResult(
        index=question.index,
        line=question.line,
        correct=predicted == question.gold,
        predicted=predicted,
        gold=question.gold,
        scores=tuple(scores),
    )


def _margin(question: Question, result: ItemResult) -> float:
    """How far the scores are from another verdict, in the unit of CLOSE."""
    if question.greedy or result.predicted is None:
        return abs(result.scores[0])
    best, least = question.rows[result.predicted], result.scores[result.predicted]
    gaps = [
        (score - least) * math.sqrt(min(row.end - row.start, best.end - best.start))
        for row, score in zip(question.rows, result.scores, strict=True)
        if row != best and math.isfinite(score)
    ]
    return min(gaps, default=math.inf)


def _scores(model: GPT, forest: Sequence[Tree], greedy: bool) -> list[float]:
    """One number per row of every tree.

    The mean loss of the scored tokens in nats, infinite where there are none; or, `greedy`, the least by which a scored
    token leads all others in logits, 0 where it ties and comes first, negative where another one is likelier.
    """
    hidden, at, goals, sizes = _read(model, forest)
    values = _leads(model, hidden[at], goals) if greedy else _nats(model, hidden[at], goals)
    parts = values.double().cpu().split(sizes)
    if greedy:
        return [part.min().item() for part in parts]
    return [part.mean().item() if part.numel() else math.inf for part in parts]


def _nats(model: GPT, x: Float[Tensor, "N C"], goals: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    if not len(goals):
        return torch.zeros(0, device=x.device)
    return chunked(x, model.lm_head.weight, goals, model.config.vocab_size, "none", READ_ROWS)


def _leads(model: GPT, x: Float[Tensor, "N C"], goals: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Logit of the goal less the highest of the others; below 0 also where an equal one comes first, as arg max does."""
    parts = []
    for rows, goal in zip(x.split(READ_ROWS), goals[:, None].split(READ_ROWS), strict=True):
        logits = softcapped_logits(rows, model.lm_head.weight, model.config.vocab_size)
        lead = logits.gather(1, goal)
        best, place = logits.scatter(1, goal, -math.inf).max(dim=1, keepdim=True)
        behind = (lead == best) & (place < goal)
        parts.append(torch.where(behind, -torch.finfo(torch.float32).tiny, lead - best))
    return torch.cat(parts).squeeze(1)


def _read(
    model: GPT, forest: Sequence[Tree]
) -> tuple[Float[Tensor, "P C"], Int[Tensor, "N"], Int[Tensor, "N"], list[int]]:
    """Hidden states of all positions that were computed, which of them predict a scored token, and these tokens.

    In the order of the rows, of which the last value says how many scored tokens each has.
    """
    device = model.lm_head.weight.device
    grown = [(n, row) for n, tree in enumerate(forest) for row in tree.rows if row.end - 1 > tree.stem]
    stems, branches = (
        [tree.rows[0].ids[: tree.stem] for tree in forest],
        [row.ids[forest[n].stem : -1] for n, row in grown],
    )
    # Without branches nobody continues, and nothing is kept.
    longest = max(row.end - 1 for tree in forest for row in tree.rows)
    cache = KVCache(model, len(forest), longest) if grown else None
    hidden = [model.hidden(_padded(stems, device), cache, [len(ids) for ids in stems] if cache else None).flatten(0, 1)]
    if cache:
        cache = cache.select([n for n, _ in grown])
        hidden.append(model.hidden(_padded(branches, device), cache, [len(ids) for ids in branches]).flatten(0, 1))
    width, at, goals, sizes = max(map(len, stems)), [], [], []
    branch_width, branch_start = max(map(len, branches), default=0), len(forest) * width
    for n, tree in enumerate(forest):
        for row in tree.rows:
            places = range(row.start - 1, row.end - 1)
            at += [n * width + t if t < tree.stem else branch_start + t - tree.stem for t in places]
            branch_start += branch_width if row.end - 1 > tree.stem else 0
            goals += row.ids[row.start :]
            sizes.append(len(places))
    return torch.cat(hidden), torch.tensor(at, device=device), torch.tensor(goals, device=device), sizes


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "B T"]:
    """`rows` of ids, filled on the right with id 0, which no position before it sees."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
