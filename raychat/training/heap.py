"""Freed memory that goes back to the system, for runs on a CPU that trade time for memory."""

import ctypes

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
SMALLEST = 2**20  # bytes of a block that is worth a mapping of its own


def give_back_freed_memory() -> bool:
    """Have blocks from 1 MiB on mapped one by one from now on, in this process; False where that cannot be asked for.

    glibc takes freed blocks of up to 32 MiB into its heap and finds no place there for the next aligned block of the same
    size. With recomputation, whose blocks come and go, these holes cost more than was saved: see docs/memory.md.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return mallopt(M_MMAP_THRESHOLD, SMALLEST) == 1
