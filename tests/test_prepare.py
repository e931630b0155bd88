"""Preparation of data: whatever is missing is made, and nothing is made twice."""

import json
import shutil

import numpy as np
import pytest
from conftest import write_corpus

from raychat.data import prepare as module
from raychat.data.prepare import check_writable, make_in_process, open_corpus, prepare, tokenizer_folder
from raychat.data.shards import RowReader, fingerprint
from raychat.data.tokenizer import Tokenizer
from raychat.errors import ConfigError, DataError


def silent(line):
    """Take a line and say nothing."""


def never(*args, **kwargs):
    """What must not be called."""
    raise AssertionError("made although it was there")


def prepared(config, maker=make_in_process, echo=silent):
    return prepare(config, with_gpus=False, maker=maker, echo=echo)


def files_of(folder):
    """Every file below `folder` with the time it was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_preparing_twice_makes_nothing_twice(tiny_config, monkeypatch):
    config = tiny_config()
    first = prepared(config)
    before = files_of(config.base_dir)
    monkeypatch.setattr(module, "train_tokenizer", never)
    assert prepared(config, maker=never) == first
    assert files_of(config.base_dir) == before


def test_only_the_shards_that_are_missing_are_made(tiny_config):
    config, lines = tiny_config(), []
    first = prepared(config)
    folder = first.manifest.folder
    for name in ("manifest.json", "train-000001.arrow"):
        (folder / name).unlink()
    asked = []

    def maker(tasks):
        asked.extend(task.name for task in tasks)
        return make_in_process(tasks)

    assert prepared(config, maker=maker, echo=lines.append) == first
    assert asked == ["train-000001"]
    assert any("2 of 3 shards are there already" in line for line in lines)


def test_what_is_prepared_is_what_its_fingerprint_says(tiny_config):
    data = prepared(tiny_config())
    assert data.manifest.fingerprint == fingerprint(data.manifest.spec, data.corpus) == data.manifest.folder.name
    assert data.manifest.spec.tokenizer_sha256 == Tokenizer.load(data.tokenizer_dir).sha256
    assert RowReader(data.manifest, "val").num_rows == data.manifest.rows("val") > 0


def test_another_context_length_uses_the_same_tokenizer(tiny_config, monkeypatch):
    first = prepared(tiny_config())
    monkeypatch.setattr(module, "train_tokenizer", never)
    second = prepared(tiny_config(max_seq_len=64))
    assert second.tokenizer_dir == first.tokenizer_dir
    assert second.manifest.folder != first.manifest.folder


def test_another_corpus_has_folders_of_its_own(tiny_config, tmp_path):
    other = write_corpus(tmp_path / "corpus", documents=41)  # of the same name, with other text
    first, second = prepared(tiny_config()), prepared(tiny_config(corpus=str(other)))
    assert first.corpus.name == second.corpus.name
    assert second.tokenizer_dir != first.tokenizer_dir
    assert second.manifest.folder != first.manifest.folder


def test_a_corpus_that_moved_is_the_same_corpus(tiny_config, corpus_dir, tmp_path):
    moved = shutil.copytree(corpus_dir, tmp_path / "corpus")
    first = prepared(tiny_config())
    assert prepared(tiny_config(corpus=str(moved)), maker=never).manifest == first.manifest


@pytest.mark.parametrize("change", [{"vocab_size": 310}, {"tok_max_chars": 20_000}, {"tok_doc_cap": 100}])
def test_whatever_decides_the_tokenizer_is_in_its_name(tiny_config, change):
    config, other = tiny_config(), tiny_config(**change)
    corpus = open_corpus(config, with_gpus=False, echo=silent)
    assert tokenizer_folder(config, corpus) != tokenizer_folder(other, corpus)


def test_a_named_tokenizer_is_kept_under_its_name_and_a_path_is_a_path(tiny_config, tmp_path):
    corpus = open_corpus(tiny_config(), with_gpus=False, echo=silent)
    named = tiny_config(tokenizer="mine")
    assert tokenizer_folder(named, corpus) == named.base_dir / "tokenizers" / "mine"
    assert tokenizer_folder(tiny_config(tokenizer=f"{tmp_path}/t"), corpus) == tmp_path / "t"


def test_a_tokenizer_of_another_vocabulary_is_refused_with_the_size_it_has(tiny_config):
    folder = prepared(tiny_config()).tokenizer_dir
    with pytest.raises(ConfigError, match=r"has 300 tokens and --vocab-size is 310: give --vocab-size 300"):
        prepared(tiny_config(vocab_size=310, tokenizer=str(folder)))


def test_a_tokenizer_folder_that_is_not_there_is_never_made(tiny_config, tmp_path):
    with pytest.raises(DataError, match=f"there is no tokenizer in {tmp_path}/absent"):
        prepared(tiny_config(tokenizer=f"{tmp_path}/absent"))
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(("longest", "choice"), [(6, "best-fit"), (200, "keep")])
def test_automatic_packing_follows_what_best_fit_would_lose(tiny_config, tmp_path, longest, choice):
    """Documents of 6 words fit into rows of 257 tokens; of those of 100 words on average, rows of 33 crop most."""
    corpus = write_corpus(tmp_path / "corpus", longest=longest, documents=400 if longest == 6 else 40)
    lines = []
    T = 256 if longest == 6 else 32
    data = prepared(
        tiny_config(corpus=str(corpus), packing="auto", max_seq_len=T, total_batch_size=8 * T), echo=lines.append
    )
    assert data.manifest.spec.packing == choice
    assert any(f"packing: {choice}" in line for line in lines)


@pytest.mark.parametrize("packing", ["best-fit", "keep"])
def test_packing_that_was_asked_for_is_not_measured(tiny_config, monkeypatch, packing):
    monkeypatch.setattr(module, "kept_share", never)
    assert prepared(tiny_config(packing=packing)).manifest.spec.packing == packing


def test_tokens_are_two_bytes_as_long_as_the_vocabulary_fits(tiny_config):
    data = prepared(tiny_config())
    assert data.manifest.spec.dtype == "uint16"
    assert RowReader(data.manifest, "train").rows(np.array([0])).dtype == np.uint16


def test_a_base_directory_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{tmp_path}/file/base cannot be written to .* --base-dir"):
        check_writable(tmp_path / "file" / "base")
    check_writable(tmp_path / "new" / "base")
    assert list((tmp_path / "new" / "base").iterdir()) == []


def test_run_in_progress_stays_with_the_files_it_began_with(tiny_config, monkeypatch):
    """A longer horizon would download more shards of climbmix, which are another corpus to the tokenizer and the order."""
    asked = []
    monkeypatch.setattr(
        module.corpora, "open_corpus", lambda name, **settings: asked.append(settings["num_data_shards"])
    )

    def files(**changes):
        open_corpus(tiny_config(corpus="climbmix", **changes), with_gpus=True, echo=silent)
        return asked[-1]

    run_dir = tiny_config().run_dir
    assert files() is None  # as many as the horizon needs
    (run_dir / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps({"config": {"corpus": "climbmix"}, "corpus_files": 5}))
    assert files() == files(num_iterations=400) == 5
    assert files(num_data_shards=7) == 7
    assert files(fresh=True) is None
