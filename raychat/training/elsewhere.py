"""Evaluations that other workers than those that train make of finished checkpoints, and how they reach the record.

A checkpoint says in its state what is owed of it. `evaluated.json` beside the checkpoints says of which that is settled,
with their bits per byte: old checkpoints are deleted by both, so that none goes before it was evaluated.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raychat.config import Config
from raychat.data.prepare import TokenData
from raychat.errors import CheckpointError
from raychat.planning import recipe
from raychat.storage import Store
from raychat.tracking.journal import Journal
from raychat.training import checkpoint
from raychat.training.evaluate_checkpoint import Assignment, Findings
from raychat.training.evaluating import BPB, CORE
from raychat.training.examiner import CoreTasks
from raychat.training.reporting import bpb_line, core_line, sample_line


@dataclass(frozen=True, eq=False)
class Owed:
    """Evaluations that are owed of one checkpoint; one that is made anew at the same step is another."""

    step: int
    kinds: tuple[str, ...]


class Elsewhere:
    """Kept by the session of a run: what is owed by step, the earliest first, and what came of it."""

    def __init__(
        self, config: Config, data: TokenData, root: Store, journal: Journal, *, echo: Callable[[str], None]
    ) -> None:
        """`root` is the folder of the checkpoints, whose own word is taken for what earlier drivers left to do."""
        self._config, self._data, self._root, self._journal, self._echo = config, data, root, journal, echo
        self._settled = checkpoint.evaluated(root)
        self._lowest: float | None = min((bpb for bpb in self._settled.values() if bpb is not None), default=None)
        self.pending: dict[int, Owed] = {}
        for step in reversed(checkpoint.steps(root)):
            with suppress(CheckpointError, KeyError, TypeError, AttributeError):  # a damaged one
                state = checkpoint.read_meta(root.child(checkpoint.folder_name(step)))["state"]
                self._owe(step, state)
                self._owe_late(step, state)

    def saved(self, step: int, state: Mapping[str, Any]) -> None:
        """A checkpoint of `step` is whole; one that is made again in a replay is not evaluated again."""
        self._owe(step, state)

    def forget_after(self, step: int, *, branched: bool) -> None:
        """The run goes on from `step`: later checkpoints are gone. `branched`: what was found of them is void, too."""
        self.pending = {at: owed for at, owed in self.pending.items() if at <= step}
        if branched and any(at > step for at in self._settled):
            self._settled = {at: bpb for at, bpb in self._settled.items() if at <= step}
            self._write()

    def assignment(self, owed: Owed) -> Assignment:
        """What those who make the evaluations need to know."""
        return Assignment(
            checkpoint=self._root.child(checkpoint.folder_name(owed.step)).address,
            tokens_dir=self._data.manifest.store.address,
            tokenizer_dir=self._data.tokenizer_address,
            config=self._config.flat(),
            kinds=owed.kinds,
        )

    def take(self, owed: Owed, findings: Findings) -> None:
        """Write down what came out, and tell it; unless the run has gone back to before that checkpoint."""
        if not self.wants(owed):
            return
        step = owed.step
        values: dict[str, float | None] = {}
        bpb, core = findings.bpb, findings.core
        if bpb is not None:
            values["val/bpb"] = bpb
            if math.isfinite(bpb):
                self._keep_lowest(bpb)
            else:
                self._journal.event("bad_evaluation", step=step, value=str(bpb))
            seconds = findings.seconds[BPB]
            self._echo(bpb_line(step, bpb, self._lowest, tokens=findings.val_tokens, seconds=seconds))
        if core is not None:
            values |= core.metrics()
            self._echo(core_line(step, core, seconds=findings.seconds[CORE]))
        if values:
            self._journal.log(step, values)
        for prompt, text in findings.samples:
            self._echo(sample_line(step, text))
            self._journal.event("sample", step=step, prompt=prompt, text=text)
        self._journal.event("evaluated", step=step, seconds=findings.seconds)
        self._settle(step, bpb if bpb is not None and math.isfinite(bpb) else None)

    def give_up(self, steps: Iterable[int], reason: str) -> None:
        """Leave the evaluations of `steps` out for good."""
        for step in list(steps):
            self._echo(
                f"warning: the checkpoint of step {step} is not evaluated: {reason}. python jobs/evaluate.py --step {step} "
                "does it, as long as the checkpoint is there"
            )
            self._journal.event("evaluation_given_up", step=step, reason=reason)
            self._settle(step)

    def tidy(self) -> None:
        """Delete the checkpoints that were kept for their evaluation alone; for the driver, when nothing is saved any more."""
        try:
            checkpoint.prune(self._root, self._config.save.keep_checkpoints)
        except OSError as error:
            self._echo(f"warning: old checkpoints in {self._root} could not be deleted: {error}")

    def wants(self, owed: Owed) -> bool:
        """Whether the checkpoint is still part of the run, and its evaluation owed."""
        return self.pending.get(owed.step) is owed

    def _settle(self, step: int, bpb: float | None = None) -> None:
        """Nothing is owed of the checkpoint of `step` any more; it may be deleted unless its `bpb` is the best."""
        self.pending.pop(step, None)
        self._settled[step] = self._settled.get(step) if bpb is None else bpb
        self._write()

    def _owe(self, step: int, state: Mapping[str, Any]) -> None:
        self._keep_lowest(state.get("min_val_bpb"))
        if state.get("owed") and step not in self._settled:
            self.pending[step] = Owed(step, tuple(state["owed"]))

    def _owe_late(self, step: int, state: Mapping[str, Any]) -> None:
        """Of the last checkpoint, what is wanted only since it was made: a CORE bundle that came later, for example."""
        settings = self._config.eval
        owed = state.get("owed")
        if not (settings.eval_workers and owed) or step < recipe(self._config).num_iterations:
            return
        metrics = {BPB: "val/bpb", CORE: "core_metric"}
        wanted = {BPB: settings.eval_every > 0, CORE: CoreTasks.of(self._config) is not None}
        late = [kind for kind in metrics if wanted[kind] and kind not in owed]
        if late := [kind for kind in late if self._journal.last_step(metrics[kind]) != step]:
            before = self.pending[step].kinds if step in self.pending else ()
            self.pending[step] = Owed(step, (*before, *late))

    def _keep_lowest(self, bpb: float | None) -> None:
        self._lowest = min((value for value in (self._lowest, bpb) if value is not None), default=None)

    def _write(self) -> None:
        content = {str(step): bpb for step, bpb in sorted(self._settled.items())}
        try:
            self._root.write_bytes(checkpoint.EVALUATED, json.dumps(content, indent=2).encode())
        except OSError as error:  # its checkpoints stay for longer, and the next one writes all of it
            self._echo(f"warning: {self._root.child(checkpoint.EVALUATED)} cannot be written: {error}")
