"""Text generation, as token ids: rows join and leave between steps, and each costs one new position per token.

A row's tokens depend on its prompt, its settings and its seed, not on the rows beside it (up to the rounding of the
matrix products, whose order of summation may follow the size of the batch).

Legend: R rows, C channels, V vocabulary.
"""

import dataclasses
import math
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raychat.errors import ConfigError
from raychat.model.cache import KVCache
from raychat.model.gpt import GPT, Linear
from raychat.model.loss import softcapped_logits

PREFILL_TOKENS = 16_384  # positions of one pass over prompts, padding included: bounds its memory
GREEDY_BELOW = 1e-5  # a temperature that leaves nothing to chance, and whose quotients would overflow


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Raises ConfigError for what cannot be."""

    temperature: float = 1.0
    """divides the logits; 0 (or below 1e-5): always the likeliest token"""
    top_k: int | None = None
    """draw from the k likeliest tokens only; None: from all"""
    top_p: float = 1.0
    """of these, draw from the fewest that together have this probability"""
    seed: int = 42
    """of the row's own stream of random numbers"""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature={self.temperature} cannot be: use 0 (always the likeliest) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token to draw: use 1 or more, or leave it out.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is no share of the probability: use a number above 0, up to 1.")

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < GREEDY_BELOW


LIKELIEST = Sampling(temperature=0.0)
PLAIN = Sampling()


@dataclass
class _Row:
    """A text in the making."""

    number: int
    prompt: list[int]
    left: int  # tokens that may still come
    sampling: Sampling
    stop: frozenset[int]
    stream: random.Random
    newest: int = -1  # drawn, and not yet seen by the model


class Generator:
    """Continues any number of rows, one token each per `step`; rows come and go between steps.

    The model must be in the dtype and on the device it is to compute with. One thread at a time.
    """

    def __init__(self, model: GPT, *, never: Collection[int] = ()) -> None:
        """Generates with `model`. Tokens in `never` are not drawn, whatever the model thinks of them."""
        self._model = model
        self._never = [token for token in never if token < model.config.vocab_size]
        self._rows: list[_Row] = []  # in the order of the cache's rows
        self._waiting: list[_Row] = []
        self._cache = KVCache(model, 0)
        self._next = 0

    @property
    def rows(self) -> list[int]:
        """The rows that have not ended."""
        return [row.number for row in (*self._rows, *self._waiting)]

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values of all rows."""
        return self._cache.num_bytes

    def add(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = PLAIN, stop: Collection[int] = ()
    ) -> int:
        """The number of a new row, whose first token comes with the next step. It ends after `max_tokens` tokens or
        where it draws one of `stop`, which is not part of it.

        Raises:
            ConfigError: the prompt is empty, holds what is no token, or leaves no room for `max_tokens`.
        """
        vocab, room = self._model.config.vocab_size, self._cache.capacity
        if not prompt:
            raise ConfigError("The prompt is empty: give at least one token to start from, for instance BOS.")
        if strange := [token for token in prompt if not 0 <= token < vocab]:
            raise ConfigError(f"The prompt holds {strange[0]}, which is no token: the model knows 0 to {vocab - 1:,}.")
        if max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens} asks for nothing: use 1 or more.")
        if len(prompt) >= room:
            raise ConfigError(
                f"A prompt of {len(prompt):,} tokens leaves no room for a text in the {room:,} positions of the model. "
                "Use a shorter prompt."
            )
        if len(prompt) + max_tokens > room:
            raise ConfigError(
                f"A prompt of {len(prompt):,} tokens and max_tokens={max_tokens:,} do not fit the {room:,} positions "
                f"of the model. Use max_tokens up to {room - len(prompt):,}, or a shorter prompt."
            )
        row = _Row(self._next, list(prompt), max_tokens, sampling, frozenset(stop), random.Random(sampling.seed))
        self._next += 1
        self._waiting.append(row)
        return row.number

    def remove(self, number: int) -> None:
        """End a row early. One that has ended already is left alone."""
        self._waiting = [row for row in self._waiting if row.number != number]
        self._keep([row.number != number for row in self._rows])

    @torch.inference_mode()
    def step(self) -> dict[int, int | None]:
        """The next token of every row, by the number that `add` gave; None: the row drew a stop token, and has ended.

        A row that has all of its `max_tokens` with this step has ended too.
        """
        parts = []
        if self._rows:
            newest = torch.tensor([[row.newest] for row in self._rows], device=self._model.lm_head.weight.device)
            parts.append(self._model.hidden(newest, self._cache)[:, -1])
        while self._waiting:
            parts.append(self._take_in(self._next_prompts()))
        if not parts:
            return {}
        drawn: dict[int, int | None] = {}
        for row, token in zip(self._rows, self._draw(torch.cat(parts)), strict=True):
            row.newest, row.left = token, 0 if token in row.stop else row.left - 1
            drawn[row.number] = None if token in row.stop else token
        self._keep([row.left > 0 for row in self._rows])
        return drawn

    def _next_prompts(self) -> list[_Row]:
        """Waiting rows of similar length, as many as one pass may hold, at least one; they wait no longer."""
        self._waiting.sort(key=lambda row: len(row.prompt))
        count = 1
        while count < len(self._waiting) and (count + 1) * len(self._waiting[count].prompt) <= PREFILL_TOKENS:
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    def _take_in(self, batch: list[_Row]) -> Float[Tensor, "R C"]:
        """Read the prompts of `batch` and join its rows to the others; the hidden state at the end of each prompt."""
        device = self._model.lm_head.weight.device
        counts = [len(row.prompt) for row in batch]
        idx = torch.zeros(len(batch), max(counts), dtype=torch.long)
        for place, row in enumerate(batch):
            idx[place, : counts[place]] = torch.tensor(row.prompt)
        cache = KVCache(self._model, len(batch))
        hidden = self._model.hidden(idx.to(device), cache, counts)
        self._cache = self._cache.joined(cache) if self._rows else cache
        self._rows = [*self._rows, *batch]
        return hidden[torch.arange(len(batch), device=device), torch.tensor(counts, device=device) - 1]

    def _draw(self, hidden: Float[Tensor, "R C"]) -> list[int]:
        """A token for every row, of which those with the same settings are drawn at once."""
        logits = softcapped_logits(hidden, self._model.lm_head.weight, self._model.config.vocab_size)
        if self._never:
            logits[:, self._never] = -torch.inf
        groups: dict[Sampling, list[int]] = {}
        for place, row in enumerate(self._rows):
            groups.setdefault(dataclasses.replace(row.sampling, seed=0), []).append(place)
        tokens = torch.empty(len(self._rows), dtype=torch.long)
        for sampling, places in groups.items():
            points = [0.0 if sampling.greedy else self._rows[place].stream.random() for place in places]
            own = logits if len(groups) == 1 else logits[places]
            tokens[places] = draw(own, sampling, torch.tensor(points, dtype=torch.float64)).cpu()
        return tokens.tolist()

    def _keep(self, kept: list[bool]) -> None:
        if not all(kept):
            places = [place for place, stays in enumerate(kept) if stays]
            self._rows = [self._rows[place] for place in places]
            self._cache = self._cache.select(places)


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | Sequence[Sampling] = PLAIN,
    *,
    stop: Collection[int] = (),
    never: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Continue all prompts at once: per step one new token for each; None for those that a stop token has ended.

    One `Sampling` for several prompts: prompt i draws with `seed + i`. Prompts may have different lengths.

    Raises:
        ConfigError: at once, for what `Generator.add` refuses.
    """
    if isinstance(sampling, Sampling):
        sampling = [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(len(prompts))]
    generator = Generator(model, never=never)
    rows = [generator.add(prompt, max_tokens, own, stop) for prompt, own in zip(prompts, sampling, strict=True)]
    return _steps(generator, rows)


def continuations(steps: Iterator[list[int | None]], rows: int) -> list[list[int]]:
    """What `generate` gives for `rows` prompts, whole: the new tokens of each."""
    texts: list[list[int]] = [[] for _ in range(rows)]
    for step in steps:
        for text, token in zip(texts, step, strict=True):
            if token is not None:
                text.append(token)
    return texts


def draw(logits: Float[Tensor, "R V"], sampling: Sampling, points: Float[Tensor, "R"]) -> Int[Tensor, "R"]:
    """One token per row: the one under which `points` (float64, 0 <= point < 1) falls when the probabilities stand in
    a row. In float64, so that devices agree. The order is temperature, top-k, top-p; the likeliest token always stays.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    if logits.device.type not in ("cpu", "cuda"):
        logits = logits.cpu()  # not every device has float64
    tokens = None
    if sampling.top_k is not None or sampling.top_p < 1:
        logits, tokens = logits.topk(min(sampling.top_k or logits.size(-1), logits.size(-1)))  # descending
    share = ((logits.double() - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    below = share.cumsum(-1)
    if sampling.top_p < 1:
        share = share.where(below - share < sampling.top_p, 0.0)
        below = share.cumsum(-1)
    # In float64 no point below 1 is rounded up to the total, so that a token of no share is never hit.
    target = points.to(below.device)[:, None] * below[:, -1:]
    place = torch.searchsorted(below, target, right=True).clamp(max=share.size(-1) - 1)  # else beyond it for nan
    return (place if tokens is None else tokens.gather(-1, place))[:, 0]


def cast_matrices_(model: GPT) -> None:
    """Store the matrices of a model that will not be trained in the dtype it computes with.

    The results keep their bits; a step no longer casts every weight, and half the memory does for a short dtype.
    """
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.to(model.compute_dtype)


def _steps(generator: Generator, rows: list[int]) -> Iterator[list[int | None]]:
    while generator.rows:
        drawn = generator.step()
        tokens = [drawn.get(row) for row in rows]
        if any(token is not None for token in tokens):
            yield tokens
