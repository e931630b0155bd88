"""The trials of a search in the order of their numbers, with the outcomes that are there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from raychat.search.trial import Outcome, Trial


class Roll:
    """Trials are added as drafts and get the next numbers: what is added must follow from outcomes alone."""

    def __init__(self, name: str, done: Mapping[str, Outcome]) -> None:
        self.name, self.done = name, done
        self.trials: list[Trial] = []

    def add(self, drafts: Sequence[Trial]) -> list[Trial]:
        """`drafts` with their numbers and tags."""
        numbered = [
            replace(draft, number=number, tag=f"{self.name}-{number:03d}")
            for number, draft in enumerate(drafts, start=len(self.trials))
        ]
        self.trials += numbered
        return numbered

    def settled(self, trials: Sequence[Trial]) -> bool:
        """Whether all of `trials` have an outcome."""
        return all(trial.tag in self.done for trial in trials)

    def runs(self) -> list[tuple[Trial, Outcome]]:
        """The trials that have an outcome, with it."""
        return [(trial, self.done[trial.tag]) for trial in self.trials if trial.tag in self.done]
