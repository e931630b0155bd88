"""What a training process tells its surroundings. Plain values: they cross process and machine borders.

Only rank 0 sends, except where it says otherwise; who receives (the driver of a Ray job, or rank 0 itself) keeps the
journal, the console and the summary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """A line for the console."""

    text: str


@dataclass(frozen=True)
class Metrics:
    """Metric values of a step; `time_s` is when they were measured, in Unix seconds."""

    step: int
    values: dict[str, float]
    time_s: float


@dataclass(frozen=True)
class Note:
    """Something that belongs in the journal and is no metric: a text sample, a failed save, a bad step."""

    kind: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole on storage, and the state of the loop that it holds.

    Training stood still for `stall_s` seconds; `total_s` after it was asked for, all `bytes` of it were on storage.
    """

    step: int
    path: str
    state: dict[str, Any]
    stall_s: float
    total_s: float
    bytes: int
    synchronous: bool


@dataclass(frozen=True)
class Ended:
    """The loop returned: `finished` its horizon, or was told to stop before it."""

    finished: bool
    state: dict[str, Any]
    peak_memory_bytes: int


@dataclass(frozen=True)
class Failed:
    """A mistake that a restart will not mend: `message` is for the user. Any rank sends it."""

    message: str
    exit_code: int


Event = Line | Metrics | Note | Saved | Ended | Failed
Sink = Callable[[Event], None]
