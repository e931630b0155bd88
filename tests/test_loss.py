"""The two losses are one function."""

import math

import pytest
import torch
from torch import Tensor

from raychat.model import loss as loss_module
from raychat.model.loss import chunked, full, softcapped_logits

V, V_PADDED, C = 70, 128, 24


def problem(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets: large logits, so that the cap bends them, and every fifth target ignored."""
    generator = torch.Generator().manual_seed(rows)
    x = (4 * torch.randn(rows, C, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(V_PADDED, C, generator=generator).requires_grad_()
    targets = torch.randint(V, (rows,), generator=generator)
    targets[::5] = -1
    return x, weight, targets


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 16, 41], ids=["only an ignored row", "whole chunks", "a rest"])
def test_chunked_loss_and_gradients_equal_the_full_ones(rows, reduction):
    x, weight, targets = problem(rows)
    if rows == 1 and reduction == "mean":
        targets[0] = 3  # the mean over no target is nan in both
    results = []
    for kind, extra in ((full, {}), (chunked, {"chunk_rows": 8})):
        value = kind(x, weight, targets, V, reduction, **extra)
        results.append((value, *torch.autograd.grad(3.0 * value, (x, weight))))
    for plain, ours in zip(*results, strict=True):
        assert (plain - ours).norm() <= 1e-5 * plain.norm()
    assert results[1][2][V:].abs().max() == 0  # padded rows of the head get no gradient


def test_the_mean_over_no_target_is_nan_and_the_sum_zero():
    x, weight, targets = problem(1)
    for kind in (full, chunked):
        assert math.isnan(kind(x, weight, targets, V, "mean").item())
        assert kind(x, weight, targets, V, "sum").item() == 0


def test_per_token_nats_are_zero_where_ignored_and_add_up_to_the_sum():
    x, weight, targets = problem(40)
    x, weight, targets = x.detach().view(4, 10, C), weight.detach(), targets.view(4, 10)
    for kind in (full, chunked):
        nats = kind(x, weight, targets, V, "none")
        assert nats.shape == (4, 10)
        assert (nats[targets == -1] == 0).all()
        torch.testing.assert_close(nats.sum(), full(x, weight, targets, V, "sum"))


def test_per_token_nats_have_gradients_under_chunked_too():
    x, weight, targets = problem(12)
    scale = torch.arange(12.0)
    grads = [torch.autograd.grad((kind(x, weight, targets, V, "none") * scale).sum(), x)[0] for kind in (full, chunked)]
    assert torch.equal(*grads)


def test_chunked_never_holds_float32_logits_of_all_rows(monkeypatch):
    """The largest product of the head is one chunk, whatever the number of rows."""
    seen = []
    plain = loss_module._nats
    monkeypatch.setattr(loss_module, "_nats", lambda raw, goal: seen.append(raw.shape) or plain(raw, goal))
    x, weight, targets = problem(41)
    chunked(x, weight, targets, V, "sum", chunk_rows=8).backward()
    assert seen == [(8, V)] * 5 + [(1, V)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_agree_to_the_rounding_of_the_dtype(dtype):
    """Both round logits and slopes to `dtype`; bfloat16 has 8 bits, so 2^-7 in the norm is one last place each way."""
    x, weight, targets = problem(64, dtype)
    results = [torch.autograd.grad(kind(x, weight, targets, V, "mean"), (x, weight)) for kind in (full, chunked)]
    for plain, ours in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        assert (plain.float() - ours.float()).norm() <= 2**-7 * plain.float().norm()


def test_the_cap_bounds_logits_by_fifteen_and_the_vocabulary_is_cut():
    x, weight, _ = problem(16)
    logits = softcapped_logits(1000 * x, weight, V)
    assert logits.shape == (16, V)
    assert logits.dtype == torch.float32
    assert logits.abs().max() == 15.0
