"""One driver per run: `lease.json` names the holder and beats; a second driver is refused while it does.

On a file system a claim file that only one process can create keeps two drivers that start at the same moment apart.
An object store offers no such thing through pyarrow: there a driver writes, waits and reads back, and the last writer
has the lease. Should two pass all the same, because the store was slow for one of them, the next beat of the first
finds the other's name within BEAT_S, or writes over it before the other has read back: one goes on.

A holder that could not beat for FENCE_S counts the lease as lost, before STALE_S lets another driver take it.

Whether a holder on another machine, or in another container, is alive cannot be asked. It is watched instead: one that
beats is, and one that has not for STALE_S is not. So a driver that is started again elsewhere goes on by itself.
"""

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from raychat.errors import RaychatError
from raychat.liveness import is_gone, is_here, machine_id
from raychat.storage import Store

FILE_NAME = "lease.json"
CLAIM_NAME = "lease.claim"
BEAT_S = 5.0
STALE_S = 60.0
FENCE_S = STALE_S - 2 * BEAT_S  # what is left is for clocks that differ and for a write on its way
SETTLE_S, REMOTE_SETTLE_S = 0.1, 3.0
CLAIM_S = 5.0  # a claim is held for milliseconds: one that stays this long was left by a crash
WATCH_S = 0.5
PADDED_BYTES = 512  # always the same size, so that a beat fits into its old place when the disk is full

OTHER_DRIVER = "Another driver"
"""how the message of a LeaseError begins; what reads logs goes by it"""

logger = logging.getLogger(__name__)


class LeaseError(RaychatError):
    """Another driver is at work in this run."""


class LeaseLostError(LeaseError):
    """The lease was held, and is no more: the run itself is sound, and goes on when it is started again."""

    exit_code = 1


def _say_nothing(line: str) -> None:
    """Nobody listens."""


class Lease:
    """Held from `acquire` to `release`. The calls raise OSError when the store is out of reach, the beats do not."""

    def __init__(self, store: Store | Path) -> None:
        """`store` is the folder of the run."""
        self.store = Store.of(store)
        self.holder = uuid.uuid4().hex
        """name of this holder: what a process that writes on its behalf compares with the file"""
        self.why_lost: str | None = None
        """what befell a lease that was lost, for a person to read"""
        self._mine = {
            "holder": self.holder,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine_id(),
            "since": time.time(),
        }
        self._beaten = 0.0
        self._dead: dict[str, Any] | None = None
        """a lease that did not change while it was watched for STALE_S"""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")

    @property
    def lost(self) -> bool:
        """Whether another driver has the lease, or may have it because this one could not beat: write nothing more.

        Once lost, always lost. It is never waited for the store here: a beat that hangs counts as none.
        """
        silent = _now() - self._beaten
        if self._beaten and not self.why_lost and not self._stop.is_set() and silent > FENCE_S:
            self.why_lost = (
                f"The lease in {self.store.uri} could not be renewed for {silent:.0f}s, and another driver may have taken "
                "it over: this one writes nothing more. Run the same command again."
            )
        return self.why_lost is not None

    def ask(self) -> bool:
        """As `lost`, of this moment. A store that does not tell counts for nothing."""
        if not self.lost:
            with suppress(OSError):
                self._look()
        return self.lost

    def refuse_if_held(self, echo: Callable[[str], None] = _say_nothing) -> None:
        """Return when no live driver holds the lease; tells `echo` when that takes up to STALE_S to find out.

        Raises:
            LeaseError: when one does.
        """
        watched, since = None, _now()
        while holder := self._holder():
            if watched is None:
                if is_here(holder):
                    raise self._refusal(holder)
                watched = holder
                echo(
                    f"another driver was seen {_age(holder)} ago in {self.store.uri}, process {holder['pid']} on "
                    f"{holder['host']}: waiting to see whether it is alive"
                )
            elif holder != watched:
                raise self._refusal(holder)
            elif _now() - since > STALE_S:  # its clock may be ahead of ours
                self._dead = holder
                return
            time.sleep(WATCH_S)

    def acquire(self, echo: Callable[[str], None] = _say_nothing) -> None:
        """Take the lease, from nobody or from a holder that has stopped beating, for which it may wait up to STALE_S.

        Raises:
            LeaseError: when another driver holds it, or takes it at the same moment.
        """
        while True:
            self.refuse_if_held(echo)
            with _alone(self.store.path) if self.store.is_local else nullcontext():
                began = _now()
                if holder := self._holder():
                    raise self._refusal(holder)
                self._write()
            time.sleep(self._settling_s(_now() - began))
            if (lease := read_lease(self.store)) and lease["holder"] == self.holder:
                break
        self._beaten = began
        self._thread.start()

    def release(self) -> None:
        """Give the lease back, if it is still ours. A store that is out of reach keeps it until it is stale."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_S)
        try:
            if (lease := read_lease(self.store)) and lease["holder"] == self.holder:
                self.store.delete(FILE_NAME)
        except OSError as error:
            logger.warning("the lease in %s stands for %.0fs more: %s", self.store.uri, STALE_S, error)

    def _holder(self) -> dict[str, Any] | None:
        """The lease of a driver that is alive, as far as can be told at once."""
        lease = read_lease(self.store)
        return lease if lease and lease != self._dead and _alive(lease) else None

    def _refusal(self, holder: dict[str, Any]) -> LeaseError:
        return LeaseError(
            f"{OTHER_DRIVER} is training in {self.store.uri}: process {holder['pid']} on {holder['host']}, last seen "
            f"{_age(holder)} ago. Wait for it, stop it, or give another --model-tag."
        )

    def _settling_s(self, took_s: float) -> float:
        """How long to wait for other writers, when reading and writing took `took_s` seconds.

        A driver that read before this one wrote has written by REMOTE_SETTLE_S after that, if its store is as fast. One
        for which it took longer may meet a holder that is at work already: it waits for a beat of that one to answer.
        """
        if self.store.is_local:
            return SETTLE_S
        return REMOTE_SETTLE_S if took_s < REMOTE_SETTLE_S else 2 * BEAT_S + took_s

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S) and not self.lost:
            began = _now()
            try:
                self._look()
                if self._stop.is_set() or self.lost:  # reading may have taken long
                    return
                self._write()
            except OSError as error:  # neither a full disk nor an outage ends the run; the next beat tries again
                logger.info("no beat of the lease in %s: %s", self.store.uri, error)
                continue
            if not self.lost:
                self._beaten = began

    def _look(self) -> None:
        if taken_over(self.store, self.holder):
            self.why_lost = f"{OTHER_DRIVER} has taken over {self.store.uri}: this one writes nothing more."

    def _write(self) -> None:
        text = json.dumps(self._mine | {"heartbeat": round(time.time(), 3)}, indent=2)
        content = text.encode().ljust(PADDED_BYTES) + b"\n"
        try:
            self.store.write_bytes(FILE_NAME, content)
        except OSError as error:
            if not self.store.is_local or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _write_in_place(self.store.path / FILE_NAME, content)


def taken_over(store: Store | Path, holder: str) -> bool:
    """Whether the run in `store` is now another driver's than `holder`'s.

    A stale lease is nobody's: it is a late write of a driver that has fenced itself since.

    Raises:
        OSError: when the store does not tell.
    """
    lease = read_lease(store)
    return lease is not None and lease["holder"] != holder and not _stale(lease)


def read_lease(store: Store | Path) -> dict[str, Any] | None:
    """The lease of the run in the folder `store`; None when there is none, or what is there is none.

    Raises:
        OSError: when the store does not tell.
    """
    try:
        lease = json.loads(Store.of(store).read_bytes(FILE_NAME))
        return lease if {"holder", "host", "pid", "heartbeat"} <= lease.keys() else None
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):  # the last: JSON, and no object
        return None


def _stale(lease: dict[str, Any]) -> bool:
    return time.time() - lease["heartbeat"] > STALE_S


def _alive(lease: dict[str, Any]) -> bool:
    if _stale(lease):
        return False
    return not is_gone(lease)


def _age(lease: dict[str, Any]) -> str:
    return f"{max(0.0, time.time() - lease['heartbeat']):.0f}s"


def _now() -> float:
    """Seconds on a clock that nobody sets and that, where there is such a one, goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps the other drivers of a run in a file system out, on all machines that share it."""
    folder.mkdir(parents=True, exist_ok=True)
    claim = folder / CLAIM_NAME
    seen, since = None, 0.0
    while True:
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            found = _identity(claim)
        if found != seen:
            seen, since = found, _now()
        elif found and _now() - since > CLAIM_S:
            claim.unlink(missing_ok=True)
        time.sleep(0.02)
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    except FileNotFoundError:
        return None


def _write_in_place(path: Path, content: bytes) -> None:
    """Change the digits of the heartbeat where they stand: needs no space on the disk."""
    with path.open("r+b") as file:
        if os.fstat(file.fileno()).st_size != len(content):
            raise OSError(errno.ENOSPC, "no space for the lease", str(path))
        os.pwrite(file.fileno(), content, 0)
