"""Runs a training in this process, as `python -m raychat.training` does, with the seams open to a test."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raychat.config import Config
from raychat.data.batches import Batch
from raychat.data.prepare import make_in_process, prepare
from raychat.tracking.journal import read_journal
from raychat.tracking.summary import Summary
from raychat.training.build import train
from raychat.training.events import Event, Line
from raychat.training.job import BatchPlan
from raychat.training.reading import read_here
from raychat.training.session import Session
from raychat.training.state import Signal
from raychat.training.world import World


@dataclass
class Ran:
    """What a run left when it ended: its events, the records of the journal's branch, and its summary."""

    run_dir: Path
    events: list[Event] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    summary: Summary | None = None

    @property
    def losses(self) -> list[float]:
        """Loss of every step of the current branch."""
        return self.metric("train/loss")

    @property
    def lines(self) -> list[str]:
        """What the console showed of this run."""
        return [event.text for event in self.events if isinstance(event, Line)]

    def metric(self, name: str) -> list[float]:
        """Values of a metric over the steps of the current branch."""
        return [record[name] for record in self.records if name in record]


def open_session(
    config: Config, echo: Callable[[str], None] = lambda line: None, *, eval_workers: bool = False
) -> Session:
    """A session of `config`, its data prepared where they are missing."""
    data = prepare(config, with_gpus=False, maker=make_in_process, echo=echo)
    return Session(config, data, echo=echo, eval_workers=eval_workers)


def run_here(config: Config, poll: Callable[[], Signal] = lambda: Signal.NONE) -> Ran:
    """Train `config` to its end in this process, or until `poll` stops it; an error passes through, lease given back."""
    session = open_session(config)
    ran = Ran(config.run_dir)

    def sink(event: Event) -> None:
        ran.events.append(event)
        session.receive(event)

    status = "failed"
    try:
        job = session.begin_attempt(world_size=1)
        status = "finished" if train(job, world=World(), batches=_told(poll), sink=sink, poll=poll) else "stopped"
    finally:
        ran.summary = session.close(status)
        ran.records = read_journal(ran.run_dir / "metrics.jsonl")
    return ran


def train_for_others(
    config: Config, poll: Callable[[], Signal] = lambda: Signal.NONE
) -> tuple[Session, bool, list[str]]:
    """Train with evaluations left to others (`--eval-workers`): the open session, whether it finished, and its lines."""
    lines: list[str] = []
    session = open_session(config, lines.append, eval_workers=True)
    job = session.begin_attempt(world_size=1)
    finished = train(job, world=World(), batches=_told(poll), sink=session.receive, poll=poll)
    return session, finished, lines


def _told(poll: Callable[[], Signal]) -> Callable[[BatchPlan], Iterator[Batch]]:
    """Batches whose beginning `poll` is told of, where it wants to know."""

    def batches(plan: BatchPlan) -> Iterator[Batch]:
        for batch in read_here(plan):
            if isinstance(poll, InStep):
                poll.step_begins()
            yield batch

    return batches


@dataclass
class InStep:
    """A poll for `run_here` that does `act` once, when it is asked within the `steps`-th step, and else asks nothing.

    Questions outside of steps, such as those of an evaluation, are not counted.
    """

    steps: int
    act: Callable[[], Signal]
    begun: int = 0
    inside: bool = False

    def step_begins(self) -> None:
        """The batch of the next step is handed out."""
        self.begun += 1
        self.inside = True

    def __call__(self) -> Signal:
        inside, self.inside = self.inside, False
        return self.act() if inside and self.begun == self.steps else Signal.NONE


def after(steps: int, signal: Signal) -> InStep:
    """A poll that gives `signal` in the `steps`-th step, and nothing otherwise."""
    return InStep(steps, lambda: signal)


def dying_at(step: int) -> InStep:
    """A poll that ends the process's run in the `step`-th step, as a kill would: nothing is saved."""

    def die() -> Signal:
        raise KeyboardInterrupt

    return InStep(step, die)
