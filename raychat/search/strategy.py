"""Which runs a search makes next, as a pure function of what is done: a search that was killed proposes the same ones again."""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from raychat.search.forks import plot_forks
from raychat.search.limits import affordable, limit_reached
from raychat.search.optuna_search import plot_optuna
from raychat.search.roll import Roll
from raychat.search.rungs import plot_rungs
from raychat.search.spec import SearchSpec
from raychat.search.trial import Outcome, Trial

Done = Mapping[str, Outcome]
"""tag -> outcome"""


class Strategy(Protocol):
    """What a search asks after each outcome. It keeps nothing: equal `done` gives equal answers."""

    def propose(self, done: Done, open: Collection[str]) -> list[Trial]:
        """Trials that may be started now, in their order; none that is in `done` or among the tags `open`, which run."""
        ...

    def finished(self, done: Done) -> bool:
        """Whether nothing will be proposed any more, whatever comes out of what still runs."""
        ...

    def why_finished(self, done: Done) -> str:
        """For a person: a limit that was reached, and what was left out because of it; empty when all was tried."""
        ...

    def find(self, tag: str, done: Done) -> Trial:
        """The trial with this tag. KeyError where it is not known yet."""
        ...


Plot = Callable[[SearchSpec, Roll], bool]
"""Adds to the roll all trials that follow from the outcomes; True when none can follow any more"""


class Plotted:
    """A strategy whose trials are laid out by a `plot`."""

    def __init__(self, spec: SearchSpec, plot: Plot) -> None:
        self.spec, self.plot = spec, plot

    def propose(self, done: Done, open: Collection[str]) -> list[Trial]:
        """See Strategy."""
        roll, _ = self._roll(done)
        if limit_reached(self.spec, done):
            return []
        waiting = [trial for trial in roll.trials if trial.tag not in done and trial.tag not in open]
        running = [trial for trial in roll.trials if trial.tag not in done and trial.tag in open]
        return affordable(self.spec, waiting, running, roll.trials, done)

    def finished(self, done: Done) -> bool:
        """See Strategy."""
        roll, complete = self._roll(done)
        if limit_reached(self.spec, done):
            return True
        waiting = [trial for trial in roll.trials if trial.tag not in done]
        return (complete and not waiting) or (
            bool(waiting) and not affordable(self.spec, waiting, [], roll.trials, done)
        )

    def why_finished(self, done: Done) -> str:
        """See Strategy."""
        roll, complete = self._roll(done)
        waiting = [trial for trial in roll.trials if trial.tag not in done]
        if complete and not waiting:
            return ""
        reason = limit_reached(self.spec, done)
        if not reason and waiting and not affordable(self.spec, waiting, [], roll.trials, done):
            reason = "what is left of the budget pays for no further run"
        return f"{reason}: {len(waiting)} runs were not made, from {waiting[0].title}" if reason and waiting else reason

    def find(self, tag: str, done: Done) -> Trial:
        """See Strategy."""
        return {trial.tag: trial for trial in self._roll(done)[0].trials}[tag]

    def _roll(self, done: Done) -> tuple[Roll, bool]:
        roll = Roll(self.spec.name, done)
        return roll, self.plot(self.spec, roll)


def make_strategy(spec: SearchSpec) -> Strategy:
    """The strategy that `spec` asks for.

    Raises:
        ConfigError: for Optuna where that is not installed.
    """
    if spec.searcher == "optuna":
        return Plotted(spec, plot_optuna())
    return Plotted(spec, plot_forks if spec.fork_at != -1 else plot_rungs)
