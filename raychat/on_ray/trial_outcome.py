"""What a trial came to: from how its process ended and from what its run left behind."""

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from raychat.config import Config
from raychat.errors import RaychatError
from raychat.on_ray.trial_process import TrialEnd
from raychat.planning import model_shape, param_counts, recipe
from raychat.search.trial import Outcome, Status, Trial, outcome_of_summary
from raychat.tracking.journal import read_journal
from raychat.tracking.run_table import JOURNAL, last_turn
from raychat.tracking.summary import DIVERGED, Summary
from raychat.training.reporting import UNTIMED_STEPS

BAD_INPUT = 2
ERROR_CHARS = 500
MACHINES_GONE = re.compile(r"--max-(preemptions|wait)\b")
NO_MEMORY = re.compile(r"out of memory|DefaultCPUAllocator", re.IGNORECASE)
WRITTEN = re.compile(r"^written to (.+)$", re.MULTILINE)


def outcome_of(trial: Trial, config: Config, end: TrialEnd, *, memory_limit_bytes: int = -1) -> Outcome:
    """The outcome of `trial`, which ran as `config` and was not told to stop by its search."""
    if trial.role == "rehearsal":
        return _of_rehearsal(config, end, memory_limit_bytes)
    found, summary = _known(config), _summary(config)
    status, reason = _status(config, end, summary)
    peak = max(found.peak_memory_bytes or 0, end.over_memory_bytes)
    if end.over_memory_bytes != -1 or (status == "finished" and -1 < memory_limit_bytes < peak):
        status, reason = "OOM", _over_limit(memory_limit_bytes)
        found = replace(found, peak_memory_bytes=peak)
    if status == "OOM":
        found = replace(found, val_bpb=None)  # how far it came before that is chance
    if status == "finished" and config.eval.eval_every != -1 and found.val_bpb is None and config.run.stop_at == -1:
        status, reason = "diverged", "its validation loss is no number"
    return replace(found, status=status, reason=reason[:ERROR_CHARS])


def early(config: Config, reason: str, status: Status = "stopped early") -> Outcome:
    """The outcome of a run that its search gave up, with what is known of it."""
    return replace(_known(config), status=status, reason=reason)


def _status(config: Config, end: TrialEnd, summary: Summary | None) -> tuple[Status, str]:
    """How a run ended that kept within its memory."""
    if summary is None:  # refused, or it died without a word
        refused = end.exit_code == BAD_INPUT and last_turn(config.run_dir / JOURNAL) is None
        return ("infeasible", end.error) if refused else _failure(_error(end))
    if summary.status == "finished":
        return "finished", ""
    if summary.status == "failed":
        return _failure(summary.error or _error(end))
    if config.run.stop_at != -1 and summary.step == config.run.stop_at:
        return "finished", ""
    money = config.money
    if money.max_hours != -1 and (summary.wall_time_s or 0.0) >= money.max_hours * 3600:
        return (
            "over budget",
            f"it took its {money.max_hours:g} h and is at step {summary.step} of {summary.num_iterations}",
        )
    if money.budget_usd != -1 and (summary.cost_usd or 0.0) >= money.budget_usd:
        return (
            "over budget",
            f"it cost its ${money.budget_usd:g} and is at step {summary.step} of {summary.num_iterations}",
        )
    return "stopped early", f"it was stopped from outside at step {summary.step} of {summary.num_iterations}"


def _failure(error: str) -> tuple[Status, str]:
    if NO_MEMORY.search(error):
        return "OOM", error
    if DIVERGED in error:
        return "diverged", error
    return ("preempted" if MACHINES_GONE.search(error) else "failed"), error


def _error(end: TrialEnd) -> str:
    lines = end.text.strip().splitlines()
    word = f"killed by signal {-end.exit_code}" if end.exit_code < 0 else f"exit code {end.exit_code}"
    return end.error or f"{word}: {lines[-1] if lines else 'no word of a cause'}"


def _over_limit(limit: int) -> str:
    """Without what it used, which is chance beyond the limit, and stands in the outcome besides."""
    return f"a worker used more than the {limit / 1e9:g} GB of memory_limit_gb"


def _summary(config: Config) -> Summary | None:
    """The summary of the last end, unless the run was begun again since."""
    turn = last_turn(config.run_dir / JOURNAL)
    if turn is None or turn["event"] != "end":
        return None
    try:
        return Summary.read(config.run_dir / "summary.json")
    except (FileNotFoundError, RaychatError):
        return None


def _known(config: Config) -> Outcome:
    """Figures of a run, whatever its end; the status is to be filled in."""
    plan, shape = recipe(config), model_shape(config.model)
    fixed = {"num_iterations": plan.num_iterations, "parameters": param_counts(shape).scaling}
    records = read_journal(config.run_dir / JOURNAL)
    times = [record["train/dt"] for record in records if record.get("train/dt")]
    step_s = statistics.median(times[UNTIMED_STEPS:] or times) if times else None
    facts: dict[str, Any] = {
        "total_batch_size": plan.total_batch_size,
        "device_batch_size": config.batch.device_batch_size,
        "total_parameters": param_counts(shape).total,
    }
    summary = _summary(config)
    if summary is None:
        values = [record["val/bpb"] for record in records if "val/bpb" in record]
        return Outcome(status="failed", step_s=step_s, val_bpb=values[-1] if values else None, facts=facts, **fixed)
    facts |= {
        "step": summary.step,
        "goodput": summary.goodput,
        "restarts": summary.restarts,
        "min_val_bpb": summary.min_val_bpb,
        "train_loss": summary.train_loss,
        "mlflow_run_id": summary.mlflow_run_id,
    }
    told = {name: value for name, value in facts.items() if value is not None}
    return outcome_of_summary(summary, "failed", step_s=step_s, facts=told, **fixed)


def _of_rehearsal(config: Config, end: TrialEnd, memory_limit_bytes: int) -> Outcome:
    """A short run leaves a plan with what it measured, and no run directory."""
    plan, shape = recipe(config), model_shape(config.model)
    measured: dict[str, Any] = {}
    if written := WRITTEN.findall(end.text):
        measured = json.loads(Path(written[-1]).read_bytes()).get("measured") or {}
    step_s = measured.get("step_s")
    found = Outcome(
        status="finished",
        step_s=step_s,
        tok_per_sec=plan.total_batch_size / step_s if step_s else None,
        peak_memory_bytes=measured.get("peak_memory_bytes"),
        num_iterations=plan.num_iterations,
        parameters=param_counts(shape).scaling,
    )
    if end.over_memory_bytes != -1:
        peak = end.over_memory_bytes
        return replace(found, status="OOM", reason=_over_limit(memory_limit_bytes), peak_memory_bytes=peak)
    if end.exit_code == 0:
        return found
    if measured and end.exit_code == BAD_INPUT:  # it ran, and what it measured is beyond a limit
        return replace(found, status="too slow", reason=end.error[:ERROR_CHARS])
    status, reason = _failure(_error(end))
    refused = status == "failed" and end.exit_code == BAD_INPUT
    return replace(found, status="infeasible" if refused else status, reason=reason[:ERROR_CHARS])
