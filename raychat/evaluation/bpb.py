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


class BitsPerByte:
    """Bits per byte of `model`, batch by batch: a caller may do other things in between, or give up.

    Only targets that stand for bytes count: `token_bytes` is 0 for special tokens, and a target of -1 is in neither
    sum. fp8 layers compute in high precision.
    """

    def __init__(self, model: nn.Module, token_bytes: Int[Tensor, "vocab"], device: torch.device | str) -> None:
        self.model, self.device = model, device
        self._token_bytes = token_bytes.to(device)
        self._precise = torch.float32 if torch.device(device).type == "mps" else torch.float64  # which mps has not
        self._sums = torch.zeros(2, dtype=self._precise, device=device)  # nats, bytes

    @torch.no_grad()
    def add(self, batch: Int[Tensor, "n T1"]) -> None:
        """Take in a batch (n, T+1) of token ids: T inputs and the T ids that follow them."""
        ids = batch.to(self.device).long()
        targets = ids[:, 1:]
        counts = self._token_bytes[targets.clamp_min(0)] * (targets >= 0)
        with high_precision(self.model):
            nats = self.model(ids[:, :-1].clamp_min(0), targets, reduction="none")
        self._sums += torch.stack((nats.to(self._precise)[counts > 0].sum(), counts.sum().to(self._precise)))

    def total(self, all_reduce: Callable[[Tensor], object] | None = None) -> float:
        """The value over all batches of all ranks, the same on each; the last call.

        Every rank brings its own batches, of any number; the sums are added over ranks by `all_reduce` (default: SUM
        over the process group where there is one).

        Raises:
            DataError: there was no text in them.
        """
        if all_reduce is not None:
            all_reduce(self._sums)
        elif dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sums)
        nats_sum, bytes_sum = self._sums.tolist()
        if bytes_sum == 0:
            raise DataError(
                "Bits per byte over no bytes: the validation rows hold no text. Use a larger validation split."
            )
        return bits_per_byte(nats_sum, bytes_sum)


def evaluate_bpb(
    model: nn.Module,
    rows: Iterable[Int[Tensor, "n T1"]],
    token_bytes: Int[Tensor, "vocab"],
    device: torch.device | str,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> float:
    """Bits per byte of `model` over `rows`, batches (n, T+1) of token ids, as `BitsPerByte` has it."""
    meter = BitsPerByte(model, token_bytes, device)
    for batch in rows:
        meter.add(batch)
    return meter.total(all_reduce)
