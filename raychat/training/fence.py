"""Keeps a rank 0 that was left behind away from storage: another driver holds the run, or a later attempt has begun.

All attempts of a driver share its lease. A machine that is cut off from the cluster may still reach storage, where its
rank 0 would go on with an attempt that the driver has given up: the later one says there that it has begun.
"""

import json
from dataclasses import dataclass
from typing import Any

from raychat.storage import Store
from raychat.training.lease import taken_over

FILE_NAME = "attempt.json"


@dataclass(frozen=True)
class Fence:
    """Asked before anything is changed on storage; True: another one writes now. For rank 0 of attempt `attempt`.

    `store` is the folder of the run, `holder` the driver's name in the lease. The call raises OSError when storage does
    not tell.
    """

    store: Store
    holder: str
    attempt: int

    def __call__(self) -> bool:
        """Whether another driver has the run, or a later attempt of this one."""
        return taken_over(self.store, self.holder) or self._overtaken()

    def begin(self) -> None:
        """Say that this attempt has begun, unless a later one has. Raises OSError when storage does not take it."""
        if not self._overtaken():
            content = {"holder": self.holder, "attempt": self.attempt}
            self.store.write_bytes(FILE_NAME, json.dumps(content).encode())

    def _overtaken(self) -> bool:
        # The numbers of two drivers do not compare: the first one's journal may be lost. Of those the lease decides.
        begun = _read(self.store)
        return begun.get("holder") == self.holder and begun["attempt"] > self.attempt


def _read(store: Store) -> dict[str, Any]:
    try:
        content = json.loads(store.read_bytes(FILE_NAME))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("attempt"), int) else {}
