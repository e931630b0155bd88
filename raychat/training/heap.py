"""What the allocator of a CPU process does with freed memory: kept for the next step, or given back for a smaller peak.

A user who sets one of glibc's own variables decides alone.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MOST = 2**31 - 1
LARGEST_IN_HEAP = 2**25  # glibc takes no more
SMALLEST = 2**20  # bytes of a block that is worth a mapping of its own
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Have blocks of up to 32 MiB stay in the heap when they are freed; False where that cannot be asked for.

    By default the end of the heap goes back to the system as soon as 128 KiB of it are free, and every step gets its
    activations anew, page by page: a seventh of a compiled step (docs/speed.md). The peak does not change.
    """
    return _set({M_TRIM_THRESHOLD: MOST, M_MMAP_THRESHOLD: LARGEST_IN_HEAP})


def give_back_freed_memory() -> bool:
    """Have blocks from 1 MiB on mapped one by one from now on, in this process; False where that cannot be asked for.

    glibc takes freed blocks of up to 32 MiB into its heap and finds no place there for the next aligned block of the same
    size. With recomputation, whose blocks come and go, these holes cost more than was saved: see docs/memory.md.
    """
    return _set({M_MMAP_THRESHOLD: SMALLEST})


def _set(options: dict[int, int]) -> bool:
    if any(os.environ.get(name) for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    taken = [mallopt(option, value) for option, value in options.items()]  # each, also when one is refused
    return all(taken)
