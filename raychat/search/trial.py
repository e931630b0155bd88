"""What a search runs and what comes back: trials and their outcomes, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raychat.tracking.summary import Summary

Status = Literal[
    "finished", "stopped early", "diverged", "OOM", "preempted", "too slow", "infeasible", "failed", "over budget"
]
"""stopped early: by the scheduler; preempted: machines were taken away and did not come back; too slow: by its rehearsal"""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a search. Equal `key` means the same training: it is never made twice."""

    number: int
    """in the order of being proposed, from 0"""
    tag: str
    """model tag of its run directory: <search>-<number>"""
    title: str
    """how it differs from the base, for a person: `depth 10, matrix-lr 0.03`"""
    settings: Mapping[str, Any]
    """flag names with underscores -> values, over the base's"""
    arm: str
    """what is compared: the same for all seeds and rungs of a configuration"""
    seed: int
    rung: float = 1.0
    """share of the full horizon, 0 to 1: a complete run with its own whole schedule"""
    role: Literal["trial", "noise", "confirmation", "trunk", "fork", "rehearsal"] = "trial"
    fork_of: str = ""
    """tag of the trunk whose checkpoint it starts from"""
    fork_step: int = -1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial came to. Values that do not apply are None."""

    status: Status
    reason: str = ""
    val_bpb: float | None = None
    core_metric: float | None = None
    wall_s: float | None = None
    cost_usd: float | None = None
    mfu: float | None = None
    tok_per_sec: float | None = None
    step_s: float | None = None
    peak_memory_bytes: int | None = None
    tokens: int | None = None
    flops: float | None = None
    num_iterations: int | None = None
    parameters: int | None = None
    preemptions: int | None = None
    replayed_s: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """whatever else a report may show"""


def outcome_of_summary(summary: Summary, status: Status, reason: str = "", **others: Any) -> Outcome:
    """What `summary` says of a run that came to `status`; `others` are the fields that it does not tell."""
    return Outcome(
        status=status,
        reason=reason,
        val_bpb=summary.val_bpb,
        core_metric=summary.core_metric,
        wall_s=summary.wall_time_s,
        cost_usd=summary.cost_usd,
        mfu=summary.mfu,
        tok_per_sec=summary.tok_per_sec,
        peak_memory_bytes=summary.peak_memory_bytes,
        tokens=summary.tokens,
        flops=summary.flops,
        preemptions=summary.preemptions,
        replayed_s=summary.replayed_s,
        **others,
    )
