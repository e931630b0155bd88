"""When checkpoints are made, and what is said about them. Every rank makes the same calls at the same steps."""

import time
from dataclasses import asdict
from typing import Any

from raychat.config import SaveSettings
from raychat.errors import CheckpointError
from raychat.model import GPT
from raychat.optim import MuonAdamW
from raychat.training.events import Saved
from raychat.training.lease import OTHER_DRIVER, LeaseLostError
from raychat.training.reporting import Reporter
from raychat.training.save_clock import SaveClock
from raychat.training.saver import SaveOutcome, Saver
from raychat.training.state import LoopState, Surroundings
from raychat.training.world import World

INSIST_S, PAUSE_S = 180.0, 10.0  # that a save which must succeed is tried again for, and between two tries


class LastSaveError(CheckpointError):
    """The last checkpoint of an attempt could not be written: the storage's fault, and no mistake in what was given."""

    exit_code = 1


class Saves:
    """The checkpoints of a run: periodic ones while training goes on, and those that are waited for.

    Raises:
        LeaseLostError: on every rank, by `settle` and `now`, when another driver, or a later attempt, has the run.
    """

    def __init__(
        self,
        settings: SaveSettings,
        around: Surroundings,
        model: GPT,
        optimizer: MuonAdamW,
        world: World,
        report: Reporter,
        *,
        saved_at: int | None,
    ) -> None:
        self.settings, self.around, self.world, self.report = settings, around, world, report
        self.model, self.optimizer = model, optimizer
        self.saved_at = saved_at
        """step of the newest checkpoint that is whole, as far as this rank knows; None: there is none"""
        self.fenced = False
        """this rank has learnt that another driver, or a later attempt, has the run"""
        self._begun_at = saved_at
        self._owed = False
        self._synchronous = False
        self._clock = SaveClock(settings.save_every)
        self._saver = Saver(around.checkpoints, world, keep=settings.keep_checkpoints, fence=around.fence)

    def due_by_time(self) -> bool:
        """Whether time asks for a save, and none is in flight: for rank 0 to ask, and for all to agree to."""
        return self._clock.due_by_time() and not self._saver.busy

    def due_at(self, step: int) -> bool:
        """Whether the step count asks for a save, or what has happened: the same on all ranks."""
        return self._clock.due_at(step) or (self._owed and step > 0)

    def best(self, step: int) -> None:
        """The evaluation at `step` is the best so far: a save is due, unless none but the last are wanted.

        One that was made at this step before the evaluation will do: later ones say how good it is.
        """
        self._owed = self._owed or (step not in (0, self._begun_at) and self.settings.save_every != -1)

    def owe(self, step: int) -> bool:
        """Have a checkpoint of `step` made, for others to evaluate; False: there was one before, or nothing was trained."""
        if step in (0, self._begun_at):
            return False
        self._owed = True
        return True

    def periodic(self, state: LoopState) -> None:
        """Begin to save `state`, unless that has been done; an earlier save that is still in flight ends first."""
        if state.step == self._begun_at:
            return
        if self.settings.save_mode == "sync":
            self.now(state, must=False)
        else:
            self.settle()
            self._begin(state, synchronous=False)

    def now(self, state: LoopState, *, must: bool) -> None:
        """Return when `state` is whole on storage, or has failed to get there; one that `must` is tried for minutes.

        Raises:
            LastSaveError: on every rank, when it failed and it `must`.
        """
        if state.step == self._begun_at:
            self._synchronous = True  # a save in flight is waited for from here on
        self.settle()
        if state.step == self.saved_at:
            return
        self._begin(state, synchronous=True)
        self.settle()
        if must:
            self._insist(state)

    def collect(self) -> None:
        """Take in a save that has ended, without waiting for one."""
        self._take(self._saver.finished())

    def settle(self) -> None:
        """Wait for the save in flight; afterwards `saved_at` is the same on all ranks."""
        self._take(self._saver.wait())
        # Ranks may have learnt of an outcome at different times.
        self.saved_at, self.fenced = self.world.broadcast((self.saved_at, self.fenced))
        self.refuse_if_fenced(self.fenced)

    def went_back(self, step: int | None) -> None:
        """The run has gone back to the checkpoint of `step`, or to its beginning.

        What is left out is known for good when the next checkpoint says so: it is due after the next step.
        """
        self.saved_at = self._begun_at = step
        self._owed = True

    def refuse_if_fenced(self, fenced: bool) -> None:
        """Raise LeaseLostError when `fenced`, on which all ranks have agreed."""
        if fenced:
            raise LeaseLostError(
                f"{OTHER_DRIVER} or a later attempt has taken over the run of {self.around.checkpoints.uri}: this one "
                "writes nothing more."
            )

    def close(self) -> None:
        """Wait for the save in flight, and let go of what saving needs."""
        self._saver.close()

    def _insist(self, state: LoopState) -> None:
        """Try again until `state` is saved: an outage of the storage may pass, and this is the work of hours."""
        deadline = time.monotonic() + INSIST_S
        while self.saved_at != state.step:  # the same on all ranks, and the clock is rank 0's
            if not self.world.broadcast(time.monotonic() < deadline):
                raise LastSaveError(
                    f"There is no checkpoint of step {state.step}, the last of this attempt, although it was tried for "
                    f"{INSIST_S:.0f}s; the warnings above say why. Mend that and give the same command: the run goes on "
                    "from the checkpoint before."
                )
            self.report.line(f"the checkpoint of step {state.step} must be written: trying again in {PAUSE_S:g}s")
            time.sleep(PAUSE_S)
            self._begin(state, synchronous=True)
            self.settle()

    def _begin(self, state: LoopState, *, synchronous: bool) -> None:
        facts: dict[str, Any] = {"step": state.step, "state": asdict(state), "world_size": self.world.world_size}
        facts["recent_metrics"] = self.report.recent()
        self._begun_at, self._synchronous, self._owed = state.step, synchronous, False
        self._saver.begin(self.model, self.optimizer, self.around.meta | facts, urgent=synchronous)

    def _take(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        self._clock.saved(outcome.stall_s)
        if outcome.fenced:
            self.fenced = True
        elif outcome.uri is None:
            self.report.line(f"warning: no checkpoint at step {outcome.step}: {outcome.error}")
            self.report.note("save_failed", step=outcome.step, error=outcome.error)
        else:
            self.saved_at = outcome.step
            self._tell(outcome, outcome.uri)

    def _tell(self, outcome: SaveOutcome, uri: str) -> None:
        self.report.send(
            Saved(
                outcome.step,
                uri,
                outcome.state,
                stall_s=outcome.stall_s,
                total_s=outcome.total_s,
                bytes=outcome.bytes,
                synchronous=self._synchronous,
            )
        )
        stall = "" if self._synchronous else f" (training waited {outcome.stall_s:.2f}s)"
        self.report.line(f"step {outcome.step:05d} | checkpoint saved in {outcome.total_s:.1f}s{stall}: {uri}")
