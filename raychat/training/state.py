"""What a run is made of while it trains: where it is, what it costs, what is asked of it, and the seams around it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from raychat.data.batches import Batch
from raychat.storage import Store
from raychat.training.events import Sink

SMOOTHING = 0.9  # of the moving average of the loss that the console shows


class Signal(IntEnum):
    """What the surroundings ask of the loop. Ordered: the strongest of all ranks wins."""

    NONE = 0
    SAVE = 1  # write a checkpoint now and go on (a node is about to be taken away)
    STOP = 2  # write a checkpoint now and return


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """Where a run is: all that the loop needs to go on as if nothing had happened, besides weights and moments.

    `rows_consumed` and `skipped` are the whole state of the data: the rows taken or passed over so far, and the cursors
    of global batches that are left out. Nothing random happens in a step, so there is no generator to keep. `owed` are the
    evaluations of this step that other workers are to make of its checkpoint.
    """

    step: int = 0
    rows_consumed: int = 0
    epoch: int = 0
    smooth_loss: float = 0.0
    train_loss: float | None = None
    val_bpb: float | None = None
    val_step: int | None = None
    min_val_bpb: float | None = None
    min_val_step: int | None = None
    core_metric: float | None = None
    core_step: int | None = None
    total_training_time_s: float = 0.0
    step_time_s: float = 0.0
    tok_per_sec: float | None = None
    mfu: float | None = None
    loss_scale: float | None = None
    loss_scale_good_steps: int = 0
    skipped: tuple[int, ...] = ()
    owed: tuple[str, ...] = ()

    @staticmethod
    def restore(values: dict[str, Any]) -> "LoopState":
        """The state that a checkpoint holds as JSON."""
        return LoopState(
            **values | {"skipped": tuple(values.get("skipped", ())), "owed": tuple(values.get("owed", ()))}
        )

    def smoothed_loss(self) -> float:
        """The moving average of the loss, free of its start at zero."""
        return self.smooth_loss / (1 - SMOOTHING**self.step) if self.step else 0.0


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Wall time and money of a run over all its attempts. `before_s`, `before_usd`: those of the earlier ones.

    `price_per_hour` is in dollars for one machine; this attempt holds `nodes` of them.
    """

    attempt_started: float
    before_s: float
    price_per_hour: float | None
    nodes: int = 1
    before_usd: float = 0.0

    def wall_s(self) -> float:
        """Wall time of the run so far."""
        return self.before_s + self._attempt_s()

    def cost_usd(self) -> float | None:
        """Dollars so far, or None without a price."""
        if self.price_per_hour is None:
            return None
        return self.before_usd + self.price_per_hour * self.nodes * self._attempt_s() / 3600

    def _attempt_s(self) -> float:
        return time.time() - self.attempt_started


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The seams of the loop: where batches come from, where events go, who asks for what, and what a save records.

    `open_batches` gives the batches from a state on, those that it leaves out left out. `validation` gives this rank's
    passes of an evaluation; `validation_rounds` is how many the rank with the most of them has. `after_warm_up` is
    called on every rank when the first step is done that is like those after it: compiled, if they are.
    """

    open_batches: Callable[[LoopState], Iterator[Batch]]
    validation: Callable[[], Iterator[np.ndarray]]
    validation_rounds: int
    sink: Sink
    poll: Callable[[], Signal]
    clock: Clock
    checkpoints: Store
    fence: Callable[[], bool]
    after_warm_up: Callable[[], None]
    meta: dict[str, Any]
