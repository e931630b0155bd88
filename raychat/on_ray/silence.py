"""When workers that report how far they are have been silent for so long that they must be hanging."""

import time
from collections.abc import Callable

START_S = 1800.0  # until the first report: processes start, a checkpoint is downloaded, tasks are read
LEAST_S = 600.0  # between two reports, however quickly they came before
FACTOR = 20  # ... and no less than so many times the longest wait for a report before


class Silence:
    """Takes note of a count that grows as long as the work goes on; every growth is a report."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since = clock, clock()
        self._count: int | None = None
        self._longest_s: float | None = None

    def heard(self, count: int) -> None:
        """The work is at `count`; the first one that is heard is where it began."""
        if self._count is not None and count > self._count:
            # The way to the first report is another than from one to the next.
            self._longest_s = 0.0 if self._longest_s is None else max(self._longest_s, self.seconds)
            self._since = self._clock()
        self._count = count

    @property
    def seconds(self) -> float:
        """Since the last report, or since the beginning."""
        return self._clock() - self._since

    @property
    def limit_s(self) -> float:
        """How long it may last."""
        return START_S if self._longest_s is None else max(LEAST_S, FACTOR * self._longest_s)

    @property
    def too_long(self) -> bool:
        """Whether those who work must be hanging."""
        return self.seconds > self.limit_s
