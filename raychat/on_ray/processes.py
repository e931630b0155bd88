"""Processes of this machine, read from /proc (Linux): who started whom, and ending one with all that it started."""

import contextlib
import os
import signal
from pathlib import Path


def children(pid: int) -> list[int]:
    """All processes below `pid`, however deep, parents before their children."""
    by_parent: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (parent := _parent(folder)) is not None:
            by_parent.setdefault(parent, []).append(int(folder.name))
    below, front = [], [pid]
    while front:
        front = [child for parent in front for child in by_parent.get(parent, [])]
        below += front
    return below


def is_running(pid: int) -> bool:
    """Whether the process is there and has not ended (a dead one stays in the table until its parent looks)."""
    try:
        return _after_name(Path(f"/proc/{pid}"))[0] != "Z"
    except OSError:
        return False


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that it started. It is stopped first, so that it starts nothing meanwhile."""
    _send(pid, signal.SIGSTOP)
    for victim in [*children(pid), pid]:
        _send(victim, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _parent(folder: Path) -> int | None:
    try:
        return int(_after_name(folder)[1])
    except OSError:  # it ended meanwhile
        return None


def _after_name(folder: Path) -> list[str]:
    """The fields of /proc/PID/stat from the state on: the name before them may hold spaces and parentheses."""
    return (folder / "stat").read_text().rpartition(")")[2].split()
