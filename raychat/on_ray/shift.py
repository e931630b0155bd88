"""What the supervisor knows of the crew that is at work: state of its own, forgotten with the crew."""

from dataclasses import dataclass, field
from typing import Literal

from raychat.on_ray.crew import Crew
from raychat.on_ray.inbox import Rank
from raychat.on_ray.sizing import Patience
from raychat.training.job import Job
from raychat.training.retry import Cause

TELL_S = 30.0  # between two lines while waiting
SPARE_S = 10.0  # left over before a machine goes: clouds do not keep to the second
WHAT_HAPPENED: dict[Cause, str] = {
    "crash": "a worker failed",
    "preempted": "a machine was preempted",
    "lost": "a machine was lost",
    "hang": "a worker hung",
}


@dataclass
class Notice:
    """A machine that is about to be taken away at `deadline_s`, and the save for it, which is due at `save_at_s`.

    Times are Unix times.
    """

    name: str
    deadline_s: float
    save_at_s: float
    asked: bool = False
    saved: bool = False


def save_at_s(deadline_s: float, *, save_s: float | None, step_s: float) -> float:
    """When to ask for the save before a deadline: late, because what is trained after it is lost, and with time to spare.

    A save that took `save_s` seconds may take three times as long now, and is heard at the end of a step of `step_s`.
    Where it is not known how long a save takes, at once: 0.
    """
    return 0.0 if save_s is None else deadline_s - 3 * save_s - 2 * step_s - SPARE_S


@dataclass
class Shift:
    """What is known of the crew that is at work."""

    crew: Crew
    job: Job | None
    """begun, and not yet given to a group of workers"""
    homes: set[str]
    """nodes that its workers are on, or may be while that is not known"""
    ranks: tuple[Rank, ...] = ()
    training: bool = False
    since: Patience = field(default_factory=lambda: Patience(TELL_S, first_s=TELL_S))
    failure_told: bool = False
    stop_told: bool = False
    notices: dict[str, Notice] = field(default_factory=dict)
    resizing: Literal["", "saving", "stopping"] = ""
    resize_after: float = 0.0
    hung: bool = False

    def name(self, node_id: str) -> str:
        """A machine by its host and the ranks on it."""
        here = [rank for rank in self.ranks if rank.node_id == node_id]
        if not here:
            return "the driver's machine"
        ranks = ", ".join(str(rank.rank) for rank in here)
        return f"{here[0].host} (rank{'s' if len(here) > 1 else ''} {ranks})"
