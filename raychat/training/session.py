"""The keeper of a run directory: decides where a run starts, receives its events, and says how it ended.

There is one per run: the driver of a Ray job has it, or rank 0 under torchrun. It holds the lease, the journal and the
summary; the training processes only send events.
"""

import dataclasses
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from raychat.atomic import write_json
from raychat.config import Config
from raychat.data.prepare import TokenData, check_writable
from raychat.errors import CheckpointError, ConfigError, RaychatError
from raychat.planning import make_plan, model_shape, param_counts, recipe
from raychat.progress import format_duration
from raychat.tracking.figures import loss_curve
from raychat.tracking.journal import Journal, read_journal, records_from
from raychat.tracking.summary import Summary
from raychat.training import checkpoint
from raychat.training.build import Job
from raychat.training.changes import check_changes
from raychat.training.events import Ended, Event, Failed, Line, Metrics, Note, Saved
from raychat.training.lease import Lease
from raychat.training.loop import UNTIMED_STEPS

FORMAT = 1


class Session:
    """Opened by `Session(...)`, which takes the lease; each try at training is an attempt; `close` writes the summary.

    Raises:
        LeaseError: when another driver is at work in the run directory.
        CheckpointError: when the run cannot go on with this configuration.
        ConfigError: when the run directory cannot be written to or has too little space.
    """

    def __init__(self, config: Config, data: TokenData, *, echo: Callable[[str], None]) -> None:
        self.config, self.data, self.echo = config, data, echo
        self.recipe = recipe(config)
        self.run_dir = config.run_dir
        if config.run.fresh:
            _set_aside(self.run_dir, echo)
        check_writable(self.run_dir)
        self.lease = Lease(self.run_dir)
        self.lease.acquire()
        try:
            self.checkpoints = self.run_dir / "checkpoints"
            _check_space(self.run_dir, param_counts(model_shape(config.model)).total)
            self.start = self._find_start()
            self.changed = self._check_start()
            self.journal = Journal(self.run_dir / "metrics.jsonl")
        except BaseException:
            self.lease.release()
            raise
        self.state: dict[str, Any] = self.start.meta["state"] if self.start else {}
        self.peak_memory_bytes: int | None = None
        self.ended: Ended | None = None
        self.failure: Failed | None = None
        self._first_attempt = True
        self._resolved: dict[str, Any] | None = None

    @property
    def done(self) -> bool:
        """Whether the run has nothing left to do."""
        return self.start is not None and self.start.step >= self.recipe.num_iterations

    def done_line(self) -> str:
        """What to tell a user whose run has nothing left to do."""
        step, bpb = (self.start.step, self.state.get("val_bpb")) if self.start else (0, None)
        return (
            f"done: {self.run_dir} reached its horizon of {step:,} steps before"
            + (f" (val bpb {bpb:.4f})" if bpb is not None else "")
            + ". --fresh starts over; a longer horizon with --allow-config-change goes on."
        )

    def begin_attempt(self, **facts: Any) -> Job:
        """What the ranks need for the next attempt, from the newest good checkpoint. `facts` go into the journal."""
        starts, wall_before = self._history()
        attempt = len(starts) + 1
        rollback = self.config.run.resume_from_step >= 0 and self._first_attempt
        if not self._first_attempt:
            self.start = checkpoint.newest(self.checkpoints, echo=self.echo)
        step = self.start.step if self.start else 0
        # A damaged checkpoint left in place would count as the newest when old ones are pruned.
        aside = f"{'abandoned' if rollback else 'damaged'}-{attempt}"
        if later := checkpoint.set_aside_after(self.checkpoints, step if self.start else -1, aside):
            self.echo(f"checkpoints of steps {', '.join(map(str, later))} moved to {aside}/")
        logged = [record["step"] for record in read_journal(self.journal.path) if "train/loss" in record]
        replayed = max(0, max(logged, default=-1) + 1 - step)
        if replayed and self._first_attempt and (rollback or self.changed):
            self.journal.event("branch", from_step=step)  # what was logged from here on is of another training
            replayed = 0
        self._first_attempt = False
        self.journal.event(
            "start", attempt=attempt, driver=self.lease.holder, resume_step=step, replayed=replayed, **facts
        )
        self._write_config()
        return Job(
            config=self.config.flat(),
            tokens_dir=str(self.data.manifest.folder),
            tokenizer_dir=str(self.data.tokenizer_dir),
            checkpoint=str(self.start.path) if self.start else None,
            attempt=attempt,
            attempt_started=time.time(),
            wall_before_s=wall_before,
            lease_holder=self.lease.holder,
            journal_offset=self.journal.offset,
        )

    def receive(self, event: Event) -> None:
        """Take in what a training process tells."""
        if self.lease.lost:
            self.failure = Failed(f"Another driver has taken over {self.run_dir}: this one writes nothing more.", 1)
            return
        match event:
            case Line(text):
                self.echo(text)
            case Metrics(step, values, time_s):
                self.journal.log(step, values, time_s)
            case Note("resolved", fields):
                self._resolved = fields
                self._write_config()
            case Note(kind, fields):
                self.journal.event(kind, **fields)
            case Saved(step, path, state):
                self.state = state
                self.journal.event("checkpoint", step=step, path=path)
            case Ended():
                self.ended, self.state = event, event.state
                self.peak_memory_bytes = event.peak_memory_bytes
            case Failed():
                self.failure = event

    def tracking_facts(self) -> dict[str, Any]:
        """What MLflow is told about the run besides its metrics: name, params and the dataset."""
        config, data = self.config, self.data
        return {
            "run_name": config.run.run or config.model_tag,
            "params": config.flat() | dataclasses.asdict(self.recipe),
            "dataset": {
                "name": data.corpus.name,
                "source": config.data.corpus or data.corpus.name,
                "digest": data.manifest.fingerprint,
            },
        }

    def close(self, status: Literal["finished", "failed", "stopped"], *, mlflow_run_id: str | None = None) -> Summary:
        """Write the loss curve and `summary.json`, give the lease back, and return the summary."""
        try:
            if self.lease.lost:
                return self._summary(status, [], mlflow_run_id)
            self.journal.event("end", status=status)
            self.journal.close()
            records = read_journal(self.journal.path)
            if records:
                loss_curve(records, self.run_dir / "loss_curve.png", title=f"{self.config.model_tag} ({status})")
            summary = self._summary(status, records, mlflow_run_id)
            summary.write(self.run_dir / "summary.json")
        finally:
            self.lease.release()
        return summary

    def artifacts(self) -> list[Path]:
        """Small files that say what the run was and how it went."""
        names = ("config.json", "plan.json", "summary.json", "loss_curve.png")
        return [path for name in names if (path := self.run_dir / name).exists()]

    def closing_lines(self, summary: Summary) -> list[str]:
        """How the run ended, for the console."""
        bpb = [r["val/bpb"] for r in read_journal(self.journal.path) if r.get("val/bpb") is not None]
        facts = [f"step {summary.step or 0:,} of {summary.num_iterations or 0:,}"]
        if bpb:
            facts.append(f"val bpb {bpb[0]:.4f} -> {bpb[-1]:.4f}")
        if summary.tokens:
            facts.append(f"{summary.tokens:,} tokens")
        if summary.tok_per_sec:
            facts.append(f"{summary.tok_per_sec:,.0f} tok/s")
        facts.append(f"{format_duration(summary.wall_time_s or 0)} wall time, goodput {summary.goodput or 0:.0%}")
        if summary.cost_usd is not None:
            facts.append(f"${summary.cost_usd:.2f}")
        lines = [f"{summary.status}: {', '.join(facts)}", f"  summary    {self.run_dir / 'summary.json'}"]
        if (curve := self.run_dir / "loss_curve.png").exists():
            lines.append(f"  loss curve {curve}")
        if summary.checkpoint:
            lines.append(f"  checkpoint {summary.checkpoint}")
        return lines

    def abort(self) -> None:
        """Give the lease back without a word about the run: nothing was tried."""
        self.journal.close()
        self.lease.release()

    def _find_start(self) -> checkpoint.Checkpoint | None:
        wanted = self.config.run.resume_from_step
        if wanted < 0:
            return checkpoint.newest(self.checkpoints, echo=self.echo)
        there = checkpoint.steps(self.checkpoints)
        if wanted not in there:
            raise CheckpointError(
                f"--resume-from-step {wanted}: {self.checkpoints} holds "
                + (
                    f"the steps {', '.join(map(str, sorted(there)))}."
                    if there
                    else "no checkpoint: leave it out to start at the beginning."
                )
            )
        return checkpoint.verify(self.checkpoints / checkpoint.folder_name(wanted))

    def _check_start(self) -> list[str]:
        if self.start is None:
            return [] if self._begun_alike() else ["what was begun here without a checkpoint"]
        run = self.config.run
        changed = check_changes(
            self.start.meta["config"],
            self.config,
            old_fingerprint=self.start.meta["fingerprint"],
            new_fingerprint=self.data.manifest.fingerprint,
            permitted=run.allow_config_change or run.resume_from_step >= 0,
        )
        if changed:
            self.echo(f"going on with other settings: {'; '.join(changed)}")
        T, lanes = self.config.model.max_seq_len, self.start.meta["lanes"]
        if self.recipe.total_batch_size // T % lanes:
            raise CheckpointError(
                f"The run {self.run_dir} reads its rows in {lanes} lanes, and {self.recipe.total_batch_size:,} tokens are "
                f"{self.recipe.total_batch_size // T} rows: give a --total-batch-size that is a multiple of {lanes * T:,}."
            )
        if self.start.step > self.recipe.num_iterations:
            raise CheckpointError(
                f"The run {self.run_dir} is at step {self.start.step:,} and the horizon is now "
                f"{self.recipe.num_iterations:,}: give a longer one, or go back with --resume-from-step."
            )
        return changed

    def _begun_alike(self) -> bool:
        """Whether a run that never saved was begun with these settings and data, so that it will come out the same."""
        path = self.run_dir / "config.json"
        if not path.exists():
            return True
        begun = json.loads(path.read_text())
        fingerprints = {
            "old_fingerprint": begun["data_fingerprint"],
            "new_fingerprint": self.data.manifest.fingerprint,
        }
        try:
            return not check_changes(begun["config"], self.config, **fingerprints, permitted=False)
        except RaychatError:
            return False

    def _write_config(self) -> None:
        flat = self.config.flat()
        content = {
            "format": FORMAT,
            "fingerprint": hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16],
            "data_fingerprint": self.data.manifest.fingerprint,
            "config": flat,
            "recipe": dataclasses.asdict(self.recipe),
            "corpus_files": self.data.corpus_files,
            "resolved": self._resolved,
        }
        write_json(self.run_dir / "config.json", content)
        write_json(self.run_dir / "plan.json", make_plan(self.config))

    def _history(self) -> tuple[list[dict[str, Any]], float]:
        """Start events so far, and the wall time of their attempts: each ends with the last thing it journaled.

        The time between two attempts counts where one driver made both: the machines were there, and paid for.
        """
        starts: list[dict[str, Any]] = []
        wall = last = 0.0
        for record, _ in records_from(self.journal.path):
            begins = record.get("event") == "start"
            if starts and (not begins or record["driver"] == starts[-1]["driver"]):
                wall += max(0.0, record["time"] - last)
            if begins:
                starts.append(record)
            last = record["time"]
        return starts, wall

    def _summary(self, status: Any, records: list[dict[str, Any]], mlflow_run_id: str | None) -> Summary:
        starts, wall = self._history()
        state, T = self.state, self.config.model.max_seq_len
        step = state.get("step")
        saved = checkpoint.steps(self.checkpoints)
        price = self.config.money.price_per_hour

        def typical(key: str) -> float | None:
            values = [record[key] for record in records if record.get(key) is not None]
            return statistics.median(values[UNTIMED_STEPS:] or values) if values else None

        return Summary(
            status=status,
            step=step,
            num_iterations=self.recipe.num_iterations,
            rows_consumed=state.get("rows_consumed"),
            tokens=state["rows_consumed"] * T if state else None,
            val_bpb=state.get("val_bpb"),
            min_val_bpb=state.get("min_val_bpb"),
            core_metric=None,
            train_loss=state.get("train_loss"),
            total_training_time_s=state.get("total_training_time_s"),
            wall_time_s=wall,
            goodput=min(1.0, state["step_time_s"] / wall) if state and wall else None,
            restarts=max(0, len(starts) - 1),
            preemptions=0,
            replayed_steps=sum(start["replayed"] for start in starts),
            tok_per_sec=typical("train/tok_per_sec"),
            mfu=typical("train/mfu"),
            peak_memory_bytes=self.peak_memory_bytes,
            flops=float(self.recipe.flops_per_token) * state["rows_consumed"] * T if state else None,
            cost_usd=None if price == -1 else price * wall / 3600,
            mlflow_run_id=mlflow_run_id,
            checkpoint=str(self.checkpoints / checkpoint.folder_name(saved[0])) if saved else None,
        )


def _set_aside(run_dir: Path, echo: Callable[[str], None]) -> None:
    """Rename an existing run directory, so that its name is free for a new one and nothing is lost."""
    if not run_dir.exists():
        return
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    Lease(run_dir).refuse_if_held()
    run_dir.rename(kept)
    echo(f"--fresh: the old run is kept in {kept}")


def _check_space(run_dir: Path, num_params: int) -> None:
    need, free = 2 * checkpoint.estimated_bytes(num_params), shutil.disk_usage(run_dir).free
    if free < need:
        raise ConfigError(
            f"{run_dir} has {free / 1e9:.2f} GB free, and two checkpoints of this model take {need / 1e9:.2f} GB: "
            "free some space, or give a --storage-path with more."
        )
