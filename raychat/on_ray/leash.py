"""Starts a command that the kernel kills when the process that asked for it is gone. Linux; elsewhere it just runs.

    python -I leash.py PARENT_PID COMMAND ARGUMENT...

Run as a file of its own, so that it imports nothing and is through in milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Become `command`, bound to the life of `parent`. The bond outlasts the exec."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == parent:  # else it died before the bond was made
        os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
