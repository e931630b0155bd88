"""Keeps a run in an object store and its copy on the driver's machine in step.

The driver works in the copy, as with a run on a disk: it appends to `metrics.jsonl` and replaces small files. A thread
sends what is new: the journal as segments that never change (`raychat.tracking.segments`), the small files whole.
Checkpoints go to the store by themselves. Nothing here stops a training: what cannot be sent stays in the copy, and
the next driver on this machine sends it.
"""

import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

from raychat.atomic import sync_folder, write_json
from raychat.storage import Store
from raychat.tracking.segments import FOLDER, first_byte, join_segments, read_segments, segment_name, segment_names

JOURNAL = "metrics.jsonl"
SMALL_FILES = ("config.json", "plan.json", "summary.json", "mlflow.json", "loss_curve.png")
MARKER = "mirror.json"
"""in the copy: it has been in the store, so that a store without it holds another run by now"""
PERIOD_S = 10.0  # longer than a driver that was replaced takes to learn of it
LONGEST_DELAY_S = 300.0
LARGEST_SEGMENT = 1 << 22  # bytes: a segment is sent, and read, in one request
SEGMENTS_PER_PERIOD = 100  # a run with this many segments sends half as often: a week's journal is some 3,000


class Mirror:
    """`pull`, then `start`, `push_soon` as often as wanted, and `close` before the lease is given back.

    Nothing happens where the store is the run directory itself.
    """

    def __init__(
        self,
        run_dir: Path,
        store: Store,
        *,
        echo: Callable[[str], None],
        allowed: Callable[[], bool] = lambda: True,
        period_s: float = PERIOD_S,
    ) -> None:
        """`run_dir` is the copy and `store` the folder of the run; `allowed` says whether the lease is still held."""
        self.run_dir, self.store = run_dir, store
        self._echo, self._allowed, self._period_s = echo, allowed, period_s
        self._idle = store.is_local and store.path == run_dir
        self._journal = run_dir / JOURNAL
        self._sent = 0  # bytes of the journal that the store has at least
        self._sure = self._marked = False  # whether it has just these; whether MARKER is there
        self._segments = 0
        self._crcs: dict[str, int] = {}  # of the small files in the store
        self._failing = False
        self._conflict_s: float | None = None  # when another driver's segment was found
        self._wake, self._closing, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="mirror")

    def pull(self, *, fresh: bool = False) -> None:
        """Make the copy what the run is. To be called when the lease is held, and before anything is read.

        The longer journal of the same history wins: another machine may have driven the run since, or what this one
        wrote last did not reach the store. A copy of another history (the tag was begun anew elsewhere, or the run went
        on elsewhere from before the end of the copy) is renamed, never deleted, and so is every copy when the run begins
        anew: `fresh`, for which the store has been cleared.

        Raises:
            OSError: when the store or the disk fails; the copy is as it was, or newer.
        """
        if self._idle:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        joined = self.run_dir.with_name(f".{self.run_dir.name}.pulled")
        try:
            there = join_segments(self.store, joined)
            if self._journal.exists() and (fresh or self._is_another(joined, there)):
                self._set_aside()
            here = whole_lines(self._journal)
            newer = there > here or not self._journal.exists()
            if there > here:
                _replace(joined, self._journal)
        finally:
            joined.unlink(missing_ok=True)
        if 0 < there < here:
            self._echo(f"{here - there:,} bytes of the journal had not reached {self.store.uri}: they are sent now")
        self._pull_small_files(overwrite=newer)
        self._sent, self._sure, self._segments = there, True, len(segment_names(self.store))
        self._mark()

    def start(self) -> None:
        """Begin to send, at first what an earlier driver could not send."""
        if not self._idle:
            self._thread.start()

    def push_soon(self) -> None:
        """Send what there is without waiting for the period to pass. Returns at once."""
        self._wake.set()

    def close(self, grace_s: float = 30.0) -> bool:
        """Send the rest within `grace_s` seconds and stop. Whether the store has everything; if not, says what is left."""
        if self._idle:
            return True
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(grace_s)
        self._closed.set()
        if not self._allowed():  # another driver's run by now
            return False
        if not (left := self._left()):
            return True
        self._echo(
            f"{' and '.join(left)} did not reach {self.store.uri} and are kept in {self.run_dir}: run the same command on "
            "this machine again to send them"
        )
        return False

    def _work(self) -> None:
        delay = 0.0
        while True:
            self._wake.wait(delay)
            self._wake.clear()
            last = self._closing.is_set()
            if self._closed.is_set() or not self._allowed():
                return
            try:
                self._push()
            except OSError as error:
                self._report(error)
                delay = min(max(2 * delay, self._period_s), LONGEST_DELAY_S)
                if last:
                    delay = min(delay, 1.0)
                continue
            self._report(None)
            if last:
                return
            delay = self._period_s * (1 + self._segments / SEGMENTS_PER_PERIOD)

    def _push(self) -> None:
        """Send everything that is new. Raises OSError when the store fails."""
        # Read before the journal: what mlflow.json says about the journal must not be ahead of what the store has.
        small = self._changed_files()
        self._push_journal()
        self._mark()
        for name, content in small.items():
            if not self._may_write():
                return
            self.store.write_bytes(name, content)
            self._crcs[name] = zlib.crc32(content)

    def _push_journal(self) -> None:
        folder = self.store.child(FOLDER)
        while content := _lines_from(self._journal, self._sent):
            if not self._may_write():
                return
            name = segment_name(self._sent)
            if not self._sure or folder.exists(name):
                self._agree()
                continue
            self._sure = False
            folder.write_bytes(name, content)
            self._sure, self._conflict_s = True, None
            self._sent += len(content)
            self._segments += 1

    def _agree(self) -> None:
        """Find out how much of the journal the store has, after a write of which nobody knows whether it arrived.

        Segments that hold something else are those of a driver that had been replaced and did not know it. They are
        renamed after a period: it may be this driver that has been replaced, and by then it knows.
        """
        names = [name for name in segment_names(self.store) if first_byte(name) >= self._sent]
        end, foreign = self._sent, []
        with self._journal.open("rb") as file:
            for name, content in zip(names, read_segments(self.store, names), strict=True):
                file.seek(end)
                if first_byte(name) == end and file.read(len(content)) == content:
                    end += len(content)
                else:
                    foreign.append(name)
        if foreign:
            self._conflict_s = self._conflict_s or time.monotonic()
            if time.monotonic() - self._conflict_s < self._period_s:
                raise OSError(f"another driver has written {FOLDER}/{foreign[0]}")
        for name in foreign:
            if self._may_write():
                self.store.child(FOLDER).move(
                    name, self.store.child(f"{FOLDER}-replaced", f"{name}.{uuid.uuid4().hex}")
                )
        self._sent, self._sure = end, True

    def _may_write(self) -> bool:
        return self._allowed() and not self._closed.is_set()

    def _changed_files(self) -> dict[str, bytes]:
        found = {}
        for name in SMALL_FILES:
            try:
                content = (self.run_dir / name).read_bytes()
            except FileNotFoundError:
                continue
            if self._crcs.get(name) != zlib.crc32(content):
                found[name] = content
        return found

    def _left(self) -> list[str]:
        """What the store does not have."""
        unsent = whole_lines(self._journal) - self._sent
        journal = [f"the last {unsent:,} bytes of {JOURNAL}" if self._sent else JOURNAL] if unsent > 0 else []
        return journal + list(self._changed_files())

    def _report(self, error: OSError | None) -> None:
        if self._closed.is_set():  # `close` has said what is left
            return
        if error and not self._failing:
            self._echo(
                f"{self.store.uri} does not take the journal ({error}): it is kept in {self.run_dir} and sent later"
            )
        elif self._failing and not error:
            self._echo(f"{self.store.uri} has the journal again, with all that was kept back")
        self._failing = error is not None

    def _is_another(self, joined: Path, there: int) -> bool:
        """Whether the copy is of another history than the store's `there` bytes."""
        if there == 0:
            return (self.run_dir / MARKER).exists()
        return not _same_start(joined, self._journal, min(there, whole_lines(self._journal)))

    def _set_aside(self) -> None:
        number = 1
        while (kept := self.run_dir.with_name(f"{self.run_dir.name}.other-{number}")).exists():
            number += 1
        self.run_dir.rename(kept)
        self.run_dir.mkdir()
        self._echo(f"the copy on this machine is of another run than {self.store.uri}: it is kept in {kept}")

    def _pull_small_files(self, *, overwrite: bool) -> None:
        there = set(self.store.names())
        for name in SMALL_FILES:
            if name not in there:
                continue
            content = self.store.read_bytes(name)
            self._crcs[name] = zlib.crc32(content)
            if overwrite or not (self.run_dir / name).exists():
                Store.of(self.run_dir).write_bytes(name, content)

    def _mark(self) -> None:
        if self._sent and not self._marked:
            write_json(self.run_dir / MARKER, {"store": self.store.uri})
            self._marked = True


def whole_lines(path: Path) -> int:
    """Bytes of a file up to its last newline: what is behind it is not finished. 0 when there is no file."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    return start + newline + 1
                end = start
    except FileNotFoundError:
        pass
    return 0


def _lines_from(path: Path, offset: int) -> bytes:
    """Whole lines of a file from `offset` on, LARGEST_SEGMENT bytes or one line at most; empty when there are none."""
    size = min(LARGEST_SEGMENT, whole_lines(path) - offset)
    if size <= 0:
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
        return content if content.endswith(b"\n") else content + file.readline()


def _same_start(one: Path, other: Path, size: int) -> bool:
    with one.open("rb") as first, other.open("rb") as second:
        while size > 0:
            block = min(size, 1 << 20)
            if first.read(block) != second.read(block):
                return False
            size -= block
    return True


def _replace(source: Path, target: Path) -> None:
    with source.open("rb+") as file:
        os.fsync(file.fileno())
    source.replace(target)
    sync_folder(target.parent)
