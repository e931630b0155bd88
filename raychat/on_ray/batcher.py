"""Continuous batching: one thread that generates for all requests at once, rows joining and leaving between steps.

The thread is the only one that touches the generator. Others put rows in and take them out, and hear of each token
through a function of theirs, which is called on the thread and must return at once.
"""

import collections
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from raychat.errors import ConfigError
from raychat.model.generation import PLAIN, Sampling

End: TypeAlias = Literal["stop", "length"] | Exception
Deliver: TypeAlias = Callable[[int | None, End | None], None]
"""Takes the next token, and how the row ends, if it does: a stop token (no token with it), its length, or a failure."""

PREFILL_TOKENS = 4096  # of prompts that join in one step: those who are served already wait for them


class QueueFullError(Exception):
    """There is no room for more rows now."""


class Steps(Protocol):
    """What is asked of a generator; `raychat.model.generation.Generator` is one."""

    def add(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = PLAIN, stop: Collection[int] = ()
    ) -> int: ...

    def remove(self, number: int) -> None: ...

    def step(self) -> Mapping[int, int | None]: ...


@dataclass(eq=False, kw_only=True)
class Row:
    """One text to be continued, by up to `max_tokens` tokens."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    deliver: Deliver


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a batcher does, and has done since it began."""

    active: int
    """rows that are generated for"""
    waiting: int
    """rows in the queue"""
    most_active: int
    """rows that one step served, at most"""
    steps: int
    tokens: int


class Batcher:
    """Generates for up to `max_batch` rows at once; up to `max_queue` more wait, first come, first served.

    Tokens in `stop` end a row.
    """

    def __init__(self, generator: Steps, *, max_batch: int, max_queue: int, stop: Collection[int] = ()) -> None:
        self._generator, self._max_batch, self._max_queue, self._stop = generator, max_batch, max_queue, stop
        self._changed = threading.Condition()
        self._waiting: collections.deque[Row] = collections.deque()
        self._active: dict[int, Row] = {}  # by the generator's number; changed on the thread only
        self._left: set[Row] = set()  # active rows that nobody wants any more
        self._steps = self._tokens = self._most_active = 0
        self._closed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Take in all of `rows`, or none.

        Raises:
            QueueFullError: they do not fit the queue now.
            RuntimeError: the thread has ended.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher has ended") from self._closed
            free = max(0, self._max_batch - len(self._active))
            if len(self._waiting) + len(rows) > self._max_queue + free:
                raise QueueFullError
            self._waiting.extend(rows)
            self._changed.notify()

    def leave(self, rows: Collection[Row]) -> None:
        """End `rows` early: they hear no more. Rows that have ended are left alone."""
        with self._changed:
            gone = set(rows)
            self._waiting = collections.deque(row for row in self._waiting if row not in gone)
            self._left |= gone.intersection(self._active.values())

    def load(self) -> Load:
        """What it does now."""
        with self._changed:
            return Load(
                active=len(self._active),
                waiting=len(self._waiting),
                most_active=self._most_active,
                steps=self._steps,
                tokens=self._tokens,
            )

    def check(self) -> None:
        """Raise RuntimeError when the thread has ended."""
        if self._closed:
            raise RuntimeError("the batcher has ended") from self._closed

    def close(self) -> None:
        """End the thread, once the step it is in is over; all rows fail."""
        with self._changed:
            self._closed = self._closed or RuntimeError("the server stops")
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_in():
                self._tell(self._generator.step())
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            self._closed = error
        with self._changed:
            failed = [*self._active.values(), *self._waiting]
            self._active.clear()
            self._waiting.clear()
        for row in failed:
            row.deliver(None, self._closed)

    def _take_in(self) -> bool:
        """Let rows leave and join; wait for some when there are none. False: it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._active or self._closed)
            for number in [number for number, row in self._active.items() if row in self._left]:
                self._generator.remove(number)
                del self._active[number]
            self._left.clear()
            joining, prefill = [], 0
            while self._waiting and len(self._active) + len(joining) < self._max_batch and prefill < PREFILL_TOKENS:
                joining.append(self._waiting.popleft())
                prefill += len(joining[-1].prompt)
            for row in joining:
                self._join(row)
            self._most_active = max(self._most_active, len(self._active))
            return self._closed is None

    def _join(self, row: Row) -> None:
        try:
            self._active[self._generator.add(row.prompt, row.max_tokens, row.sampling, self._stop)] = row
        except ConfigError as error:  # of this row alone
            row.deliver(None, error)

    def _tell(self, drawn: Mapping[int, int | None]) -> None:
        told: list[tuple[Row, int | None, End | None]] = []
        with self._changed:
            self._steps += 1
            for number, token in drawn.items():
                row = self._active[number]
                end: End | None = "stop" if token is None else None
                if token is not None:
                    self._tokens += 1
                    row.max_tokens -= 1
                    end = None if row.max_tokens else "length"
                if end:
                    del self._active[number]
                if row not in self._left:
                    told.append((row, token, end))
        for row, token, end in told:
            row.deliver(token, end)
