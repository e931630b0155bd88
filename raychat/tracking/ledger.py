"""The ledger: where the wall time of a run went, and what it cost. A pure function of the journal's records.

Every second between the first start and the end belongs to exactly one account. Step time comes from the loop's own
cumulative clock (`time/productive`), of which differences are taken, so that steps that were not logged count too.
Records of a replay are missing (a journal holds each step once); the next step that is new carries their time.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
EVALUATION_TIMES = ("val/time_s", "time/core")  # metrics: seconds that training waited for an evaluation


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Seconds by account, which add up to `wall_s`, and money."""

    productive_s: float = 0.0
    """steps that survived"""
    replayed_s: float = 0.0
    """steps that were lost and run again, or must be"""
    startup_s: float = 0.0
    """from the begin of an attempt to its first step, and from a failure to the next attempt"""
    checkpoint_stall_s: float = 0.0
    """training stood still for a save"""
    evaluation_s: float = 0.0
    waiting_s: float = 0.0
    """for machines"""
    other_s: float = 0.0
    """noticing a failure, text samples, everything else"""
    node_s: float = 0.0
    """seconds times machines held"""
    cost_usd: float | None = None
    """None without a price"""

    @property
    def wall_s(self) -> float:
        """Seconds that a driver was at work on the run."""
        return sum(self.accounts().values())

    @property
    def goodput(self) -> float | None:
        """Share of the wall time spent on steps that survived, 0 to 1; None before there is any."""
        return self.productive_s / self.wall_s if self.wall_s > 0 else None

    def accounts(self) -> dict[str, float]:
        """Account -> seconds."""
        return {
            "productive_s": self.productive_s,
            "replayed_s": self.replayed_s,
            "startup_s": self.startup_s,
            "checkpoint_stall_s": self.checkpoint_stall_s,
            "evaluation_s": self.evaluation_s,
            "waiting_s": self.waiting_s,
            "other_s": self.other_s,
        }

    def line(self) -> str:
        """One line for the console."""
        named = {
            "productive": self.productive_s,
            "replayed": self.replayed_s,
            "start-up": self.startup_s,
            "checkpoints": self.checkpoint_stall_s,
            "evaluation": self.evaluation_s,
            "waiting": self.waiting_s,
            "other": self.other_s,
        }
        shares = ", ".join(f"{seconds / (self.wall_s or 1):.0%} {name}" for name, seconds in named.items())
        return f"time: {shares}" + ("" if self.cost_usd is None else f"; ${self.cost_usd:.2f}")


def ledger(records: Iterable[Record], *, price_per_hour: float | None) -> Ledger:
    """The ledger of all records of a journal, in their order, those of abandoned branches included.

    Counted is the time in which a driver is known to have been at work: an attempt ends with the last record of it, and
    the time up to the next one counts when the same driver made both. `price_per_hour` is dollars for one machine.
    Journals of before the ledger lack some fields: step time is then estimated from `train/dt`, and what cannot be told
    apart is `other_s`.
    """
    book = Book()
    for record in records:
        book.take(record)
    return book.closed(price_per_hour)


class _Attempt:
    """What is known about one attempt while its records pass by."""

    def __init__(self, begun: float, step: int) -> None:
        self.begun = self.last = begun
        self.next_step = step
        """the step that follows the last one known to be done"""
        self.wall = self.steps = self.evaluation = self.stall = 0.0
        self.first_step_at: float | None = None
        self.before_first = 0.0
        """seconds of steps, evaluation and saves that lie before the end of the first step"""
        self._first_unknown = False

    def first_step(self, now: float, seconds: float | None) -> None:
        """The first step is done, and took `seconds`; None: an unknown part of the next advance of the clock."""
        if self.first_step_at is None:
            self.steps += seconds or 0.0
            self.first_step_at, self._first_unknown = now, seconds is None
            self.before_first = self.evaluation + self.stall + (seconds or 0.0)

    def steps_until(self, step: int, seconds: float, now: float) -> None:
        """The steps up to `step`, that one included, took `seconds`."""
        self.steps += seconds
        if self.first_step_at is None:  # written before there were events of it
            self.first_step_at = now
            self.before_first = self.evaluation + self.stall + seconds
        elif self._first_unknown:
            self.before_first += seconds / max(1, step + 1 - self.next_step)
        self._first_unknown = False
        self.next_step = step + 1

    def split(self) -> dict[str, float]:
        """Seconds by account, which add up to `wall`, none below 0."""
        left = self.wall
        steps = min(self.steps, left)
        left -= steps
        evaluation = min(self.evaluation, left)
        left -= evaluation
        stall = min(self.stall, left)
        left -= stall
        if self.first_step_at is None:
            startup = self.last - self.begun - self.steps - self.evaluation - self.stall
        else:
            startup = self.first_step_at - self.begun - self.before_first
        startup = min(max(0.0, startup), left)
        return {
            "steps": steps,
            "evaluation": evaluation,
            "stall": stall,
            "startup": startup,
            "other": left - startup,
        }


class Book:
    """The accounts while the records pass by: what `ledger` makes of a journal, for one that still grows."""

    def __init__(self) -> None:
        self.driver: str | None = None
        """who was at work last; None before the first and after an end"""
        self.last = 0.0
        self.nodes = 0
        self.attempt: _Attempt | None = None
        self.waiting = False
        self.productive = 0.0
        """the loop's clock: seconds of the steps that survive so far"""
        self.clock_at: dict[int, float] = {0: 0.0}
        """that clock at the steps at which training was saved or begun"""
        self.seconds = dict.fromkeys(("steps", "evaluation", "stall", "startup", "waiting", "other"), 0.0)
        self.node_s = 0.0
        self._pages: dict[str, Callable[[Record], None]] = {
            "start": self._start,
            "waiting": self._waiting,
            "first_step": self._first_step,
            "evaluated_again": self._evaluated_again,
            "evaluation_wait": self._evaluated_again,
            "checkpoint": self._checkpoint,
            "rollback": self._rollback,
            "failure": self._failure,
            "end": self._end,
        }

    def take(self, record: Record) -> None:
        """Take in the next record."""
        kind, now = record.get("event"), float(record["time"])
        # A driver branches before its first start, and once did not sign that.
        author = record.get("driver", None if kind == "branch" else self.driver)
        if self.driver is not None and author == self.driver:
            self._pass_time(max(0.0, now - self.last), kind)
        self.last = now
        if kind is None:
            self._metrics(record)
        elif page := self._pages.get(kind):
            page(record)

    def closed(self, price_per_hour: float | None, *, last: Record | None = None) -> Ledger:
        """The ledger if nothing came after `last` (default: what was taken in). The book itself stays as it is."""
        book = copy.deepcopy(self)
        if last:
            book.take(last)
        return book._closed(price_per_hour)

    def _closed(self, price_per_hour: float | None) -> Ledger:
        self._close_attempt()
        productive = min(self.productive, self.seconds["steps"])
        return Ledger(
            productive_s=productive,
            replayed_s=self.seconds["steps"] - productive,
            startup_s=self.seconds["startup"],
            checkpoint_stall_s=self.seconds["stall"],
            evaluation_s=self.seconds["evaluation"],
            waiting_s=self.seconds["waiting"],
            other_s=self.seconds["other"],
            node_s=self.node_s,
            cost_usd=None if price_per_hour is None else price_per_hour * self.node_s / 3600,
        )

    def _pass_time(self, seconds: float, kind: str | None) -> None:
        self.node_s += seconds * self.nodes
        if self.waiting:
            self.seconds["waiting"] += seconds
        elif self.attempt and kind not in ("start", "waiting"):
            self.attempt.wall += seconds
            self.attempt.last += seconds
        else:
            self.seconds["other" if kind == "end" else "startup"] += seconds

    def _start(self, record: Record) -> None:
        self._close_attempt()
        step, clock = record["resume_step"], record.get("productive_s")
        self.productive = self.clock_at[step] = self._clock_before(step) if clock is None else clock
        self.driver, self.nodes, self.waiting = record["driver"], record.get("nodes", 1), False
        self.attempt = _Attempt(float(record["time"]), step)

    def _waiting(self, record: Record) -> None:
        self._close_attempt()
        author = record.get("driver", self.driver)
        if author != self.driver:  # whatever an earlier driver held is not known to be there
            self.nodes = 0
        self.nodes = min(self.nodes, record.get("there", self.nodes))
        self.driver, self.waiting = author, True

    def _first_step(self, record: Record) -> None:
        clock = record.get("step_time_s")
        if self.attempt:
            self.attempt.first_step(float(record["time"]), None if clock is None else self._advance(clock))

    def _evaluated_again(self, record: Record) -> None:
        if self.attempt:
            self.attempt.evaluation += record["time_s"]

    def _metrics(self, record: Record) -> None:
        if self.attempt is None:
            return
        self.attempt.evaluation += sum(record.get(name) or 0.0 for name in EVALUATION_TIMES)
        clock, dt, step = record.get("time/productive"), record.get("train/dt"), record["step"]
        if clock is None and dt is not None:  # written before there was a clock: unseen steps took as long as this one
            clock = self.productive + dt * max(1, step + 1 - self.attempt.next_step)
        if clock is not None:
            self.attempt.steps_until(step, self._advance(clock), float(record["time"]))

    def _checkpoint(self, record: Record) -> None:
        step, clock = record["step"], record.get("productive_s")
        if self.attempt:
            self.attempt.stall += record.get("stall_s") or 0.0
            if clock is not None:
                self.attempt.steps += self._advance(clock)
        self.clock_at[step] = self.productive if clock is None else clock

    def _rollback(self, record: Record) -> None:
        self.productive = self._clock_before(record["from_step"])
        if self.attempt:
            self.attempt.next_step = record["from_step"]

    def _failure(self, record: Record) -> None:
        if self.attempt:
            self.attempt.steps += self._advance(record.get("step_time_s") or 0.0)
        self._close_attempt()

    def _end(self, record: Record) -> None:
        self._failure(record)
        if (survived := record.get("productive_s")) is not None:
            self.productive = min(self.productive, survived)
        self.driver, self.waiting = None, False

    def _advance(self, clock: float) -> float:
        """Put the loop's clock to `clock`, unless it is beyond; by how much that was."""
        advanced = max(0.0, clock - self.productive)
        self.productive += advanced
        return advanced

    def _clock_before(self, step: int) -> float:
        """The loop's clock before `step`, or before the nearest step below it of which that is known."""
        return self.clock_at[max(known for known in self.clock_at if known <= step)]

    def _close_attempt(self) -> None:
        if self.attempt:
            for account, seconds in self.attempt.split().items():
                self.seconds[account] += seconds
        self.attempt = None
