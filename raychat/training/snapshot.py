"""What a rank saves, copied into host memory that is used again for each save, in the layout of a safetensors file.

Training waits for the copy only. The file is the buffer: writing it needs neither a second copy nor torch.
"""

import json
import logging
import math
from collections.abc import Iterator

import torch

BLOCK = 1 << 26  # bytes handed on at a time; each time, the thread that writes takes the interpreter's lock
ALIGNMENT = 8
LARGEST_PIECE, LEAST_PIECE = 1 << 28, 1 << 20  # of page-locked memory
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

logger = logging.getLogger(__name__)

Layout = list[tuple[str, torch.dtype, torch.Size]]


class HostFile:
    """The bytes of a safetensors file that holds tensors of a given layout.

    Source of the format: https://huggingface.co/docs/safetensors/index#format (8 bytes length, JSON, tensors).
    """

    def __init__(self, layout: Layout, *, pinned: bool) -> None:
        self.layout = layout
        entries, offsets, end = {}, {}, 0
        for name, dtype, shape in sorted(layout, key=lambda entry: (-entry[1].itemsize, entry[0])):  # keeps all aligned
            start, end = end, end + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            offsets[name] = (start, end)
        head = json.dumps(entries, separators=(",", ":")).encode()
        head += b" " * (-len(head) % ALIGNMENT)
        head = len(head).to_bytes(8, "little") + head
        self._pieces = _pinned(len(head) + end) if pinned else [torch.empty(len(head) + end, dtype=torch.uint8)]
        self._offsets = {name: len(head) + start for name, (start, _) in offsets.items()}
        self._copy(0, torch.frombuffer(bytearray(head), dtype=torch.uint8))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(piece.numel() for piece in self._pieces)

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy `tensors`, which have the layout; from a GPU without waiting for it."""
        for name, start in self._offsets.items():
            self._copy(start, tensors[name].detach().contiguous().view(-1).view(torch.uint8))

    def blocks(self) -> Iterator[memoryview]:
        """The content, piece by piece, not copied."""
        for piece in self._pieces:
            content = piece.numpy().data
            yield from (content[start : start + BLOCK] for start in range(0, len(content), BLOCK))

    def _copy(self, start: int, data: torch.Tensor) -> None:
        """Copy bytes to where they begin in the file, over as many pieces as they reach."""
        first = 0
        for piece in self._pieces:
            lo, hi = max(start - first, 0), min(start + data.numel() - first, piece.numel())
            if lo < hi:
                piece[lo:hi].copy_(data[lo + first - start : hi + first - start], non_blocking=True)
            first += piece.numel()


def piece_sizes(size: int) -> list[int]:
    """Powers of two, and a last one, that make up `size` bytes.

    The allocator of page-locked memory rounds up to a power of two: in one piece, 9 GB would take 16.
    """
    sizes = []
    while size > LEAST_PIECE:
        sizes.append(min(LARGEST_PIECE, 1 << (size.bit_length() - 1)))
        size -= sizes[-1]
    return [*sizes, size] if size else sizes


def _pinned(size: int) -> list[torch.Tensor]:
    """Page-locked memory of `size` bytes; ordinary memory where there is not so much."""
    try:
        return [torch.empty(part, dtype=torch.uint8, pin_memory=True) for part in piece_sizes(size)]
    except RuntimeError as error:
        logger.warning("no page-locked memory for %.3f GB, so saves copy more slowly: %s", size / 1e9, error)
        return [torch.empty(size, dtype=torch.uint8)]


class Snapshot:
    """Tensors of one rank as they were at the last `take`, as files in host memory."""

    def __init__(self) -> None:
        self.files: dict[str, HostFile] = {}
        """by file name"""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def take(self, contents: dict[str, dict[str, torch.Tensor]]) -> None:
        """Copy tensors, given by file name and name. Afterwards they may change."""
        on_gpu = False
        for name, tensors in contents.items():
            layout = [(key, tensor.dtype, tensor.shape) for key, tensor in tensors.items()]
            gpu = any(tensor.is_cuda for tensor in tensors.values())
            if name not in self.files or self.files[name].layout != layout:
                self.files.pop(name, None)  # before the new one is made
                self.files[name] = HostFile(layout, pinned=gpu)
            self.files[name].fill(tensors)
            on_gpu |= gpu
        if on_gpu:
            torch.cuda.current_stream().synchronize()
