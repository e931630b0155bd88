"""Generation: equal to the naive forward pass, rows that do not know of each other, draws that follow the softmax."""

import math
import random

import pytest
import torch

from raychat.errors import ConfigError
from raychat.model import GPT, GPTConfig
from raychat.model.generation import (
    LIKELIEST,
    Generator,
    Sampling,
    cast_matrices_,
    continuations,
    draw,
    generate,
)

# d4 as the depth dial makes it, with a small vocabulary: windows of 128 on three of the four blocks.
D4 = GPTConfig(sequence_len=256, vocab_size=1000, n_layer=4, n_head=2, n_kv_head=2, n_embd=256, window_pattern="SSSL")
SMALL = GPTConfig(sequence_len=32, vocab_size=50, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")
BOS = 49


def lively(config: GPTConfig = SMALL) -> GPT:
    """A model whose every part matters, and whose likeliest token depends on all it has seen."""
    model, generator = GPT(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "c_proj" in name or "gate" in name or name in ("lm_head.weight", "smear_lambda"):
                param.normal_(0, 2 * param.size(-1) ** -0.5, generator=generator)
    return model.eval()


@torch.no_grad()
def naive(model: GPT, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy, a whole forward pass for each token."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def alone(model: GPT, prompt: list[int], max_tokens: int, sampling: Sampling = LIKELIEST, **kwargs) -> list[int]:
    return continuations(generate(model, [prompt], max_tokens, sampling, **kwargs), 1)[0]


def test_200_greedy_steps_beyond_the_window_are_the_naive_ones():
    """From inside the short window of 128 positions to far beyond it, and past the training length of 256.

    No position sees its future, so one pass over the whole text has the logits of all 200 naive passes.
    """
    model = lively(D4)
    prompt = torch.randint(1000, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    new = alone(model, prompt, 200)
    with torch.no_grad():
        likeliest = model(torch.tensor([prompt + new]))[0].argmax(-1).tolist()
    assert new == likeliest[99:-1]
    assert len(set(new)) > 100  # no loop that a broken cache could follow as well


def test_prompts_of_different_lengths_go_on_together_as_each_alone():
    model = lively()
    prompts = [[BOS], [BOS, 3, 4], list(range(40)), [7] * 9]
    together = continuations(generate(model, prompts, 30, LIKELIEST), 4)
    assert together == [naive(model, prompt, 30) for prompt in prompts]


def test_rows_that_come_and_go_leave_the_others_alone():
    """Rows with draws of their own join and leave at random steps; each text is the one that its row writes alone."""
    model, rng = lively(), random.Random(0)
    asked = {}
    for seed in range(12):
        prompt = rng.choices(range(50), k=rng.randint(1, 60))
        setting = rng.choice([{"temperature": 0.0}, {"top_k": 7}, {"top_p": 0.9}, {"temperature": 0.7}])
        asked[seed] = (prompt, rng.randint(1, 25), Sampling(seed=seed, **setting))
    generator, texts, numbers = Generator(model), {}, {}
    waiting, left = list(asked), set()
    while waiting or generator.rows:
        for seed in waiting[: rng.randint(0, 3)]:
            waiting.remove(seed)
            numbers[generator.add(*asked[seed])] = seed
        if rng.random() < 0.1 and generator.rows:
            gone = rng.choice(generator.rows)
            generator.remove(gone)
            left.add(numbers[gone])
        for number, token in generator.step().items():
            texts.setdefault(numbers[number], []).append(token)
    assert 0 < len(left) < 6
    for seed, request in asked.items():
        whole = alone(model, *request)
        assert texts.get(seed, []) == (whole[: len(texts.get(seed, []))] if seed in left else whole)


def test_many_prompts_are_read_in_passes_of_bounded_size(monkeypatch):
    model, sizes, hidden = lively(), [], GPT.hidden
    monkeypatch.setattr("raychat.model.generation.PREFILL_TOKENS", 20)

    def spy(self, idx, cache=None, counts=None):
        sizes.append(idx.numel())
        return hidden(self, idx, cache, counts)

    monkeypatch.setattr(GPT, "hidden", spy)
    prompts = [[BOS] * n for n in (9, 1, 3, 8, 30, 2)]
    together = continuations(generate(model, prompts, 1, LIKELIEST), 6)
    assert sizes == [9, 18, 30]  # lengths 1 to 3; 8 and 9; what is larger than a pass is one of its own
    assert together == [alone(model, prompt, 1) for prompt in prompts]


def test_a_stop_token_ends_its_row_and_is_not_part_of_it():
    model = lively()
    prompts = [[BOS, 1], [BOS, 2], [BOS, 3]]
    whole = continuations(generate(model, prompts, 12, LIKELIEST), 3)
    stop = whole[0][5]
    cut = continuations(generate(model, prompts, 12, LIKELIEST, stop={stop}), 3)
    assert cut == [row[: row.index(stop)] if stop in row else row for row in whole]
    steps = list(generate(model, prompts[:1], 12, LIKELIEST, stop={stop}))
    assert len(steps) == whole[0].index(stop)
    generator = Generator(model)
    row = generator.add(prompts[0], 12, LIKELIEST, stop={whole[0][0]})
    assert generator.step() == {row: None}
    assert generator.rows == []
    assert generator.step() == {}


def test_memory_is_given_back_with_the_rows():
    model = lively()
    generator = Generator(model)
    long, short = generator.add([BOS] * 300, 5), generator.add([BOS], 5)
    generator.step()
    full = generator.num_bytes
    generator.remove(long)
    assert generator.num_bytes < full / 2
    generator.remove(short)
    generator.remove(short)
    assert generator.num_bytes == 0


def test_tokens_that_must_never_come_do_not():
    model = lively()
    drawn = {
        token
        for seed in range(20)
        for token in alone(model, [BOS], 20, Sampling(temperature=3.0, seed=seed), never=range(10, 50))
    }
    assert drawn == set(range(10))


def test_a_seed_repeats_a_text_and_rows_of_one_setting_differ():
    model = lively()
    draws = [alone(model, [BOS], 20, Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    rows = continuations(generate(model, [[BOS], [BOS]], 20, Sampling(seed=1)), 2)
    assert rows == [draws[0], draws[2]]  # row i has seed + i


LOGITS = torch.tensor([[1.0, 3.0, -2.0, 2.0, 2.5, 0.0, -15.0, 1.5]])


def counts(sampling: Sampling, n: int = 2000) -> torch.Tensor:
    """How often each token is drawn at `n` points that are spread evenly."""
    points = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return draw(LOGITS.expand(n, -1), sampling, points).bincount(minlength=LOGITS.numel()) / n


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    expected = (LOGITS[0].double() / temperature).softmax(-1)
    torch.testing.assert_close(counts(Sampling(temperature=temperature)).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5, 7]),
        ({"top_p": 0.5}, [1, 4]),  # the likeliest has 0.42 of the probability
        ({"top_p": 1e-9}, [1]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of the two that are left, the likelier has 0.62
        ({"top_k": 2, "top_p": 0.63}, [1, 4]),
    ],
    ids=str,
)
def test_what_is_cut_never_comes_and_the_rest_keeps_its_proportions(setting, allowed):
    expected = torch.zeros(LOGITS.numel(), dtype=torch.float64)
    expected[allowed] = LOGITS[0, allowed].double().softmax(-1)
    torch.testing.assert_close(counts(Sampling(**setting)).double(), expected, rtol=0, atol=2e-3)


def test_the_ends_of_the_range_give_tokens_that_may_come():
    points = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    assert draw(logits, Sampling(), points).tolist() == [1, 2]
    assert draw(logits, Sampling(top_p=0.99), points).sort().values.tolist() == [1, 2]


def test_a_model_that_computes_no_numbers_still_gives_tokens():
    logits = torch.full((1, 8), torch.nan)
    for sampling in (LIKELIEST, Sampling(), Sampling(top_k=3), Sampling(top_p=0.5)):
        assert 0 <= draw(logits, sampling, torch.full((1,), 0.5, dtype=torch.float64)).item() < 8


def test_no_temperature_is_greedy_and_so_is_almost_none():
    assert draw(LOGITS, LIKELIEST, torch.zeros(1, dtype=torch.float64)).item() == 1
    assert counts(Sampling(temperature=1e-8))[1] == 1
    assert counts(Sampling(temperature=2e-5))[1] == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "use 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "1 or more"),
        ({"top_p": 0.0}, "above 0"),
        ({"top_p": 1.1}, "up to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "at least one token"),
        ([50], 1, "knows 0 to 49"),
        ([-1], 1, "no token"),
        ([1], 0, "1 or more"),
        ([1] * 300, 21, "Use max_tokens up to 20,"),
        ([1] * 320, 1, "no room .* 320 positions"),
    ],
)
def test_requests_that_cannot_be_are_refused_at_once(prompt, max_tokens, message):
    with pytest.raises(ConfigError, match=message):
        generate(lively(), [prompt], max_tokens)


def test_the_last_position_of_the_model_can_be_used():
    model = lively()
    assert alone(model, [BOS] * 300, 20) == naive(model, [BOS] * 300, 20)


def test_matrices_in_the_compute_dtype_give_the_same_bits_in_less_memory():
    model, idx = lively(), torch.arange(60)[None] % 50
    model.set_compute_dtype(torch.bfloat16)
    with torch.no_grad():
        expected = model(idx)
        before = sum(p.numel() * p.element_size() for p in model.parameters())
        cast_matrices_(model)
        assert torch.equal(model(idx), expected)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) < 0.6 * before
