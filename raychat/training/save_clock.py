"""When to save: every so many steps, or by time so that saving and redoing lost work cost about the same."""

import math
import time
from typing import Literal

MEAN_TIME_BETWEEN_LOSSES_S = 4 * 3600.0  # assumed; spot machines of large clouds last hours, not minutes or weeks
MAX_INTERVAL_S = 600.0
FIRST_STALL_S = 1.0  # until a save has been measured
LEAST_STALL_S = 0.1  # a save of a small model costs next to nothing, and a log full of saves costs its reader


def save_interval_s(stall_s: float, mean_time_between_losses_s: float = MEAN_TIME_BETWEEN_LOSSES_S) -> float:
    """Seconds between saves that stall training for `stall_s` each: sqrt(2 stall MTBL), at most ten minutes.

    Source: J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974.
    """
    return min(MAX_INTERVAL_S, math.sqrt(2 * stall_s * mean_time_between_losses_s))


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
