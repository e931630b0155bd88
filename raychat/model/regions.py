"""The training pass with its parts compiled one by one: what lies before the blocks, a block, what lies behind, the loss.

All blocks of a kind share one piece of code, so a deep model compiles as fast as a shallow one. Evaluation and decoding,
whose shapes vary, stay uncompiled.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raychat.model.gpt import GPT
from raychat.model.loss import Reduction, chunked, full, nats_and_slopes

Function = Callable[..., Any]


class CompiledTraining:
    """`model(idx, targets, reduction)` as training calls it. A part is compiled when it is called first."""

    def __init__(self, model: GPT, backend: str | Function = "inductor") -> None:
        self.model = model
        self._backend = backend
        self._compiled: dict[Function, Function] = {}

    def __call__(
        self, idx: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], reduction: Reduction = "mean"
    ) -> Float[Tensor, "..."]:
        """The cross entropy in nats."""
        model = self.model
        x = model.hidden(idx, call=self._call)
        head, vocab_size = model.lm_head.weight, model.config.vocab_size
        if model.loss_impl == "chunked":
            return chunked(x, head, targets, vocab_size, reduction, slopes=self._region(nats_and_slopes))
        return self._call(full, x, head, targets, vocab_size, reduction)

    def _call(self, function: Function, *inputs: Any) -> Tensor:
        return self._region(function)(*inputs)

    def _region(self, function: Function) -> Function:
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, dynamic=False, backend=self._backend)
        return self._compiled[function]
