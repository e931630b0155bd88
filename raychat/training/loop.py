"""The training loop: batches come in, events go out, orders come in. Every rank runs it and takes the same branches."""

import gc
import socket
import time
from dataclasses import asdict, dataclass, replace

import torch

from raychat.config import Config
from raychat.data.batches import Batch
from raychat.data.tokenizer import Tokenizer
from raychat.model import GPT
from raychat.model.regions import CompiledTraining
from raychat.optim import MuonAdamW
from raychat.optim.schedule import lr_multiplier, muon_momentum, weight_decay_at
from raychat.planning import Recipe, warmup_steps
from raychat.planning.devices import mfu_percent
from raychat.training.bad_steps import MAX_ROLLBACKS, BadStep, BadSteps, DivergedError, load_newest
from raychat.training.device import Resolved, peak_memory_bytes
from raychat.training.evaluating import Evaluations
from raychat.training.events import Ended
from raychat.training.examiner import CoreTasks, Examiner, Validation
from raychat.training.feed import Feed
from raychat.training.memory import MemoryGauge, explained, is_out_of_memory, out_of_memory
from raychat.training.reporting import UNTIMED_STEPS, Reporter, StepTimes
from raychat.training.saving import Saves
from raychat.training.scaler import LossScaler
from raychat.training.spikes import LossSpikes
from raychat.training.state import SMOOTHING, Clock, LoopState, Signal, Surroundings
from raychat.training.stragglers import Stragglers
from raychat.training.world import World

__all__ = ["UNTIMED_STEPS", "Clock", "DivergedError", "LoopState", "Signal", "Surroundings", "Trainer"]


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step: the mean loss, what is asked, and the seconds of each rank for one sequence."""

    loss: float
    asked: Signal
    save_due: bool
    fenced: bool
    rank_seconds: list[float]


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
        self.resolved, self.world, self.around, self.state = resolved, world, surroundings, state
        self.device = next(model.parameters()).device
        self.forward = CompiledTraining(model) if resolved.compile else model
        # On a CPU it shows within seconds whether data, memory and loss are right, before compiling takes its time.
        eager_first = resolved.compile and resolved.device_type == "cpu" and config.precision.compile == "auto"
        self.eager_steps = 1 if eager_first else 0
        self.report = Reporter(config, recipe, surroundings.clock, surroundings.sink, rank=world.rank)
        saved_at = state.step if state.step else None
        self.saves = Saves(config.save, surroundings, model, optimizer, world, self.report, saved_at=saved_at)
        self.scaler = LossScaler.restore(resolved.dtype, state.loss_scale, state.loss_scale_good_steps)
        self.feed = self._open_feed()
        self.bad_steps, self.spikes = BadSteps(config.optim.on_bad_step), LossSpikes()
        self.stragglers = Stragglers(world.gather(socket.gethostname())) if world.world_size > 1 else None
        self.memory, self.times, self.first_step = MemoryGauge(self.device), StepTimes(), True
        self.warming_up = True
        self.evaluations = self._evaluations(tokenizer)

    def _evaluations(self, tokenizer: Tokenizer) -> Evaluations:
        around = self.around
        core = self.world.broadcast(CoreTasks.of(self.config))  # a folder that appears now is for the next attempt
        validation = Validation(passes=around.validation, rounds=around.validation_rounds)
        return Evaluations(
            self.config.eval,
            Examiner(self.model, tokenizer, self.world, validation=validation, core=core, echo=self.report.line),
            self.saves,
            self.report,
            with_core=core is not None,
            val_tokens=around.meta["val_tokens"],
            ask=self._ask,
            serve=self._serve,
        )

    def fit(self) -> bool:
        """Train on. True when the horizon is reached and evaluated, False when the loop was told to stop before."""
        try:
            return self._fit()
        finally:
            self.close()

    def close(self) -> None:
        """End what runs beside training."""
        self.feed.close()
        self.saves.close()
        gc.unfreeze()

    def _open_feed(self) -> Feed:
        return Feed(self.around.open_batches(self.state), self.config.batch.sequences, self.device)

    def _fit(self) -> bool:
        self.report.evaluation_again(self.state)
        # A notice that came while this attempt started is heard before its first step, which may compile for minutes.
        asked = self._ask()
        save_due = False
        while True:
            last = self.state.step == self.recipe.num_iterations
            if self.state.step == self.config.run.stop_at and not last:
                asked = Signal.STOP
            if asked is not Signal.STOP:
                self.state, waiting = self.evaluations.make(self.state, last)
                asked = max(asked, waiting)
            if last or asked is Signal.STOP:
                if self.state.step:
                    self.saves.now(self.state, must=True)
                finished = last and self.evaluations.finished(self.state)
                peak = max(self.world.gather(peak_memory_bytes(self.device)))
                self.report.send(Ended(finished, asdict(self.state), peak))
                return finished
            waiting = self._serve(asked, self.state)
            if save_due or self.saves.due_at(self.state.step):
                self.saves.periodic(self.state)
            asked, save_due = self.train_step()
            asked = max(waiting, asked)

    def _serve(self, asked: Signal, state: LoopState) -> Signal:
        """Save `state` now where that is asked; what has to wait because nothing has been trained yet."""
        if asked is Signal.NONE or state.step == 0:
            return asked
        self.saves.now(state, must=False)
        return Signal.NONE

    def train_step(self) -> tuple[Signal, bool]:
        """Train on the next batch; what is asked after it, and whether a periodic save is due by time."""
        start = time.perf_counter()
        passes = next(self.feed)  # a rank that waits for its data is slow too
        batch = passes.batch
        N, optim = self.recipe.num_iterations, self.config.optim
        up = warmup_steps(self.config, N)
        lrm = lr_multiplier(self.state.step, N, up, optim.warmdown_ratio, optim.final_lr_frac, optim.warmup_from)
        self._schedule(self.state.step, lrm)
        nats = self._accumulate_gradients(passes.rows)
        agreed = self._agree(nats, (time.perf_counter() - start) / len(batch.rows))
        self.optimizer.grad_scale = self.scaler.scale
        with explained("the update", self.device):
            grad_norm = float(self.optimizer.reduce_gradients())
        bad = BadSteps.found(agreed.loss, grad_norm, scaled=self.scaler.can_shrink)
        if bad and self._bad_step(batch, agreed.loss, grad_norm) == "rollback":
            return agreed.asked, False
        if not bad:
            self.bad_steps.good()
            self._watch(agreed)
            if self.scaler.accepts(grad_norm):
                with explained("the update", self.device):
                    self.optimizer.apply_updates()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._advance(batch, None if bad else agreed.loss, time.perf_counter() - start)
        self._tell_step(agreed.loss, lrm, grad_norm, time.perf_counter() - start)
        self.saves.collect()
        self.saves.refuse_if_fenced(agreed.fenced)
        return agreed.asked, agreed.save_due

    def _agree(self, nats: float, seconds: float) -> Agreed:
        """One collective for all that ranks tell each other in a step: sums of `nats`, orders and the ranks' own times."""
        world, asked = self.world, self._poll()
        lead = world.rank == 0
        mine = [seconds if rank == world.rank else 0.0 for rank in range(world.world_size)]
        loss, save, stop, save_due, fenced, *rank_seconds = world.sum(
            [
                nats / self.recipe.total_batch_size,
                asked is Signal.SAVE,
                asked is Signal.STOP,
                lead and self.saves.due_by_time(),
                lead and self.saves.fenced,
                *mine,
            ],
            self.device,
        )
        strongest = Signal.STOP if stop else Signal.SAVE if save else Signal.NONE
        return Agreed(loss, strongest, bool(save_due), bool(fenced), rank_seconds)

    def _ask(self) -> Signal:
        """What is asked of any rank, outside of steps. Every rank calls this equally often."""
        asked = self._poll()
        save, stop = self.world.sum([asked is Signal.SAVE, asked is Signal.STOP], self.device)
        return Signal.STOP if stop else Signal.SAVE if save else Signal.NONE

    def _accumulate_gradients(self, passes: list[torch.Tensor]) -> float:
        """Forward and backward over this rank's rows, a pass (n, T+1) at a time; the sum of nats."""
        precise = torch.float32 if self.device.type == "mps" else torch.float64
        nats = torch.zeros((), dtype=precise, device=self.device)
        weight = self.scaler.scale / self.recipe.total_batch_size
        forward = self.model if self.state.step < self.eager_steps else self.forward
        try:
            for held in passes:
                self.memory.before_pass()
                rows = held.to(self.device, non_blocking=True).long()
                loss = forward(rows[:, :-1], rows[:, 1:], reduction="sum")
                (loss * weight).backward()
                nats += loss.detach()
                self.memory.after_pass(len(rows))
            return nats.item()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            T, size = self.config.model.max_seq_len, self.config.batch.sequences
            raise out_of_memory(size, T, self.memory.read(), self.recipe.total_batch_size // T) from error

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
        return Signal.STOP if self.world.rank == 0 and self._limit_reached() else asked

    def _limit_reached(self) -> bool:
        money, clock = self.config.money, self.around.clock
        cost = clock.cost_usd()
        over_time = money.max_hours > 0 and clock.wall_s() > money.max_hours * 3600
        over_budget = money.budget_usd > 0 and cost is not None and cost > money.budget_usd
        if over_time or over_budget:
            which = f"--max-hours {money.max_hours:g}" if over_time else f"--budget-usd {money.budget_usd:g}"
            self.report.line(f"{which} is reached after {clock.wall_s() / 3600:.2f} h: saving and stopping")
        return over_time or over_budget

    def _bad_step(self, batch: Batch, loss: float, grad_norm: float) -> str:
        """Leave the update of a bad step out, or go back and leave its batch out: which of the two was done.

        Raises:
            DivergedError: on every rank, when the run is to stop.
        """
        cursor = batch.rows_consumed - self.recipe.total_batch_size // self.config.model.max_seq_len
        bad = BadStep(step=self.state.step, cursor=cursor, loss=loss, grad_norm=grad_norm)
        action = self.bad_steps.decide(bad, self.state.skipped)
        facts = {"step": bad.step, "cursor": cursor, "loss": str(loss), "grad_norm": str(grad_norm)}
        self.report.note("bad_step", **facts, action=action)  # as texts: JSON has no such numbers
        if action == "skip":
            self.report.line(f"warning: step {bad.step:05d}: {bad.reason}; this update is left out")
        else:
            self._roll_back(bad)
        return action

    def _roll_back(self, bad: BadStep) -> None:
        """Go back to the newest verified checkpoint, or to the start, and leave the batch of `bad` out from there on."""
        self.optimizer.zero_grad(set_to_none=True)
        self.saves.settle()
        skipped = tuple(sorted({*self.state.skipped, bad.cursor}))
        found = load_newest(
            self.around.checkpoints,
            self.model,
            self.optimizer,
            self.world,
            seed=self.config.run.seed,
            aside=f"damaged-{self.around.meta['attempt']}-{len(skipped)}",
            echo=self.report.line,
        )
        state = LoopState.restore(found.meta["state"]) if found else LoopState()
        self.state = replace(state, skipped=skipped)
        self.saves.went_back(state.step if found else None)
        self.scaler = LossScaler.restore(self.resolved.dtype, state.loss_scale, state.loss_scale_good_steps)
        self.spikes = LossSpikes()
        self.feed.close()
        self.feed = self._open_feed()
        self.report.line(
            f"warning: step {bad.step:05d}: {bad.reason}. Going back to step {state.step}; the batch at row {bad.cursor:,} "
            f"is left out from now on (rollback {len(skipped)} of at most {MAX_ROLLBACKS})"
        )
        self.report.note(
            "rollback",
            from_step=state.step,
            bad_step=bad.step,
            cursor=bad.cursor,
            reason=f"step {bad.step}: {bad.reason}",
        )
        self.report.evaluation_again(self.state)

    def _watch(self, agreed: Agreed) -> None:
        """Name a loss that stands out, and ranks that are slow."""
        step = self.state.step
        if (mean := self.spikes.observe(agreed.loss)) is not None:
            self.report.line(
                f"warning: step {step:05d}: the loss {agreed.loss:.4f} is a spike above a mean of {mean:.4f}"
            )
            self.report.note("loss_spike", step=step, loss=agreed.loss, mean=mean)
        for slow in self.stragglers.observe(step, agreed.rank_seconds) if self.stragglers else ():
            self.report.line(
                f"warning: rank {slow.rank} on {slow.host} is slow: {slow.seconds * 1000:.1f} ms a sequence, and the median "
                f"rank takes {slow.median_s * 1000:.1f} ms"
            )
            self.report.note("slow_rank", step=step, **asdict(slow))

    def _advance(self, batch: Batch, loss: float | None, dt: float) -> None:
        """Count a step; `loss` is None when its update was left out."""
        state, peak = self.state, self.resolved.peak
        tok_per_sec = self.recipe.total_batch_size / dt
        shown = state.smoothed_loss() if loss is None else loss
        self.state = replace(
            state,
            step=state.step + 1,
            owed=(),
            rows_consumed=batch.rows_consumed,
            epoch=batch.epoch,
            smooth_loss=SMOOTHING * state.smooth_loss + (1 - SMOOTHING) * shown,
            train_loss=state.train_loss if loss is None else loss,
            total_training_time_s=state.total_training_time_s + self.times.add(dt),
            step_time_s=state.step_time_s + dt,
            tok_per_sec=tok_per_sec,
            mfu=mfu_percent(
                self.recipe.flops_per_token, tok_per_sec, peak.flops if peak else None, self.world.world_size
            ),
            loss_scale=self.scaler.scale if self.scaler.active else None,
            loss_scale_good_steps=self.scaler.good_steps,
        )

    def _tell_step(self, loss: float, lrm: float, grad_norm: float, dt: float) -> None:
        step = self.state.step - 1
        if self.first_step:
            self.report.note("first_step", step=step, step_time_s=self.state.step_time_s)
        if self.warming_up and step >= self.eager_steps:
            self.warming_up = False
            self.around.after_warm_up()
            # What is there now stays: the collector, which stops all threads, need not look at it again.
            gc.collect()
            gc.freeze()
            if not self.first_step:
                self.report.note("compiled", step=step, step_s=dt)
        self.first_step = False
        if step % self.config.run.log_every == 0 or self.state.step == self.recipe.num_iterations:
            spread = self.stragglers.spread if self.stragglers else None
            self.report.step(
                self.state, loss=loss, lrm=lrm, grad_norm=grad_norm, dt=dt, spread=spread, mean_s=self.times.mean_s()
            )
