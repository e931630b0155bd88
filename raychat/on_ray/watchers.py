"""The driver's part in watching for the end of machines: a watcher on every node that its run is on."""

import threading
import time
from typing import Any

from raychat.on_ray.node_watcher import start_watchers
from raychat.on_ray.notices import detect

EVERY_S = 10.0


class Watchers:
    """Started where they can be of use: on nodes of a cluster, and on this machine when it is in a cloud.

    No others: a node that this run is not on is to be taken away by the autoscaler when it idles.
    """

    def __init__(self, *, local: bool) -> None:
        self._known: dict[str, Any] = {}
        self._nodes: set[str] = set()
        self._wanted = not local
        self._kept_at = float("-inf")
        if local:
            threading.Thread(target=self._detect, daemon=True, name="detect").start()

    def keep(self, node_ids: set[str]) -> None:
        """Have them on these nodes and no others. Cheap enough to be called all the time."""
        changed = node_ids != self._nodes
        if self._wanted and (changed or time.monotonic() - self._kept_at >= EVERY_S):
            self._kept_at, self._nodes = time.monotonic(), set(node_ids)
            start_watchers(self._known, node_ids)

    def _detect(self) -> None:
        self._wanted = detect() is not None
