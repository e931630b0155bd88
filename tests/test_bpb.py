"""Bits per byte: known models, and the same value however the rows are dealt out."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from raychat.errors import DataError
from raychat.evaluation.bpb import bits_per_byte, evaluate_bpb
from raychat.model import GPT, GPTConfig

CONFIG = GPTConfig(sequence_len=16, vocab_size=100, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
TOKEN_BYTES = torch.tensor([0] * 9 + [1 + i % 5 for i in range(91)])  # nine special tokens


def rows() -> Tensor:
    return torch.randint(100, (24, 17), generator=torch.Generator().manual_seed(0))


def model() -> GPT:
    made = GPT(CONFIG)
    with torch.no_grad():
        made.lm_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return made


def test_a_model_that_knows_nothing_pays_log2_vocab_per_one_byte_token():
    """All logits are zero: log2(100) bits per token, and every token is one byte."""
    uniform = model()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    value = evaluate_bpb(uniform, iter([rows()]), torch.ones(100, dtype=torch.long), "cpu")
    assert value == pytest.approx(math.log2(100), rel=1e-6)


def test_bits_per_byte_is_nats_over_ln2_bytes():
    assert bits_per_byte(3 * math.log(2), 2) == pytest.approx(1.5)


def test_special_and_ignored_targets_are_in_neither_sum():
    data = rows()
    data[:, 9] = -1
    idx, targets = data[:, :-1].clamp_min(0), data[:, 1:]
    with torch.no_grad():
        probabilities = model()(idx).double().log_softmax(-1)
    nats = length = 0.0
    for r, t in targets.ge(9).nonzero().tolist():  # neither -1 nor one of the nine
        nats -= probabilities[r, t, targets[r, t]].item()
        length += TOKEN_BYTES[targets[r, t]].item()
    assert evaluate_bpb(model(), iter([data]), TOKEN_BYTES, "cpu") == pytest.approx(
        nats / (math.log(2) * length), rel=1e-5
    )


@pytest.mark.parametrize("loss_impl", ["full", "chunked"])
def test_the_batch_size_does_not_matter(loss_impl):
    made = model()
    made.loss_impl = loss_impl
    values = [evaluate_bpb(made, iter(rows().split(size)), TOKEN_BYTES, "cpu") for size in (24, 7, 1)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_the_number_of_ranks_does_not_matter_even_when_one_has_no_rows():
    expected = evaluate_bpb(model(), iter([rows()]), TOKEN_BYTES, "cpu")
    for world in (2, 3):
        assert run_ranks(share_of_rows, world) == pytest.approx([expected] * world, rel=1e-6)


def share_of_rows() -> float:
    """The last of three ranks has nothing to evaluate."""
    mine = rows()[dist.get_rank() :: 2] if dist.get_rank() < 2 else rows()[:0]
    return evaluate_bpb(model(), iter(mine.split(5)) if len(mine) else iter(()), TOKEN_BYTES, "cpu")


def test_a_given_reduction_replaces_the_process_group():
    def double_nats(sums: Tensor) -> None:
        sums[0] *= 2

    value = evaluate_bpb(model(), iter([rows()]), TOKEN_BYTES, "cpu", all_reduce=double_nats)
    assert value == pytest.approx(2 * evaluate_bpb(model(), iter([rows()]), TOKEN_BYTES, "cpu"))


def test_evaluation_leaves_no_gradient_and_no_text_is_an_error():
    made = model()
    evaluate_bpb(made, iter([rows()]), TOKEN_BYTES, "cpu")
    assert all(p.grad is None for p in made.parameters())
    with pytest.raises(DataError, match="no bytes"):
        evaluate_bpb(made, iter(()), TOKEN_BYTES, "cpu")
