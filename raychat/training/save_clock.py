"""When to save: every so many steps, or by time so that saving and redoing lost work cost about the same."""

import time
from typing import Literal

from raychat.planning.save_interval import LEAST_STALL_S, save_interval_s

FIRST_STALL_S = 1.0  # until a save has been measured


class SaveClock:
    """`every` steps, "auto" for by time, or -1 for only at the end."""

    def __init__(self, every: Literal["auto"] | int) -> None:
        self.every = every
        self._interval_s = save_interval_s(FIRST_STALL_S)
        self._last = time.monotonic()

    def due_at(self, step: int) -> bool:
        """Whether the step count alone asks for a save: the same on all ranks."""
        return self.every != "auto" and self.every > 0 and step > 0 and step % self.every == 0

    def due_by_time(self) -> bool:
        """Whether time asks for a save. Ranks' clocks differ: only rank 0 asks, and all agree to it."""
        return self.every == "auto" and time.monotonic() - self._last >= self._interval_s

    def saved(self, stall_s: float) -> None:
        """A save, or the attempt at one, took this long and is over."""
        self._interval_s = save_interval_s(max(stall_s, LEAST_STALL_S))
        self._last = time.monotonic()
