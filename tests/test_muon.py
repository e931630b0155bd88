"""Muon, one law per step of the rule."""

import pytest
import torch
from torch import Tensor

from raychat.optim import muon

SHAPES = pytest.mark.parametrize(("m", "n"), [(24, 96), (96, 24), (48, 48)], ids=["wide", "tall", "square"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_singular_values(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    U, _ = torch.linalg.qr(randn(m, len(values), seed=seed))
    V, _ = torch.linalg.qr(randn(n, len(values), seed=seed + 1))
    return U @ torch.diag(values) @ V.T


def norms(X: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(X)


def test_momentum_is_a_running_mean_and_the_step_looks_ahead_along_it():
    """Under a constant gradient G from a zero buffer: buffer = (1 - 0.9^t) G, and the look-ahead is 0.1 G + 0.9 buffer."""
    G, buffer = randn(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.float64)
    for t in range(1, 6):
        ahead = muon.nesterov_(buffer, G, 0.9)
        torch.testing.assert_close(buffer, (1 - 0.9**t) * G)
        torch.testing.assert_close(ahead, 0.1 * G + 0.9 * buffer)


@SHAPES
def test_rows_come_out_equally_long_and_the_norm_stays(m, n):
    G = randn(3, m, n) * torch.logspace(-3, 2, m, dtype=torch.float64)[:, None]
    out = muon.equalize_rows(G)
    rows = out.norm(dim=-1)
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    torch.testing.assert_close(norms(out), norms(G))


@SHAPES
def test_polar_express_keeps_directions_and_brings_singular_values_near_one(m, n):
    """Spectra from 1 to 0.02 of the largest: five steps leave 1 +- 0.15, which is a fact about the coefficients."""
    G = with_singular_values(m, n, torch.logspace(0, -1.7, min(m, n), dtype=torch.float64))
    X = muon.polar_express(G[None])[0]
    assert (torch.linalg.svdvals(X) - 1).abs().max() < 0.15
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    core = U.T @ X @ Vh.T  # diagonal exactly when X has G's singular vectors
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-9
    assert (core.diagonal() > 0).all()


@SHAPES
def test_polar_express_turns_with_its_argument_and_ignores_its_size(m, n):
    G = randn(1, m, n)
    Q, _ = torch.linalg.qr(randn(m, m, seed=5))
    torch.testing.assert_close(muon.polar_express(Q @ G), Q @ muon.polar_express(G))
    torch.testing.assert_close(muon.polar_express(G.mT.contiguous()), muon.polar_express(G).mT)
    torch.testing.assert_close(muon.polar_express(1e4 * G), muon.polar_express(G), rtol=1e-5, atol=1e-6)


@SHAPES
def test_renormalised_updates_have_the_norm_of_an_orthogonal_matrix(m, n):
    out = muon.renormalize(randn(2, m, n))
    torch.testing.assert_close(norms(out), torch.full((2,), min(m, n) ** 0.5, dtype=torch.float64))


@SHAPES
def test_variance_reduction_keeps_the_norm_and_evens_out_rows_or_columns(m, n):
    """From a zero state the first step divides by each line's own root mean square: all lines come out equally long."""
    lines = -1 if m >= n else -2  # the dimension that a line runs along
    uneven = torch.logspace(-1, 1, m if m >= n else n, dtype=torch.float64)
    X = randn(2, m, n) * (uneven[:, None] if m >= n else uneven)
    state = torch.zeros(2, *muon.second_moment_shape(m, n), dtype=torch.float64)
    out = muon.reduce_variance_(X.clone(), state, 0.9)
    torch.testing.assert_close(state, 0.1 * X.square().mean(lines, keepdim=True))
    torch.testing.assert_close(norms(out), norms(X))
    length = out.norm(dim=lines)
    torch.testing.assert_close(length, length[:, :1].expand_as(length))


def test_decay_acts_exactly_where_the_update_shrinks_the_parameter():
    P = torch.tensor([[[2.0, -2.0, 2.0, -2.0, 0.0]]])
    X = torch.tensor([[[0.5, -0.5, -0.5, 0.5, 0.5]]])
    muon.cautious_step_(P, X, lr=0.1, weight_decay=0.2)
    expected = torch.tensor([[[2.0 - 0.05 - 0.04, -2.0 + 0.05 + 0.04, 2.05, -2.05, -0.05]]])
    torch.testing.assert_close(P, expected)


def update(P: Tensor, G: Tensor, **settings: float) -> Tensor:
    K, m, n = P.shape
    state = torch.zeros_like(P), torch.zeros(K, *muon.second_moment_shape(m, n), dtype=P.dtype)
    moved = P.clone()
    defaults = {"lr": 0.02, "momentum": 0.95, "beta2": 0.9, "weight_decay": 0.0}
    muon.muon_update_(moved, G, *state, **{**defaults, **settings})
    return moved


@SHAPES
def test_a_step_has_the_size_that_lr_says(m, n):
    """Frobenius norm lr * sqrt(max(1, m/n)) * sqrt(min(m, n)), whatever the size of the gradient."""
    expected = 0.02 * max(1.0, m / n) ** 0.5 * min(m, n) ** 0.5
    for size in (1e-6, 1.0, 1e6):
        moved = update(torch.zeros(2, m, n), size * randn(2, m, n, dtype=torch.float32))
        torch.testing.assert_close(norms(moved), torch.full((2,), expected), rtol=1e-4, atol=0)


def test_a_matrix_moves_alike_alone_and_in_a_stack():
    P, G = randn(5, 12, 20, dtype=torch.float32), randn(5, 12, 20, seed=1, dtype=torch.float32)
    together = update(P, G, weight_decay=0.3)
    alone = torch.cat([update(P[i : i + 1], G[i : i + 1], weight_decay=0.3) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_a_zero_gradient_moves_nothing():
    """At the first step most gradients are exactly zero, because the output projections start at zero."""
    P = randn(2, 8, 8, dtype=torch.float32)
    assert torch.equal(update(P, torch.zeros(2, 8, 8), weight_decay=0.0), P)


@pytest.mark.parametrize(("m", "n"), [(64, 64), (64, 16)])
def test_products_in_bfloat16_give_nearly_the_same_direction(m, n):
    G = with_singular_values(m, n, torch.logspace(0, -1, min(m, n), dtype=torch.float64))[None].float()
    exact, rough = (update(torch.zeros_like(G), G, product_dtype=d) for d in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32
    assert torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.995


@pytest.mark.parametrize(("m", "n"), [(256, 48), (48, 256)])
@pytest.mark.parametrize("rank", [48, 5])
def test_oblong_matrices_in_float32_take_the_shorter_way_to_the_same_end(m, n, rank, monkeypatch):
    """Against float64, which takes the long way: as far off as float32 on the long way, or up to half as far again."""
    G = randn(2, m, rank) @ randn(2, rank, n, seed=1)
    exact = muon.polar_express(G)
    short = muon.polar_express(G.float()).double()
    monkeypatch.setattr(muon, "GRAM_RATIO", 100)
    long = muon.polar_express(G.float()).double()
    assert not torch.equal(long, short)
    assert (short - exact).norm() < max(3 * (long - exact).norm(), 1e-5 * exact.norm())
    assert (short - exact).norm() < 2e-4 * exact.norm()
