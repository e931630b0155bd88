"""Muon with row equalisation, Polar Express, variance reduction and cautious decay, on stacks of equal matrices.

Legend: K matrices of m rows (outputs) and n columns (inputs); G gradient, X update, P parameter. Each function is one
step of the rule; `muon_update_` is their order. Sources: https://kellerjordan.github.io/posts/muon/, arXiv:2505.16932
(Polar Express), arXiv:2510.05491 (NorMuon).
"""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
GRAM_RATIO = 2  # of the sides, above which Polar Express on the Gram matrix needs fewer products
GRAM_STEPS = 3  # polynomials of one Gram matrix: more are quicker, and less exact
TINY = 1e-6  # floor under norms: a zero gradient gives a zero update
VARIANCE_FLOOR = 1e-10

Matrices = Float[Tensor, "K m n"]


def muon_update_(
    P: Matrices,
    G: Matrices,
    momentum_buffer: Matrices,
    second_moment: Float[Tensor, "K mv nv"],
    *,
    lr: float,
    momentum: float,
    beta2: float,
    weight_decay: float,
    product_dtype: torch.dtype = torch.float32,
) -> None:
    """One step on K matrices, in place on `P`, `momentum_buffer` and `second_moment` (see `second_moment_shape`).

    `product_dtype` is the dtype of the matrix products of Polar Express. Whatever the size of the gradient, P moves by
    lr * sqrt(max(1, m/n)) times a nearly orthogonal matrix.
    """
    X = nesterov_(momentum_buffer, G, momentum).to(product_dtype)
    X = renormalize(polar_express(equalize_rows(X)).float())
    X = reduce_variance_(X, second_moment, beta2)
    cautious_step_(P, X, lr=lr * max(1.0, P.size(-2) / P.size(-1)) ** 0.5, weight_decay=weight_decay)


def second_moment_shape(m: int, n: int) -> tuple[int, int]:
    """Shape of NorMuon's state of one matrix: one value per row where m >= n, else one per column."""
    return (m, 1) if m >= n else (1, n)


def nesterov_(buffer: Matrices, G: Matrices, momentum: float) -> Matrices:
    """Move `buffer`, the running mean of gradients, towards G; return G looked ahead along it."""
    buffer.lerp_(G, 1 - momentum)
    return G.lerp(buffer, momentum)


def equalize_rows(G: Matrices) -> Matrices:
    """Rescale every row to the root mean square of the row norms (MuonEq); the Frobenius norm stays."""
    row = G.norm(dim=-1, keepdim=True)  # (K, m, 1)
    target = row.norm(dim=-2, keepdim=True) / G.size(-2) ** 0.5
    return G * (target / row.clamp_min(TINY))


def polar_express(G: Matrices) -> Matrices:
    """About U V^T for each U S V^T of the stack: five odd polynomials bring the singular values near 1."""
    X = G / (G.norm(dim=(-2, -1), keepdim=True) * 1.01 + TINY)  # singular values at most 1
    tall = G.size(-2) > G.size(-1)
    if G.dtype is torch.float32 and max(G.shape[-2:]) > GRAM_RATIO * min(G.shape[-2:]):
        for polynomials in (POLAR_EXPRESS[:GRAM_STEPS], POLAR_EXPRESS[GRAM_STEPS:]):
            X = X @ _gram_factor(X.mT @ X, polynomials).mT if tall else _gram_factor(X @ X.mT, polynomials) @ X
        return X
    for a, b, c in POLAR_EXPRESS:
        A = X.mT @ X if tall else X @ X.mT  # the smaller Gram matrix
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


def _gram_factor(
    A: Float[Tensor, "K s s"], polynomials: Sequence[tuple[float, float, float]]
) -> Float[Tensor, "K s s"]:
    """The matrix Q by which the `polynomials` multiply X, from A = X X^T alone: all products are of the smaller side.

    With P = p(A) a step makes X into P X and A into P A P. Of the two orders in which P and Q may be multiplied, this one
    amplifies less of the rounding in directions that X lacks: of five steps, 8e-5 of the result in float32 where the other
    has 6e-3 (1024 x 256, rank 20). A is made anew after `GRAM_STEPS`: then it is 3.5e-5, and 2.6e-5 where all products
    are of X itself. In bfloat16 none of this will do.
    """
    factors = []
    for step, (a, b, c) in enumerate(polynomials, start=1):
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        factors.append(P)
        if step < len(polynomials):
            A = P @ A @ P
    return functools.reduce(lambda Q, P: P @ Q, factors)


def renormalize(X: Matrices) -> Matrices:
    """Scale X to the Frobenius norm of an exactly orthogonal matrix, sqrt(min(m, n)) (Muon+)."""
    return X * (min(X.shape[-2:]) ** 0.5 / X.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY))


def reduce_variance_(X: Matrices, second_moment: Float[Tensor, "K mv nv"], beta2: float) -> Matrices:
    """Divide rows (m >= n) or columns by the root of their running mean square; the Frobenius norm stays (NorMuon)."""
    size = X.norm(dim=(-2, -1), keepdim=True)
    second_moment.lerp_(X.square().mean(dim=-1 if X.size(-2) >= X.size(-1) else -2, keepdim=True), 1 - beta2)
    X = X * second_moment.clamp_min(VARIANCE_FLOOR).rsqrt()
    return X.mul_(size / X.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY))


def cautious_step_(P: Matrices, X: Matrices, *, lr: float, weight_decay: float) -> None:
    """P -= lr * X, and decay by lr * weight_decay only those entries that the update shrinks anyway."""
    if weight_decay:
        decayed = (X * P).ge_(0).mul_(P)
        P.sub_(X, alpha=lr).sub_(decayed, alpha=lr * weight_decay)
    else:
        P.sub_(X, alpha=lr)
