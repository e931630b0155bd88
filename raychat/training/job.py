"""What goes from the driver to the ranks, and from a rank to where its batches come from: plain values, without torch.

Processes that only pass them on, or read rows by them, start much faster than those that train.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from raychat.data.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the driver hands to every rank: plain values that cross process and machine borders.

    `checkpoint` is the path or URI of the verified one to go on from. `wall_before_s` and `cost_before_usd` are those of
    earlier attempts; this one holds `nodes` machines.
    """

    config: dict[str, Any]
    tokens_dir: str
    tokenizer_dir: str
    checkpoint: str | None
    attempt: int
    attempt_started: float
    wall_before_s: float
    lease_holder: str
    journal_offset: int
    nodes: int = 1
    cost_before_usd: float = 0.0


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which batches a rank wants: a pure function of this gives the rows, wherever they are read."""

    tokens_dir: str
    seed: int
    lanes: int
    cursor: int
    num_batches: int
    rows_per_batch: int
    rank: int
    world_size: int


BatchSource = Callable[[BatchPlan], Iterator[Batch]]
