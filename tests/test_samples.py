"""Generation: greedy, seeded, bounded, and cut where a new document begins."""

import pytest
import torch

from raychat.evaluation.samples import DEFAULT_PROMPTS, generate, samples
from raychat.model import GPT, GPTConfig

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


def test_greedy_tokens_are_the_likeliest_of_the_full_forward_pass(model):
    new = generate(model, [49, 3], 6, temperature=0)
    with torch.no_grad():
        likeliest = model(torch.tensor([[49, 3, *new]])).argmax(-1)[0]
    assert likeliest[1:-1].tolist() == new


def test_a_seed_fixes_the_draws_and_another_changes_them(model):
    draws = [generate(model, [49], 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_top_1_is_greedy_and_top_k_draws_from_the_k_likeliest(model):
    assert generate(model, [49], 10, top_k=1) == generate(model, [49], 10, temperature=0)
    with torch.no_grad():
        allowed = set(model(torch.tensor([[49]]))[0, -1].topk(3).indices.tolist())
    drawn = {generate(model, [49], 1, temperature=5.0, top_k=3, seed=seed)[0] for seed in range(40)}
    assert drawn == allowed


def test_draws_follow_the_softmax_at_the_temperature(model):
    """300 draws of one token: frequencies within 0.1, more than 3 standard deviations of 0.03."""
    with torch.no_grad():
        expected = (model(torch.tensor([[49]]))[0, -1] / 0.3).softmax(-1)
    drawn = torch.tensor([generate(model, [49], 1, temperature=0.3, seed=seed)[0] for seed in range(300)])
    assert (drawn.bincount(minlength=50) / 300 - expected).abs().max() < 0.1


def test_contexts_beyond_ten_times_the_training_length_are_cropped(model):
    prompt = [i % 50 for i in range(60)]
    assert generate(model, prompt, 5, temperature=0) == generate(model, prompt[-40:], 5, temperature=0)


def test_generation_needs_a_token_to_start_from(model):
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [], 1)


def test_samples_begin_with_their_prompts_and_end_at_a_new_document(model):
    texts = samples(model, Letters(), ["AB", "C"], max_tokens=5)
    start = Letters().encode("AB")
    assert texts[0] == Letters().decode(start + generate(model, [49, *start], 5, temperature=0))
    assert texts[1].startswith("C")
    with torch.no_grad():  # all other logits are bounded by 15: bos is now always the likeliest
        model.lm_head.weight.zero_()
        hidden = model.hidden(torch.tensor([[49, *start]]))[0, -1]
        model.lm_head.weight[49] = hidden
    assert samples(model, Letters(), ["AB"], max_tokens=5) == [Letters().decode(start)]


def test_the_default_prompts_are_several_and_distinct():
    assert len(set(DEFAULT_PROMPTS)) == len(DEFAULT_PROMPTS) >= 5
