"""One trial of a search as a process of its own: a full run that can be pasted, watched from outside.

A driver that dies without a word is started again, and the run goes on, as `jobs/submit.py --keep-alive` has it. The
process is killed by the kernel when the one that started it dies, and all that it started on Ray goes with it.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raychat.on_ray import leash
from raychat.on_ray.processes import kill_tree
from raychat.on_ray.resubmission import TAIL, JobEnd, decide, read_log, read_run
from raychat.on_ray.submission import AGAIN_S

KILL_AFTER_S = 600.0
"""for the last save of a trial that was told to stop"""
MEMORY_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class TrialOrder:
    """What a trial process is to run. Plain values: it travels to another process."""

    tag: str
    command: tuple[str, ...]
    """as it is executed; credentials may be among them, so it is never written down"""
    place: str
    """run directory or URI"""
    log: Path
    """where its output is appended"""
    folder: Path
    """current directory of the process"""
    memory_limit_bytes: int = -1
    """of one worker; -1: no limit"""


@dataclass(frozen=True, kw_only=True)
class TrialEnd:
    """How the process of a trial ended. Plain values, see `flat`."""

    exit_code: int
    error: str = ""
    """what it said behind `error:`, without that word"""
    text: str = ""
    """the last of its output"""
    over_memory_bytes: int = -1
    """what a worker used, when that was more than the limit"""
    told: bool = False
    """it was told to stop from here"""

    def flat(self) -> dict[str, Any]:
        """For Tune, which takes a dictionary."""
        return dataclasses.asdict(self)


class TrialProcess:
    """Runs an order. `poll` again and again until it gives the end.

    `workers_bytes` gives the memory of the workers of the driver with a process id: the largest of any.
    """

    def __init__(
        self,
        order: TrialOrder,
        *,
        environment: Mapping[str, str],
        workers_bytes: Callable[[int], int] = lambda pid: 0,
        again_s: float = AGAIN_S,
    ) -> None:
        self.order, self._again_s = order, again_s
        self._environment, self._workers_bytes = dict(environment), workers_bytes
        self._ends: list[JobEnd] = []
        self._over_memory = -1
        self._told_at: float | None = None
        self._next_memory = self._start_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    @property
    def pid(self) -> int | None:
        """Of the driver at work; None between two."""
        return self._process.pid if self._process else None

    def poll(self) -> TrialEnd | None:
        """Look after the process; how it ended, once nothing is to follow."""
        now = time.monotonic()
        if self._process is None:  # between a crash and the next try
            if self._told_at is not None:
                return self._ended(-signal.SIGTERM)
            if now >= self._start_at:
                self._start()
            return None
        exit_code = self._process.poll()
        if exit_code is None:
            self._watch_memory(now)
            if self._told_at is not None and now - self._told_at > KILL_AFTER_S:
                kill_tree(self._process.pid)
            return None
        self._process = None
        return self._follow(exit_code)

    def stop(self) -> None:
        """Ask the run to save and end. `poll` tells when it has."""
        if self._told_at is None:
            self._told_at = time.monotonic()
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)

    def end(self, patience_s: float) -> None:
        """Have it stop, and kill it with all that it started when it has not within `patience_s`."""
        self.stop()
        if self._process is None:
            return
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            kill_tree(self._process.pid)
            self._process.wait()
        self._process = None

    def _start(self) -> None:
        self.order.log.parent.mkdir(parents=True, exist_ok=True)
        self._began_s = time.time()
        with self.order.log.open("ab") as log:
            self._log_from = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", leash.__file__, str(os.getpid()), *self.order.command],
                env=self._environment,
                cwd=self.order.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal is for the search, which tells its trials
            )

    def _watch_memory(self, now: float) -> None:
        limit = self.order.memory_limit_bytes
        if limit == -1 or self._told_at is not None or now < self._next_memory or self._process is None:
            return
        self._next_memory = now + MEMORY_EVERY_S
        used = self._workers_bytes(self._process.pid)
        if used > limit:
            self._over_memory = used
            self.stop()

    def _follow(self, exit_code: int) -> TrialEnd | None:
        """The end, or None when another driver goes on with the run."""
        end = dataclasses.replace(
            read_log(self._text()), status="succeeded" if exit_code == 0 else "failed", exit_code=exit_code
        )
        if run := read_run(self.order.place, self._began_s):
            end = dataclasses.replace(end, run_status=run.status, step=run.step, hopeless=run.hopeless)
        self._ends.append(end)
        verdict = decide(self._ends)
        if not verdict.again or self._told_at is not None:
            return self._ended(exit_code)
        self._start_at = time.monotonic() + max(self._again_s, verdict.after_s)
        return None

    def _ended(self, exit_code: int) -> TrialEnd:
        error = self._ends[-1].error if self._ends else ""
        return TrialEnd(
            exit_code=exit_code,
            error=error.removeprefix("error: "),
            text=self._text(),
            over_memory_bytes=self._over_memory,
            told=self._told_at is not None and self._over_memory == -1,
        )

    def _text(self) -> str:
        """The last that the present driver printed."""
        with self.order.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_from, size - TAIL))
            return log.read().decode(errors="replace")


def peak_bytes(pids: Sequence[int]) -> int:
    """The largest resident memory that any of these processes of this machine has had; 0 where none is there."""
    found = [0]
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it ended
            continue
        found += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    return max(found)
