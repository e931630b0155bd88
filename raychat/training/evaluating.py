"""What the loop does where an evaluation is due: makes it, or has a checkpoint saved that other workers evaluate."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

from raychat.config import EvalSettings
from raychat.training.examiner import Between, Examiner
from raychat.training.reporting import Reporter
from raychat.training.saving import Saves
from raychat.training.state import LoopState, Signal

BPB, CORE, SAMPLES = "bpb", "core", "samples"


class Evaluations:
    """Those of a run, on each of its ranks, which make the same calls.

    `ask` says what is asked of any rank. `serve` does it for the state given, and returns what has to wait.
    """

    def __init__(
        self,
        settings: EvalSettings,
        examiner: Examiner,
        saves: Saves,
        report: Reporter,
        *,
        with_core: bool,
        val_tokens: int,
        ask: Callable[[], Signal],
        serve: Callable[[Signal, LoopState], Signal],
    ) -> None:
        self.settings, self.examiner, self.saves, self.report = settings, examiner, saves, report
        self.with_core, self.val_tokens = with_core, val_tokens
        self._ask, self._serve = ask, serve
        self._waiting = Signal.NONE

    def due(self, state: LoopState, last: bool) -> tuple[str, ...]:
        """What is to be evaluated at the step of `state` and has not been; `last`: it is the horizon."""
        if self.settings.eval_workers and state.owed:
            return ()  # the checkpoint of this step says it, and others do it
        begun = state.step > 0
        wanted = {
            BPB: _due(self.settings.eval_every, state.step, last) and state.val_step != state.step,
            CORE: self.with_core
            and begun
            and _due(self.settings.core_metric_every, state.step, last)
            and state.core_step != state.step,
            SAMPLES: begun and _due(self.settings.sample_every, state.step, last),
        }
        return tuple(kind for kind, is_due in wanted.items() if is_due)

    def finished(self, state: LoopState) -> bool:
        """Whether nothing that gives a value is left to do at the horizon, which `state` is at."""
        return not {BPB, CORE}.intersection(self.due(state, last=True))

    def make(self, state: LoopState, last: bool) -> tuple[LoopState, Signal]:
        """Do what is due: the state that knows of it, and what was asked meanwhile and is not served yet.

        A stop that is asked for leaves the rest out.
        """
        due = self.due(state, last)
        if due and self.settings.eval_workers and self.saves.owe(state.step):
            return replace(state, owed=due), Signal.NONE
        self._waiting = Signal.NONE
        makers = {BPB: self._bpb, CORE: self._core, SAMPLES: self._samples}
        for kind in due:
            if (after := makers[kind](state)) is None:
                return state, Signal.STOP
            state = after
        return state, self._waiting

    def _between(self, state: LoopState) -> Between:
        """Hears what is asked while `state` is evaluated."""

        def stops() -> bool:
            if (asked := self._ask()) is Signal.STOP:
                return True
            self._waiting = max(self._waiting, self._serve(asked, state))
            return False

        return stops

    def _bpb(self, state: LoopState) -> LoopState | None:
        """A value that is no number, which JSON has no word for, leaves none behind."""
        start = time.perf_counter()
        if (bpb := self.examiner.bpb(self._between(state))) is None:
            return None
        state = replace(state, val_bpb=bpb if math.isfinite(bpb) else None, val_step=state.step)
        if state.val_bpb is None:
            self.report.note("bad_evaluation", step=state.step, value=str(bpb))
        elif state.min_val_bpb is None or bpb < state.min_val_bpb:
            state = replace(state, min_val_bpb=bpb, min_val_step=state.step)
            self.saves.best(state.step)
        self.report.evaluation(state, bpb, tokens=self.val_tokens, seconds=time.perf_counter() - start)
        return state

    def _core(self, state: LoopState) -> LoopState | None:
        start = time.perf_counter()
        if (result := self.examiner.core(self._between(state))) is None:
            return None
        self.report.core(state.step, result, seconds=time.perf_counter() - start)
        return replace(state, core_metric=result.core_metric, core_step=state.step)

    def _samples(self, state: LoopState) -> LoopState:
        for prompt, text in self.examiner.samples():  # on rank 0; the others wait in their next collective
            self.report.sample(state.step, prompt, text)
        return state


def _due(every: int, step: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)
