"""What a report says, as plain data: its readers fill it, its writers only show it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raychat.search.effects import Effect
from raychat.search.fits import ScalingFit
from raychat.search.pairing import Noise
from raychat.search.range_test import RangeTest
from raychat.search.ranking import Place
from raychat.search.trial import Outcome, Trial


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """A trial and what it came to; no outcome yet: it is waiting or running."""

    trial: Trial
    outcome: Outcome | None = None
    running: bool = False

    @property
    def status(self) -> str:
        """The status of the outcome, or `running` or `waiting`."""
        if self.outcome is not None:
            return self.outcome.status
        return "running" if self.running else "waiting"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a search comes to."""

    winner: str
    """arm to go on with"""
    state: str
    """in a word or two"""
    sentence: str


@dataclass(frozen=True)
class Point:
    """Something measured after `tokens`. Seconds and dollars are those of the ledger, from the start of the run."""

    tokens: float
    hours: float
    dollars: float | None
    value: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How a run went."""

    tag: str
    title: str
    arm: str
    loss: tuple[Point, ...]
    """training loss, nats per token, moving average"""
    val_bpb: tuple[Point, ...]
    """bits per byte"""


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """What restarts cost, of all runs together."""

    preemptions: int
    restarts: int
    """of any cause, preemptions included"""
    replayed_s: float
    """steps that were lost and made again"""
    starting_s: float
    """from the end of an attempt to the first step of the next one, waiting for machines included"""
    cost_usd: float | None
    """of both"""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting that is not the same everywhere."""

    setting: str
    """flag with its dashes, or words"""
    base: str
    values: Mapping[str, str]
    """title of the configuration -> value, where it differs"""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What was paid per hour, and how that is known."""

    machine: str
    usd_per_hour: float | None
    source: str
    as_of: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is left open, and what an answer would take."""

    text: str
    runs: int
    hours: float | None
    cost_usd: float | None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What was expected of a run when it began, and what it came to."""

    number: int
    title: str
    values: Mapping[str, Any]
    """raychat.planning.hindsight.record"""


@dataclass(frozen=True, kw_only=True)
class ReportContents:
    """Everything in a report. What is empty or None is left out, never invented."""

    name: str
    kind: Literal["search", "run"]
    made: str
    """when the report was made: a date with its time zone"""
    sentence: str
    """the verdict"""
    state: str
    """of the verdict, in a word or two"""
    command: str
    """of the final baseline, ready to paste"""
    winner: str = ""
    """arm that `command` belongs to"""
    baseline: str = ""
    """arm that all are compared with"""
    going_on: bool = False
    """the search or run has not ended"""
    objective: str = "val_bpb"
    spec: Mapping[str, Any] = field(default_factory=dict)
    """specification of the search, or settings of the run"""
    runs: tuple[ReportRun, ...] = ()
    places: tuple[Place, ...] = ()
    noise: Noise | None = None
    curves: tuple[Curve, ...] = ()
    effects: tuple[Effect, ...] = ()
    fit: ScalingFit | None = None
    range_test: RangeTest | None = None
    """of a run that is one"""
    forecasts: tuple[Forecast, ...] = ()
    """of the runs that ended and had one"""
    ledger: Mapping[str, float] = field(default_factory=dict)
    """account -> seconds, of all runs together"""
    interruption: Interruption | None = None
    differences: tuple[Difference, ...] = ()
    prices: tuple[Price, ...] = ()
    questions: tuple[Question, ...] = ()
    reproduce: tuple[str, ...] = ()
    """commands that make all of this again"""
    facts: Mapping[str, str] = field(default_factory=dict)
    """commit, versions, hardware, data"""
    notes: tuple[str, ...] = ()
    """what a reader of the figures must know"""

    @property
    def wall_s(self) -> float:
        """Of all runs that have one."""
        return sum(run.outcome.wall_s or 0.0 for run in self.runs if run.outcome)

    @property
    def cost_usd(self) -> float | None:
        """Of all runs; None where no run has a price."""
        costs = [run.outcome.cost_usd for run in self.runs if run.outcome and run.outcome.cost_usd is not None]
        return sum(costs) if costs else None
