"""Samples: prompts with their continuations, cut where a new document begins, as the naive forward pass has them."""

import pytest
import torch

from raychat.evaluation.samples import DEFAULT_PROMPTS, samples
from raychat.model import GPT, GPTConfig
from raychat.model.generation import Sampling

CONFIG = GPTConfig(sequence_len=4, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")


class Letters:
    """A tokenizer whose tokens are the code points from 32 up, modulo 49; 49 is bos."""

    bos_id = 49

    def encode(self, text: str) -> list[int]:
        return [(ord(c) - 32) % 49 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(32 + i) for i in ids)


@pytest.fixture
def model() -> GPT:
    made = GPT(CONFIG)
    with torch.no_grad():
        made.lm_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return made


def naive(model: GPT, text: str, max_tokens: int) -> str:
    """Greedy, a whole forward pass for each token."""
    ids = [49, *Letters().encode(text)]
    with torch.no_grad():
        for _ in range(max_tokens):
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
            if token == 49:
                break
            ids.append(token)
    return Letters().decode(ids[1:])


def test_the_texts_of_a_batch_are_those_of_the_naive_forward_pass(model):
    prompts = ["AB", "C", "", "A LONG ONE, AND NO END"]
    texts = samples(model, Letters(), prompts, max_tokens=12)
    assert texts == [naive(model, prompt, 12) for prompt in prompts]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))


def test_a_text_ends_where_a_new_document_begins(model):
    start = Letters().encode("AB")
    with torch.no_grad():  # all other logits are bounded by 15: bos is now always the likeliest
        model.lm_head.weight.zero_()
        model.lm_head.weight[49] = model.hidden(torch.tensor([[49, *start]]))[0, -1]
    assert samples(model, Letters(), ["AB"], max_tokens=5) == [Letters().decode(start)]


def test_of_a_prompt_beyond_the_models_reach_the_end_is_seen(model):
    prompt = "ABCDEFGHIJKLMNOP" * 3  # 49 tokens with bos; the model has 40 positions
    (text,) = samples(model, Letters(), [prompt], max_tokens=5)
    tail = Letters().encode(prompt)[-35:]
    with torch.no_grad():
        first = int(model(torch.tensor([tail]))[0, -1].argmax())
    assert text.startswith(prompt + Letters().decode([first]))


def test_a_model_of_few_positions_still_writes(model):
    """The default of 16 tokens does not fit beside the prompts; a training run must not end for it."""
    tiny = GPT(GPTConfig(sequence_len=1, vocab_size=50, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
    assert len(samples(tiny, Letters())) == len(DEFAULT_PROMPTS)


def test_a_seed_repeats_the_texts_and_another_does_not(model):
    texts = [samples(model, Letters(), ["A", "B"], sampling=Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_default_prompts_are_several_and_distinct():
    assert len(set(DEFAULT_PROMPTS)) == len(DEFAULT_PROMPTS) == 7
