"""A run seen from outside: the process of its driver, what it says, and what its journal holds."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raychat.errors import RaychatError
from raychat.tracking.journal import records_from

POLL_S = 0.05


class LostRunError(RaychatError):
    """The run did not come back by itself: what the drill is there to find out."""

    exit_code = 1


class JournalView:
    """The records of a journal, read as it grows."""

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, list[dict[str, Any]]()
        self._offset = 0

    def look(self) -> list[dict[str, Any]]:
        """All records so far."""
        if self.path.exists():
            for record, offset in records_from(self.path, self._offset):
                self.records.append(record)
                self._offset = offset
        return self.records

    @property
    def steps(self) -> int:
        """Optimizer steps whose loss is there."""
        return max((record["step"] + 1 for record in self.records if "train/loss" in record), default=0)

    def events(self, kind: str, after_s: float = 0.0) -> list[dict[str, Any]]:
        """Events of a kind that were written after a point in time, in order."""
        return [record for record in self.records if record.get("event") == kind and record["time"] > after_s]

    def first_step_after(self, time_s: float) -> float | None:
        """When an attempt that began after `time_s` had done its first step."""
        starts = self.events("start", time_s)
        first = self.events("first_step", starts[0]["time"]) if starts else []
        return first[0]["time"] if first else None


@dataclass(frozen=True)
class Rank:
    """Where a rank of the run is at work."""

    rank: int
    pid: int
    node_id: str


class Run:
    """A run of jobs/pretrain.py in processes of its own, which the same command takes up again after a kill.

    Args:
        command: the whole command line.
        environment: of the process.
        run_dir: where the run is kept, on this machine.
        output: file that takes what the driver says.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], run_dir: Path, output: Path) -> None:
        self.command, self.environment, self.run_dir, self.output = list(command), dict(environment), run_dir, output
        self.journal = JournalView(run_dir / "metrics.jsonl")
        self.lines: list[tuple[float, str]] = []
        self.on_step: Callable[[int], None] = lambda steps: None
        """called with the steps so far, whenever the journal is looked at"""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> float:
        """Start the command; when that was, in Unix seconds."""
        began = time.time()
        self._process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the drill
        )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True, name="driver-output").start()
        return began

    def kill(self) -> None:
        """SIGKILL the driver, and nothing else."""
        self._started.kill()
        self._started.wait()

    def close(self) -> None:
        """Stop the driver if it still runs."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        self.kill()

    @property
    def exit_code(self) -> int | None:
        """How the driver ended, or None while it runs."""
        return self._started.poll()

    def wait_for(self, found: Callable[[], Any], what: str, timeout_s: float, *, may_end: bool = False) -> Any:
        """Look at the journal again and again until `found` gives something that counts as true; that.

        Raises:
            LostRunError: it did not within the time, or the driver ended before (when that `may_end`, `found` has the
                last word and None is returned).
        """
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.exit_code is not None  # asked first: what it wrote before is there now
            self.journal.look()
            self.on_step(self.journal.steps)
            if value := found():
                return value
            if ended and may_end:
                return None
            if ended:
                raise LostRunError(f"the driver ended with {self.exit_code} before {what}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise LostRunError(f"{what}: not within {timeout_s:g}s: {self.last_words()}")
            time.sleep(POLL_S)

    def last_words(self) -> str:
        """The last line that the driver said."""
        return self.lines[-1][1] if self.lines else "it said nothing"

    def said_after(self, time_s: float, text: str) -> float | None:
        """When the driver first said `text`, after `time_s`."""
        return next((at for at, line in list(self.lines) if at > time_s and text in line), None)

    def ranks(self) -> list[Rank]:
        """Where the ranks of the newest attempt are; empty when that is not known yet."""
        starts, told = self.journal.events("start"), self.journal.events("ranks")
        if not starts or not told or told[-1]["time"] < starts[-1]["time"]:
            return []
        return [Rank(rank["rank"], rank["pid"], rank["node_id"]) for rank in told[-1]["ranks"]]

    @property
    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            raise RuntimeError("the run has not been started")
        return self._process

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        with process.stdout or open(os.devnull) as stream, self.output.open("a") as log:
            for line in stream:
                self.lines.append((time.time(), line.rstrip()))
                log.write(line)
                log.flush()
