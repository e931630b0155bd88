"""Keeps a run going through whatever happens to its workers, until it is finished, stopped or given up.

A tick reads the inbox and looks at the machines. Where the same machines are left, Ray Train restarts the crew's
workers in place, which is the fastest; where they are not, the crew is ended and another one takes over, as large as
can be had.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import ray

from raychat.config import Config
from raychat.errors import RaychatError
from raychat.on_ray.cluster import Cluster
from raychat.on_ray.crew import Crew, remove_placement_groups
from raychat.on_ray.inbox import ControllerState, ControllerUp, Hello, Message, Post, Rank
from raychat.on_ray.nodes import NodeWatch, Requests, kill_process
from raychat.on_ray.watchers import Watchers
from raychat.planning import recipe
from raychat.progress import format_duration
from raychat.storage import Store
from raychat.training.events import Metrics, Saved
from raychat.training.job import Job
from raychat.training.retry import Cause
from raychat.training.session import Session

TICK_S = 0.2
LOOK_S = 0.5
INBOX_TIMEOUT_S = 60.0
RETRY_S = 5.0
TELL_S = 30.0  # between two lines while waiting
SILENT_S = 30.0  # a rank that has not beaten for so long hangs
SETTLE_S = 5.0  # room for more workers must last so long before a run is interrupted for it

Ending = Literal["finished", "stopped"]


class RunFailedError(RaychatError):
    """Training failed again and again, or machines did not come; the last checkpoint is good."""

    exit_code = 1


class WorkerError(RaychatError):
    """A RaychatError of a worker, told by the driver."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclasses.dataclass
class Notice:
    """A machine with workers on it that is about to be taken away at `deadline_s`, Unix time."""

    host: str
    deadline_s: float
    saved: bool = False


class Supervisor:
    """Trains the session's run on `cluster`. `stop_asked` turns true when the user wants it saved and stopped."""

    def __init__(
        self,
        session: Session,
        cluster: Cluster,
        inbox: Any,
        *,
        stop_asked: Callable[[], bool],
        on_start: Callable[[], None],
    ) -> None:
        self.session, self.inbox, self.stop_asked, self.on_start = session, inbox, stop_asked, on_start
        self.echo = session.echo
        self.use_gpu = uses_gpus(session.config, cluster)
        self.most, self.fewest = worker_range(session.config, cluster, self.use_gpu)
        self.watch = NodeWatch(self.use_gpu)
        self.requests = Requests(self.use_gpu)
        self.last_save_s: float | None = None
        self._looked_at = 0.0
        self._ended: list[Any] = []  # controllers of the crews before
        self._watchers = Watchers(local=cluster.started_here)
        self._forget_crew()

    def _forget_crew(self) -> None:
        self.ranks: tuple[Rank, ...] = ()
        self.notices: dict[str, Notice] = {}
        self._job: Job | None = None  # begun, and not yet given to a group of workers
        self._training, self._idle_since = False, 0.0
        self._resizing = False
        self._hung: Rank | None = None

    def run(self) -> Ending:
        """Train to the end.

        Raises:
            RaychatError: the run cannot go on.
        """
        try:
            while True:
                if not self._wait_for_machines():
                    return "stopped"
                crew = self._start_crew()
                try:
                    if ending := self._mind(crew):
                        return ending
                finally:
                    crew.end()
                    self._ended += [crew.controller] if crew.controller else []
                    remove_placement_groups(self._ended)
        finally:
            self.requests.set(0)

    def _wait_for_machines(self) -> bool:
        """Until there is room for the fewest workers; False when the user would rather stop."""
        self._look_closely()
        since, told = time.monotonic(), -TELL_S
        while self.watch.slots() < self.fewest:
            waited = time.monotonic() - since
            if told < 0:
                there = self.watch.machines(self.watch.slots()) if self.watch.slots() else 0
                self.session.journal.event("waiting", wanted=self.fewest, there=there)
                self.requests.set(self.most)
            if waited - told >= TELL_S:
                told = waited
                self.echo(self._waiting_line(waited))
            self._check_wait(waited)
            if self.stop_asked() or self._limit_reached():
                return False
            time.sleep(LOOK_S)
            self._look_closely()
        return True

    def _look_closely(self) -> None:
        self.watch.look()
        self.watch.probe()

    def _limit_reached(self) -> bool:
        """Whether the run may cost or last no longer. While it trains, the loop looks at this itself."""
        money, cost = self.session.config.money, self.session.cost_usd()
        hours = self.session.ledger().wall_s / 3600
        if money.budget_usd != -1 and cost is not None and cost >= money.budget_usd:
            self.echo(f"--budget-usd {money.budget_usd:g} is spent: stopping")
            return True
        if money.max_hours != -1 and hours >= money.max_hours:
            self.echo(f"--max-hours {money.max_hours:g} are over: stopping")
            return True
        return False

    def _waiting_line(self, waited_s: float) -> str:
        kind = "GPUs" if self.use_gpu else "CPUs"
        cost = self.session.cost_usd()
        spent = "" if cost is None else f", ${cost:.2f} spent so far"
        return (
            f"waiting for machines: {self.fewest} {kind} are needed and {self.watch.slots()} are there; "
            f"asked for {self.most} {format_duration(waited_s)} ago{spent}"
        )

    def _check_wait(self, waited_s: float) -> None:
        if self.session.lease.lost:
            raise self._fenced()
        limit = self.session.config.cluster.max_wait
        if limit != -1 and waited_s > limit * 3600:
            raise RunFailedError(
                f"The machines for {self.fewest} workers did not come within --max-wait {limit:g} hours. The same command "
                "goes on from the newest checkpoint; --min-workers lets it go on with fewer."
            )

    def _start_crew(self) -> Crew:
        self._forget_crew()
        self.requests.set(0)  # room that was kept free for workers is theirs now
        workers = min(self.most, self.watch.slots())
        self._job = job = self._begin_attempt(workers)
        self.on_start()
        return Crew(
            self.inbox,
            workers=workers,
            use_gpu=self.use_gpu,
            name=f"attempt-{job.attempt}",
            storage=Store.of(self.session.config.run_uri).child("ray"),
            avoid=self.watch.avoid(),
        )

    def _begin_attempt(self, workers: int) -> Job:
        self.session.ended = None
        machines, told = self.watch.machines(workers), 0.0
        while True:
            try:
                return self.session.begin_attempt(
                    world_size=workers, use_gpu=self.use_gpu, nodes=machines, workers_wanted=self.most
                )
            except OSError as error:  # an object store that is out of reach; in the end, the lease is lost over it
                if Store.of(self.session.config.run_uri).is_local:
                    raise
                if time.monotonic() - told >= TELL_S:
                    told = time.monotonic()
                    self.echo(f"the checkpoints cannot be read ({error}): trying again")
                self._check_session()
                time.sleep(RETRY_S)

    def _mind(self, crew: Crew) -> Ending | None:
        """Until the crew has ended or must make way: how the run ended, or None when another crew is to go on."""
        self._idle_since = told = time.monotonic()
        while crew.alive:
            time.sleep(TICK_S)
            if self._read_inbox(crew) or self._look_at_nodes(crew):
                return "stopped" if self.stop_asked() else None
            self._check_session()
            now = time.monotonic()
            if not self._training and now - max(told, self._idle_since) >= TELL_S:
                told = now
                if not self.ranks and self._limit_reached():
                    return "stopped"
                self.echo(f"{crew.workers} workers are starting, since {format_duration(now - self._idle_since)}")
        self._read_inbox(crew)
        self._check_session()
        return self._ending(crew)

    def _ending(self, crew: Crew) -> Ending | None:
        ended = self.session.ended
        if ended and ended.finished:
            return "finished"
        if self.stop_asked():
            return "stopped"  # saved, or dead before it could save
        if ended and self._resizing:
            self.inbox.ask_to_stop.remote(False)
            self._failed("resize", "there is room for more workers")
            return None
        if ended:
            return "stopped"  # a limit of time or money
        if self._job is None:  # else the failure was told before, and the next attempt has begun
            self._failed(self._cause(), crew.error or "the workers ended without a word")
        return None

    def _read_inbox(self, crew: Crew) -> bool:
        """Take in what has come; True when the crew must make way for another one."""
        try:
            post: Post = ray.get(self.inbox.take.remote(), timeout=INBOX_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:  # a loaded machine
            return False
        make_way = False
        for message in post.messages:
            make_way = self._handle(message, crew) or make_way
        return make_way or self._end_silent_rank(post)

    def _handle(self, message: Message, crew: Crew) -> bool:
        match message:
            case ControllerUp(handle):
                crew.controller = handle
            case ControllerState():
                return self._controller_state(message, crew)
            case Hello(group, ranks):
                self._welcome(group, ranks, crew)
            case Metrics():
                self._training = True
                self.session.receive(message)
            case Saved():
                self._saved(message)
                self.session.receive(message)
            case _:
                self.session.receive(message)
        return False

    def _controller_state(self, state: ControllerState, crew: Crew) -> bool:
        self.session.journal.event("ray_train", state=state.name, error=state.error)
        if state.error is None or state.waiting:
            return False
        self._check_session()  # a mistake that a worker has told is no failure to be retried
        self._look_closely()
        self._failed(self._cause(), state.error)
        if self.stop_asked() or self.watch.slots() < crew.workers or self._on_bad_nodes():
            return True
        self._hung, self._training, self._idle_since = None, False, time.monotonic()
        self.ranks = ()  # of the group that is no more
        self._job = self._begin_attempt(crew.workers)
        return False

    def _welcome(self, group: str, ranks: tuple[Rank, ...], crew: Crew) -> None:
        job = self._job or self._begin_attempt(crew.workers)
        self._job, self.ranks = None, ranks
        self.session.journal.event("ranks", ranks=[dataclasses.asdict(rank) for rank in ranks])
        self.inbox.give_job.remote(group, job)
        self.requests.set(self.most - crew.workers, away_from={rank.node_id for rank in ranks})

    def _saved(self, saved: Saved) -> None:
        self.last_save_s = saved.total_s
        for notice in self.notices.values():
            left = notice.deadline_s - time.time()
            if saved.synchronous and not notice.saved:
                notice.saved = True
                when = f"{left:.0f}s before" if left >= 0 else f"{-left:.0f}s after"
                self.echo(f"saved step {saved.step:,} {when} {notice.host} goes; training goes on until then")

    def _cause(self) -> Cause:
        """What the machines say about a failure."""
        if self._hung:
            return "hang"
        if any(self.watch.deadline_s(rank.node_id) for rank in self.ranks):
            return "preempted"
        return "lost" if any(not self.watch.is_alive(rank.node_id) for rank in self.ranks) else "crash"

    def _on_bad_nodes(self) -> bool:
        return self._cause() in ("preempted", "lost")

    def _failed(self, cause: Cause, error: str) -> None:
        reason = self.session.attempt_failed(cause, error)
        if reason:
            raise RunFailedError(f"{reason} The last error: {error}")
        if cause == "resize":
            self.echo(f"{error}: going on with them from the newest checkpoint")
        else:
            self.echo(f"{_WHAT_HAPPENED[cause]}: {error}")
            self.echo("going on from the newest checkpoint")

    def _look_at_nodes(self, crew: Crew) -> bool:
        """Heed notices, losses and new machines; True when the crew must make way for another one."""
        if time.monotonic() - self._looked_at < LOOK_S:
            return False
        self._looked_at = time.monotonic()
        self.watch.look()
        remove_placement_groups(self._ended)
        for node_id in {rank.node_id for rank in self.ranks}:
            deadline = self.watch.deadline_s(node_id)
            if deadline is not None and node_id not in self.notices:
                self._heed(node_id, deadline)
            if deadline is not None and time.time() >= deadline:
                self._failed("preempted", f"{self._names(node_id)} was taken away")
                return True
            if not self.watch.is_alive(node_id):
                self._failed("lost", f"{self._names(node_id)} is gone")
                return True
        if self.ranks:
            self._watchers.keep()
        self._grow(crew)
        return False

    def _heed(self, node_id: str, deadline_s: float) -> None:
        """A machine with workers is about to go: save once, and ask for another one."""
        left, last = deadline_s - time.time(), self.last_save_s
        self.notices[node_id] = Notice(self._names(node_id), deadline_s)
        if last is None:
            fits = "how long a save takes is not known yet"
        else:
            fits = f"a save takes {last:.1f}s, which {'fits' if last < left else 'does not fit: periodic saves have to do'}"
        self.echo(f"notice: {self._names(node_id)} is taken away in {left:.0f}s: saving ({fits})")
        self.session.journal.event("notice", host=self._names(node_id), node_id=node_id, seconds=left, fits=fits)
        self.inbox.ask_to_save.remote()
        leaving = sum(rank.node_id == node_id for rank in self.ranks)
        self.requests.set(self.requests.asked + leaving, away_from={rank.node_id for rank in self.ranks})

    def _names(self, node_id: str) -> str:
        here = [rank for rank in self.ranks if rank.node_id == node_id]
        ranks = ", ".join(str(rank.rank) for rank in here)
        return f"{here[0].host} (rank{'s' if len(here) > 1 else ''} {ranks})"

    def _grow(self, crew: Crew) -> None:
        """Interrupt the run for more workers once there is lasting room for them; it saves before."""
        more = self.requests.granted(for_s=SETTLE_S)
        if self._training and more and not (self._resizing or self.notices or self.stop_asked()):
            self._resizing = True
            self.echo(f"there is room for {more} more workers: saving, to go on with {crew.workers + more}")
            self.inbox.ask_to_stop.remote()

    def _end_silent_rank(self, post: Post) -> bool:
        """Name and end a process that hangs: Ray Train then restarts the workers. True when its machine does not answer."""
        ages = {rank: post.beats.get((rank.group, rank.rank), 0.0) for rank in self.ranks}
        silent = [rank for rank, age in ages.items() if age > SILENT_S]
        if not silent or self._hung or (len(silent) == len(ages) > 1):  # all of them: the network, or the driver itself
            return False
        self._hung = rank = silent[0]
        self.echo(
            f"rank {rank.rank} on {rank.host} (process {rank.pid}) has not been heard of for {ages[rank]:.0f}s: ending it"
        )
        self.session.journal.event("hang", **dataclasses.asdict(rank), silent_s=ages[rank])
        if not kill_process(rank.node_id, rank.pid):
            self._failed("hang", f"rank {rank.rank} on {rank.host} hangs, and so does its machine")
            return True
        return False

    def _check_session(self) -> None:
        if self.session.failure:
            raise WorkerError(self.session.failure.message, self.session.failure.exit_code)
        if self.session.lease.lost:
            raise self._fenced()

    def _fenced(self) -> WorkerError:
        return WorkerError(str(self.session.lease.why_lost), 1)


_WHAT_HAPPENED: dict[Cause, str] = {
    "crash": "a worker failed",
    "preempted": "a machine was preempted",
    "lost": "a machine was lost",
    "hang": "a worker hung",
}


def uses_gpus(config: Config, cluster: Cluster) -> bool:
    """Whether the workers are on GPUs."""
    return wants_gpus(config) or (cluster.gpus > 0 and config.precision.device_type == "")


def wants_gpus(config: Config) -> bool:
    """Whether only GPUs will do, also those that an autoscaler has yet to add."""
    return config.precision.device_type == "cuda" or config.precision.fp8


def worker_range(config: Config, cluster: Cluster, use_gpu: bool) -> tuple[int, int]:
    """The most and the fewest workers that the run may have. `auto`: as many as there are GPUs, and at least one."""
    wanted, fewest = config.cluster.num_workers, config.cluster.min_workers
    if wanted == "auto":
        sequences = recipe(config).total_batch_size // config.model.max_seq_len
        most = max(1, min(cluster.gpus, sequences)) if use_gpu else 1
        return most, min(most, max(1, fewest))
    return wanted, wanted if fewest == -1 else fewest
