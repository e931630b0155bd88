"""What happens to a step whose loss or gradient is no number: its batch is left out, its update is, or the run stops.

Every rank sees the same loss and gradient norm, so all of them decide alike without asking each other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from raychat.errors import RaychatError
from raychat.model import GPT
from raychat.optim import MuonAdamW
from raychat.storage import Store
from raychat.tracking.summary import DIVERGED
from raychat.training import checkpoint
from raychat.training.checkpoint import Checkpoint
from raychat.training.world import World

MAX_ROLLBACKS = 3
MAX_SKIPS_RUNNING = 20  # updates left out one after the other: then it is the weights, and no batch


class DivergedError(RaychatError):
    """The loss or the gradient is no longer a number. The last checkpoint is from before."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """A step that was refused: its number, the cursor of its global batch, and what was found."""

    step: int
    cursor: int
    loss: float
    grad_norm: float

    @property
    def reason(self) -> str:
        """What was found, for a person."""
        return f"the loss is {self.loss} and the gradient norm {self.grad_norm}"


class BadSteps:
    """Decides what becomes of bad steps by `--on-bad-step`."""

    def __init__(self, mode: Literal["rollback", "skip", "stop"]) -> None:
        self.mode = mode
        self._running = 0

    @staticmethod
    def found(loss: float, grad_norm: float, *, scaled: bool) -> bool:
        """Whether a step is bad. With gradients `scaled` by what can shrink an overflow is ordinary, a bad loss is not."""
        return not math.isfinite(loss) or (not math.isfinite(grad_norm) and not scaled)

    def good(self) -> None:
        """A step was good."""
        self._running = 0

    def decide(self, bad: BadStep, skipped: tuple[int, ...]) -> Literal["rollback", "skip"]:
        """What to do about `bad`, when the batches at the cursors `skipped` have been left out before.

        Raises:
            DivergedError: to stop, when that was asked for or when all else has been tried.
        """
        tried = ""
        self._running += 1
        if self.mode == "skip":
            if self._running < MAX_SKIPS_RUNNING:
                return "skip"
            tried = f" This is the {self._running}th bad step running, and leaving out their updates did not help."
        elif self.mode == "rollback":
            if len(skipped) < MAX_ROLLBACKS:
                return "rollback"
            rows = ", ".join(f"{cursor:,}" for cursor in skipped)
            tried = (
                f" The run went back to a checkpoint {len(skipped)} times before and left out the batches at the rows "
                f"{rows}: it is not the data."
            )
        raise DivergedError(
            f"step {bad.step}: {bad.reason}. {DIVERGED}; the last checkpoint is good.{tried} Lower the "
            "rates (--matrix-lr, --embedding-lr), or set --grad-clip 1.0."
        )


def load_newest(
    root: Store,
    model: GPT,
    optimizer: MuonAdamW,
    world: World,
    *,
    seed: int,
    aside: str,
    echo: Callable[[str], None],
) -> Checkpoint | None:
    """Put the newest verified checkpoint in place on every rank, or the seeded initial state where there is none.

    Rank 0 looks for it; damaged ones that are later are moved to the folder `aside`, where no later save meets them.

    Raises:
        OSError: on every rank, when storage cannot be reached.
    """
    found, problem = None, None
    if world.rank == 0:
        try:
            found = checkpoint.newest(root, echo=echo)
            checkpoint.set_aside_after(root, found.step if found else -1, aside)
        except OSError as error:
            problem = f"{root}: {error}"
    found, problem = world.broadcast((found, problem))
    if problem:
        raise OSError(problem)
    if found:
        found.load(model, optimizer, world=world)
    else:
        model.init_weights(seed)
        shapes = optimizer.state_shapes()
        optimizer.load_owned_state(lambda key, first, stop: torch.zeros(stop - first, *shapes[key][1:]))
        optimizer.step_count = 0
    return found
