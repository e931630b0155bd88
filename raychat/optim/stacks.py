"""How parameters are dealt out to ranks: stacks of equally sized units, each unit owned by one rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 1024  # a parameter of AdamW with fewer elements is one unit, larger ones are cut into their rows


@dataclass(frozen=True)
class Stack:
    """K units in a fixed order; rank r of `world` owns the units [r * share, (r + 1) * share) that exist.

    Units are whole parameters of one shape (Muon's matrices, small parameters), or the rows of a single parameter.
    """

    group: dict[str, Any]
    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    by_row: bool
    world: int

    @property
    def units(self) -> int:
        """K, the number of units."""
        return self.params[0].size(0) if self.by_row else len(self.params)

    @property
    def share(self) -> int:
        """Units per rank; the last ranks may have fewer, or none."""
        return -(-self.units // self.world)

    @property
    def unit_shape(self) -> torch.Size:
        """Shape of one unit."""
        return self.params[0].shape[1:] if self.by_row else self.params[0].shape

    def owned(self, rank: int) -> tuple[int, int]:
        """First unit of `rank`, and the unit after its last."""
        first = min(rank * self.share, self.units)
        return first, min(first + self.share, self.units)

    def pieces(self, tensors: Sequence[Tensor], rank: int) -> list[Tensor]:
        """The part of `tensors` (one per parameter) that `rank` owns, as views: whole tensors, or one run of rows."""
        first, stop = self.owned(rank)
        if not self.by_row:
            return list(tensors[first:stop])
        return [tensors[0][first:stop]] if first < stop else []

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """`tensors` (one per parameter) as (share * world, elements of a unit), padded with zeros; a view if it can be."""
        padded = self.share * self.world
        if self.by_row and padded == self.units:
            return tensors[0].contiguous().view(padded, -1)
        out = tensors[0].new_zeros(padded, self.unit_shape.numel())
        rows = tensors[0] if self.by_row else torch.stack(tuple(tensors))
        out[: self.units] = rows.reshape(self.units, -1)
        return out

    def unflat(self, rows: Tensor) -> list[Tensor]:
        """The inverse of `pieces` on flat units: views of `rows` (any number of units, elements of a unit)."""
        shaped = rows.view(-1, *self.unit_shape)
        if self.by_row:
            return [shaped] if len(shaped) else []
        return list(shaped.unbind())


def build_stacks(groups: Sequence[dict[str, Any]], world: int) -> list[Stack]:
    """Stacks of all parameters in the order of the groups: for Muon one per shape, for AdamW one per parameter."""
    stacks = []
    for group in groups:
        named = list(zip(group["names"], group["params"], strict=True))
        if group["kind"] == "adamw":
            for name, param in named:
                by_row = param.ndim > 1 and param.numel() >= SMALL
                stacks.append(Stack(group, (name,), (param,), by_row, world))
        else:
            by_shape: dict[torch.Size, list[tuple[str, nn.Parameter]]] = {}
            for name, param in named:
                by_shape.setdefault(param.shape, []).append((name, param))
            for members in by_shape.values():
                names, params = zip(*members, strict=True)
                stacks.append(Stack(group, names, params, False, world))
    return stacks
