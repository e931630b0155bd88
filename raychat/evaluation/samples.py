"""What a model writes: continuations of prompts, to read along with a training run."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from raychat.model import GPT
from raychat.model.fp8 import high_precision
from raychat.model.generation import LIKELIEST, Sampling, continuations, generate

DEFAULT_PROMPTS = (
    "The largest city of Japan is",
    "Water boils at a temperature of",
    "The day after Wednesday is",
    "Ice melts because",
    "Two plus three equals",
    "The first person to walk on the Moon was",
    "A triangle has",
)


@runtime_checkable
class Codec(Protocol):
    """The part of a tokenizer that sampling needs."""

    @property
    def bos_id(self) -> int:
        """The token that begins every document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        ...


def samples(
    model: GPT,
    tokenizer: Codec,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_tokens: int = 16,
    sampling: Sampling = LIKELIEST,
) -> list[str]:
    """Each prompt with its continuation, which ends early where the model begins a new document.

    Never in fp8. Of a prompt that is too long for the model, the model sees the end.
    """
    reach = model.cos.size(0)
    max_tokens = min(max_tokens, reach - 1)
    encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    seen = [ids[-(reach - max_tokens) :] for ids in encoded]
    with high_precision(model):
        steps = generate(model, seen, max_tokens, sampling, stop={tokenizer.bos_id})
        new = continuations(steps, len(prompts))
    return [tokenizer.decode(ids[1:] + more) for ids, more in zip(encoded, new, strict=True)]
