"""Workers that evaluate finished checkpoints while training goes on (`--eval-workers`).

They never take the room of those that train: they ask for their own once training has all it wants and is under way, and
give it up when the crew is made anew. What is owed waits meanwhile: the session knows it, and so do the checkpoints.
"""

import time
from collections import Counter
from collections.abc import Callable

from raychat.on_ray.group import Group, GroupError
from raychat.on_ray.nodes import NodeWatch
from raychat.on_ray.sizing import Patience
from raychat.progress import format_duration
from raychat.training.elsewhere import Owed
from raychat.training.evaluate_checkpoint import evaluate_checkpoint
from raychat.training.session import Session

AGAIN = 3  # times that an evaluation which failed is tried again
TICK_S = 0.2
ROOM_S = 10.0  # that room is waited for before a line says so
TELL_S = 30.0  # between two lines at the end of the run


class Evaluators:
    """One group of workers, kept from the first evaluation on. All methods but `finish` return at once."""

    def __init__(self, session: Session, watch: NodeWatch, *, use_gpu: bool) -> None:
        self.session, self.watch, self.use_gpu = session, watch, use_gpu
        self._owed = session.elsewhere
        self._group: Group | None = None
        self._at: Owed | None = None
        self._failures: Counter[Owed] = Counter()
        self._workers = session.config.eval.eval_workers
        self._room_wanted = Patience(TELL_S)
        self._told = False

    def tick(self, *, may_start: bool) -> None:
        """Take in what has come and go on with the next. `may_start`: training has its room."""
        if self._group is None:
            if may_start and self._owed.pending and self._workers:
                self._ask_for_room(self._workers)
        elif not self._group.started:
            self._start(self._group)
        elif self._at is not None:
            self._collect(self._group, self._at)
        elif self._owed.pending:
            self._at = self._owed.pending[min(self._owed.pending)]
            self._group.begin(evaluate_checkpoint, self._owed.assignment(self._at))

    def make_way(self) -> None:
        """Give the room back at once; what was being evaluated begins anew when there is room again."""
        if self._group is not None:
            self._group.end()
            self._group = self._at = None

    def finish(self, stopped: Callable[[], bool]) -> bool:
        """Wait until everything is evaluated. False when `stopped` says not to: the rest stays owed."""
        if not self._workers:
            return True
        start, patience = time.monotonic(), Patience(TELL_S, first_s=2.0)
        self.watch.look()
        self._workers = max(1, min(self._workers, self.watch.slots()))
        if self._group is not None and not self._group.started:
            self.make_way()  # to ask for what can be had, now that those that trained have left
        while self._owed.pending and not stopped():
            self.tick(may_start=True)
            if patience.due():
                steps = ", ".join(map(str, sorted(self._owed.pending)))
                self.session.echo(
                    f"waiting for the evaluation of the checkpoints of steps {steps}, since "
                    f"{format_duration(patience.waited_s)} (a stop leaves them for the next start)"
                )
            time.sleep(TICK_S)
        self.session.journal.event("evaluation_wait", time_s=time.monotonic() - start)
        self._owed.tidy()
        return not self._owed.pending

    def _ask_for_room(self, workers: int) -> None:
        self._group = Group(workers, use_gpu=self.use_gpu, avoid=self.watch.avoid())
        self._room_wanted, self._told = Patience(TELL_S, first_s=ROOM_S), False

    def _start(self, group: Group) -> None:
        if group.is_room:
            group.start()
        elif self._room_wanted.due() and not self._told:
            self._told = True
            kind = ("GPU" if self.use_gpu else "CPU") + "s" * (group.workers > 1)
            self.session.echo(
                f"evaluation waits for {group.workers} free {kind}: its checkpoints are kept, at the latest until training "
                "has ended and left its own"
            )

    def _collect(self, group: Group, owed: Owed) -> None:
        if not self._owed.wants(owed):  # the run has gone back to before it
            self.make_way()
            return
        try:
            findings = group.answers()
        except GroupError as error:
            self._failed(owed, str(error))
            return
        if findings is not None:
            self._at = None
            self._owed.take(owed, findings[0])

    def _failed(self, owed: Owed, error: str) -> None:
        self.make_way()
        error = self.session.hide(error)
        self._failures[owed] += 1
        if self._failures[owed] > AGAIN:
            self._owed.give_up([owed.step], f"it failed {self._failures[owed]} times, the last time with: {error}")
            return
        self.session.echo(f"the evaluation of step {owed.step} failed ({error}): trying again")
        self.session.journal.event("evaluation_failed", step=owed.step, error=error)
