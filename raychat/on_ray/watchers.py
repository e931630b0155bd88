"""The driver's part in watching for the end of machines: a watcher on every node of its cluster, new ones included."""

import threading
import time
from typing import Any

from raychat.on_ray.node_watcher import start_watchers
from raychat.on_ray.notices import detect

EVERY_S = 10.0


class Watchers:
    """Started where they can be of use: on the nodes of a cluster, and on this machine when it is in a cloud."""

    def __init__(self, *, local: bool) -> None:
        self._known: dict[str, Any] = {}
        self._wanted = not local
        self._kept_at = float("-inf")
        if local:
            threading.Thread(target=self._detect, daemon=True, name="detect").start()

    def keep(self) -> None:
        """Start those that are missing. Cheap enough to be called all the time."""
        if self._wanted and time.monotonic() - self._kept_at >= EVERY_S:
            self._kept_at = time.monotonic()
            start_watchers(self._known)

    def _detect(self) -> None:
        self._wanted = detect() is not None
