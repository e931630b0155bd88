"""Between the strategy of a search and whoever runs its trials: what starts next, what came out, and what is said of it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Protocol

from raychat.config import Config
from raychat.errors import CheckpointError, ConfigError, DataError
from raychat.on_ray.trial_outcome import outcome_of
from raychat.on_ray.trial_process import TrialEnd, TrialOrder
from raychat.planning.target import Target
from raychat.progress import format_duration
from raychat.search.book import Book
from raychat.search.feasible import foreseen
from raychat.search.limits import limit_reached
from raychat.search.strategy import Strategy
from raychat.search.trial import Outcome, Trial
from raychat.training.secrets import Secrets

Echo = Callable[[str], None]


class MakesOrders(Protocol):
    """What turns trials into configurations and commands: raychat.on_ray.orders."""

    def config(self, trial: Trial) -> Config:
        """The whole configuration."""
        ...

    def order(self, trial: Trial, config: Config) -> TrialOrder:
        """The command."""
        ...


@dataclass(kw_only=True)
class Steering:
    """Asks the strategy, keeps the book, and tells. `next` and `ended` are called from one thread."""

    strategy: Strategy
    book: Book
    orders: MakesOrders
    stop_asked: Callable[[], bool]
    concurrency: int
    echo: Echo
    target: Callable[[Config], Target | None] = lambda config: None
    """machine that a configuration would run on; None: what it names, else this one"""
    changed: Callable[[], None] = lambda: None
    """called after each outcome"""
    open: dict[str, Config] = field(default_factory=dict)
    """tag -> configuration of the trials that run"""
    _idle: bool = False
    """there is nothing to start until something ends"""

    def next(self) -> TrialOrder | None:
        """The next trial to start, or None when there is none now. What cannot be is entered without being started.

        Raises:
            CheckpointError: this search was begun by another version of raychat.
        """
        while not (self._idle or self.stop_asked() or self.book.lost):
            trial = self._proposal()
            if trial is None:
                self._idle = True
                return None
            self.book.propose(trial)
            order = self._start(trial)
            if order is not None:
                return order
        return None

    def ended(self, tag: str, end: TrialEnd) -> None:
        """The process of a trial is gone."""
        config, trial = self.open.pop(tag), self.book.contents.trials[tag]
        self._idle = False
        limit_gb = self.book.spec.memory_limit_gb
        limit = -1 if limit_gb == -1 else round(limit_gb * 1e9)
        outcome = outcome_of(trial, config, end, memory_limit_bytes=limit)
        if end.told and outcome.status not in ("finished", "OOM"):
            self.echo(f"{tag} has saved and stopped: it goes on when the search does")
        else:
            self._enter(trial, outcome)

    def crashed(self, tag: str, error: str) -> None:
        """What ran the process of a trial is gone, again and again."""
        self.open.pop(tag)
        self._idle = False
        self._enter(self.book.contents.trials[tag], Outcome(status="failed", reason=error))

    def _proposal(self) -> Trial | None:
        if limit_reached(self.book.spec, self.book.done, hours=self.book.hours):
            return None
        return next(iter(self.strategy.propose(self.book.done, self.open)), None)

    def _start(self, trial: Trial) -> TrialOrder | None:
        """The order of `trial`, which is open from now on; None when its outcome is known without one."""
        book = self.book
        outcome = order = config = None
        try:
            outcome = self._foreseen(trial)
            if outcome is None:
                config = self.orders.config(trial)
                order = self.orders.order(trial, config)
        except (ConfigError, DataError) as error:
            outcome = Outcome(status="infeasible", reason=str(error))
        except CheckpointError as error:
            outcome = Outcome(status="failed", reason=str(error))
        if order is None or config is None:
            self._enter(trial, outcome or Outcome(status="failed"))
            return None
        book.start(trial.tag)
        self.open[trial.tag] = config
        again = ", goes on" if book.contents.started[trial.tag] > 1 else ""
        self.echo(f"{trial.tag} started: {describe(trial)}{again}")
        return order

    def _foreseen(self, trial: Trial) -> Outcome | None:
        """The outcome of `trial` where it is known without running it."""
        try:
            target = self.target(self.book.spec.config(trial))
        except ConfigError as error:
            return Outcome(status="infeasible", reason=str(error))
        return foreseen(self.book.spec, trial, self.book.contents.runs(), target)

    def _enter(self, trial: Trial, outcome: Outcome) -> None:
        if self.book.lost:  # another process goes on with this search, and makes this trial again
            return
        outcome = replace(outcome, reason=Secrets(self.book.spec.base_config).hide(outcome.reason))
        self.book.end(trial.tag, outcome)
        self.echo(f"{trial.tag} {outcome.status}: {describe(trial)}{figures(outcome)}; {self.standing()}")
        self.changed()

    def standing(self) -> str:
        """How far the search is, in a line."""
        book = self.book
        proposed = [] if self.stop_asked() else self.strategy.propose(book.done, self.open)
        waiting = [trial for trial in proposed if self._foreseen(trial) is None]
        facts = [f"{len(book.done)} done"]
        if self.open:
            facts.append(f"{len(self.open)} running")
        if waiting:
            facts.append(f"{len(waiting)} waiting")
        running = [book.contents.trials[tag] for tag in self.open]
        if seconds := remaining_s([*running, *waiting], book.contents.trials, book.done, self.concurrency):
            facts.append(f"ETA {format_duration(seconds)} for these")
        budget = book.spec.budget_usd
        if budget != -1 or any(outcome.cost_usd is not None for outcome in book.done.values()):
            facts.append(f"${book.contents.spent_usd:.2f} spent" + (f" of ${budget:.2f}" if budget != -1 else ""))
        return ", ".join(facts)


def describe(trial: Trial) -> str:
    """A trial for a person: `depth 3, matrix-lr 0.03 (seed 42, rung 0.25)`."""
    facts = [f"seed {trial.seed}"]
    facts += [f"rung {trial.rung:g}"] if trial.rung != 1 else []
    facts += [trial.role] if trial.role != "trial" else []
    return f"{trial.title} ({', '.join(facts)})"


def figures(outcome: Outcome) -> str:
    """`: val_bpb 2.1345, 1m02s, $0.01`, and why where there is a reason."""
    facts = []
    if outcome.val_bpb is not None:
        facts.append(f"val_bpb {outcome.val_bpb:.4f}")
    if outcome.wall_s is not None:
        facts.append(format_duration(outcome.wall_s))
    if outcome.cost_usd is not None:
        facts.append(f"${outcome.cost_usd:.2f}")
    if outcome.reason:
        facts.append(outcome.reason)
    return f": {', '.join(facts)}" if facts else ""


def remaining_s(
    trials: list[Trial], known: Mapping[str, Trial], done: Mapping[str, Outcome], concurrency: int
) -> float | None:
    """Seconds for `trials`, as long as those before them took, at the same rung where there were such; None: not known."""
    walls: dict[float, list[float]] = {}
    for tag, outcome in done.items():
        if outcome.wall_s and tag in known:
            walls.setdefault(known[tag].rung, []).append(outcome.wall_s)
    if not walls or not trials:
        return None
    mean = fmean(wall for group in walls.values() for wall in group)
    total = sum(fmean(walls[trial.rung]) if trial.rung in walls else mean for trial in trials)
    return total / min(concurrency, len(trials))


class Clock:
    """Whether something that takes a while is due again: at most once in `every_s`."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._next_s = every_s, 0.0

    def due(self) -> bool:
        """Whether it is; then it is due again after the interval."""
        now = time.monotonic()
        if now < self._next_s:
            return False
        self._next_s = now + self._every_s
        return True
