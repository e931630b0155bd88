"""Out of memory, said so that a user knows what to do: what was tried, what there is, and what would fit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from raychat.errors import RaychatError
from raychat.training.device import peak_memory_bytes

SHARE = 0.9  # of the memory that there is, to plan with: allocators fragment
SIGNS = (
    "out of memory",  # CUDA
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",  # of a CPU
)


class OutOfMemoryError(RaychatError):
    """Something does not fit; the message says what, and for a pass which one would."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, raised by torch or Python, is about memory that is not there."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a device: what there is, the largest use so far, and what is in use between passes.

    `per_sequence` is the peak of a pass that fitted, for each of its sequences; None where none was measured.
    """

    total: int
    peak: int
    base: int = 0
    per_sequence: float | None = None


@contextmanager
def explained(doing: str, device: torch.device) -> Iterator[None]:
    """Out of memory in the block as OutOfMemoryError that says in what. For all but a pass, whose size is known."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"Out of memory in {doing}. {_used(MemoryGauge(device).read())} Use a smaller --device-batch-size (auto finds what "
            "fits), more workers, which share the state of the optimizer, or a smaller --depth."
        ) from error


def _used(memory: Memory) -> str:
    return f"The peak was {memory.peak / 2**30:.1f} GiB, and there are {memory.total / 2**30:.1f} GiB."


class MemoryGauge:
    """Measures the passes of one device. On a CPU there is no peak of a pass to be had, only the process's own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._base = 0
        self._per_sequence: float | None = None

    def before_pass(self) -> None:
        """A pass is about to begin. What the model was loaded with does not count for the peak of the first."""
        if self.device.type == "cuda" and self._per_sequence is None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)

    def after_pass(self, sequences: int) -> None:
        """A pass of so many sequences fitted. The first one is measured."""
        if self.device.type == "cuda" and self._per_sequence is None:
            self._per_sequence = (torch.cuda.max_memory_allocated(self.device) - self._base) / sequences

    def read(self) -> Memory:
        """What is known now."""
        if self.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.device)[1]
        else:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        peak = peak_memory_bytes(self.device)
        return Memory(total=total, peak=peak, base=self._base, per_sequence=self._per_sequence)


def fitting_batch(tried: int, memory: Memory, rows: int) -> int | None:
    """The largest device batch below `tried` that divides the `rows` of a global batch and would fit; None if none.

    From the measured peak for each sequence where there is one, else at most the half.
    """
    most = tried // 2
    if memory.per_sequence:
        room = int((SHARE * memory.total - memory.base) / memory.per_sequence)
        most = room if 0 < room < tried else most
    return next((size for size in range(most, 0, -1) if rows % size == 0), None)


def out_of_memory(tried: int, max_seq_len: int, memory: Memory, rows: int) -> OutOfMemoryError:
    """The error for a pass of `tried` sequences of `max_seq_len` tokens, of the `rows` of a global batch."""
    fitting = fitting_batch(tried, memory, rows)
    advice = (
        f"Use --device-batch-size {fitting}, or auto, which tries what fits: more passes make up for it, so nothing changes "
        "but the rounding of sums."
        if fitting
        else "No smaller --device-batch-size is left: use a shorter --max-seq-len, a smaller --depth, or --loss chunked."
    )
    return OutOfMemoryError(
        f"Out of memory: a pass of --device-batch-size {tried} x --max-seq-len {max_seq_len} tokens does not fit. "
        f"{_used(memory)} {advice}"
    )
