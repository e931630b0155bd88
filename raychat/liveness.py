"""Whether a process that left its number in a file is still at work, as far as can be told from this machine."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def machine_id() -> str:
    """What says whether a process number of another process means something here: host names repeat, in containers."""
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{booted} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def is_here(lease: Mapping[str, Any]) -> bool:
    """Whether the process number in a lease means something to this process."""
    return lease.get("machine") == machine_id()


def is_gone(lease: Mapping[str, Any]) -> bool:
    """Whether the process that holds `lease` is known to have ended. One on another machine cannot be asked."""
    if not is_here(lease):
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False
