"""Names ranks that are slower than the others for long, and says how far the ranks lie apart.

Times are a rank's own, before it waits for anybody, for one sequence: where sequences do not divide evenly, a rank with
one more is not a slow one.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FACTOR = 1.5
STEPS_RUNNING = 20
STEPS_BETWEEN = 200  # from one naming of a rank to the next


@dataclass(frozen=True)
class SlowRank:
    """A rank that took `seconds` for a sequence for which the median rank takes `median_s`."""

    rank: int
    host: str
    seconds: float
    median_s: float


class Stragglers:
    """Watches the ranks on `hosts`, one host a rank. The median of an even number of ranks is the lower one."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self.spread: float | None = None
        """slowest over median rank in the last step; None before the first"""
        self._running = [0] * len(hosts)
        self._named_at: dict[int, int] = {}

    def observe(self, step: int, seconds: Sequence[float]) -> list[SlowRank]:
        """Take in the time of every rank for one sequence in `step`; the ranks to name now."""
        median_s = statistics.median_low(seconds)
        self.spread = max(seconds) / median_s
        slow = []
        for rank, mine in enumerate(seconds):
            self._running[rank] = self._running[rank] + 1 if mine > FACTOR * median_s else 0
            named_at = self._named_at.get(rank)
            if self._running[rank] >= STEPS_RUNNING and (named_at is None or step - named_at >= STEPS_BETWEEN):
                self._named_at[rank] = step
                slow.append(SlowRank(rank, self.hosts[rank], mine, median_s))
        return slow
