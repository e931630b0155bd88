"""Filling up the disk of a run, and only that: a small file system in memory, or a limit on what workers may write."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

DISK_BYTES = 2**29
LEFT_BYTES = 2**20  # for the journal: a line of it is small, and a checkpoint is not
FILE_BYTES = 2**20  # largest file under the limit: logs are smaller, checkpoints larger


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a file system of half a gigabyte at `folder`, where that is allowed; whether it was."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "raychat-drill", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:  # no such program
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


class Ballast:
    """A file that takes all room but a little. `fill` again takes what was freed meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._file, self._count = folder / ".ballast", 0

    def fill(self) -> None:
        """Take all room that there is, up to a little."""
        room = shutil.disk_usage(self._file.parent).free - LEFT_BYTES
        if room > 0:
            taken = self._file.stat().st_size if self._file.exists() else 0
            with self._file.open("ab") as file, contextlib.suppress(OSError):  # the run was faster: full all the same
                os.posix_fallocate(file.fileno(), taken, room)

    def lift(self) -> None:
        """Give the room back."""
        self._file.unlink(missing_ok=True)


class FileLimit:
    """Forbids processes to write large files (RLIMIT_FSIZE)."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._old = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}

    def fill(self) -> None:
        """Set the limit."""
        for pid, (_, hard) in self._old.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (FILE_BYTES, hard))

    def lift(self) -> None:
        """Take the limit back."""
        for pid, limits in self._old.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
