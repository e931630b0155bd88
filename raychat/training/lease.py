"""One driver per run directory: `lease.json` names the holder and beats; a second driver is refused while it does."""

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from raychat.atomic import write_json
from raychat.errors import RaychatError

BEAT_S = 5.0
STALE_S = 60.0
SETTLE_S = 0.1


class LeaseError(RaychatError):
    """Another driver is at work in this run directory."""


class Lease:
    """Held from `acquire` to `release`."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lease.json"
        self.holder = uuid.uuid4().hex
        """name of this holder: what a process that writes on its behalf compares with the file"""
        self._mine = {
            "holder": self.holder,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.time(),
        }
        self.lost = False
        """another driver took the lease over while this one was not beating: nothing may be written any more"""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")

    def refuse_if_held(self) -> None:
        """Raise LeaseError while a live driver holds the lease."""
        if (holder := read_lease(self.path)) and _alive(holder):
            raise LeaseError(
                f"Another driver is training in {self.path.parent}: process {holder['pid']} on {holder['host']}, last seen "
                f"{time.time() - holder['heartbeat']:.0f}s ago. Wait for it, stop it, or give another --model-tag."
            )

    def acquire(self) -> None:
        """Take the lease, from nobody or from a holder that has stopped beating."""
        self.refuse_if_held()
        self._write()
        time.sleep(SETTLE_S)
        if (holder := read_lease(self.path)) and holder["holder"] != self.holder:
            self.refuse_if_held()  # another driver that started at the same moment wrote last
        self._thread.start()

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if (holder := read_lease(self.path)) and holder["holder"] == self.holder:
            self.path.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            if (holder := read_lease(self.path)) and holder["holder"] != self.holder:
                self.lost = True
                return
            try:
                self._write()
            except OSError:  # a full disk must not end the run; the next beat tries again
                continue

    def _write(self) -> None:
        write_json(self.path, self._mine | {"heartbeat": time.time()})


def taken_over(path: Path, holder: str) -> bool:
    """Whether the lease at `path` is now somebody else's than `holder`'s."""
    lease = read_lease(path)
    return lease is not None and lease["holder"] != holder


def read_lease(path: Path) -> dict[str, Any] | None:
    """The lease at `path`, or None."""
    try:
        lease = json.loads(path.read_text())
        return lease if {"holder", "host", "pid", "heartbeat"} <= lease.keys() else None
    except (OSError, ValueError, AttributeError):  # the last: JSON, and no object
        return None


def _alive(lease: dict[str, Any]) -> bool:
    if time.time() - lease["heartbeat"] > STALE_S:
        return False
    if lease["host"] != socket.gethostname():
        return True
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
