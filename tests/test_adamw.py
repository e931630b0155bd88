"""AdamW against torch's and against the formula in plain operations."""

import pytest
import torch
from torch import Tensor

from raychat.optim.adamw import adamw_update_

SETTINGS = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}


def plain(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int) -> None:
    """The formula, operation by operation, in float32, stored in the dtype of the arguments."""
    lr, b1, b2 = SETTINGS["lr"], SETTINGS["beta1"], SETTINGS["beta2"]
    m32 = m.float() * b1 + g.float() * (1 - b1)
    v32 = v.float() * b2 + g.float().square() * (1 - b2)
    decayed = p.float() * (1 - lr * SETTINGS["weight_decay"])
    update = (m32 / (1 - b1**step)) / ((v32 / (1 - b2**step)).sqrt() + SETTINGS["eps"])
    p.copy_(decayed - lr * update)
    m.copy_(m32)
    v.copy_(v32)


def start(dtype: torch.dtype) -> list[Tensor]:
    p = torch.randn(37, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [p, torch.zeros_like(p), torch.zeros_like(p)]


def gradient(step: int, dtype: torch.dtype) -> Tensor:
    """Sizes from 1e-8 to 1: that of the gradient must not matter."""
    sizes = torch.logspace(-8, 0, 37)[:, None]
    return (torch.randn(37, 5, generator=torch.Generator().manual_seed(step)) * sizes).to(dtype)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_update_is_the_formula_in_float32_arithmetic(dtype, rtol):
    """bfloat16 storage: one last place (2^-7 of the value) from a different order of roundings."""
    ours, formula = start(dtype), start(dtype)
    for step in range(1, 6):
        grad = gradient(step, dtype)
        adamw_update_(ours[0], grad, ours[1], ours[2], step=step, **SETTINGS)
        plain(formula[0], grad, formula[1], formula[2], step)
        for a, b in zip(ours, formula, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 1e-2)
            b.copy_(a)  # each step starts equal: a flipped last place must not grow


def test_update_is_that_of_torch():
    ours = start(torch.float32)
    theirs = torch.nn.Parameter(ours[0].clone())
    s = SETTINGS
    optimizer = torch.optim.AdamW(
        [theirs],
        lr=s["lr"],
        betas=(s["beta1"], s["beta2"]),
        eps=s["eps"],
        weight_decay=s["weight_decay"],
        foreach=False,
    )
    for step in range(1, 11):
        theirs.grad = gradient(step, torch.float32)
        optimizer.step()
        adamw_update_(ours[0], theirs.grad, ours[1], ours[2], step=step, **SETTINGS)
    torch.testing.assert_close(ours[0], theirs.detach(), rtol=1e-5, atol=1e-6)


def test_the_first_step_moves_every_entry_by_lr_whatever_the_gradient():
    p, m, v = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    grad = torch.tensor([1e-6, -1.0, 1e4, 0.0])
    adamw_update_(p, grad, m, v, step=1, **SETTINGS)
    torch.testing.assert_close(p, -0.03 * grad.sign(), rtol=1e-3, atol=0)
