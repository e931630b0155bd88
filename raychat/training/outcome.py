"""What a run came to: its summary from the journal and the last state, and the lines that say so."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raychat.config import Config
from raychat.planning import Recipe, hindsight
from raychat.progress import format_duration
from raychat.tracking.journal import is_metrics
from raychat.tracking.ledger import Ledger
from raychat.tracking.summary import NO_RETRY, Status, Summary
from raychat.training.reporting import UNTIMED_STEPS

PREFIX = "ledger/"


def summarize(
    status: Status,
    config: Config,
    recipe: Recipe,
    *,
    state: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    ledger: Ledger,
    peak_memory_bytes: int | None,
    checkpoint: str | None,
    mlflow_run_id: str | None,
    error: str | None,
    retry_helps: bool,
    forecast: Callable[[Summary], dict[str, Any] | None] = lambda summary: None,
) -> Summary:
    """The summary of a run.

    `state` is the loop's at its last save, empty when there was none; `records` are the metric records of the journal's
    branch, `events` all its events. `error` and `retry_helps` are about a run that failed. `forecast` holds the rest against
    what was expected.
    """
    tokens = _tokens(state, config.model.max_seq_len, recipe.total_batch_size)
    counts = interruptions(events)

    def typical(key: str) -> float | None:
        values = [record[key] for record in records if record.get(key) is not None]
        return statistics.median(values[UNTIMED_STEPS:] or values) if values else None

    summary = Summary(
        status=status,
        step=state.get("step"),
        num_iterations=recipe.num_iterations,
        rows_consumed=state.get("rows_consumed"),
        tokens=tokens,
        **evaluated(state, records),
        train_loss=state.get("train_loss"),
        total_training_time_s=state.get("total_training_time_s"),
        wall_time_s=ledger.wall_s,
        goodput=ledger.goodput,
        restarts=counts["restarts"],
        preemptions=counts["preemptions"],
        replayed_steps=counts["replayed_steps"],
        tok_per_sec=typical("train/tok_per_sec"),
        mfu=typical("train/mfu"),
        peak_memory_bytes=peak_memory_bytes,
        flops=None if tokens is None else float(recipe.flops_per_token) * tokens,
        cost_usd=ledger.cost_usd,
        mlflow_run_id=mlflow_run_id,
        checkpoint=checkpoint,
        **ledger.accounts(),
        failed_saves=len(_of_kind(events, "save_failed")),
        rollbacks=len(_of_kind(events, "rollback")),
        skipped_batches=counts["skipped_batches"],
        error=error if status == "failed" else None,
        retry_helps=retry_helps if status == "failed" else None,
        forecast=None,
    )
    return dataclasses.replace(summary, forecast=forecast(summary))


def interruptions(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """What came between a run and its end, counted from all events of its journal."""
    starts, rollbacks = _of_kind(events, "start"), _of_kind(events, "rollback")
    return {
        "restarts": max(0, len(starts) - 1),
        "preemptions": sum(failure["cause"] == "preempted" for failure in _of_kind(events, "failure")),
        "replayed_steps": sum(start["replayed"] for start in starts)
        + sum(event["bad_step"] - event["from_step"] for event in rollbacks),
        "skipped_batches": len({event["cursor"] for event in _of_kind(events, "rollback", "bad_step")}),
    }


def evaluated(state: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Evaluations of the run up to the step of `state`: what that says, or the journal when it knows of later ones.

    Those that other workers make of a checkpoint are only in the journal.
    """
    step, found = state.get("step", -1), dict[str, float | None]()
    records = list(records)
    for name, metric, at in (("val_bpb", "val/bpb", "val_step"), ("core_metric", "core_metric", "core_step")):
        points = [(state[at], state.get(name))] if state.get(at) is not None else []
        points += [point for point in points_of(records, metric) if point[0] <= step]
        found[name] = max(points, key=lambda point: point[0])[1] if points else None
    known = [value for at, value in points_of(records, "val/bpb") if at <= step and value is not None]
    lowest = state.get("min_val_bpb")
    found["min_val_bpb"] = min([*known, *([] if lowest is None else [lowest])], default=None)
    return found


def points_of(records: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[int, float | None]]:
    """(step, value) of `metric` in order of step; None where it was no number."""
    points = [(record["step"], record[metric]) for record in records if is_metrics(record) and metric in record]
    return sorted(points, key=lambda point: point[0])


def last_metrics(ledger: Ledger, summary: Summary) -> dict[str, float]:
    """The ledger and the forecast as metrics."""
    known = {"goodput": ledger.goodput, "cost_usd": ledger.cost_usd, "node_s": ledger.node_s, **ledger.accounts()}
    found = {PREFIX + name: value for name, value in known.items() if value is not None}
    return found | hindsight.metrics(summary.forecast or {})


def done_line(run_dir: Path, step: int, bpb: float | None) -> str:
    """What to tell a user whose run has nothing left to do."""
    return (
        f"done: {run_dir} reached its horizon of {step:,} steps before"
        + (f" (val bpb {bpb:.4f})" if bpb is not None else "")
        + ". --fresh starts over; a longer horizon with --allow-config-change goes on."
    )


def closing_lines(summary: Summary, run_dir: Path, records: Iterable[Mapping[str, Any]]) -> list[str]:
    """How the run ended, for the console; the first line alone says the most important."""
    bpb = [value for _, value in points_of(records, "val/bpb") if value is not None]
    facts = [f"step {summary.step or 0:,} of {summary.num_iterations or 0:,}"]
    if bpb:
        facts.append(f"val bpb {bpb[0]:.4f} -> {bpb[-1]:.4f}")
    if summary.core_metric is not None:
        facts.append(f"CORE {summary.core_metric:.4f}")
    if summary.tokens:
        facts.append(f"{summary.tokens:,} tokens")
    if summary.tok_per_sec:
        facts.append(f"{summary.tok_per_sec:,.0f} tok/s")
    facts.append(f"{format_duration(summary.wall_time_s or 0)} wall time, goodput {summary.goodput or 0:.0%}")
    accounts = {name: getattr(summary, name) or 0.0 for name in Ledger().accounts()}
    lines = [
        f"{summary.status}: {', '.join(facts)}",
        f"  {Ledger(**accounts, cost_usd=summary.cost_usd).line()}",
        *hindsight.table(summary.forecast or {}),
        f"  summary    {run_dir / 'summary.json'}",
    ]
    if (curve := run_dir / "loss_curve.png").exists():
        lines.append(f"  loss curve {curve}")
    if summary.checkpoint:
        lines.append(f"  checkpoint {summary.checkpoint}")
    if summary.retry_helps is False:
        lines.append(f"  {NO_RETRY}")
    return lines


def _tokens(state: Mapping[str, Any], T: int, total_batch_size: int) -> int | None:
    """Tokens that steps used: all rows passed so far, without the batches that were left out."""
    if not state:
        return None
    left_out = sum(cursor < state["rows_consumed"] for cursor in state.get("skipped", ()))
    return state["rows_consumed"] * T - left_out * total_batch_size


def _of_kind(events: Iterable[Mapping[str, Any]], *kinds: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event["event"] in kinds]
