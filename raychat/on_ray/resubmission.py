"""What follows from how a job ended: another submission, or the end of the matter.

`decide` goes by the ends of all submissions so far. They are known by the run's journal where that can be read from here, and
by the exit code and the last lines of the log.
"""

import dataclasses
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raychat.errors import RaychatError
from raychat.storage import Store
from raychat.tracking.journal import is_metrics, records_from
from raychat.tracking.segments import join_segments, segment_names
from raychat.tracking.summary import NO_RETRY
from raychat.training.lease import OTHER_DRIVER, STALE_S

CRASHES = 3
TAIL = 20_000
"""characters at the end of a log that are looked at"""
# What the driver names when it gives a run up: nothing that another submission would change.
GAVE_UP = re.compile(r"--max-(failures|preemptions|wait)\b")
BAD_INPUT = 2


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """How one submission ended, as far as can be known from here."""

    status: Literal["succeeded", "failed", "stopped", "lost"]
    """lost: the cluster knows it no more, or something broke that is not the job itself"""
    exit_code: int | None = None
    """of the driver; negative: the signal that killed it; None: not known"""
    run_status: str | None = None
    """finished, stopped or failed, where the run could say so before it ended"""
    step: int | None = None
    """that the run had reached"""
    error: str = ""
    """the last line of its log that begins with `error:`"""
    hopeless: bool = False
    """the run said that the same command would fail alike"""


@dataclass(frozen=True)
class Verdict:
    """What follows from the ends so far: another submission, or this exit code."""

    again: bool
    exit_code: int
    why: str
    after_s: float = 0.0
    """seconds for which another submission would be in vain"""


def decide(ends: Sequence[JobEnd]) -> Verdict:
    """Whether to submit the job again after the last of `ends` (not empty, oldest first)."""
    last = ends[-1]
    if last.status == "succeeded" or last.run_status == "finished":
        return Verdict(False, 0, f"the run is {last.run_status or 'done'}")
    if last.status == "lost":  # a run that says `stopped` then was not told to by its user, but by a dying machine
        return Verdict(True, 1, "the cluster lost the job")
    if last.status == "stopped" or last.run_status == "stopped":
        return Verdict(False, 0, "the run was stopped")
    if _met_another(last):
        return Verdict(True, last.exit_code or 1, f"the run is held ({last.error})", after_s=STALE_S)
    if last.exit_code == BAD_INPUT:
        return Verdict(False, BAD_INPUT, "the job refused its input")
    if last.hopeless:
        return Verdict(False, last.exit_code or 1, f"the run would fail alike ({_cause(last)})")
    if GAVE_UP.search(last.error):
        return Verdict(False, 1, "the job has given the run up")
    crashes = sum(end.status == "failed" and end.step == last.step and not _met_another(end) for end in ends)
    where = "before the first step that is known of" if last.step is None else f"at step {last.step}"
    if crashes >= CRASHES:
        return Verdict(False, 1, f"the job has crashed {crashes} times {where}")
    return Verdict(True, 1, f"the job crashed {where} ({_cause(last)})")


def _met_another(end: JobEnd) -> bool:
    """Whether the job ended because another driver has the run, or had it until it died a moment ago."""
    return end.error.startswith(f"error: {OTHER_DRIVER} ")


def _cause(end: JobEnd) -> str:
    if end.error:
        return end.error
    return "no word of a cause" if end.exit_code is None or end.exit_code < 0 else f"exit code {end.exit_code}"


def read_log(text: str) -> JobEnd:
    """What the last lines of a driver's log say about its end; the status is to be filled in."""
    steps = re.findall(r"^step (\d+)/", text, re.MULTILINE)
    closing = re.findall(r"^(finished|stopped|failed): step ", text, re.MULTILINE)
    errors = re.findall(r"^error: .*", text, re.MULTILINE)
    return JobEnd(
        status="failed",
        run_status=closing[-1] if closing else None,
        step=int(steps[-1]) if steps else None,
        error=errors[-1] if errors else "",
        hopeless=f"  {NO_RETRY}\n" in text,
    )


@dataclass(frozen=True)
class RunState:
    """What the journal of a run says."""

    status: str | None
    """None: it died without a word"""
    step: int | None
    hopeless: bool = False


def read_run(place: str, since_s: float) -> RunState | None:
    """The state of a run that was started after the unix time `since_s`.

    `place` is the run directory or its URI. None when no such run can be read there: what lies at the same path on this
    machine may be another run.
    """
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "metrics.jsonl"
        try:
            _fetch_journal(Store.of(place), journal)
            records = [record for record, _ in records_from(journal)]
        except (OSError, RaychatError):
            return None
    begun = [n for n, record in enumerate(records) if record.get("event") == "start" and record["time"] >= since_s]
    if not begun:
        return None
    state = RunState(None, None)
    for record in records[begun[0] :]:
        if record.get("event") == "end":
            state = RunState(record["status"], state.step, record.get("retry_helps") is False)
        elif record.get("event") == "start":
            state = RunState(None, record["resume_step"])
        elif is_metrics(record):
            state = dataclasses.replace(state, step=record["step"])
    return state


def _fetch_journal(run: Store, target: Path) -> None:
    if segment_names(run):  # an object store, to which nothing can be appended
        join_segments(run, target)
    else:
        run.download(target.name, target)
