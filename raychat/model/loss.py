"""From the last hidden state to the loss: head, softcap 15 tanh(z / 15), cross entropy.

`full` is the plain formula. `chunked` never holds the (rows, vocabulary) logits in float32, which are the largest tensors
of a training step: it walks over chunks of rows and computes their gradients at once, while the chunk is at hand.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from raychat.planning.activations import loss_chunk_rows

SOFTCAP = 15.0
IGNORE = -1  # target of a position that does not count
Reduction = Literal["mean", "sum", "none"]


def softcapped_logits(
    x: Float[Tensor, "*rows C"], weight: Float[Tensor, "Vpad C"], vocab_size: int
) -> Float[Tensor, "*rows V"]:
    """Logits in float32, bounded to +-15; the padded rows of `weight` (kept in float32) are cut off."""
    raw = F.linear(x, weight[:vocab_size].to(x.dtype)).float()
    return SOFTCAP * torch.tanh(raw / SOFTCAP)


def full(
    x: Float[Tensor, "*rows C"],
    weight: Float[Tensor, "Vpad C"],
    targets: Int[Tensor, "*rows"],
    vocab_size: int,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Cross entropy in nats. "none" gives one value per row, 0 where the target is -1."""
    logits = softcapped_logits(x, weight, vocab_size)
    nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORE, reduction=reduction)
    return nats.view(targets.shape) if reduction == "none" else nats


def chunked(
    x: Float[Tensor, "*rows C"],
    weight: Float[Tensor, "Vpad C"],
    targets: Int[Tensor, "*rows"],
    vocab_size: int,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
    slopes: "Slopes | None" = None,
) -> Float[Tensor, "..."]:
    """The same as `full` up to rounding, `chunk_rows` rows at a time (default: what suits the device).

    `slopes` computes what `nats_and_slopes` does, in another way.

    Gradients exist for "mean" and "sum". With "none" under autograd every row would bring its own incoming gradient,
    which chunks computed ahead cannot know: that case goes to `full`.
    """
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if grad and reduction == "none":
        return full(x, weight, targets, vocab_size, reduction)
    rows, goals = x.flatten(0, -2), targets.flatten().long()
    size = chunk_rows or loss_chunk_rows(vocab_size, x.device.type)
    if grad:
        total = _ChunkedNats.apply(rows, weight, goals, vocab_size, size, slopes or nats_and_slopes)
    else:
        head = weight[:vocab_size].to(x.dtype)
        nats = torch.cat([_nats(part @ head.T, goal)[0] for part, goal in _chunks(rows, goals, size)])
        if reduction == "none":
            return nats.view(targets.shape)
        total = nats.sum()
    return total if reduction == "sum" else total / (goals != IGNORE).sum()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, int, Reduction], Tensor]] = {"full": full, "chunked": chunked}


def _chunks(rows: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(rows.split(size), targets.split(size), strict=True))


def _nats(raw: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nats per row (0 where ignored) of uncapped logits (n, V), and what their slope needs: tanh, exp, and its sum.

    May overwrite `raw`. No maximum is subtracted before exp: the cap keeps the exponent within +-15.
    """
    t = raw.float().div_(SOFTCAP).tanh_()  # (n, V)
    e = (t * SOFTCAP).exp_()  # (n, V)
    mass = e.sum(dim=-1, keepdim=True)  # (n, 1)
    hit = t.gather(-1, targets.clamp_min(0)[:, None])
    nats = (mass.log() - SOFTCAP * hit).squeeze(-1).masked_fill_(targets == IGNORE, 0.0)
    return nats, t, e, mass


def nats_and_slopes(raw: Float[Tensor, "n V"], targets: Int[Tensor, "n"]) -> tuple[Tensor, Float[Tensor, "n V"]]:
    """Sum of nats over the rows of uncapped logits, and its gradient with respect to them, in their dtype."""
    nats, t, p, mass = _nats(raw, targets)
    valid = (targets != IGNORE).float()[:, None]
    p.mul_(valid / mass)  # softmax
    p.scatter_add_(-1, targets.clamp_min(0)[:, None], -valid)
    return nats.sum(), p.addcmul_(p, t.square_(), value=-1).to(raw.dtype)  # through the cap: p * (1 - tanh^2)


Slopes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _ChunkedNats(torch.autograd.Function):
    """Sum of nats over all rows. The gradients of that sum are ready after the forward pass; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, size: int, slopes: Slopes
    ) -> Tensor:
        head = weight[:vocab_size].to(x.dtype)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for (part, goal), grad_part in zip(_chunks(x, targets, size), grad_x.split(size), strict=True):
            nats, slope = slopes(part @ head.T, goal)
            total += nats
            torch.mm(slope, head, out=grad_part)
            if slope.dtype == grad_weight.dtype:
                grad_weight[:vocab_size].addmm_(slope.T, part)
            else:
                grad_weight[:vocab_size] += slope.T @ part
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:  # pyrefly: ignore[bad-override]
        grad_x, grad_weight = ctx.saved_tensors
        # Scaled in float32: 1 / tokens is below what float16 can hold.
        return (grad_x.float() * scale).to(grad_x.dtype), grad_weight * scale, None, None, None, None
