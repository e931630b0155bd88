"""When to stop trying again: a pure function of the journal's events, so that it holds over restarts of the driver."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Cause = Literal["crash", "hang", "preempted", "lost", "resize"]
"""crash, hang: of the training itself; preempted: a machine was taken away with notice; lost: without; resize: on purpose"""
TAKEN_AWAY = ("preempted", "lost")


@dataclass
class _Count:
    """Failures since the count began."""

    taken_away: int = 0
    at_step: dict[int, int] = field(default_factory=dict)
    in_a_row: int = 0
    """crashes since the last checkpoint that was new"""
    newest: int = -1
    """step of the newest checkpoint"""
    last_step: int = -1
    """at which the last crash was"""


def give_up(events: Iterable[Mapping[str, Any]], *, max_failures: int, max_preemptions: int) -> str | None:
    """Why the run should not be tried again after the last of `events` (the journal's), or None while it should.

    Crashes and hangs are retried while the run makes progress: not when `max_failures` of them happened at one step, or
    one after another without a new checkpoint. Machines that were taken away only count against `max_preemptions` (-1:
    no limit). An `end` starts the counts anew, since somebody decided to run again; a driver that died without a word
    does not, and is itself no failure of the run.
    """
    count = _Count()
    for event in events:
        count = _counted(count, event)
    most = max(1, max_failures)
    if 0 <= max_preemptions < count.taken_away:
        return (
            f"machines were taken away {_times(count.taken_away)}, and --max-preemptions is {max_preemptions}. The same "
            "command goes on from the newest checkpoint."
        )
    advice = "When the cause is mended, the same command goes on from the newest checkpoint."
    if count.at_step and (times := max(count.at_step.values())) >= most:
        step = max(count.at_step, key=count.at_step.__getitem__)
        return f"training failed {_times(times)} at the same step, {step} (--max-failures {max_failures}). {advice}"
    if count.in_a_row >= most:
        return (
            f"training failed {_times(count.in_a_row)} without a new checkpoint in between (--max-failures "
            f"{max_failures}), now at step {count.last_step}. {advice}"
        )
    return None


def _counted(count: _Count, event: Mapping[str, Any]) -> _Count:
    match event["event"]:
        case "end":
            return _Count(newest=count.newest)
        case "branch":  # training went back on purpose: what is saved from here on is new
            count.newest = min(count.newest, event["from_step"])
        case "checkpoint" if event["step"] > count.newest:
            count.newest, count.in_a_row = event["step"], 0
        case "failure" if event["cause"] in TAKEN_AWAY:
            count.taken_away += 1
        case "failure" if event["cause"] != "resize":
            count.at_step[event["step"]] = count.at_step.get(event["step"], 0) + 1
            count.in_a_row += 1
            count.last_step = event["step"]
    return count


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
