"""Bits per byte: the loss in a unit that does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from raychat.errors import DataError
from raychat.model.fp8 import high_precision


def bits_per_byte(nats_sum: float, bytes_sum: float) -> float:
    """`nats_sum` over the bytes that the predicted tokens stand for; infinite where there are none."""
    return nats_sum / (math.log(2) * bytes_sum) if bytes_sum else math.inf


@torch.no_grad()
def evaluate_bpb(
    model: nn.Module,
    rows: Iterable[Int[Tensor, "n T1"]],
    token_bytes: Int[Tensor, "vocab"],
    device: torch.device | str,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> float:
    """Bits per byte of `model` over `rows`, batches (n, T+1) of token ids: T inputs and the T ids that follow them.

    Only targets that stand for bytes count: `token_bytes` is 0 for special tokens, and a target of -1 is in neither
    sum. Each rank brings its own rows, of any number; the sums are added over ranks by `all_reduce` (default: SUM over
    the process group where there is one). All ranks get the same value. fp8 layers compute in high precision.
    """
    token_bytes = token_bytes.to(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, bytes
    with high_precision(model):
        for batch in rows:
            ids = batch.to(device).long()
            targets = ids[:, 1:]
            counts = token_bytes[targets.clamp_min(0)] * (targets >= 0)
            nats = model(ids[:, :-1].clamp_min(0), targets, reduction="none")
            sums += torch.stack((nats.double()[counts > 0].sum(), counts.sum().double()))
    if all_reduce is not None:
        all_reduce(sums)
    elif dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    nats_sum, bytes_sum = sums.tolist()
    if bytes_sum == 0:
        raise DataError("Bits per byte over no bytes: the validation rows hold no text. Use a larger validation split.")
    return bits_per_byte(nats_sum, bytes_sum)
