"""A sign of life for whatever takes longer than two seconds: one plain line every few seconds, with rate and ETA."""

import threading
import time
from collections.abc import Callable
from types import TracebackType


def format_duration(seconds: float) -> str:
    """`seconds` as a person reads it: `42s`, `3m10s`, `2h05m`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress:
    """Prints `label: done/total unit (percent), rate, elapsed, eta` every `every_s` seconds while the block runs.

    A thread of its own prints, so a line comes even while one long piece of work is under way. `advance` is thread-safe.
    """

    def __init__(
        self, label: str, total: float | None, unit: str, *, every_s: float = 5.0, echo: Callable[[str], None] = print
    ) -> None:
        self.label, self.total, self.unit, self.every_s, self.echo = label, total, unit, every_s, echo
        self.done = 0.0
        self.start = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"progress-{label}")

    def advance(self, amount: float) -> None:
        """Count `amount` more units as done."""
        with self._lock:
            self.done += amount

    def line(self) -> str:
        """The state of the work in one line."""
        elapsed = time.monotonic() - self.start
        rate = self.done / elapsed if elapsed > 0 else 0.0
        text = f"{self.label}: {self.done:,.0f}"
        if self.total:
            text += f"/{self.total:,.0f} {self.unit} ({100 * self.done / self.total:.0f}%)"
        else:
            text += f" {self.unit}"
        text += f" | {rate:,.1f} {self.unit}/s | {format_duration(elapsed)}"
        if self.total and 0 < self.done < self.total:
            text += f" | eta {format_duration((self.total - self.done) / rate)}"
        return text

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self.echo(self.line())

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            self.echo(self.line())
