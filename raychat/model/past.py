"""The seam between a model and the memory of earlier passes: what `GPT.hidden` asks of a cache.

`raychat.model.cache.KVCache` is the one there is. It needs the model's shapes, so the model knows this protocol only.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Past(Protocol):
    """Rows that earlier passes have computed, for a pass that continues them."""

    def begin(self, n: int, counts: Sequence[int] | None) -> Int[Tensor, "B n"]:
        """Absolute positions of `n` new tokens per row, of which the first `counts` are real (None: all)."""
        ...

    def shift(self, x: Float[Tensor, "B n C"]) -> Float[Tensor, "B n C"]:
        """The embedding before each of `x`, from the earlier passes where need be; zero before a row's first."""
        ...

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "B n H D"],
        k: Float[Tensor, "B n Hkv D"],
        v: Float[Tensor, "B n Hkv D"],
        backend: str,
    ) -> Float[Tensor, "B n H D"]:
        """Attention of a layer's new queries over the old and the new keys, as far as its window reaches."""
        ...

    def end(self) -> None:
        """Every layer is through: the rows are longer now."""
        ...
