"""How a training worker reaches its driver: an actor that keeps events until the driver takes them.

Events survive the worker that sent them. Orders go the other way: the driver asks to stop, rank 0 looks now and then.
"""

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychat.training.events import Event
from raychat.training.loop import Signal

ASK_EVERY_S = 0.5


class _Inbox:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stop_asked = False

    def put(self, event: Event) -> None:
        self.events.append(event)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def ask_to_stop(self) -> None:
        self.stop_asked = True

    def stop_is_asked(self) -> bool:
        return self.stop_asked


def open_inbox() -> Any:
    """A handle of a new inbox on the driver's node, which takes no CPU from the workers."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Inbox).options(num_cpus=0, scheduling_strategy=here).remote()


class StopPoll:
    """Asks the inbox whether to stop, without waiting for the answer."""

    def __init__(self, inbox: Any) -> None:
        self._inbox, self._answer, self._asked_at = inbox, None, 0.0

    def __call__(self) -> Signal:
        """STOP once the driver has asked for it."""
        if self._answer is None:
            if time.monotonic() - self._asked_at >= ASK_EVERY_S:
                self._answer, self._asked_at = self._inbox.stop_is_asked.remote(), time.monotonic()
            return Signal.NONE
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            return Signal.NONE
        self._answer = None
        return Signal.STOP if ray.get(ready[0]) else Signal.NONE
