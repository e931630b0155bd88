"""Runs a training in this process, as `python -m raychat.training` does, with the seams open to a test."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raychat.config import Config
from raychat.data.prepare import make_in_process, prepare
from raychat.tracking.journal import read_journal
from raychat.tracking.summary import Summary
from raychat.training.__main__ import read_here
from raychat.training.build import train
from raychat.training.events import Event, Line
from raychat.training.loop import Signal
from raychat.training.session import Session
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


def open_session(config: Config, echo: Callable[[str], None] = lambda line: None) -> Session:
    """A session of `config`, its data prepared where they are missing."""
    return Session(config, prepare(config, with_gpus=False, maker=make_in_process, echo=echo), echo=echo)


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
        status = "finished" if train(job, world=World(), batches=read_here, sink=sink, poll=poll) else "stopped"
    finally:
        ran.summary = session.close(status)
        ran.records = read_journal(ran.run_dir / "metrics.jsonl")
    return ran


def after(steps: int, signal: Signal) -> Callable[[], Signal]:
    """A poll that gives `signal` at the `steps`-th question, which is in that step, and nothing otherwise."""
    asked = iter(range(1, 1_000_000))
    return lambda: signal if next(asked) == steps else Signal.NONE


def dying_at(step: int) -> Callable[[], Signal]:
    """A poll that ends the process's run at the `step`-th question, as a kill would: nothing is saved."""
    asked = iter(range(1, 1_000_000))

    def poll() -> Signal:
        if next(asked) == step:
            raise KeyboardInterrupt
        return Signal.NONE

    return poll
