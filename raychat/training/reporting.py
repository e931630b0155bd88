"""What a run says of itself while it trains: metrics for the journal, lines for the console. Only rank 0 speaks."""

import math
import time
from collections import deque
from dataclasses import asdict
from typing import Any

from raychat.config import Config
from raychat.evaluation.core import CoreResult
from raychat.planning import Recipe
from raychat.training.events import Event, Line, Metrics, Note, Sink
from raychat.training.state import Clock, LoopState

RECENT_S, MOST_RECENT = 60.0, 256
UNTIMED_STEPS = 10  # first steps of a process, which warm caches up, are left out of the training time


class StepTimes:
    """Times of the steps of this process, the first ones left out."""

    def __init__(self) -> None:
        self._steps, self._timed_s = 0, 0.0

    def add(self, dt: float) -> float:
        """Take in a step of `dt` seconds; how much of it counts as training time."""
        timed_s = dt if self._steps >= UNTIMED_STEPS else 0.0
        self._steps += 1
        self._timed_s += timed_s
        return timed_s

    def mean_s(self) -> float | None:
        """Mean of the steps that count, or None before the first of them."""
        timed = self._steps - UNTIMED_STEPS
        return self._timed_s / timed if timed > 0 else None


class Reporter:
    """Tells `sink` what rank 0 has to say; on other ranks it is silent."""

    def __init__(self, config: Config, recipe: Recipe, clock: Clock, sink: Sink, *, rank: int) -> None:
        self.config, self.recipe, self.clock = config, recipe, clock
        self._sink, self._rank = sink, rank
        self._recent: deque[Metrics] = deque(maxlen=MOST_RECENT)

    def send(self, event: Event) -> None:
        """Tell `event` to the driver."""
        if self._rank == 0:
            if isinstance(event, Metrics):
                self._recent.append(event)
            self._sink(event)

    def recent(self) -> list[dict[str, Any]]:
        """Metrics of the last minute, as JSON: a driver that dies has not read all of them, so each save holds them."""
        since = time.time() - RECENT_S
        return [
            asdict(told)
            | {"values": {key: value if math.isfinite(value) else None for key, value in told.values.items()}}
            for told in self._recent
            if told.time_s >= since
        ]

    def line(self, text: str) -> None:
        """Show a line."""
        self.send(Line(text))

    def note(self, kind: str, **fields: object) -> None:
        """Put an event into the journal."""
        self.send(Note(kind, fields))

    def step(
        self,
        state: LoopState,
        *,
        loss: float,
        lrm: float,
        grad_norm: float,
        dt: float,
        spread: float | None,
        mean_s: float | None,
    ) -> None:
        """Metrics and line of the step that led to `state`; `spread` is that of the ranks, `mean_s` of a step."""
        step, N = state.step - 1, self.recipe.num_iterations
        cost = self.clock.cost_usd()
        rows = self.recipe.total_batch_size // self.config.model.max_seq_len
        passed_over = sum(cursor < state.rows_consumed for cursor in state.skipped) * rows
        trained_tokens = (state.rows_consumed - passed_over) * self.config.model.max_seq_len
        values = {
            "train/loss": loss,
            "train/lrm": lrm,
            "train/dt": dt,
            "train/tok_per_sec": state.tok_per_sec,
            "train/mfu": state.mfu,
            "train/grad_norm": grad_norm,
            "train/rank_spread": spread,
            "time/total_training": state.total_training_time_s,
            "time/productive": state.step_time_s,
            "flops/total": float(self.recipe.flops_per_token) * trained_tokens,
            "goodput": state.step_time_s / max(self.clock.wall_s(), state.step_time_s),
            "cost/usd": cost,
        }
        self.send(Metrics(step, {key: value for key, value in values.items() if value is not None}, time.time()))
        eta = "" if mean_s is None else f" | eta: {mean_s * (N - state.step) / 60:.1f}m"
        mfu = "n/a" if state.mfu is None else f"{state.mfu:.2f}"
        spent = "" if cost is None else f" | spent: ${cost:.2f}"
        self.line(
            f"step {step:05d}/{N:05d} ({100 * step / N:.2f}%) | loss: {state.smoothed_loss():.6f} | lrm: {lrm:.2f}"
            f" | dt: {dt * 1000:.2f}ms | tok/sec: {state.tok_per_sec:,.0f} | mfu: {mfu} | epoch: {state.epoch + 1}"
            f" | total time: {state.total_training_time_s / 60:.2f}m{eta}{spent}"
        )

    def evaluation(self, state: LoopState, bpb: float, *, tokens: int, seconds: float) -> None:
        """Metrics and line of an evaluation that gave `bpb`; `state` is the one after it."""
        self.send(Metrics(state.step, {"val/bpb": bpb, "val/time_s": seconds}, time.time()))
        self.line(bpb_line(state.step, bpb, state.min_val_bpb, tokens=tokens, seconds=seconds))

    def core(self, step: int, result: CoreResult, *, seconds: float) -> None:
        """Metrics and line of an evaluation of CORE."""
        self.send(Metrics(step, result.metrics() | {"time/core": seconds}, time.time()))
        self.line(core_line(step, result, seconds=seconds))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """What the model made of a prompt."""
        self.line(sample_line(step, text))
        self.note("sample", step=step, prompt=prompt, text=text)

    def evaluation_again(self, state: LoopState) -> None:
        """The evaluation before the save that `state` comes from: a journal that went back to there has lost it."""
        values = {}
        if state.val_step == state.step and state.val_bpb is not None:
            values["val/bpb"] = state.val_bpb
        if state.core_step == state.step and state.core_metric is not None:
            values["core_metric"] = state.core_metric
        if values:
            self.send(Metrics(state.step, values, time.time()))


def bpb_line(step: int, bpb: float, lowest: float | None, *, tokens: int, seconds: float) -> str:
    """The line of an evaluation of bits per byte; `lowest` is that of the run so far."""
    known = "" if lowest is None else f" (lowest {lowest:.6f})"
    warning = "" if math.isfinite(bpb) else "warning: "
    return f"{warning}step {step:05d} | validation bpb: {bpb:.6f}{known} on {tokens:,} tokens in {seconds:.1f}s"


def core_line(step: int, result: CoreResult, *, seconds: float) -> str:
    """The line of an evaluation of CORE."""
    items = sum(len(task.items) for task in result.tasks.values())
    return f"step {step:05d} | CORE: {result.core_metric:.4f} on {items:,} items of {len(result.tasks)} tasks in {seconds:.1f}s"


def sample_line(step: int, text: str) -> str:
    """The line of a sample."""
    return f"step {step:05d} | sample: {text!r}"
