"""Token shards: what was packed comes back, whole or not at all, and damage is found and named."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import write_corpus

from raychat.data import shards as module
from raychat.data.corpus import iter_documents, open_corpus, read_documents
from raychat.data.pack import pack
from raychat.data.shards import (
    RowReader,
    ShardSpec,
    fingerprint,
    finished,
    make_shard,
    read_manifest,
    shard_tasks,
    verify_shard,
    write_manifest,
)
from raychat.data.tokenizer import Tokenizer, train_tokenizer
from raychat.errors import DataError

SEQ_LEN = 32


@pytest.fixture(scope="module")
def corpus(corpus_dir, tmp_path_factory):
    return open_corpus(str(corpus_dir), base_dir=tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer_dir(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / "tiny"
    documents = iter_documents(corpus.train, text_column="text")
    train_tokenizer(documents, vocab_size=300, echo=lambda line: None).save(folder)
    return folder


@pytest.fixture(scope="module")
def spec(tokenizer_dir):
    return ShardSpec(
        tokenizer_sha256=Tokenizer.load(tokenizer_dir).sha256,
        seq_len=SEQ_LEN,
        packing="best-fit",
        text_column="text",
        dtype="uint16",
        chunk_rows=4,
    )


@pytest.fixture
def tasks(spec, corpus, tokenizer_dir, tmp_path):
    return shard_tasks(spec, corpus, tokenizer_dir, tmp_path / "tokens")


@pytest.fixture
def manifest(tasks, spec, corpus, tmp_path):
    made = [make_shard(task) for task in tasks]
    return write_manifest(tmp_path / "tokens", fingerprint(spec, corpus), spec, made, corpus)


def packed(task, tokenizer_dir):
    """The rows of a task, packed in memory, (n, T+1)."""
    tokenizer, spec = Tokenizer.load(tokenizer_dir), task.spec
    documents = (
        np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.uint16)
        for text in read_documents(task.unit, text_column="text")
    )
    return np.stack(list(pack(documents, SEQ_LEN + 1, packing=spec.packing, bos_id=tokenizer.bos_id)))


@pytest.mark.parametrize("packing", ["best-fit", "keep"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_come_back_as_they_were_packed(spec, corpus, tokenizer_dir, tmp_path, packing, dtype):
    spec = dataclasses.replace(spec, packing=packing, dtype=dtype)
    tasks = shard_tasks(spec, corpus, tokenizer_dir, tmp_path)
    manifest = write_manifest(tmp_path, "f", spec, [make_shard(task) for task in tasks], corpus)
    for split, count in (("val", 1), ("train", 2)):
        mine = [task for task in tasks if task.split == split]
        assert len(mine) == count
        expected = np.concatenate([packed(task, tokenizer_dir) for task in mine])
        reader = RowReader(manifest, split)
        rows = reader.rows(np.arange(reader.num_rows))
        assert rows.dtype == np.dtype(dtype)
        assert np.array_equal(rows, expected)


def test_rows_are_read_in_any_order_across_shards_and_chunks(manifest):
    """400 ids in random order: their rows are those of one pass through the files."""
    reader = RowReader(manifest, "train")
    whole = reader.rows(np.arange(reader.num_rows))
    ids = np.random.default_rng(0).integers(0, reader.num_rows, 400)
    assert np.array_equal(RowReader(manifest, "train").rows(ids), whole[ids])
    assert len(RowReader(manifest, "train").rows(np.array([], np.int64))) == 0


def test_a_shard_counts_what_went_into_it(tasks, tokenizer_dir):
    info = make_shard(tasks[0])
    tokenizer = Tokenizer.load(tokenizer_dir)
    lengths = [1 + len(tokenizer.encode(text)) for text in read_documents(tasks[0].unit, text_column="text")]
    assert (info.docs, info.tokens_in) == (len(lengths), sum(lengths))
    assert info.rows * (SEQ_LEN + 1) <= info.tokens_in


def test_the_sidecar_is_written_after_the_whole_shard(tasks, tmp_path, monkeypatch):
    seen = []

    def look(store, name, content):
        shard = tmp_path / "tokens" / content["file"]
        seen.append(shard.stat().st_size == content["bytes"] and not store.exists(name))

    monkeypatch.setattr(module, "_write_json", look)
    make_shard(tasks[0])
    assert seen == [True]


def test_an_interrupted_make_leaves_nothing(tasks, tmp_path, monkeypatch):
    def interrupted(rows, *args, **kwargs):
        yield np.zeros(SEQ_LEN + 1, np.uint16)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shard(tasks[0])
    assert list((tmp_path / "tokens").iterdir()) == []


KILLED = """
import os, pickle, signal, sys
from raychat.data import shards
setattr(shards, sys.argv[1], lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
shards.make_shard(pickle.load(sys.stdin.buffer))
"""


@pytest.mark.parametrize("moment", ["_write_rows", "crc32", "_write_json"])
def test_a_killed_make_is_made_again_with_the_same_bytes(tasks, tmp_path, moment):
    """SIGKILL before the rows are written, before the rename, and between the shard and its sidecar."""
    killed = subprocess.run([sys.executable, "-c", KILLED, moment], input=pickle.dumps(tasks[0]))
    assert killed.returncode == -signal.SIGKILL
    assert finished(tasks[0]) is None
    again = make_shard(tasks[0])
    elsewhere = make_shard(dataclasses.replace(tasks[0], folder=str(tmp_path / "elsewhere")))
    assert again == elsewhere
    verify_shard(tmp_path / "tokens", again)


def test_a_shard_that_is_there_is_not_made_again(tasks, monkeypatch):
    first = make_shard(tasks[0])
    monkeypatch.setattr(module, "pack", None)  # a call would raise
    assert make_shard(tasks[0]) == first == finished(tasks[0])


def test_a_shard_of_another_size_than_its_sidecar_is_made_again(tasks, tmp_path):
    first = make_shard(tasks[0])
    os.truncate(tmp_path / "tokens" / first.file, first.bytes - 1)
    assert finished(tasks[0]) is None
    assert make_shard(tasks[0]) == first


def test_the_manifest_comes_back_as_it_was_written(manifest):
    assert read_manifest(manifest.folder) == manifest
    assert manifest.rows("train") == sum(shard.rows for shard in manifest.shards if shard.split == "train")


def test_without_a_manifest_there_are_no_shards_to_train_on(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("harm", ["truncated", "missing"])
def test_a_shard_that_is_not_whole_is_named_with_the_way_out(manifest, harm):
    file = manifest.folder / manifest.shards[1].file
    if harm == "truncated":
        os.truncate(file, 100)
    else:
        file.unlink()
    expected = {"truncated": "has 100 bytes instead of", "missing": "is missing"}[harm]
    with pytest.raises(DataError, match=f"{file} {expected}.*delete {manifest.folder / 'manifest.json'}"):
        read_manifest(manifest.folder)


def test_one_flipped_bit_is_found_and_the_file_named(manifest):
    shard = manifest.shards[0]
    file = manifest.folder / shard.file
    verify_shard(manifest.folder, shard)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file} is damaged.*Delete it and .*manifest.json"):
        verify_shard(manifest.folder, shard)


def test_a_shard_that_is_no_arrow_file_is_named_by_the_reader(manifest):
    shard = manifest.split("train")[0]
    file = manifest.folder / shard.file
    file.write_bytes(b"x" * shard.bytes)
    with pytest.raises(DataError, match=f"{file} cannot be read .*delete it and .*manifest.json"):
        RowReader(manifest, "train").rows(np.array([0]))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": []}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=f"{tmp_path / 'manifest.json'} is damaged.*delete the folder"):
        read_manifest(tmp_path)


def test_a_manifest_of_a_newer_format_is_refused(manifest):
    path = manifest.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(DataError, match="format 2, this version reads 1"):
        read_manifest(manifest.folder)


def test_a_split_without_a_row_is_refused(tasks, spec, corpus, tmp_path):
    empty = [dataclasses.replace(make_shard(task), rows=0) for task in tasks if task.split == "val"]
    with pytest.raises(DataError, match=r"The (train|val) split .* no row .* --max-seq-len"):
        write_manifest(tmp_path, "f", spec, empty, corpus)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_sha256": "0" * 64},
        {"seq_len": 64},
        {"packing": "keep"},
        {"text_column": "body"},
        {"dtype": "uint32"},
        {"buffer_docs": 7},
        {"refill": 7},
        {"chunk_rows": 7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_changes_with_every_part_of_the_spec(spec, corpus, change):
    assert fingerprint(dataclasses.replace(spec, **change), corpus) != fingerprint(spec, corpus)


def test_the_fingerprint_is_of_the_text_and_not_of_the_folder(spec, tmp_path):
    here = write_corpus(tmp_path / "here")
    there = shutil.copytree(here, tmp_path / "there")

    def mark(folder):
        return fingerprint(spec, open_corpus(str(folder), base_dir=tmp_path))

    same = mark(here)
    assert mark(there) == same
    first = there / "part-0.jsonl"
    first.write_text(first.read_text().replace("ka", "KA", 1))  # another text of the same size
    assert mark(there) != same
    shutil.copy(here / "part-0.jsonl", first)
    assert mark(there) == same
    first.rename(there / "part-00.jsonl")
    assert mark(there) != same


def test_a_tokenizer_that_changes_under_way_is_refused(tasks):
    other = dataclasses.replace(tasks[0], spec=dataclasses.replace(tasks[0].spec, tokenizer_sha256="0" * 64))
    with pytest.raises(DataError, match=r"changed while .* start again"):
        make_shard(other)
