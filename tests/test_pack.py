"""Packing against a linear scan that follows the policy word for word, and its conservation laws."""

from itertools import islice

import numpy as np
import pytest

from raychat.data.pack import kept_share, pack

BOS = 60_000


def scan(documents, row_len, *, keep, buffer_docs, refill):
    """The policy as it is stated, on lists, by linear search."""
    source, buffer, rows, row = iter(documents), [], [], []
    while True:
        while len(buffer) < buffer_docs and (more := list(islice(source, refill))):
            buffer += more
        if not buffer:
            return rows
        room = row_len - len(row)
        fitting = [document for document in buffer if len(document) <= room]
        chosen = max(fitting, key=len) if fitting else min(buffer, key=len)  # both return the first among equals
        buffer.pop(next(i for i, document in enumerate(buffer) if document is chosen))
        row += chosen[:room]
        if keep and len(chosen) > room:
            buffer.append([BOS, *chosen[room:]])
        if len(row) == row_len:
            rows.append(row)
            row = []


def documents_of(lengths):
    """Documents of these lengths whose tokens behind BOS all differ (modulo 2**16 at most once round)."""
    counter = iter(range(10**9))
    return [[BOS, *(next(counter) % BOS for _ in range(length - 1))] for length in lengths]


def packed(documents, row_len, **options):
    arrays = [np.array(document, dtype=np.uint16) for document in documents]
    return list(pack(arrays, row_len, bos_id=BOS, **options))


DISTRIBUTIONS = {
    "short": lambda rng: rng.integers(1, 12, 300),
    "long": lambda rng: rng.integers(40, 400, 60),
    "mixed": lambda rng: np.maximum(1, rng.lognormal(3.0, 1.2, 300)).astype(int),
    "equal": lambda rng: np.full(100, rng.integers(1, 70)),
    "near the row": lambda rng: rng.integers(30, 36, 150),
    "few": lambda rng: rng.integers(1, 100, 3),
}


@pytest.mark.parametrize("packing", ["best-fit", "keep"])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_rows_equal_those_of_a_linear_scan(kind, packing):
    rng = np.random.default_rng(7)
    for row_len in (2, 17, 33):
        for buffer_docs, refill in ((1, 1), (8, 3), (64, 16), (1000, 128)):
            documents = documents_of(DISTRIBUTIONS[kind](rng))
            expected = scan(documents, row_len, keep=packing == "keep", buffer_docs=buffer_docs, refill=refill)
            rows = packed(documents, row_len, packing=packing, buffer_docs=buffer_docs, refill=refill)
            assert [row.tolist() for row in rows] == expected


@pytest.mark.parametrize("packing", ["best-fit", "keep"])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_every_row_starts_with_bos_and_is_full(kind, packing):
    documents = documents_of(DISTRIBUTIONS[kind](np.random.default_rng(1)))
    for row in packed(documents, 33, packing=packing):
        assert row.shape == (33,)
        assert row.dtype == np.uint16
        assert row[0] == BOS


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_keep_delivers_each_token_once_except_the_incomplete_row(kind):
    documents = documents_of(DISTRIBUTIONS[kind](np.random.default_rng(2)))
    given = [token for document in documents for token in document[1:]]
    rows = packed(documents, 33, packing="keep")
    delivered = [token for row in rows for token in row.tolist() if token != BOS]
    assert len(set(given)) == len(given), "the law below needs distinct tokens"
    assert len(set(delivered)) == len(delivered)
    assert set(delivered) <= set(given)
    assert len(given) - len(delivered) < 33


def test_keep_delivers_a_long_document_in_its_order():
    [document] = documents_of([1000])
    rows = packed([document], 33, packing="keep")
    delivered = [token for row in rows for token in row.tolist() if token != BOS]
    assert delivered == document[1 : len(delivered) + 1]
    assert len(rows) == 999 // 32


def test_best_fit_continues_no_document_in_another_row():
    documents = documents_of(DISTRIBUTIONS["mixed"](np.random.default_rng(3)))
    starts = {tuple(document[1:2]) for document in documents}
    for row in packed(documents, 33, packing="best-fit"):
        text = row.tolist()
        behind_bos = [tuple(text[i + 1 : i + 2]) for i, token in enumerate(text) if token == BOS]
        assert all(start in starts or not start or start == (BOS,) for start in behind_bos)


def test_documents_of_exactly_a_row_pass_unchanged():
    documents = documents_of([17] * 20)
    assert [row.tolist() for row in packed(documents, 17, packing="best-fit")] == documents
    assert kept_share([17] * 20, 17) == 1.0


def test_kept_share_counts_what_best_fit_delivers():
    lengths = DISTRIBUTIONS["mixed"](np.random.default_rng(4)).tolist()
    rows = packed(documents_of(lengths), 33, packing="best-fit", buffer_docs=50, refill=10)
    assert kept_share(lengths, 33, buffer_docs=50, refill=10) == len(rows) * 33 / sum(lengths)
    assert kept_share([], 33) == 0.0


def test_a_larger_buffer_loses_fewer_tokens():
    lengths = np.maximum(2, np.random.default_rng(5).lognormal(5.5, 1.0, 6000)).astype(int).tolist()
    small, large = (kept_share(lengths, 513, buffer_docs=size) for size in (16, 2000))
    assert 0.5 < small < large < 1.0


def test_the_input_is_read_no_further_than_the_buffer_needs():
    read = []

    def source():
        for document in documents_of([10] * 500):
            read.append(document)
            yield np.array(document, dtype=np.uint16)

    next(pack(source(), 10, packing="best-fit", bos_id=BOS, buffer_docs=20, refill=8))
    assert len(read) == 24


@pytest.mark.parametrize("bad", [{"row_len": 1}, {"buffer_docs": 0}, {"refill": 0}])
def test_settings_that_cannot_work_are_refused_at_the_call(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        pack([], **{"row_len": 8, "packing": "keep", "bos_id": BOS, **bad})
