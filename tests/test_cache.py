"""The cache: whatever the chunks, a model with a cache computes what it computes in one pass."""

import gc
import json
import random
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raychat.errors import ConfigError
from raychat.model import GPT, GPTConfig
from raychat.model.cache import GRAIN, KVCache

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "gpt_d3_gqa.json"
# The short window is 128 positions; three query heads share a key head; the middle block is the one with a window only.
GQA = GPTConfig(sequence_len=256, vocab_size=257, n_layer=3, n_head=6, n_kv_head=2, n_embd=96, window_pattern="SL")
SMALL = GPTConfig(sequence_len=160, vocab_size=97, n_layer=4, n_head=4, n_kv_head=4, n_embd=32, window_pattern="SSSL")


def lively(config: GPTConfig) -> GPT:
    """A model all of whose parameters matter: the zeros and near-zeros of the initialisation are replaced."""
    model, generator = GPT(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "c_proj" in name or "gate" in name or name in ("lm_head.weight", "smear_lambda"):
                param.normal_(0, 0.3, generator=generator)
    return model


def tokens(rows: int, T: int, config: GPTConfig) -> Tensor:
    return torch.randint(config.vocab_size, (rows, T), generator=torch.Generator().manual_seed(T))


def in_chunks(model: GPT, cache: KVCache, idx: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([model(chunk, cache=cache) for chunk in idx.split(sizes, dim=1)], dim=1)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("config", [SMALL, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize(
    "sizes",
    [[300], [1] * 300, [200, 1, 1, 98], [7, 150, 140, 3], [120, 9, 1, 170], [1, 299]],
    ids=["whole", "single", "decode", "chunks", "to-the-window", "one-first"],
)
def test_chunks_of_any_size_give_the_logits_of_one_pass(config, sizes):
    model, idx = lively(config), tokens(2, 300, config)
    torch.testing.assert_close(in_chunks(model, KVCache(model, 2), idx, sizes), model(idx), rtol=1e-5, atol=1e-5)


def test_the_first_pass_has_the_bits_of_a_pass_without_a_cache():
    model, idx = lively(GQA), tokens(2, 300, GQA)
    assert torch.equal(model(idx, cache=KVCache(model, 2)), model(idx))


@pytest.mark.skipif(not REFERENCE.is_file(), reason=f"no reference values at {REFERENCE}")
def test_cached_logits_are_the_values_of_the_independent_implementation():
    from test_reference import batch, filled

    reference = json.loads(REFERENCE.read_text())
    model, idx = filled(reference), batch(reference, 0)[0]
    logits = in_chunks(model, KVCache(model, 2), idx, [100, 60, 1, 1, 94])
    for row, position, token, value in reference["logits"]:
        assert logits[row, position, token].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("config", [SMALL, GQA], ids=["mha", "gqa"])
def test_rows_of_different_lengths_grow_by_different_steps(config):
    """Some rows pause, some are still empty while others have filled their windows."""
    model, rng, rows = lively(config), random.Random(0), 4
    idx = tokens(rows, 400, config)
    cache, got = KVCache(model, rows), [[] for _ in range(rows)]
    for _ in range(14):
        counts = [rng.choice([0, 1, 2, 30, 90]) for _ in range(rows)]
        counts = [min(c, 400 - at) for c, at in zip(counts, cache.lengths, strict=True)]
        chunk = torch.full((rows, max(*counts, 1)), 96)  # the padding is a token like any other
        for row, (count, at) in enumerate(zip(counts, cache.lengths, strict=True)):
            chunk[row, :count] = idx[row, at : at + count]
        logits = model(chunk, cache=cache, counts=counts)
        for row, count in enumerate(counts):
            got[row].append(logits[row, :count])
    assert cache.lengths == [sum(map(len, parts)) for parts in got]
    assert min(cache.lengths) > 128
    assert len(set(cache.lengths)) > 1
    expected = model(idx)
    for row, length in enumerate(cache.lengths):
        torch.testing.assert_close(torch.cat(got[row]), expected[row, :length], rtol=1e-5, atol=1e-5)


def test_repeated_and_selected_rows_go_on_as_their_own():
    model, idx = lively(GQA), tokens(3, 200, GQA)
    cache = KVCache(model, 3)
    model(idx[:, :150], cache=cache, counts=[150, 20, 140])
    ends = tokens(6, 40, GQA)
    fan = cache.repeat(2)
    logits = model(ends, cache=fan, counts=[40, 1, 39, 5, 40, 40])
    for row, (count, start) in enumerate(zip([40, 1, 39, 5, 40, 40], [150, 150, 20, 20, 140, 140], strict=True)):
        alone = torch.cat((idx[row // 2, :start], ends[row, :count]))[None]
        torch.testing.assert_close(logits[row, :count], model(alone)[0, start:], rtol=1e-5, atol=1e-5)
    assert cache.lengths == [150, 20, 140]  # the original is untouched and can be used again
    turned = cache.select([2, 0])
    torch.testing.assert_close(
        model(idx[[2, 0]][:, -1:], cache=turned)[1, 0], model(torch.cat((idx[0, :150], idx[0, -1:]))[None])[0, -1]
    )


def test_joined_caches_go_on_as_each_alone():
    model, idx = lively(GQA), tokens(2, 500, GQA)
    caches = [KVCache(model, 1), KVCache(model, 1)]
    for row, (cache, length) in enumerate(zip(caches, (300, 3), strict=True)):
        model(idx[row : row + 1, :length], cache=cache)
    both = caches[0].joined(caches[1])
    new = tokens(2, 1, GQA)
    logits = model(new, cache=both)
    for row, cache in enumerate(caches):
        torch.testing.assert_close(logits[row : row + 1], model(new[row : row + 1], cache=cache), rtol=1e-5, atol=1e-5)
    assert both.lengths == [301, 4]


def test_windowed_layers_keep_their_window_only():
    model = lively(SMALL)  # SSSL: windows of 128, 128, 128 and all
    cache, position = KVCache(model, 2), SMALL.n_kv_head * SMALL.head_dim * 4 * 2 * 2
    assert cache.num_bytes == 0
    in_chunks(model, cache, tokens(2, 1000, SMALL), [500, 500])
    assert cache.num_bytes == (3 * 129 + 4 * GRAIN) * position
    assert cache.select([0]).num_bytes == cache.num_bytes / 2


def test_the_masks_of_a_pass_go_with_it():
    """At once, not when the collector comes by: on a GPU they may be large."""
    model, idx = lively(SMALL), tokens(2, 300, SMALL)
    cache = KVCache(model, 2)
    in_chunks(model, cache, idx[:, :200], [150, 50])
    last = weakref.ref(cache._pass)
    gc.disable()
    try:
        model(idx[:, 200:], cache=cache)
        assert last() is None
    finally:
        gc.enable()


def test_no_slot_is_written_twice_in_one_pass():
    """Where two positions share a slot only the newer one is kept: a GPU would write them in any order."""
    model = lively(SMALL)
    cache = KVCache(model, 2)
    cache.begin(300, [300, 140])
    rows, offsets, slots = cache._pass.places(129)
    assert len(set(zip(rows.tolist(), slots.tolist(), strict=True))) == len(rows) == 2 * 129
    assert {row: min(offsets[rows == row].tolist()) for row in (0, 1)} == {0: 300 - 129, 1: 140 - 129}


def test_rows_reach_ten_times_the_training_length_and_not_further():
    config = GPTConfig(sequence_len=8, vocab_size=97, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = lively(config)
    idx, cache = tokens(1, 80, config), KVCache(model, 1)
    torch.testing.assert_close(in_chunks(model, cache, idx, [60, 20]), model(idx), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="81 tokens does not fit a cache of 80"):
        model(idx[:, :1], cache=cache)
    assert cache.lengths == [80]
    with pytest.raises(ConfigError, match="does not fit the 80 positions of a model trained on --max-seq-len=8"):
        KVCache(model, 1, 81)


def test_padding_may_reach_beyond_the_last_position():
    model, idx = lively(SMALL), tokens(2, 50, SMALL)
    cache = KVCache(model, 2, capacity=50)
    model(idx[:, :48], cache=cache, counts=[48, 10])
    logits = model(idx[:, 10:50], cache=cache, counts=[2, 40])
    torch.testing.assert_close(logits[1], model(idx[1:, :50])[0, 10:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_stay_near_their_single_pass(dtype):
    """To a few last places of the hidden state, whose mean square is 1."""
    model, idx = lively(GQA), tokens(2, 200, GQA)
    model.set_compute_dtype(dtype)
    cache = KVCache(model, 2)
    parts = [model.hidden(chunk, cache) for chunk in idx.split([150, 1, 49], dim=1)]
    difference = (torch.cat(parts, dim=1) - model.hidden(idx)).float()
    assert difference.square().mean().sqrt() < 0.05
    assert cache.num_bytes < 2 * 3 * GRAIN * 2 * GQA.n_kv_head * GQA.head_dim * 2 + 1


def test_a_cache_that_would_collect_gradients_is_refused():
    model = lively(SMALL)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no_grad"):
        model(tokens(1, 4, SMALL), cache=KVCache(model, 1))


def test_counts_that_do_not_fit_are_refused():
    model = lively(SMALL)
    for counts in ([5], [1, 1], [-1]):
        with pytest.raises(ValueError, match="counts must hold 0 to 4"):
            model(tokens(1, 4, SMALL), cache=KVCache(model, 1), counts=counts)
