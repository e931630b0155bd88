"""Keeps a run going through whatever happens to its workers, until it is finished, stopped or given up.

A tick reads the crew's inbox and looks at the machines. Where the same machines are left, Ray Train restarts the crew's
workers in place, which is the fastest; where they are not, the crew is ended and another one takes over, as large as
can be had.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import ray

from raychat.on_ray.cluster import Cluster
from raychat.on_ray.crew import Crew, remove_placement_groups
from raychat.on_ray.evaluators import Evaluators
from raychat.on_ray.gauges import RunGauges
from raychat.on_ray.inbox import ControllerState, ControllerUp, Hello, Message, Post, Rank
from raychat.on_ray.limits import RunFailedError, WorkerError, check_wait, limit_reached
from raychat.on_ray.node_checks import NodeChecks
from raychat.on_ray.nodes import NodeWatch, kill_process
from raychat.on_ray.shift import TELL_S, WHAT_HAPPENED, Notice, Shift, save_at_s
from raychat.on_ray.sizing import Patience, Room, uses_gpus, worker_range
from raychat.on_ray.watchers import Watchers
from raychat.progress import format_duration
from raychat.storage import Store
from raychat.training.events import Metrics, Note, Saved
from raychat.training.job import Job
from raychat.training.retry import Cause
from raychat.training.session import Session

TICK_S = 0.2
LOOK_S = 0.5
RETRY_S = 5.0
QUIET_WAIT_S = 2.0  # a wait for machines that is over by then is not worth a word
SILENT_S = 30.0  # a rank that has not beaten for so long hangs
ALL_SILENT_S = 120.0  # when none of several has: it may be the network, which often comes back
LAST_WORDS_S = 10.0  # that workers have to end by themselves when the run has ended
RESIZE_AGAIN_S = 60.0  # after a save that failed

Ending = Literal["finished", "stopped"]


class Supervisor:
    """Trains the session's run on `cluster`. `stop_asked` names the signal by which the user wants it saved and stopped."""

    def __init__(
        self,
        session: Session,
        cluster: Cluster,
        checks: NodeChecks,
        *,
        stop_asked: Callable[[], str | None],
        on_start: Callable[[], None],
    ) -> None:
        self.session, self.stop_asked, self.on_start = session, stop_asked, on_start
        self.echo = session.echo
        self.use_gpu = uses_gpus(session.config, cluster, session.starts())
        self.most, self.fewest = worker_range(session.config, cluster, self.use_gpu, session.starts())
        self.checks, self.watch = checks, NodeWatch(self.use_gpu, checks)
        self.room = Room(self.watch, self.use_gpu, most=self.most, fewest=self.fewest)
        self.evaluators = Evaluators(session, self.watch, use_gpu=self.use_gpu)
        self.gauges = RunGauges(session)
        self.own_node = ray.get_runtime_context().get_node_id()
        self.last_save_s: float | None = None
        self.step_s = 0.0
        self._looked_at = 0.0
        self._ended: list[Any] = []  # controllers of the crews before
        self._watchers = Watchers(local=cluster.started_here)

    def run(self) -> Ending:
        """Train to the end.

        Raises:
            RaychatError: the run cannot go on.
        """
        try:
            while True:
                workers = self._wait_for_machines()
                if workers is None:
                    return "stopped"
                shift = self._start_crew(workers)
                try:
                    ending = self._mind(shift)
                finally:
                    shift.crew.end()
                    self._ended += [shift.crew.controller] if shift.crew.controller else []
                    remove_placement_groups(self._ended)
                if ending:
                    return self._evaluate_rest(ending)
        finally:
            self.room.release()
            self.evaluators.make_way()
            self.gauges.end()

    def _evaluate_rest(self, ending: Ending) -> Ending:
        """A run that is trained to its end waits for its evaluations, one that was stopped does not."""

        def stopped() -> bool:
            self._check_session()
            self.gauges.keep(workers=0)
            return self.stop_asked() is not None or limit_reached(self.session)

        return ending if ending == "stopped" or self.evaluators.finish(stopped) else "stopped"

    def _wait_for_machines(self) -> int | None:
        """Until there is room for the fewest workers: how many to begin with; None when the user would rather stop."""
        self.evaluators.make_way()
        patience, told = Patience(TELL_S, first_s=QUIET_WAIT_S), False
        while True:
            self._check_session()
            if self.stop_asked() or limit_reached(self.session):
                return None
            self.watch.look()
            self.watch.probe()
            remove_placement_groups(self._ended)
            self.room.ask()
            if workers := self.room.found():
                return workers
            if patience.due():
                if not told:
                    there = sum(node.slots(self.use_gpu) > 0 for node in self.watch.good())
                    self.session.journal.event("waiting", wanted=self.fewest, there=there)
                told = True
                self.echo(self._waiting_line(patience.waited_s))
            check_wait(self.session, patience.waited_s, fewest=self.fewest)
            self._watchers.keep({self.own_node})
            self.gauges.keep(workers=0)
            time.sleep(LOOK_S if told else TICK_S)

    def _waiting_line(self, waited_s: float) -> str:
        kind = "GPUs" if self.use_gpu else "CPUs"
        cost = self.session.cost_usd()
        spent = "" if cost is None else f", ${cost:.2f} spent so far"
        return (
            f"waiting for machines: at least {self.fewest} free {kind} are needed, the cluster has {self.watch.slots()}; "
            f"asked for {self.most} {format_duration(waited_s)} ago{spent}"
        )

    def _start_crew(self, workers: int) -> Shift:
        self.checks.strict = False  # from now on, training does without a node that does not pass
        job = self._begin_attempt(workers)
        self.on_start()
        self.room.release()  # what was kept free for workers is theirs now
        crew = Crew(
            workers=workers,
            use_gpu=self.use_gpu,
            name=f"attempt-{job.attempt}",
            storage=Store.of(self.session.config.run_uri).child("ray"),
            avoid=self.watch.avoid(),
        )
        return Shift(crew, job, homes={node.node_id for node in self.watch.good()})

    def _begin_attempt(self, workers: int) -> Job:
        self.session.ended = None
        machines, patience = self.watch.machines(workers), Patience(TELL_S)
        while True:
            try:
                return self.session.begin_attempt(
                    world_size=workers, use_gpu=self.use_gpu, nodes=machines, workers_wanted=self.most
                )
            except OSError as error:  # an object store that is out of reach; in the end, the lease is lost over it
                if Store.of(self.session.config.run_uri).is_local:
                    raise
                if patience.due():
                    self.echo(f"the checkpoints cannot be read ({error}): trying again")
                self._check_session()
                time.sleep(RETRY_S)

    def _mind(self, shift: Shift) -> Ending | None:
        """Until the crew has ended or must make way: how the run ended, or None when another crew is to go on."""
        while shift.crew.alive:
            time.sleep(TICK_S)
            make_way = self._read_inbox(shift)
            self._check_session()
            self.gauges.keep(workers=len(shift.ranks) if shift.training else 0)
            self.evaluators.tick(may_start=shift.training and shift.crew.workers == self.most)
            if self.session.ended:
                shift.crew.join(LAST_WORDS_S)
                break
            if self._stop_now(shift):
                return "stopped"
            if make_way or self._look_at_nodes(shift):
                return None
            if not shift.training and shift.since.due():
                if not shift.ranks and limit_reached(self.session):
                    return "stopped"
                self.echo(f"{shift.crew.workers} workers are starting, since {format_duration(shift.since.waited_s)}")
        self._read_inbox(shift)
        self._check_session()
        return self._ending(shift)

    def _stop_now(self, shift: Shift) -> bool:
        """Pass on the user's wish to stop; True when there is nobody who could save."""
        name = self.stop_asked()
        if not name:
            return False
        if not shift.stop_told:
            shift.stop_told = True
            self.echo(f"{name}: saving and stopping (Ctrl-C once more ends at once)")
            shift.crew.inbox.ask_to_stop.remote()
        return not shift.ranks

    def _ending(self, shift: Shift) -> Ending | None:
        ended = self.session.ended
        if ended and ended.finished:
            return "finished"
        if self.stop_asked():
            return "stopped"  # saved, or dead before it could save
        if ended and shift.resizing == "stopping":
            self._failed(shift, "resize", "there is room for more workers")
            return None
        if ended:
            return "stopped"  # a limit of time or money
        if not shift.failure_told:
            self._failed(shift, self._cause(shift), shift.crew.error or "the workers ended without a word")
        return None

    def _read_inbox(self, shift: Shift) -> bool:
        """Take in what has come; True when the crew must make way for another one."""
        post = shift.crew.read()
        make_way = False
        for message in post.messages:
            make_way = self._handle(message, shift) or make_way
        return make_way or self._end_silent_rank(post, shift)

    def _handle(self, message: Message, shift: Shift) -> bool:
        match message:
            case ControllerUp():
                pass
            case ControllerState():
                return self._controller_state(message, shift)
            case Hello(group, ranks):
                self._welcome(group, ranks, shift)
            case _:
                if isinstance(message, Saved):
                    self._saved(message, shift)
                if isinstance(message, Note):
                    self._noted(message, shift)
                if isinstance(message, Metrics):
                    self.step_s = message.values.get("train/dt", self.step_s)
                    self.gauges.told(message)
                self.session.receive(message)
        return False

    def _noted(self, note: Note, shift: Shift) -> None:
        if note.kind == "first_step":
            shift.training = True
        elif note.kind == "save_failed" and shift.resizing == "saving":
            shift.resizing, shift.resize_after = "", time.monotonic() + RESIZE_AGAIN_S

    def _controller_state(self, state: ControllerState, shift: Shift) -> bool:
        self.session.journal.event("ray_train", state=state.name, error=state.error)
        if self.session.ended or state.error is None:
            return False
        self._check_session()  # a mistake that a worker has told is no failure to be retried
        self.watch.look()
        self.watch.probe()
        if state.waiting:
            return True  # there is no room for this crew; perhaps for a smaller one
        self._failed(shift, self._cause(shift), state.error)
        if self.stop_asked() or self.watch.slots() < shift.crew.workers or shift.resizing or self._homes_left(shift):
            return True
        shift.hung, shift.training, shift.since = False, False, Patience(TELL_S, first_s=TELL_S)
        shift.ranks = ()  # of the group that is no more
        shift.job = self._begin_attempt(shift.crew.workers)
        return False

    def _welcome(self, group: str, ranks: tuple[Rank, ...], shift: Shift) -> None:
        job = shift.job or self._begin_attempt(shift.crew.workers)
        shift.job, shift.ranks, shift.failure_told = None, ranks, False
        shift.homes = {rank.node_id for rank in ranks}
        self.session.journal.event("ranks", ranks=[dataclasses.asdict(rank) for rank in ranks])
        shift.crew.inbox.give_job.remote(group, job)
        self.room.ask_more(self.most - shift.crew.workers, away_from=shift.homes)

    def _saved(self, saved: Saved, shift: Shift) -> None:
        self.last_save_s = saved.total_s
        if not saved.synchronous:
            return
        for notice in shift.notices.values():
            left = notice.deadline_s - time.time()
            if notice.asked and not notice.saved:
                notice.saved = True
                when = f"{left:.0f}s before" if left >= 0 else f"{-left:.0f}s after"
                self.echo(f"saved step {saved.step:,} {when} {notice.name} goes; training goes on until then")
        if shift.resizing == "saving":
            shift.resizing = "stopping"
            shift.crew.inbox.ask_to_stop.remote()

    def _cause(self, shift: Shift) -> Cause:
        """What the machines say about a failure."""
        if shift.hung:
            return "hang"
        if any(self.watch.deadline_s(node_id) for node_id in shift.homes):
            return "preempted"
        return "lost" if any(not self.watch.is_alive(node_id) for node_id in shift.homes) else "crash"

    def _homes_left(self, shift: Shift) -> bool:
        """Whether machines of the crew are gone, or about to go."""
        good = {node.node_id for node in self.watch.good()}
        return bool(shift.ranks) and not shift.homes <= good

    def _failed(self, shift: Shift, cause: Cause, error: str) -> None:
        reason = self.session.attempt_failed(cause, error)
        shift.failure_told = True
        if reason:
            raise RunFailedError(f"{reason[0].upper()}{reason[1:]} The last error: {error}")
        if cause == "resize":
            self.echo(f"{error}: going on with them from the newest checkpoint")
        else:
            self.echo(f"{WHAT_HAPPENED[cause]}: {error}; going on from the newest checkpoint")

    def _look_at_nodes(self, shift: Shift) -> bool:
        """Heed notices, losses and new machines; True when the crew must make way for another one."""
        if time.monotonic() - self._looked_at < LOOK_S:
            return False
        self._looked_at = time.monotonic()
        self.watch.look()
        self._watchers.keep({rank.node_id for rank in shift.ranks} | {self.own_node})
        remove_placement_groups(self._ended)
        if not shift.ranks:
            return False
        for node_id in sorted(shift.homes | {self.own_node}):
            deadline = self.watch.deadline_s(node_id)
            if deadline is not None and node_id not in shift.notices:
                self._heed(node_id, deadline, shift)
        for node_id in sorted(shift.homes):
            deadline = self.watch.deadline_s(node_id)
            if deadline is not None and time.time() >= deadline:
                self._failed(shift, "preempted", f"{shift.name(node_id)} was taken away")
                return True
            if not self.watch.is_alive(node_id):
                self._failed(shift, "lost", f"{shift.name(node_id)} is gone")
                return True
        self._save_for_notices(shift)
        self._grow(shift)
        return False

    def _heed(self, node_id: str, deadline_s: float, shift: Shift) -> None:
        """A machine is about to go: plan the save, and ask for another machine."""
        name, left, last = shift.name(node_id), deadline_s - time.time(), self.last_save_s
        at = save_at_s(deadline_s, save_s=last, step_s=self.step_s)
        shift.notices[node_id] = Notice(name, deadline_s, at)
        if last is None:
            fits = "how long a save takes is not known yet"
        else:
            fits = f"a save takes {last:.1f}s, which {'fits' if last < left else 'may not fit'}"
        wait = at - time.time()
        when = f"saving in {wait:.0f}s" if wait >= 1 else "saving"
        self.echo(f"notice: {name} is taken away in {left:.0f}s: {when} ({fits})")
        self.session.journal.event("notice", host=name, node_id=node_id, seconds=left, fits=fits)
        leaving = sum(rank.node_id in shift.notices for rank in shift.ranks)
        self.room.ask_more(self.most - shift.crew.workers + leaving, away_from=shift.homes)

    def _save_for_notices(self, shift: Shift) -> None:
        """Ask for the saves that are due: one for all machines that go at the same time."""
        due = [notice for notice in shift.notices.values() if not notice.asked and time.time() >= notice.save_at_s]
        if due and shift.training:  # before its first step there is nothing that is not saved already
            for notice in due:
                notice.asked = True
            shift.crew.inbox.ask_to_save.remote()

    def _grow(self, shift: Shift) -> None:
        """Interrupt the run for more workers once there is lasting room for them; it saves before."""
        more = self.room.more()
        if not (more and shift.training) or shift.resizing or shift.notices or self.stop_asked():
            return
        if time.monotonic() >= shift.resize_after:
            shift.resizing = "saving"
            self.echo(f"there is room for {more} more workers: saving, to go on with {shift.crew.workers + more}")
            shift.crew.inbox.ask_to_save.remote()

    def _end_silent_rank(self, post: Post, shift: Shift) -> bool:
        """Name and end a process that hangs: Ray Train then restarts the workers. True when the crew must make way."""
        ages = {rank: post.beats.get((rank.group, rank.rank), 0.0) for rank in shift.ranks}
        silent = [rank for rank, age in ages.items() if age > SILENT_S]
        if not silent or shift.hung:
            return False
        if len(silent) == len(ages) > 1 and min(ages.values()) < ALL_SILENT_S:
            return False
        shift.hung, rank = True, silent[0]
        self.echo(
            f"rank {rank.rank} on {rank.host} (process {rank.pid}) has not been heard of for {ages[rank]:.0f}s: ending it"
        )
        self.session.journal.event("hang", **dataclasses.asdict(rank), silent_s=ages[rank])
        if kill_process(rank.node_id, rank.pid):
            return False
        self._failed(shift, "hang", f"rank {rank.rank} on {rank.host} hangs, and its process could not be ended")
        return True

    def _check_session(self) -> None:
        if self.session.failure:
            raise WorkerError(self.session.failure.message, self.session.failure.exit_code)
        if self.session.lease.lost:
            raise WorkerError(str(self.session.lease.why_lost), 1)
