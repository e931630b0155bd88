"""MuonAdamW: the torch optimizer that holds the state, shares the work among ranks and calls the update rules."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raychat.errors import CheckpointError
from raychat.optim.adamw import adamw_update_
from raychat.optim.exchange import Exchange, choose_exchange
from raychat.optim.muon import muon_update_, second_moment_shape
from raychat.optim.stacks import Stack, build_stacks

# Elements that one Muon call works on. On a CPU batching pays for small matrices only; on a GPU the bound is memory.
CHUNK = {"cpu": 2**18, "cuda": 2**26}
CLIP_EPS = 1e-6
NORM_ROW = 4096  # elements that are summed in float32


class MuonAdamW(torch.optim.Optimizer):
    """AdamW and Muon by parameter group, with gradients, work and state shared among the ranks of the process group.

    Each unit (a matrix, a row of an embedding, a small parameter) has one owner, which alone holds its state. Gradients
    are SUMMED over ranks: a rank's loss is the sum over its tokens divided by the global token count. The model is
    not wrapped in DDP, which would reduce a second time. The result does not depend on the number of ranks, up to the
    rounding of sums.

    Between steps a schedule may set `lr` of any group, and `momentum` and `weight_decay` of the one of kind "muon".

    Attributes:
        grad_clip: largest global norm of the gradient; 0 switches clipping off.
        grad_scale: factor by which the loss was multiplied (float16), divided out of the gradients.
        step_count: steps done, for the bias correction; whoever saves the state saves it too.
    """

    def __init__(self, groups: list[dict[str, Any]], exchange: Exchange | None = None) -> None:
        """`groups` as `raychat.optim.groups` makes them. `exchange` None: what suits the process group."""
        super().__init__(groups, {})
        self.grad_clip = 0.0
        self.grad_scale = 1.0
        self.step_count = 0
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.stacks = build_stacks(self.param_groups, self.world)
        self.device = self.stacks[0].params[0].device
        self._exchange = exchange or choose_exchange(self.device, self.rank, self.world)
        self._moments = [_zero_state(stack, self.rank) for stack in self.stacks]
        self._reduced: tuple[list[list[Tensor]], Tensor] | None = None

    def step(self, closure: None = None) -> Tensor:  # pyrefly: ignore[bad-override]  torch's returns a closure's loss
        """`reduce_gradients` and `apply_updates`; returns the global norm of the gradient. Takes no closure."""
        if closure is not None:
            raise NotImplementedError("MuonAdamW evaluates no closure; call backward before step")
        norm = self.reduce_gradients()
        self.apply_updates()
        return norm

    @torch.no_grad()
    def reduce_gradients(self) -> Tensor:
        """Sum the gradients over ranks; returns the global norm (before clipping, `grad_scale` divided out).

        The norm is the same on all ranks: on a non-finite one all of them can leave out `apply_updates` together.
        A parameter without gradient counts as zero.
        """
        grads = self._exchange.reduce(self.stacks)
        square = square_sum([g for pieces in grads for g in pieces], self.device)
        if self.world > 1:
            dist.all_reduce(square)
        norm = square.sqrt().float() / self.grad_scale
        self._reduced = grads, norm
        return norm

    @torch.no_grad()
    def apply_updates(self) -> None:
        """Update the pieces that this rank owns, then make all ranks' parameters equal again.

        With `grad_clip` or `grad_scale` the reduced gradients are rescaled in place, on one rank `grad` itself.
        """
        if self._reduced is None:
            raise RuntimeError("apply_updates without reduce_gradients before it")
        (grads, norm), self._reduced = self._reduced, None
        self._rescale([g for pieces in grads for g in pieces], norm)
        self.step_count += 1
        for stack, pieces, moments in zip(self.stacks, grads, self._moments, strict=True):
            params = stack.pieces([p.detach() for p in stack.params], self.rank)
            if stack.group["kind"] == "adamw":
                self._adamw(stack.group, params, pieces, moments)
            else:
                _muon(stack.group, params, pieces, moments)
        self._exchange.gather(self.stacks)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, those too that were reduced for an update that was left out."""
        self._reduced = None
        super().zero_grad(set_to_none)

    def owned_state(self) -> dict[str, tuple[int, Tensor]]:
        """This rank's state, free of the number of ranks: "<parameter>/<state>" -> (first row, rows of the whole tensor).

        The tensors are the live ones: copy or write them before the next step.
        """
        return {key: (first, tensor) for key, first, tensor, _ in self._owned()}

    def state_shapes(self) -> dict[str, torch.Size]:
        """Shape of the whole tensor behind every key that the ranks' `owned_state` have together."""
        shapes = {}
        for stack in self.stacks:
            for name, param in zip(stack.names, stack.params, strict=True):
                for kind, shape in _state_shapes(stack, param.shape).items():
                    shapes[f"{name}/{kind}"] = shape
        return shapes

    def load_owned_state(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Fill this rank's state. `read(key, first, stop)` gives the rows [first, stop) of the whole tensor of `key`."""
        for key, first, tensor, rows in self._owned():
            saved = read(key, first, first + rows)
            if saved.shape != tensor.shape:
                raise CheckpointError(
                    f"Optimizer state {key}: rows [{first}, {first + rows}) have the shape {tuple(saved.shape)} in the "
                    f"checkpoint, this model needs {tuple(tensor.shape)}. Resume with the configuration of the checkpoint."
                )
            tensor.copy_(saved)

    def state_dict(self) -> dict[str, Any]:
        """Not supported: no rank has the whole state."""
        raise NotImplementedError("the state is shared among ranks: use owned_state and step_count")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not supported: no rank has the whole state."""
        raise NotImplementedError("the state is shared among ranks: use load_owned_state and step_count")

    def _owned(self) -> Iterator[tuple[str, int, Tensor, int]]:
        """(key, first row, this rank's rows, how many) of every piece of state."""
        for stack, moments in zip(self.stacks, self._moments, strict=True):
            first, stop = stack.owned(self.rank)
            for kind, state in moments.items():
                if stack.by_row:
                    if first < stop:
                        yield f"{stack.names[0]}/{kind}", first, state, stop - first
                else:
                    for name, tensor in zip(stack.names[first:stop], state.unbind(), strict=True):
                        yield f"{name}/{kind}", 0, tensor, tensor.size(0)

    def _rescale(self, grads: list[Tensor], norm: Tensor) -> None:
        """Divide `grad_scale` out and clip, on the device: the host does not wait for the norm."""
        if not grads or (self.grad_scale == 1.0 and not self.grad_clip):
            return
        factor = torch.full_like(norm, 1 / self.grad_scale)
        if self.grad_clip:
            factor *= (self.grad_clip / (norm + CLIP_EPS)).clamp(max=1.0)
        torch._foreach_mul_(grads, factor)

    def _adamw(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], moments: dict[str, Tensor]
    ) -> None:
        beta1, beta2 = group["betas"]
        for param, grad in zip(params, grads, strict=True):  # at most one piece per stack
            adamw_update_(
                param,
                grad,
                moments["exp_avg"].view_as(param),
                moments["exp_avg_sq"].view_as(param),
                step=self.step_count,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )


def square_sum(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of all elements, in float64 where `device` has it.

    In float32 the sum over a large tensor depends on how threads and ranks cut it, to 1e-4 relative; in float64 it takes
    20 times as long on a CPU. So rows of a fixed length are summed in float32, and the rows in float64.
    """
    precise = torch.float32 if device.type == "mps" else torch.float64
    rows = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = flat.numel() // NORM_ROW * NORM_ROW
        parts = (flat[:whole].view(-1, NORM_ROW), flat[whole:].view(1, -1))
        rows += [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts]
    return torch.cat(rows).to(precise).square().sum() if rows else torch.zeros((), dtype=precise, device=device)


def _muon(group: dict[str, Any], params: list[Tensor], grads: list[Tensor], moments: dict[str, Tensor]) -> None:
    """Muon on the matrices that this rank owns, a bounded number at a time."""
    if not params:
        return
    size = max(1, CHUNK.get(params[0].device.type, CHUNK["cpu"]) // params[0].numel())
    settings = {key: group[key] for key in ("lr", "momentum", "beta2", "weight_decay", "product_dtype")}
    for start in range(0, len(params), size):
        part = slice(start, start + size)
        state = moments["momentum_buffer"][part], moments["second_moment"][part]
        if len(params[part]) == 1:
            muon_update_(params[start][None], grads[start][None], *state, **settings)
        else:
            stacked = torch.stack(params[part])
            muon_update_(stacked, torch.stack(grads[part]), *state, **settings)
            torch._foreach_copy_(params[part], list(stacked.unbind()))


def _state_shapes(stack: Stack, shape: torch.Size) -> dict[str, torch.Size]:
    """State of one parameter of `shape`, or of some of its rows."""
    if stack.group["kind"] == "adamw":
        return {"exp_avg": shape, "exp_avg_sq": shape}
    return {"momentum_buffer": shape, "second_moment": torch.Size(second_moment_shape(*shape))}


def _zero_state(stack: Stack, rank: int) -> dict[str, Tensor]:
    """Zeros for the units that `rank` owns, units first, in the parameters' dtype."""
    first, stop = stack.owned(rank)
    unit = _state_shapes(stack, stack.unit_shape)
    return {kind: stack.params[0].new_zeros(stop - first, *shape) for kind, shape in unit.items()}
