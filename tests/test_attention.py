"""Attention: the band against a dense mask, and the choice of a back-end."""

import pytest
import torch
from torch import Tensor

from raychat.model.attention import BLOCK, attend, choose_backend


def heads(T: int, n_head: int, n_kv_head: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = [(2, T, n_head, 8), (2, T, n_kv_head, 8), (2, T, n_kv_head, 8)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """The definition: softmax over all T x T scores of which the forbidden are -inf."""
    T, groups = q.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.size(-1) ** 0.5
    lag = torch.arange(T)[:, None] - torch.arange(T)
    seen = (lag >= 0) & (lag <= (T if window is None else window))
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    ("T", "window"),
    [(300, 128), (384, 128), (257, 1), (389, 130), (300, 0), (260, 258), (130, 129), (100, 128), (1, 128), (300, None)],
)
def test_attention_equals_the_dense_mask_in_outputs_and_gradients(T, window, n_kv_head):
    """In float64, so that any wrong pair would stand out. T=260 with window 258 hides exactly one pair."""
    inputs = heads(T, 4, n_kv_head)
    weights = torch.randn(2, T, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for attention in (attend, dense):
        y = attention(*inputs, window)
        results.append((y, *torch.autograd.grad((y * weights).sum(), inputs)))
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-10, atol=1e-12)


def test_a_key_moves_exactly_the_queries_that_see_it():
    T, window, j = 2 * BLOCK + 50, 128, 60
    q, k, v = (t.detach() for t in heads(T, 2, 2))
    changed = v.clone()
    changed[:, j] += 1.0
    moved = (attend(q, k, v, window) != attend(q, k, changed, window)).any(-1).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == list(range(j, j + window + 1))


def test_a_cpu_gets_sdpa_and_the_reason_is_named():
    name, reason = choose_backend(torch.device("cpu"), torch.float32)
    assert name == "sdpa"
    assert "CUDA" in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 128])
def test_flash_equals_sdpa_to_bfloat16_rounding(window):
    device = torch.device("cuda")
    name, reason = choose_backend(device, torch.bfloat16)
    if name != "flash":
        pytest.skip(reason)
    q, k, v = (torch.randn(2, 512, h, 64, device=device, dtype=torch.bfloat16) for h in (4, 2, 2))
    torch.testing.assert_close(attend(q, k, v, window, "flash"), attend(q, k, v, window, "sdpa"), rtol=2e-2, atol=2e-2)
