"""Packing of tokenized documents into rows of equal length, every row starting with BOS.

`best-fit` fills a row with the largest buffered documents that fit whole and crops a short one for the rest of it: no
document continues in another row, and the cropped tails (some 10 to 15% of the tokens) are lost. `keep` returns the
tail to the buffer with a BOS of its own, so nothing is lost but the last, incomplete row.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

Packing = Literal["best-fit", "keep"]
BUFFER_DOCS = 1000
"""Documents to choose from; a larger buffer loses fewer tokens to cropping (16,000: some 4% fewer)."""
REFILL = 128
"""Documents taken from the input at a time."""


class _Piece(NamedTuple):
    """A document, or (`start` > 0) what is left of it from `start` on, which then stands behind a BOS of its own."""

    tokens: np.ndarray
    start: int

    @property
    def length(self) -> int:
        """Tokens it occupies in a row."""
        return len(self.tokens) - self.start + (self.start > 0)

    def rest(self, taken: int) -> "_Piece":
        """What is left after its first `taken` tokens are placed."""
        # A later piece's first token is the added BOS, which is no part of `tokens`.
        return _Piece(self.tokens, self.start + taken - (self.start > 0))

    def write(self, row: np.ndarray, bos_id: int) -> None:
        """Fill `row` with its first `len(row)` tokens."""
        if self.start:
            row[0] = bos_id
            row[1:] = self.tokens[self.start : self.start + len(row) - 1]
        else:
            row[:] = self.tokens[: len(row)]


class _Buffer:
    """Pieces by length, equal lengths in order of arrival.

    One integer has bit k set where pieces of length k wait, so the largest piece that fits and the shortest one are a
    few machine operations away, however many documents wait (a linear scan is some 280 times slower at 1,000).
    """

    def __init__(self, row_len: int) -> None:
        self.count = 0
        self._lengths = 0
        self._queues: list[deque[_Piece]] = [deque() for _ in range(row_len + 1)]
        self._long: list[tuple[int, int, _Piece]] = []  # pieces longer than a row, by (length, arrival)
        self._arrivals = 0

    def add(self, piece: _Piece) -> None:
        """Let `piece` wait, behind all of its length that came before."""
        length = piece.length
        self.count += 1
        if length < len(self._queues):
            self._queues[length].append(piece)
            self._lengths |= 1 << length
        else:
            self._arrivals += 1
            heappush(self._long, (length, self._arrivals, piece))

    def pop_largest(self, room: int) -> _Piece | None:
        """The earliest of the largest pieces of at most `room` tokens; None if all are larger."""
        fitting = self._lengths & ((2 << room) - 1)
        return self._pop(fitting.bit_length() - 1) if fitting else None

    def pop_shortest(self) -> _Piece:
        """The earliest of the shortest pieces."""
        if self._lengths:
            return self._pop((self._lengths & -self._lengths).bit_length() - 1)
        self.count -= 1
        return heappop(self._long)[2]

    def _pop(self, length: int) -> _Piece:
        queue = self._queues[length]
        piece = queue.popleft()
        if not queue:
            self._lengths ^= 1 << length
        self.count -= 1
        return piece


def pack(
    documents: Iterable[np.ndarray],
    row_len: int,
    *,
    packing: Packing,
    bos_id: int,
    buffer_docs: int = BUFFER_DOCS,
    refill: int = REFILL,
) -> Iterator[np.ndarray]:
    """Rows of exactly `row_len` tokens, each a new array (row_len,) of the documents' dtype.

    `documents` are token arrays (n,) that start with `bos_id`. Before each placement the buffer is refilled to at least
    `buffer_docs` documents, `refill` at a time. The largest document that fits whole into the rest of the row is
    placed; where none fits, the shortest is cropped to fill the row. The earliest wins among equals. At the end of the
    input the buffer is used up and the incomplete last row is dropped.

    Raises:
        ValueError: `row_len` below 2 (a row would hold no token but BOS), or no buffer to choose from.
    """
    if row_len < 2 or buffer_docs < 1 or refill < 1:
        raise ValueError(f"{row_len=} must be at least 2, {buffer_docs=} and {refill=} at least 1")
    return _rows(iter(documents), row_len, packing == "keep", bos_id, buffer_docs, refill)


def _rows(
    source: Iterator[np.ndarray], row_len: int, keep: bool, bos_id: int, buffer_docs: int, refill: int
) -> Iterator[np.ndarray]:
    buffer = _Buffer(row_len)
    row, filled, exhausted = np.empty(row_len), 0, False
    while True:
        while not exhausted and buffer.count < buffer_docs:
            taken = [_Piece(tokens, 0) for tokens in islice(source, refill)]
            exhausted = len(taken) < refill
            for piece in taken:
                buffer.add(piece)
        if not buffer.count:
            return
        room = row_len - filled
        piece = buffer.pop_largest(room)
        if piece is None:
            piece = buffer.pop_shortest()
            if keep:
                buffer.add(piece.rest(room))
        if not filled:
            row = np.empty(row_len, dtype=piece.tokens.dtype)
        size = min(piece.length, room)
        piece.write(row[filled : filled + size], bos_id)
        filled += size
        if filled == row_len:
            yield row
            filled = 0


def kept_share(lengths: Iterable[int], row_len: int, *, buffer_docs: int = BUFFER_DOCS, refill: int = REFILL) -> float:
    """The share of tokens, 0 to 1, that best-fit packing delivers of documents of these lengths (tokens, BOS included).

    A sample that fills only a few rows reads low, because its incomplete last row counts as lost.
    """
    sizes = list(lengths)
    if not sizes:
        return 0.0
    blank = np.zeros(max(sizes), dtype=np.uint8)
    documents = (blank[:size] for size in sizes)
    rows = pack(documents, row_len, packing="best-fit", bos_id=0, buffer_docs=buffer_docs, refill=refill)
    return sum(1 for _ in rows) * row_len / sum(sizes)
