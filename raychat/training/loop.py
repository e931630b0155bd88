"""The training loop: batches come in, events go out, orders come in. Every rank runs it and takes the same branches."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raychat.config import Config
from raychat.data.batches import Batch
from raychat.data.tokenizer import Tokenizer
from raychat.errors import CheckpointError, RaychatError
from raychat.evaluation.bpb import evaluate_bpb
from raychat.evaluation.samples import DEFAULT_PROMPTS, samples
from raychat.model import GPT
from raychat.optim import MuonAdamW
from raychat.optim.schedule import lr_multiplier, muon_momentum, weight_decay_at
from raychat.planning import Recipe, warmup_steps
from raychat.planning.devices import mfu_percent
from raychat.training import checkpoint
from raychat.training.device import Resolved, peak_memory_bytes
from raychat.training.events import Ended, Line, Metrics, Note, Saved, Sink
from raychat.training.lease import LeaseError, taken_over
from raychat.training.save_clock import SaveClock
from raychat.training.scaler import LossScaler
from raychat.training.world import World

SMOOTHING = 0.9  # of the moving average of the loss that the console shows
UNTIMED_STEPS = 10  # first steps of a process, which warm caches up, are left out of the training time


class Signal(IntEnum):
    """What the surroundings ask of the loop. Ordered: the strongest of all ranks wins."""

    NONE = 0
    SAVE = 1  # write a checkpoint now and go on (a node is about to be taken away)
    STOP = 2  # write a checkpoint now and return


class DivergedError(RaychatError):
    """The loss or the gradient is no longer a number. The last checkpoint is from before."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """Where a run is: all that the loop needs to go on as if nothing had happened, besides weights and moments.

    `rows_consumed` is the whole state of the data. Nothing random happens in a step, so there is no generator to keep.
    """

    step: int = 0
    rows_consumed: int = 0
    epoch: int = 0
    smooth_loss: float = 0.0
    train_loss: float | None = None
    val_bpb: float | None = None
    val_step: int | None = None
    min_val_bpb: float | None = None
    total_training_time_s: float = 0.0
    step_time_s: float = 0.0
    tok_per_sec: float | None = None
    mfu: float | None = None
    loss_scale: float | None = None
    loss_scale_good_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Wall time and money of a run over all its attempts. `before_s`: wall time of the earlier ones."""

    attempt_started: float
    before_s: float
    price_per_hour: float | None

    def wall_s(self) -> float:
        """Wall time of the run so far."""
        return self.before_s + time.time() - self.attempt_started

    def cost_usd(self) -> float | None:
        """Dollars so far, or None without a price."""
        return None if self.price_per_hour is None else self.price_per_hour * self.wall_s() / 3600


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The seams of the loop: where batches come from, where events go, who asks for what, and what a save records."""

    batches: Iterator[Batch]
    validation: Callable[[], Iterator[np.ndarray]]
    sink: Sink
    poll: Callable[[], Signal]
    clock: Clock
    checkpoints: Path
    lease: Path
    lease_holder: str
    meta: dict[str, Any]


class Trainer:
    """Trains `model` from `state` to the horizon of `recipe`, or until told to stop."""

    def __init__(
        self,
        config: Config,
        recipe: Recipe,
        *,
        model: GPT,
        optimizer: MuonAdamW,
        tokenizer: Tokenizer,
        resolved: Resolved,
        world: World,
        surroundings: Surroundings,
        state: LoopState,
    ) -> None:
        self.config, self.recipe, self.model, self.optimizer = config, recipe, model, optimizer
        self.tokenizer, self.resolved, self.world, self.around, self.state = (
            tokenizer,
            resolved,
            world,
            surroundings,
            state,
        )
        self.device = next(model.parameters()).device
        self.forward = torch.compile(model, dynamic=False) if resolved.compile else model
        self.token_bytes = torch.as_tensor(tokenizer.token_bytes, device=self.device)
        self.steps_here, self.timed_here_s = 0, 0.0
        self.saved_at = state.step if state.step else None
        self.save_clock = SaveClock(config.save.save_every)
        self.scaler = LossScaler.restore(resolved.dtype, state.loss_scale, state.loss_scale_good_steps)

    def fit(self) -> bool:
        """Train on. True when the horizon is reached, False when the loop was told to stop before."""
        signal = Signal.NONE
        if self.state.val_step == self.state.step and self.state.val_bpb is not None:
            # Evaluated before the save that this run resumes from; a journal that went back to here lost it.
            self._send(Metrics(self.state.step, {"val/bpb": self.state.val_bpb}, time.time()))
        while True:
            step, last = self.state.step, self.state.step == self.recipe.num_iterations
            if self._due(self.config.eval.eval_every, last) and self.state.val_step != step:
                self._evaluate()
            if self._due(self.config.eval.sample_every, last) and step > 0:
                self._sample()
            wanted = last or signal >= Signal.SAVE or self.save_clock.due_at(step)
            if wanted and step != self.saved_at:
                self._save(must=last or signal is Signal.STOP)
            if last or signal is Signal.STOP:
                self._send(Ended(last, asdict(self.state), max(self.world.gather(peak_memory_bytes(self.device)))))
                return last
            signal = self._train_step(next(self.around.batches))

    def _train_step(self, batch: Batch) -> Signal:
        start = time.perf_counter()
        step, N, optim = self.state.step, self.recipe.num_iterations, self.config.optim
        lrm = lr_multiplier(step, N, warmup_steps(self.config, N), optim.warmdown_ratio, optim.final_lr_frac)
        self._schedule(step, lrm)
        nats = self._accumulate_gradients(batch)
        asked = self._poll()
        loss, save, stop = self.world.sum(
            [nats / self.recipe.total_batch_size, asked is Signal.SAVE, asked is Signal.STOP], self.device
        )
        self.optimizer.grad_scale = self.scaler.scale
        grad_norm = float(self.optimizer.reduce_gradients())
        if not math.isfinite(loss) or (not math.isfinite(grad_norm) and not self.scaler.active):
            raise DivergedError(
                f"step {step}: the loss is {loss} and the gradient norm {grad_norm}. The weights were not updated; the last "
                "checkpoint is good. Lower the rates (--matrix-lr, --embedding-lr), or set --grad-clip 1.0."
            )
        if self.scaler.accepts(grad_norm):
            self.optimizer.apply_updates()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._advance(batch, loss, time.perf_counter() - start)
        if step % self.config.run.log_every == 0 or self.state.step == N:
            self._log(step, loss, lrm, grad_norm, time.perf_counter() - start)
        return Signal.STOP if stop else Signal.SAVE if save else Signal.NONE

    def _accumulate_gradients(self, batch: Batch) -> float:
        """Forward and backward over this rank's rows in passes of the device batch; the sum of nats."""
        precise = torch.float32 if self.device.type == "mps" else torch.float64
        nats = torch.zeros((), dtype=precise, device=self.device)
        weight = self.scaler.scale / self.recipe.total_batch_size
        for first in range(0, len(batch.rows), self.config.batch.device_batch_size):
            rows = self._to_device(batch.rows[first : first + self.config.batch.device_batch_size])
            loss = self.forward(rows[:, :-1], rows[:, 1:], reduction="sum")
            (loss * weight).backward()
            nats += loss.detach()
        return nats.item()

    def _to_device(self, rows: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(rows.astype(np.int32))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.long()

    def _schedule(self, step: int, lrm: float) -> None:
        N, optim = self.recipe.num_iterations, self.config.optim
        momentum = muon_momentum(
            step,
            N,
            optim.warmdown_ratio,
            start=optim.muon_momentum_start,
            peak=optim.muon_momentum,
            ramp_steps=optim.muon_momentum_steps,
            final=None if optim.muon_momentum_final == -1 else optim.muon_momentum_final,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lrm
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = weight_decay_at(step, N, self.recipe.weight_decay)

    def _poll(self) -> Signal:
        """What this rank's surroundings ask. Time and money are rank 0's to watch, or ranks would disagree."""
        asked = self.around.poll()
        if self.world.rank == 0:
            if self._limit_reached():
                asked = Signal.STOP
            elif self.save_clock.due_by_time():
                asked = max(asked, Signal.SAVE)
        return asked

    def _limit_reached(self) -> bool:
        money, clock = self.config.money, self.around.clock
        cost = clock.cost_usd()
        over_time = money.max_hours > 0 and clock.wall_s() > money.max_hours * 3600
        over_budget = money.budget_usd > 0 and cost is not None and cost > money.budget_usd
        if over_time or over_budget:
            which = f"--max-hours {money.max_hours:g}" if over_time else f"--budget-usd {money.budget_usd:g}"
            self._send(Line(f"{which} is reached after {clock.wall_s() / 3600:.2f} h: saving and stopping"))
        return over_time or over_budget

    def _advance(self, batch: Batch, loss: float, dt: float) -> None:
        state = self.state
        timed_s = dt if self.steps_here >= UNTIMED_STEPS else 0.0
        tok_per_sec = self.recipe.total_batch_size / dt
        peak = self.resolved.peak
        self.state = replace(
            state,
            step=state.step + 1,
            rows_consumed=batch.rows_consumed,
            epoch=batch.epoch,
            smooth_loss=SMOOTHING * state.smooth_loss + (1 - SMOOTHING) * loss,
            train_loss=loss,
            total_training_time_s=state.total_training_time_s + timed_s,
            step_time_s=state.step_time_s + dt,
            tok_per_sec=tok_per_sec,
            mfu=mfu_percent(
                self.recipe.flops_per_token, tok_per_sec, peak.flops if peak else None, self.world.world_size
            ),
            loss_scale=self.scaler.scale if self.scaler.active else None,
            loss_scale_good_steps=self.scaler.good_steps,
        )
        self.steps_here += 1
        self.timed_here_s += timed_s

    def _log(self, step: int, loss: float, lrm: float, grad_norm: float, dt: float) -> None:
        state, N, clock = self.state, self.recipe.num_iterations, self.around.clock
        values = {
            "train/loss": loss,
            "train/lrm": lrm,
            "train/dt": dt,
            "train/tok_per_sec": state.tok_per_sec,
            "train/mfu": state.mfu,
            "train/grad_norm": grad_norm,
            "time/total_training": state.total_training_time_s,
            "flops/total": float(self.recipe.flops_per_token) * state.rows_consumed * self.config.model.max_seq_len,
            "goodput": state.step_time_s / max(clock.wall_s(), state.step_time_s),
            "cost/usd": clock.cost_usd(),
        }
        self._send(Metrics(step, {key: value for key, value in values.items() if value is not None}, time.time()))
        timed = self.steps_here - UNTIMED_STEPS
        eta = f" | eta: {self.timed_here_s / timed * (N - state.step) / 60:.1f}m" if timed > 0 else ""
        smooth = state.smooth_loss / (1 - SMOOTHING**state.step)
        mfu = "n/a" if state.mfu is None else f"{state.mfu:.2f}"
        cost = clock.cost_usd()
        spent = "" if cost is None else f" | spent: ${cost:.2f}"
        self._send(
            Line(
                f"step {step:05d}/{N:05d} ({100 * step / N:.2f}%) | loss: {smooth:.6f} | lrm: {lrm:.2f} | dt: {dt * 1000:.2f}ms"
                f" | tok/sec: {state.tok_per_sec:,.0f} | mfu: {mfu} | epoch: {state.epoch + 1}"
                f" | total time: {state.total_training_time_s / 60:.2f}m{eta}{spent}"
            )
        )

    def _evaluate(self) -> None:
        start, step = time.perf_counter(), self.state.step
        rows = (self._to_device(rows) for rows in self.around.validation())
        # In chunks: the full float32 logits of a batch that fits in training would not fit here, uncompiled.
        loss_impl, self.model.loss_impl = self.model.loss_impl, "chunked"
        bpb = evaluate_bpb(self.model, rows, self.token_bytes, self.device)
        self.model.loss_impl = loss_impl
        lowest = bpb if self.state.min_val_bpb is None else min(bpb, self.state.min_val_bpb)
        self.state = replace(self.state, val_bpb=bpb, val_step=step, min_val_bpb=lowest)
        self._send(Metrics(step, {"val/bpb": bpb}, time.time()))
        tokens = self.around.meta["val_tokens"]
        self._send(
            Line(
                f"step {step:05d} | validation bpb: {bpb:.6f} (lowest {lowest:.6f}) on {tokens:,} tokens"
                f" in {time.perf_counter() - start:.1f}s"
            )
        )

    def _sample(self) -> None:
        if self.world.rank == 0:  # the others wait in their next collective
            for prompt, text in zip(DEFAULT_PROMPTS, samples(self.model, self.tokenizer), strict=True):
                self._send(Line(f"step {self.state.step:05d} | sample: {text!r}"))
                self._send(Note("sample", {"step": self.state.step, "prompt": prompt, "text": text}))

    def _save(self, *, must: bool) -> None:
        start, step = time.perf_counter(), self.state.step
        if self.world.broadcast(self.world.rank == 0 and taken_over(self.around.lease, self.around.lease_holder)):
            raise LeaseError(f"Another driver has taken over {self.around.lease.parent}: this one writes nothing more.")
        meta = self.around.meta | {"step": step, "state": asdict(self.state), "world_size": self.world.world_size}
        try:
            path = checkpoint.save(self.around.checkpoints, self.model, self.optimizer, meta, self.world)
        except CheckpointError as error:
            if must:
                raise
            self._send(Line(f"warning: {error}; training goes on"))
            self._send(Note("save_failed", {"step": step, "error": str(error)}))
            return
        finally:
            self.save_clock.saved(time.perf_counter() - start)
        self.saved_at = step
        if self.world.rank == 0:
            checkpoint.prune(self.around.checkpoints, self.config.save.keep_checkpoints)
        self._send(Saved(step, str(path), asdict(self.state)))
        self._send(Line(f"step {step:05d} | checkpoint saved in {time.perf_counter() - start:.1f}s: {path}"))

    def _due(self, every: int, last: bool) -> bool:
        return every > 0 and (last or self.state.step % every == 0)

    def _send(self, event: Line | Metrics | Note | Saved | Ended) -> None:
        if self.world.rank == 0:
            self.around.sink(event)
