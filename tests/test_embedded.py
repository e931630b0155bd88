"""The embedded corpus: made once from what Python carries, in an order that depends on names only."""

import statistics
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raychat.data import embedded
from raychat.data.corpus import iter_documents, open_corpus
from raychat.data.embedded import collect, cut, embedded_corpus
from raychat.errors import DataError

SMALL = 3_000_000


def silent(line):
    """Take a progress line and say nothing."""


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    base_dir = tmp_path_factory.mktemp("base")
    embedded_corpus(base_dir, silent)
    return base_dir


def test_the_snapshot_is_nine_shards_of_text_and_nothing_else(base_dir):
    folder = base_dir / "corpora" / "embedded"
    assert sorted(path.name for path in folder.iterdir()) == [f"shard_{i:05d}.parquet" for i in range(9)]
    assert [path.name for path in folder.parent.iterdir()] == ["embedded"], "no temporary files are left"
    for path in folder.iterdir():
        metadata = pq.read_metadata(path)
        assert metadata.schema.names == ["text"]
        assert metadata.row_group(0).column(0).compression == "ZSTD"
        assert metadata.row_group(0).num_rows == min(64, metadata.num_rows)


def test_documents_are_distinct_of_fair_length_and_within_the_limit(base_dir):
    found = open_corpus("embedded", base_dir=base_dir, echo=silent)
    train = list(iter_documents(found.train, text_column="text"))
    val = list(iter_documents(found.val, text_column="text"))
    assert len(val) == round((len(train) + len(val)) * 0.05)
    assert len({*train, *val}) == len(train) + len(val)
    size = sum(len(text.encode()) for text in (*train, *val))
    assert 2_000_000 < size <= 30_000_000
    assert all(0 < len(text) <= 12_000 for text in (*train, *val))
    assert 2_000 < statistics.median(map(len, train)) < 12_000
    # Drawn alike: a validation split of one kind of text would differ in length by more than sampling does.
    assert statistics.mean(map(len, val)) == pytest.approx(statistics.mean(map(len, train)), rel=0.15)


def test_a_second_call_returns_the_snapshot_without_reading_anything(base_dir, monkeypatch):
    monkeypatch.setattr(embedded, "collect", None)
    assert embedded_corpus(base_dir, silent) == base_dir / "corpora" / "embedded"


def test_collecting_is_the_same_in_another_process():
    code = (
        "import hashlib; from raychat.data.embedded import collect; documents, size = collect(3_000_000);"
        "print(hashlib.sha256(repr(documents).encode()).hexdigest(), size)"
    )
    root = Path(__file__).resolve().parents[1]
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert len(seen.pop().split()) == 2


def test_the_limit_holds_and_the_standard_library_comes_first():
    documents, size = collect(SMALL)
    assert SMALL - 12_000 * 4 < size <= SMALL
    assert size == sum(len(text.encode()) for text in documents)
    names = [name for name, _ in embedded._files()]
    first_package = next((i for i, name in enumerate(names) if name.startswith("packages/")), len(names))
    assert first_package > 300
    assert all(name.startswith("packages/") for name in names[first_package:])
    assert not any("/test/" in name or "/tests/" in name for name in names[:first_package])


def test_undecodable_and_repeated_files_are_left_out(tmp_path, monkeypatch):
    for name, content in {"a": b"text\n", "b": b"\xff\xfe", "c": b"text\n", "d": b"more\n", "e": b"\n \n"}.items():
        (tmp_path / name).write_bytes(content)
    files = [(f"stdlib/{name}", tmp_path / name) for name in "abcdef"]  # f does not exist
    monkeypatch.setattr(embedded, "_files", lambda: files)
    documents, size = collect()
    assert sorted(documents) == ["more", "text"]
    assert size == 8


def test_too_little_text_is_refused_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_files", lambda: [("stdlib/x", Path(__file__))])
    with pytest.raises(DataError, match="--corpus"):
        embedded_corpus(tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(documents, folder):
        (folder / "shard_00000.parquet").write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(embedded, "collect", lambda: (["text"] * 100, SMALL))
    monkeypatch.setattr(embedded, "_write_shards", full)
    with pytest.raises(OSError, match="no space"):
        embedded_corpus(tmp_path, silent)
    assert list((tmp_path / "corpora").iterdir()) == []


def test_of_two_makers_at_once_one_wins_and_both_use_it(tmp_path, monkeypatch):
    write = embedded._write_shards

    def overtaken(documents, folder):
        monkeypatch.setattr(embedded, "_write_shards", write)
        embedded_corpus(tmp_path, silent)
        write(documents, folder)

    monkeypatch.setattr(embedded, "collect", lambda: (["text"] * 100, SMALL))
    monkeypatch.setattr(embedded, "_write_shards", overtaken)
    folder = embedded_corpus(tmp_path, silent)
    assert [path.name for path in folder.parent.iterdir()] == ["embedded"]
    assert sum(pq.read_metadata(path).num_rows for path in folder.iterdir()) == 100


@pytest.mark.parametrize(
    "text",
    [
        Path(embedded.__file__).read_text(),
        "short",
        "word " * 20_000,
        "one line\n" * 5_000,
        "paragraph of text\n\n\n" * 2_000,
        ("x" * 11_999 + "\n\n") * 3,
    ],
    ids=["source", "short", "no line breaks", "no blank lines", "paragraphs", "long paragraphs"],
)
def test_cutting_loses_nothing_but_white_space_and_keeps_to_the_limits(text):
    documents = cut(text)
    assert "".join("".join(documents).split()) == "".join(text.split())
    assert all(len(document) <= 12_000 for document in documents)
    assert all(len(document) >= 2_000 for document in documents[:-1])


def test_cuts_fall_on_blank_lines_where_there_are_some():
    paragraphs = [f"{i} " + "word " * 100 for i in range(60)]
    documents = cut("\n\n".join(paragraphs))
    assert len(documents) > 3
    assert [p.strip() for document in documents for p in document.split("\n\n")] == [p.strip() for p in paragraphs]


def test_a_text_without_content_gives_no_document():
    assert cut("") == []
    assert cut(" \n\n \n") == []
