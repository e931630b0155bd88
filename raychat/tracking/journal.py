"""The journal `metrics.jsonl`: the truth about a run, from which the summary, the pictures and MLflow are made.

One JSON object per line, appended and never changed. A metric record is `{"step": s, "time": unix seconds,
"<metric>": value, ...}`; a value that is not finite is written as null, because strict JSON has no NaN. An event is
`{"event": kind, "time": unix seconds, "driver": who wrote it, ...}`. The event `branch` with `from_step` K says that
training went back to step K and went on from there: metric records of steps >= K above it are superseded. The first
line is the event `journal`, which carries the version of the format.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from raychat.errors import DataError

FORMAT_VERSION = 1
RESERVED = frozenset({"step", "time", "event"})

logger = logging.getLogger(__name__)


class _Seen:
    """Which (step, key) pairs the current branch holds: one byte per step and key, so a million steps stay cheap."""

    def __init__(self) -> None:
        self._marks: dict[str, bytearray] = {}

    def __contains__(self, step_and_key: tuple[int, str]) -> bool:
        step, key = step_and_key
        marks = self._marks.get(key)
        return marks is not None and step < len(marks) and marks[step] == 1

    def add(self, step: int, key: str) -> None:
        marks = self._marks.setdefault(key, bytearray())
        if step >= len(marks):
            marks.extend(bytes(step + 1 - len(marks)))
        marks[step] = 1

    def forget_from(self, step: int) -> None:
        """Forget every pair whose step is `step` or later."""
        for marks in self._marks.values():
            del marks[step:]

    def high_water(self) -> int:
        """The largest step that has any key, or -1."""
        return max(map(self.last_step, self._marks), default=-1)

    def last_step(self, key: str) -> int:
        """The largest step that has `key`, or -1."""
        return self._marks.get(key, bytearray()).rfind(1)


class Journal:
    """Appends to one journal file. Thread-safe within its process; only the holder of the run's lease may open it.

    A step that is run again after a restart offers its metrics again; what the current branch already holds is
    dropped, so that no curve ever goes back in steps.
    """

    def __init__(
        self,
        path: Path,
        *,
        driver: str | None = None,
        reader: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> None:
        """Open `path` for appending; create it, and its folder, if absent. A torn last line is cut off.

        `driver` signs every event: the time between events of two drivers is time in which nobody was at work. `reader`
        gets every record, those that are there now and then each that is appended, and spares its owner to read the
        file again; also events for which there was no space on the disk.

        Raises:
            DataError: the file was written by a newer format.
        """
        self.path = path
        self._signature = {} if driver is None else {"driver": driver}
        self.replayed = 0
        """metric records refused whole, because the current branch already holds their step"""
        self.lost = 0
        """records that could not be written (disk full); the training went on without them"""
        self.newest: dict[str, Any] = {}
        """the last value of each metric; None where it was no number"""
        self._seen, self._reader = _Seen(), reader
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self.offset = self._cut_torn_line()
            for record, _ in records_from(path):
                self._replay(record)
        except BaseException:
            os.close(self._file)
            raise
        self.high_water = self._seen.high_water()
        """the largest step of the current branch, or -1"""
        if self.offset == 0:
            self.event("journal", version=FORMAT_VERSION)

    def log(self, step: int, metrics: Mapping[str, float | None], time_s: float | None = None) -> bool:
        """Append the metrics of `step` that are not there yet; True if anything was written.

        `time_s` is in unix seconds (default: now). Never raises for the disk: what cannot be written is counted in
        `lost` and reported once, because a metric must not stop the training.

        Raises:
            ValueError: a negative step, or a metric named `step`, `time` or `event`.
        """
        if step < 0 or not RESERVED.isdisjoint(metrics):
            raise ValueError(f"cannot journal step {step} with the metrics {sorted(metrics)}")
        with self._lock:
            fresh = {key: _finite(value) for key, value in metrics.items() if (step, key) not in self._seen}
            if not fresh:
                self.replayed += 1
                return False
            record = {"step": step, "time": _now(time_s), **fresh}
            if not self._append(record):
                return False
            self._replay(record)
            self.high_water = max(self.high_water, step)
            return True

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event. `fields` must be plain JSON values.

        Raises:
            OSError: a `branch` cannot be written; without it, what follows would contradict what stands above it.
                Any other event that cannot be written is counted in `lost`.
        """
        record = {"event": kind, "time": _now(None), **self._signature, **fields}
        with self._lock:
            written = self._append(record)
            if not written and kind == "branch":
                raise OSError(f"the branch from step {fields['from_step']} cannot be written to {self.path}")
            self._replay(record)
            self.high_water = self._seen.high_water()

    def last_step(self, key: str) -> int:
        """The largest step of the current branch that has the metric `key`, or -1."""
        return self._seen.last_step(key)

    def close(self) -> None:
        """Flush to disk and close. Idempotent; nothing may be logged afterwards."""
        with self._lock:
            file, self._file = self._file, -1
            if file >= 0:
                try:
                    os.fsync(file)
                finally:
                    os.close(file)

    def _replay(self, record: Mapping[str, Any]) -> None:
        if record.get("event") == "branch":
            self._seen.forget_from(record["from_step"])
        elif is_metrics(record):
            for key in record.keys() - RESERVED:
                self._seen.add(record["step"], key)
                self.newest[key] = record[key]
        self._reader(record)

    def _append(self, record: Mapping[str, Any]) -> bool:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            if written < len(line):  # the disk filled up in the middle of the line
                os.ftruncate(self._file, self.offset)
                raise OSError(f"only {written} of {len(line)} bytes could be written")
        except OSError as error:
            if self.lost == 0:
                logger.warning("%s: metrics are being lost, training goes on: %s", self.path, error)
            self.lost += 1
            return False
        self.offset += written
        return True

    def _cut_torn_line(self) -> int:
        """Cut the file back to its last newline; its size then. Reads from the end: journals grow large."""
        size = end = os.fstat(self._file).st_size
        while end > 0:
            start = max(0, end - 65536)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._file, end)
        return end


def records_from(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Every whole record after byte `offset`, each with the offset behind it, metrics and events alike.

    A line that is no JSON object (left by a power failure) is skipped with a warning; a last line without a newline
    is not finished yet and is not given.

    Raises:
        DataError: the journal was written by a newer format.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            record = _parsed(line)
            if record is None:
                logger.warning("%s: skipped a damaged line before byte %d", path, offset)
                continue
            if record.get("event") == "journal" and record["version"] > FORMAT_VERSION:
                raise DataError(
                    f"{path} has journal format {record['version']}, this raychat reads up to {FORMAT_VERSION}: "
                    f"use the raychat that wrote it, or a newer one"
                )
            yield record, offset


def is_metrics(record: Mapping[str, Any]) -> bool:
    """Whether a record holds the metrics of a step; an event may name a step, too."""
    return "step" in record and "event" not in record


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The metric records of the current branch in the order written; an absent file has none."""
    current: list[dict[str, Any]] = []
    for record, _ in records_from(path) if path.exists() else ():
        if record.get("event") == "branch":
            current = [kept for kept in current if kept["step"] < record["from_step"]]
        elif is_metrics(record):
            current.append(record)
    return current


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in the order written, without the format line; an absent file has none."""
    records = records_from(path) if path.exists() else ()
    return [record for record, _ in records if record.get("event", "journal") != "journal"]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # of which a decoding error is a kind
        return None
    return record if isinstance(record, dict) else None


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if type(value) is int else float(value)  # float() also takes scalars of numpy and torch


def _now(time_s: float | None) -> float:
    # Milliseconds are what MLflow keeps: the same record always becomes the same point there.
    return round(time.time() if time_s is None else time_s, 3)
