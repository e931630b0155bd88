"""The keeper of a run directory: decides where a run starts, receives its events, and says how it ended.

There is one per run: the driver of a Ray job has it, or rank 0 under torchrun. It holds the lease, the journal, the
summary, and the mirror of a run that is kept in an object store; the training processes only send events.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raychat.atomic import write_json
from raychat.checks import require
from raychat.config import Config
from raychat.data.prepare import TokenData, check_writable
from raychat.planning import model_shape, param_counts, recipe
from raychat.storage import Store
from raychat.tracking.figures import loss_curve
from raychat.tracking.journal import Journal, read_journal
from raychat.tracking.ledger import EVALUATION_TIMES, Book, Ledger
from raychat.tracking.summary import Status, Summary
from raychat.training import checkpoint, outcome
from raychat.training.elsewhere import Elsewhere
from raychat.training.events import Ended, Event, Failed, Line, Metrics, Note, Saved
from raychat.training.examiner import CoreTasks, check_core
from raychat.training.facts import RunFacts
from raychat.training.forecasting import Forecast
from raychat.training.fresh import set_aside
from raychat.training.hooks import hook_variables, run_hook
from raychat.training.job import Job
from raychat.training.lease import Lease, LeaseLostError
from raychat.training.mirror import Mirror
from raychat.training.retry import Cause, give_up
from raychat.training.secrets import Secrets
from raychat.training.space import check_space
from raychat.training.start import check_start, find_start

PUSH_S = 30.0  # for the mirror to send the rest when the run has ended


class Session:
    """Opened by `Session(...)`, which takes the lease; each try at training is an attempt; `close` writes the summary.

    Raises:
        LeaseError: when another driver is at work in the run directory.
        CheckpointError: when the run cannot go on with this configuration.
        ConfigError: when the run directory cannot be written to or has too little space.
    """

    def __init__(
        self, config: Config, data: TokenData, *, echo: Callable[[str], None], eval_workers: bool = False
    ) -> None:
        """`eval_workers`: whoever keeps this session has others evaluate what is `elsewhere.pending`."""
        self.config, self.data = config, data
        require(
            eval_workers or not config.eval.eval_workers,
            f"--eval-workers {config.eval.eval_workers} needs Ray, which python -m raychat.training is without: leave it "
            "out, or use jobs/pretrain.py.",
        )
        self._secrets = Secrets(config)
        self.hide: Callable[[str], str] = self._secrets.hide
        self.echo: Callable[[str], None] = lambda text: echo(self.hide(text))
        self.recipe = recipe(config)
        self._facts = RunFacts(config, self.recipe, data, self._secrets)
        self.run_dir, store = config.run_dir, Store.of(config.run_uri)
        if config.run.fresh:
            set_aside(config, self.echo)
        check_writable(self.run_dir)
        if not store.is_local:
            store.check_usable()
        self.lease = Lease(store)
        self.lease.acquire(self.echo)
        self.book, self.events = Book(), list[Mapping[str, Any]]()
        self.mirror = Mirror(self.run_dir, store, echo=self.echo, allowed=lambda: not self.lease.lost)
        try:
            self.mirror.pull(fresh=config.run.fresh)
            self.checkpoints = store.child("checkpoints")
            check_space(store, param_counts(model_shape(config.model)).total)
            self.start = find_start(config, self.checkpoints, echo=self.echo)
            self.changed = check_start(config, data, self.start, echo=self.echo)
            self.journal = Journal(self.run_dir / "metrics.jsonl", driver=self.lease.holder, reader=self._take_in)
            self.forecast = Forecast(config, data, self.run_dir, on_ray=eval_workers, echo=self.echo)
            self.core = CoreTasks.of(config)
            self.elsewhere = Elsewhere(config, data, self.checkpoints, self.journal, echo=self.echo)
            if not self.done:
                check_core(config, self.core, self.echo)
            self.mirror.start()
        except BaseException:
            self.lease.release()
            raise
        self.state: dict[str, Any] = self.start.meta["state"] if self.start else {}
        self.peak_memory_bytes: int | None = None
        self.ended: Ended | None = None
        self.failure: Failed | None = None
        self._given_up: str | None = None
        self._records: list[dict[str, Any]] | None = None
        self._first_attempt = True
        self._resolved: dict[str, Any] | None = None
        self._steps_done = 0
        self._step_time_s: float | None = None
        """the loop's own clock at the last step of this attempt that was told"""

    @property
    def done(self) -> bool:
        """Whether the run has nothing left to do."""
        if self.start is None or self.start.step < self.recipe.num_iterations:
            return False
        # One that was told to stop in its last evaluation still owes it.
        last, state, journal = self.start.step, self.start.meta["state"], self.journal
        settings = self.config.eval
        if settings.eval_workers and (state.get("owed") or self.elsewhere.pending):
            return not self.elsewhere.pending
        bpb = settings.eval_every == -1 or last in (state.get("val_step"), journal.last_step("val/bpb"))
        core = self.core is None or last in (state.get("core_step"), journal.last_step("core_metric"))
        return bpb and core

    def done_line(self) -> str:
        """What to tell a user whose run has nothing left to do."""
        return outcome.done_line(self.run_dir, self.start.step if self.start else 0, self.state.get("val_bpb"))

    def starts(self) -> list[Mapping[str, Any]]:
        """The events that began the run's attempts so far, those of earlier drivers too."""
        return [event for event in self.events if event["event"] == "start"]

    def begin_attempt(self, *, nodes: int = 1, **facts: Any) -> Job:
        """What the ranks need for the next attempt, from the newest good checkpoint.

        The attempt holds `nodes` machines, which are paid for; `facts` go into the journal besides.

        Raises:
            LeaseLostError: when the run is another driver's by now; nothing has been changed then.
            OSError: when the checkpoints are out of reach.
        """
        if self.lease.lost:
            raise LeaseLostError(str(self.lease.why_lost))
        attempt = 1 + len(self.starts())
        rollback = self.config.run.resume_from_step >= 0 and self._first_attempt
        if not self._first_attempt:
            self.start = checkpoint.newest(self.checkpoints, echo=self.echo)
        self.state = self.start.meta["state"] if self.start else {}
        step = self.start.step if self.start else 0
        self._steps_done, self._step_time_s = step, None
        # A damaged checkpoint left in place would count as the newest when old ones are pruned.
        aside = f"{'abandoned' if rollback else 'damaged'}-{attempt}"
        if later := checkpoint.set_aside_after(self.checkpoints, step if self.start else -1, aside):
            self.echo(f"checkpoints of steps {', '.join(map(str, later))} moved to {aside}/")
        checkpoint.prune_orphans(self.checkpoints)
        branched = self._first_attempt and (rollback or bool(self.changed))
        self.elsewhere.forget_after(step if self.start else -1, branched=branched)
        if not self.config.eval.eval_workers:
            self.elsewhere.give_up(self.elsewhere.pending, "--eval-workers is 0 now")
        replayed = max(0, self.journal.last_step("train/loss") + 1 - step)
        if replayed and branched:
            self.journal.event("branch", from_step=step)  # what was logged from here on is of another training
            replayed = 0
        self._first_attempt = False
        self._log_unread(step)
        begun = {"attempt": attempt, "resume_step": step, "replayed": replayed, "nodes": nodes}
        self.journal.event("start", **begun, productive_s=self.state.get("step_time_s", 0.0), **facts)
        self._write_config()
        self.forecast.begin(world_size=facts.get("world_size", 1), nodes=nodes)
        before = self.ledger()
        return Job(
            config=self.config.flat(),
            tokens_dir=self.data.manifest.store.address,
            tokenizer_dir=self.data.tokenizer_address,
            checkpoint=self.checkpoints.child(checkpoint.folder_name(step)).address if self.start else None,
            attempt=attempt,
            attempt_started=time.time(),
            wall_before_s=before.wall_s,
            cost_before_usd=before.cost_usd or 0.0,
            nodes=nodes,
            lease_holder=self.lease.holder,
            journal_offset=self.journal.offset,
        )

    def _log_unread(self, step: int) -> None:
        """The metrics before `step` that were told when nobody read them any more: the checkpoint has them, too."""
        for told in self.start.meta.get("recent_metrics", ()) if self.start else ():
            if told["step"] < step:
                self.journal.log(told["step"], told["values"], told["time_s"])

    def attempt_failed(self, cause: Cause, error: str) -> str | None:
        """Write down that an attempt ended before its time; why the run must be given up, or None to try again."""
        if self.lease.lost:
            return None
        facts = {"cause": cause, "step": self._steps_done, "error": self.hide(error)}
        self.journal.event("failure", **facts, step_time_s=self._step_time_s)
        limits = self.config.cluster
        reason = give_up(self.events, max_failures=limits.max_failures, max_preemptions=limits.max_preemptions)
        self._given_up = reason and f"{reason} The last error: {facts['error']}"
        return reason

    def receive(self, event: Event) -> None:
        """Take in what a training process tells."""
        if self.lease.lost:
            self.failure = Failed(str(self.lease.why_lost), 1)
            return
        match event:
            case Line(text):
                self.echo(text)
            case Metrics():
                self._receive_metrics(event)
            case Note():
                self._receive_note(event)
            case Saved():
                self.state = event.state
                fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
                del fields["state"]
                self.journal.event("checkpoint", **fields, productive_s=event.state["step_time_s"])
                self.elsewhere.saved(event.step, event.state)
                self.mirror.push_soon()
            case Ended():
                self.ended, self.state = event, event.state
                self.peak_memory_bytes = event.peak_memory_bytes
            case Failed():
                self.failure = event

    def _receive_metrics(self, event: Metrics) -> None:
        if "train/loss" in event.values:
            self._steps_done = event.step + 1
        self._step_time_s = event.values.get("time/productive", self._step_time_s)
        news = self.journal.log(event.step, event.values, event.time_s)
        evaluated_s = sum(event.values.get(name, 0.0) for name in EVALUATION_TIMES)
        if not news and evaluated_s:  # in a replay, whose metrics a journal does not repeat
            self.journal.event("evaluated_again", step=event.step, time_s=evaluated_s)

    def _receive_note(self, note: Note) -> None:
        fields: dict[str, Any] = {
            name: self.hide(value) if isinstance(value, str) else value for name, value in note.fields.items()
        }
        match note.kind:
            case "resolved":
                self._resolved = fields
                self._write_config()
                self.forecast.found(fields)
            case "rollback":
                self.journal.event("rollback", **fields)
                self.journal.event("branch", from_step=fields["from_step"])
                self.elsewhere.forget_after(fields["from_step"], branched=True)
                self._steps_done, self._step_time_s = fields["from_step"], None
            case _:
                self.journal.event(note.kind, **fields)

    def ledger(self) -> Ledger:
        """Where time and money went until now."""
        now = {"event": "now", "time": time.time(), "driver": self.lease.holder}
        return self.book.closed(self._price, last=now)

    def cost_usd(self) -> float | None:
        """Dollars until now; None without a price."""
        return None if self._price is None else self.ledger().cost_usd

    @property
    def _price(self) -> float | None:
        price = self.config.money.price_per_hour
        return None if price == -1 else price

    def _take_in(self, record: Mapping[str, Any]) -> None:
        """Keep what is needed of each record: a journal grows too large to be read again at every restart."""
        self.book.take(record)
        if record.get("event", "journal") != "journal":
            self.events.append(record)

    def tracking_facts(self) -> dict[str, Any]:
        """What MLflow is told about the run besides its metrics: name, params and the dataset."""
        return self._facts.for_tracking()

    def close(
        self,
        status: Status,
        *,
        mlflow_run_id: str | None = None,
        error: str | None = None,
        finish_tracking: Callable[[Summary], None] | None = None,
    ) -> Summary:
        """Write the loss curve and `summary.json`, give the lease back, run the user's hook, and return the summary.

        What cannot be written is warned of, and the rest is done. `error` says why the run failed, where the session was
        not told; `finish_tracking` gets the summary when it is written, and what it writes reaches the store of the run.
        """
        try:
            if self.lease.ask():
                with self._warned("the end of the journal"):
                    self.journal.close()
                return self._summary(status, mlflow_run_id, error)
            summary = self._journal_end(status, mlflow_run_id, error)
            with self._warned("the loss curve"):
                self._draw(status)
            with self._warned("the summary"):
                summary.write(self.run_dir / "summary.json")
            with self._warned("the end of tracking"):
                if finish_tracking:
                    finish_tracking(summary)
        finally:
            self._let_go()
        self._run_hook(summary)
        return summary

    @contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        """An error of the disk in this block is worth a warning: it must not take the place of the run's own."""
        try:
            yield
        except OSError as error:
            self.echo(f"warning: {what} cannot be written: {error}")

    def artifacts(self) -> list[Path]:
        """Small files that say what the run was and how it went."""
        names = ("config.json", "plan.json", "summary.json", "loss_curve.png")
        return [path for name in names if (path := self.run_dir / name).exists()]

    def closing_lines(self, summary: Summary) -> list[str]:
        """How the run ended, for the console."""
        return outcome.closing_lines(summary, self.run_dir, self._all_records())

    def abort(self) -> None:
        """Give the lease back without a word about the run: nothing was tried."""
        with self._warned("the end of the journal"):
            self.journal.close()
        self._let_go()

    def _let_go(self) -> None:
        with self._warned("the rest of the run"):
            self.mirror.close(PUSH_S)
        self.lease.release()

    def _journal_end(self, status: Status, mlflow_run_id: str | None, error: str | None) -> Summary:
        """The last event, and ledger and forecast as metrics, by which MLflow learns of them; the summary, not yet written."""
        survived = self.state.get("step_time_s", 0.0)
        why = {"error": self._why(error), "retry_helps": self._may_pass} if status == "failed" else {}
        self.journal.event("end", status=status, productive_s=survived, step_time_s=self._step_time_s, **why)
        summary = self._summary(status, mlflow_run_id, error)
        last = outcome.last_metrics(self.book.closed(self._price), summary)
        self.journal.log(max(0, self.journal.high_water), last)
        with self._warned("the end of the journal"):
            self.journal.close()
        return summary

    @property
    def _may_pass(self) -> bool:
        """Whether a run that failed may yet succeed as it is: neither a worker nor the count of its failures denies it."""
        return self.lease.lost or (self.failure is None and self._given_up is None)

    def _why(self, error: str | None) -> str | None:
        """Why the run failed: what a worker said, why it was given up, or else `error`."""
        why = self.failure.message if self.failure else self._given_up or error
        return why and self.hide(why)

    def _draw(self, status: Status) -> None:
        records = self._all_records()
        if any("train/loss" in record for record in records):
            loss_curve(records, self.run_dir / "loss_curve.png", title=f"{self.config.model_tag} ({status})")

    def _all_records(self) -> list[dict[str, Any]]:
        """The metrics of the run, for its end: read once, when nothing is written any more."""
        if self._records is None:
            try:
                self._records = read_journal(self.journal.path)
            except OSError as error:
                self.echo(f"warning: {self.journal.path} cannot be read: {error}")
                self._records = []
        return self._records

    def _summary(self, status: Status, mlflow_run_id: str | None, error: str | None) -> Summary:
        saved: list[int] = []
        try:
            saved = checkpoint.steps(self.checkpoints)
        except OSError as problem:
            self.echo(f"warning: the checkpoints cannot be listed: {problem}")
        return outcome.summarize(
            status,
            self.config,
            self.recipe,
            state=self.state,
            records=self._all_records(),
            events=self.events,
            ledger=self.book.closed(self._price),
            peak_memory_bytes=self.peak_memory_bytes,
            checkpoint=self.checkpoints.child(checkpoint.folder_name(saved[0])).uri if saved else None,
            mlflow_run_id=mlflow_run_id,
            error=self._why(error),
            retry_helps=self._may_pass,
            forecast=lambda summary: self.forecast.compare(summary, self.events),
        )

    def _run_hook(self, summary: Summary) -> None:
        if not self.config.run.on_event:
            return
        variables = hook_variables(
            summary, self.run_dir, model_tag=self.config.model_tag, status_line=self.closing_lines(summary)[0]
        )
        run_hook(self.config.run.on_event, variables, echo=self.echo)

    def _write_config(self) -> None:
        with self._warned("the configuration"):
            write_json(self.run_dir / "config.json", self._facts.for_file(self._resolved))
