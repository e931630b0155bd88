"""Corpora: the same documents whatever the form they come in, the split, and a reason for whatever is wrong."""

import bz2
import gzip
import json
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raychat.data import climbmix, corpus, files
from raychat.data.corpus import iter_documents, open_corpus, read_documents, split_units
from raychat.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "corpus"
DOCUMENTS = [
    "first\nline two\n\nend",
    "zweites — 東京 👩‍👩‍👧",
    " spaces ",
    'quotes " and \\ and \t',
    "x" * 5000,
    "last",
]


def write_parquet(path, texts, *, column="text", row_group_size=2, **options):
    table = pa.table({"id": list(range(len(texts))), column: texts})
    pq.write_table(table, path, row_group_size=row_group_size, **options)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))


def write_txt(path, texts):
    path.write_text("\n<|endoftext|>\n".join(texts), newline="")


def compressed(write, pack):
    def writer(path, texts):
        write(path, texts)
        path.write_bytes(pack(path.read_bytes()))

    return writer


FORMS = {
    ".parquet": write_parquet,
    ".jsonl": write_jsonl,
    ".txt": write_txt,
    ".jsonl.gz": compressed(write_jsonl, gzip.compress),
    ".txt.bz2": compressed(write_txt, bz2.compress),
    ".txt.zst": compressed(write_txt, lambda content: pa.Codec("zstd").compress(content, asbytes=True)),
}


def corpus_of(folder, form=".parquet", shards=3):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(shards):
        FORMS[form](folder / f"shard_{i:05d}{form}", [f"{i}: {text}" for text in DOCUMENTS])
    return folder


def opened(where, **options):
    return open_corpus(str(where), base_dir=Path("/nowhere"), **options)


def documents(sources, text_column="text"):
    return list(iter_documents(sources, text_column=text_column))


def names(sources):
    return [source.name for source in sources]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(tmp_path, form):
    found = opened(corpus_of(tmp_path / "data", form))
    assert documents(found.train) == [f"{i}: {text}" for i in range(2) for text in DOCUMENTS]
    assert documents(found.val) == [f"2: {text}" for text in DOCUMENTS]


@pytest.mark.parametrize("form", [".parquet", ".txt.zst"])
def test_a_uri_gives_the_same_corpus_as_the_path(tmp_path, form):
    folder = corpus_of(tmp_path / "with space", form)
    local, remote = opened(folder), opened(folder.as_uri())
    assert remote.train[0].path.startswith("file:///")
    assert documents(remote.train) == documents(local.train)
    for a, b in zip((*local.train, *local.val), (*remote.train, *remote.val), strict=True):
        assert (a.name, a.size, a.signature) == (b.name, b.size, b.signature)
    assert opened(f"{folder.as_uri()}/shard_*{form}").train == remote.train
    assert local.name == "with-space"


def test_the_last_file_in_name_order_validates(tmp_path):
    found = opened(corpus_of(tmp_path / "data", shards=4))
    assert names(found.train) == [f"shard_{i:05d}.parquet" for i in range(3)]
    assert names(found.val) == ["shard_00003.parquet"]


def test_other_files_in_the_directory_are_passed_over(tmp_path):
    folder = corpus_of(tmp_path / "data")
    (folder / "README.md").write_text("about")
    (folder / ".hidden.parquet").write_text("not one of ours")
    (folder / "deeper").mkdir()
    write_jsonl(folder / "deeper" / "x.jsonl", DOCUMENTS)
    assert len(names(opened(folder).train)) == 2


def test_globs_select_files_also_across_directories(tmp_path):
    for part in ("a", "b"):
        corpus_of(tmp_path / part, ".jsonl", shards=2)
    assert len(opened(tmp_path / "*" / "shard_*.jsonl").train) == 3
    assert names(opened(tmp_path / "a" / "shard_0000[01].jsonl").val) == ["shard_00001.jsonl"]
    assert opened(tmp_path / "a" / "*.jsonl").name == "a"


def test_another_corpus_validates_if_given(tmp_path):
    train, val = corpus_of(tmp_path / "train"), corpus_of(tmp_path / "val", ".txt", shards=2)
    found = opened(train, val_corpus=str(val))
    assert (len(found.train), names(found.val)) == (3, ["shard_00000.txt", "shard_00001.txt"])


def test_a_single_file_needs_a_validation_corpus(tmp_path):
    folder = corpus_of(tmp_path / "data", shards=2)
    with pytest.raises(DataError, match="--val-corpus"):
        opened(folder / "shard_00000.parquet")
    found = opened(folder / "shard_00000.parquet", val_corpus=str(folder / "shard_00001.parquet"))
    assert (names(found.train), names(found.val)) == (["shard_00000.parquet"], ["shard_00001.parquet"])
    assert found.name == "data"


def test_what_validates_is_not_trained_on(tmp_path):
    folder = corpus_of(tmp_path / "data")
    found = opened(folder, val_corpus=str(folder / "shard_00001.parquet"))
    assert names(found.train) == ["shard_00000.parquet", "shard_00002.parquet"]
    with pytest.raises(DataError, match="none is left to train on"):
        opened(folder, val_corpus=str(folder))


def test_num_data_shards_takes_the_first_files_and_the_last(tmp_path):
    folder = corpus_of(tmp_path / "data", shards=5)
    found = opened(folder, num_data_shards=3)
    assert names(found.train) == ["shard_00000.parquet", "shard_00001.parquet"]
    assert names(found.val) == ["shard_00004.parquet"]
    assert opened(folder, num_data_shards=5) == opened(folder)
    with pytest.raises(DataError, match="the 5 files"):
        opened(folder, num_data_shards=6)
    with pytest.raises(ConfigError, match="Use 2 or more"):
        opened(folder, num_data_shards=1)


def test_num_data_shards_counts_training_files_beside_a_validation_corpus(tmp_path):
    folder, val = corpus_of(tmp_path / "data", shards=5), corpus_of(tmp_path / "val", shards=1)
    assert names(opened(folder, val_corpus=str(val), num_data_shards=1).train) == ["shard_00000.parquet"]


def test_a_moved_corpus_has_the_same_signatures_and_a_changed_one_has_not(tmp_path):
    folder = corpus_of(tmp_path / "data", ".jsonl")
    before = opened(folder)
    moved = opened(shutil.copytree(folder, tmp_path / "moved"))
    assert [s.signature for s in moved.train] == [s.signature for s in before.train]
    path = folder / "shard_00000.jsonl"
    path.write_text(path.read_text().replace("first", "First"))
    after = opened(folder)
    assert after.train[0].size == before.train[0].size
    assert after.train[0].signature != before.train[0].signature
    assert after.train[1].signature == before.train[1].signature


@pytest.mark.parametrize("unit_bytes", [1, 6000, 2**30])
def test_units_cover_every_row_group_once_and_in_order(tmp_path, unit_bytes):
    folder = corpus_of(tmp_path / "data")
    found = opened(folder)
    units = split_units(found.train, text_column="text", unit_bytes=unit_bytes)
    assert [text for unit in units for text in read_documents(unit, text_column="text")] == documents(found.train)
    for source in found.train:
        spans = [unit.row_groups for unit in units if unit.source == source]
        assert spans[0][0] == 0
        assert spans[-1][1] == 3
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert len(units) == {1: 6, 6000: 2, 2**30: 2}[unit_bytes]


@pytest.mark.parametrize("form", [".parquet", ".jsonl"])
def test_units_estimate_their_text_and_travel_to_other_processes(tmp_path, form):
    texts = [f"{i} " * 500 for i in range(100)]
    # Dictionary and statistics count beside the text, and weigh in pages as small as these.
    options = {"use_dictionary": False, "write_statistics": False} if form == ".parquet" else {}
    for name in ("a", "b"):
        FORMS[form](tmp_path / f"{name}{form}", texts, **options)
    units = split_units(opened(tmp_path).train, text_column="text")
    assert sum(unit.text_bytes for unit in units) == pytest.approx(sum(map(len, texts)), rel=0.05)
    assert pickle.loads(pickle.dumps(units)) == units


def test_empty_and_null_documents_are_left_out(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "a.parquet", ["one", None, "", "two"])
    write_parquet(folder / "b.parquet", ["three"])
    write_jsonl(folder / "c.jsonl", ["one", None, "", "two"])
    (folder / "d.txt").write_text("<|endoftext|>\none\n<|endoftext|>\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    for file in ("a.parquet", "c.jsonl", "d.txt"):
        found = opened(folder / file, val_corpus=str(folder / "b.parquet"))
        assert documents(found.train) == ["one", "two"]


def test_a_txt_file_without_separators_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo <|endoftext|> three\n")
    write_txt(tmp_path / "b.txt", ["val"])
    assert documents(opened(tmp_path).train) == ["one\n\ntwo <|endoftext|> three"]


def test_line_breaks_of_another_system_separate_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n<|endoftext|>\r\nthree\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    val = str(corpus_of(tmp_path / "val"))
    assert documents(opened(tmp_path / "a.txt", val_corpus=val).train) == ["one\r\ntwo", "three"]
    assert documents(opened(tmp_path / "b.jsonl", val_corpus=val).train) == ["one", "two"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_string_type_of_arrow_is_text(tmp_path, kind):
    for name in ("a", "b"):
        pq.write_table(pa.table({"body": pa.array(DOCUMENTS, pa.string()).cast(kind)}), tmp_path / f"{name}.parquet")
    found = opened(tmp_path, text_column="body")
    assert documents(found.train, "body") == DOCUMENTS


def test_a_column_behind_nested_ones_is_measured_and_read(tmp_path):
    table = pa.table({"meta": [{"a": 1, "b": 2}] * 6, "text": DOCUMENTS})
    for name in ("a", "b"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    found = opened(tmp_path)
    assert documents(found.train) == DOCUMENTS
    assert split_units(found.train, text_column="text")[0].text_bytes > 5000


def broken(folder, name, content):
    """A corpus whose first file is damaged in the given way."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    suffix = name[name.index(".") :]
    FORMS.get(suffix, write_txt)(folder / f"z{suffix}", ["val"])
    return folder


GZ = gzip.compress(b"one\n" * 10_000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 cut short", "a.parquet is not a parquet file, or it was cut short"),
        ("a.parquet", b"", "a.parquet is empty"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"<|endoftext|>\n\n<|endoftext|>", "there is no text in .*a.txt"),
        ("a.txt", b"fine\nnot \xff fine", "a.txt, line 2, byte 5 of the line: not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "not \xff"}\n', "a.jsonl, line 2, byte 15 .* not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut\n', "a.jsonl, line 2: not a JSON object"),
        ("a.jsonl", b'["text"]\n', "a.jsonl, line 1: a JSON list"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "line 1: no key 'text'. The keys are body, id"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: 'text' holds a int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: a lone surrogate"),
        ("a.jsonl", b"\n\n", "there is no text in .*a.jsonl"),
        ("a.txt.gz", GZ[: len(GZ) // 2], "a.txt.gz cannot be read, it may be damaged or cut short"),
        ("a.txt.gz", b"no gzip at all", "a.txt.gz cannot be read, it may be damaged or cut short"),
    ],
)
def test_damaged_files_are_named_with_what_is_wrong(tmp_path, name, content, message):
    folder = broken(tmp_path / "data", name, content)
    with pytest.raises(DataError, match=message):
        documents(opened(folder).train)


def test_a_missing_column_names_the_columns_there_are(tmp_path):
    folder = corpus_of(tmp_path / "data")
    with pytest.raises(DataError, match="no column 'body'. Its columns are id, text: .*--text-column"):
        documents(opened(folder, text_column="body").train, "body")
    with pytest.raises(DataError, match="column 'id' of .* holds int64, not text"):
        split_units(opened(folder).train, text_column="id")


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", pa.array([], pa.string()))
    write_parquet(tmp_path / "b.parquet", ["x"])
    with pytest.raises(DataError, match="a.parquet holds no documents"):
        documents(opened(tmp_path).train)


def test_parquet_text_that_is_no_utf8_names_the_row(tmp_path):
    bad = pa.array([b"fine"] * 700 + [b"\xff"] + [b"fine"] * 99).cast(pa.binary())
    bad = pa.Array.from_buffers(pa.string(), len(bad), bad.buffers())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet", row_group_size=300)
    write_parquet(tmp_path / "b.parquet", ["x"])
    with pytest.raises(DataError, match=r"a.parquet, row 700 \(from 0\): not UTF-8"):
        documents(opened(tmp_path).train)


def test_damage_inside_a_parquet_file_is_named(tmp_path):
    folder = corpus_of(tmp_path / "data")
    path = folder / "shard_00000.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(DataError, match="shard_00000.parquet cannot be read"):
        documents(opened(folder).train)


def test_places_without_text_are_refused_with_a_remedy(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    mixed = corpus_of(tmp_path / "mixed")
    write_txt(mixed / "a.txt", ["x"])
    for where, message in [
        ("missing", "there is no .*missing. Give as the corpus a directory"),
        ("empty", "holds no .parquet, .jsonl or .txt"),
        ("notes.md", "must end in .parquet"),
        ("mixed", "several kinds .parquet, txt.*mixed/\\*.parquet"),
        ("mixed/*.jsonl", "holds no"),
        ("missing/*.txt", "there is no .*missing"),
    ]:
        with pytest.raises(DataError, match=message):
            opened(tmp_path / where)


@pytest.mark.parametrize("uri", ["nowhere://bucket/x", "file:///a b", "s3:///x", "file://"])
def test_uris_that_lead_nowhere_are_refused_with_a_remedy(uri):
    with pytest.raises(DataError, match="Check the URI|Give a"):
        opened(uri)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "may not be read: .*Change its permissions"),
        (OSError("AWS Error ACCESS_DENIED"), "ACCESS_DENIED.*credentials"),
        (FileNotFoundError(2, "gone"), "Was it moved or deleted"),
    ],
)
def test_what_a_file_system_raises_becomes_a_data_error(error, message):
    with pytest.raises(DataError, match=message), files.explained("s3://bucket/x"):
        raise error


def test_a_file_that_vanished_is_named(tmp_path):
    found = opened(corpus_of(tmp_path / "data", ".txt"))
    Path(found.train[0].path).unlink()
    with pytest.raises(DataError, match="there is no .*shard_00000.txt"):
        documents(found.train)


def climbmix_stub(base_dir, num_data_shards, *, echo):
    folder = base_dir / "corpora" / "climbmix"
    folder.mkdir(parents=True, exist_ok=True)
    for name in climbmix.shard_names(num_data_shards):
        write_parquet(folder / name, [name])
    return folder


def test_climbmix_uses_the_files_it_needs_and_validates_on_its_very_last(tmp_path, monkeypatch):
    monkeypatch.setattr(climbmix, "fetch", climbmix_stub)
    open_corpus("climbmix", base_dir=tmp_path, num_data_shards=5)
    found = open_corpus("climbmix", base_dir=tmp_path, num_data_shards=3)
    assert found.name == "climbmix"
    assert names(found.train) == ["shard_00000.parquet", "shard_00001.parquet"], "not all that lie there"
    assert names(found.val) == ["shard_06542.parquet"]
    assert open_corpus("climbmix", base_dir=tmp_path, tokens_needed=80_000_000) == found
    with pytest.raises(ValueError, match="tokens_needed"):
        open_corpus("climbmix", base_dir=tmp_path)


def test_the_validation_file_of_a_provided_corpus_is_never_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(climbmix, "fetch", climbmix_stub)
    monkeypatch.setattr(corpus, "embedded_corpus", lambda base_dir, echo: corpus_of(base_dir / "embedded"))
    found = open_corpus("climbmix", base_dir=tmp_path, num_data_shards=3, val_corpus="embedded")
    assert (len(found.train), names(found.val)) == (2, ["shard_00002.parquet"])
    found = open_corpus("embedded", base_dir=tmp_path, num_data_shards=2, val_corpus="climbmix")
    assert (names(found.train), names(found.val)) == (["shard_00000.parquet"], ["shard_06542.parquet"])
    assert found.name == "embedded"
    with pytest.raises(ConfigError, match="Use 2 or more"):
        open_corpus("embedded", base_dir=tmp_path, num_data_shards=1, val_corpus="climbmix")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared text corpus")
def test_the_shared_corpus_holds_what_its_page_says():
    found = opened(SHARED)
    assert (len(found.train), names(found.val)) == (8, ["shard_00008.parquet"])
    texts = documents([*found.train, *found.val])
    assert len(texts) == 6822
    assert sum(len(text.encode()) for text in texts) == 38_455_170
