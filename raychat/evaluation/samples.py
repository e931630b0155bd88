"""What a model writes: continuations of prompts, to read along with a training run."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from raychat.model import GPT
from raychat.model.fp8 import high_precision
from raychat.model.gpt import ROTARY_REACH

DEFAULT_PROMPTS = (
    "The largest city of Japan is",
    "Water boils at a temperature of",
    "The day after Wednesday is",
    "Ice melts because",
    "Two plus three equals",
    "The first person to walk on the Moon was",
    "A triangle has",
)


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


@torch.no_grad()
def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """`max_tokens` token ids that follow `prompt_ids` (at least one), without the prompt.

    Temperature 0 takes the likeliest token. `top_k` draws from the k likeliest only. Draws come from a CPU generator,
    so that a seed means the same on every device. Each token costs a forward pass over the whole context, of which
    the model sees the last 10 * sequence_len positions.
    """
    if not prompt_ids:
        raise ValueError("generate needs at least one token to start from, for instance bos")
    device = model.lm_head.weight.device
    reach = ROTARY_REACH * model.config.sequence_len
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    with high_precision(model):
        for _ in range(max_tokens):
            context = torch.tensor([ids[-reach:]], device=device)
            logits = model(context)[0, -1].cpu()  # (V,)
            ids.append(_draw(logits, temperature, top_k, generator))
    return ids[len(prompt_ids) :]


def samples(
    model: GPT,
    tokenizer: Codec,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_tokens: int = 16,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Each prompt with its continuation, which ends early where the model begins a new document."""
    texts = []
    for prompt in prompts:
        start = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        new = generate(model, start, max_tokens, temperature, top_k, seed)
        if tokenizer.bos_id in new:
            new = new[: new.index(tokenizer.bos_id)]
        texts.append(tokenizer.decode(start[1:] + new))
    return texts


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
