"""How the workers of a crew and their driver reach each other: an actor beside the driver that outlives the workers.

Events go to the driver, which takes them now and then. Orders and jobs go the other way: rank 0 of a new group of
workers says hello and gets its job; between steps it asks whether it is to save or to stop. Every rank beats, so that
one that hangs is found out.
"""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychat.training.events import Event
from raychat.training.job import Job
from raychat.training.state import Signal

ASK_EVERY_S = 0.25
ANSWER_S = 0.1  # an answer takes a millisecond or two; training does not wait for a driver that is busy


@dataclass(frozen=True)
class Rank:
    """Where a rank runs."""

    group: str
    rank: int
    pid: int
    host: str
    node_id: str


@dataclass(frozen=True)
class Hello:
    """A group of workers is there and wants its job; `group` names it."""

    group: str
    ranks: tuple[Rank, ...]


@dataclass(frozen=True)
class ControllerUp:
    """Ray Train's controller has started; its handle is how a group is ended from outside.

    `run_id` is Ray Train's: what it asks of the autoscaler bears it.
    """

    handle: Any
    run_id: str


@dataclass(frozen=True)
class ControllerState:
    """Ray Train's controller is in another state now; `error` is why, when something failed."""

    name: str
    error: str | None
    waiting: bool = False
    """the failure is only that the cluster has no room yet"""


Message = Event | Hello | ControllerUp | ControllerState


@dataclass(frozen=True)
class Post:
    """What the driver finds in the inbox: messages in order, and the seconds since each rank of a group last beat."""

    messages: list[Message]
    beats: dict[tuple[str, int], float]


class _Inbox:
    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.beats: dict[tuple[str, int], float] = {}
        self.jobs: dict[str, Job] = {}
        self.saves_asked = 0
        self.stop_asked = False

    def put(self, message: Message) -> None:
        self.messages.append(message)

    def take(self) -> Post:
        messages, self.messages = self.messages, []
        now = time.monotonic()
        return Post(messages, {who: now - at for who, at in self.beats.items()})

    def beat(self, group: str, rank: int) -> None:
        self.beats[group, rank] = time.monotonic()

    def give_job(self, group: str, job: Job) -> None:
        self.jobs, self.saves_asked = {group: job}, 0
        self.beats = {who: at for who, at in self.beats.items() if who[0] == group}

    def job_of(self, group: str) -> Job | None:
        return self.jobs.get(group)

    def ask_to_save(self) -> None:
        self.saves_asked += 1

    def ask_to_stop(self) -> None:
        self.stop_asked = True

    def orders(self) -> tuple[int, bool]:
        return self.saves_asked, self.stop_asked


def open_inbox() -> Any:
    """A handle of a new inbox on the driver's node, which takes no CPU from the workers."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Inbox).options(num_cpus=0, scheduling_strategy=here).remote()


class OrderPoll:
    """Asks the inbox for orders, now and then. Each order to save is passed on once."""

    def __init__(self, inbox: Any) -> None:
        self._inbox, self._answer, self._asked_at = inbox, None, float("-inf")
        self._saves_seen = 0  # of those that were asked for since this group has its job

    def __call__(self) -> Signal:
        """STOP once the driver has asked for it, SAVE when it has asked for a save since."""
        if self._answer is None:
            if time.monotonic() - self._asked_at < ASK_EVERY_S:
                return Signal.NONE
            self._answer, self._asked_at = self._inbox.orders.remote(), time.monotonic()
        ready, _ = ray.wait([self._answer], timeout=ANSWER_S)
        if not ready:
            return Signal.NONE
        self._answer = None
        saves, stop = ray.get(ready[0])
        fresh, self._saves_seen = saves > self._saves_seen, saves
        return Signal.STOP if stop else Signal.SAVE if fresh else Signal.NONE
