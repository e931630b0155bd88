"""Preparation of data: whatever is missing is made, and nothing is made twice."""

import json
import shutil

import numpy as np
import pytest
from conftest import write_corpus
from s3_server import s3_server

from raychat.data import prepare as module
from raychat.data.prepare import (
    check_writable,
    make_in_process,
    open_corpus,
    prepare,
    sample_text,
    tokenizer_folder,
)
from raychat.data.shards import RowReader, fingerprint
from raychat.data.tokenizer import Tokenizer
from raychat.errors import ConfigError, DataError
from raychat.planning.text import SIZE_MARGIN
from raychat.storage import Store


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


def begin(config, fingerprint):
    """What a run of these data leaves in its directory at its first checkpoint."""
    (config.run_dir / "checkpoints" / "step_00000002").mkdir(parents=True)
    content = {"config": config.public(), "data_fingerprint": fingerprint, "corpus_files": 3}
    (config.run_dir / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("steps", "choice"), [(4, "best-fit"), (400, "keep")])
def test_automatic_packing_follows_whether_the_corpus_outlasts_the_run(tiny_config, steps, choice):
    lines = []
    data = prepared(tiny_config(packing="auto", num_iterations=steps), echo=lines.append)
    assert data.manifest.spec.packing == choice
    [said] = [line for line in lines if line.startswith("packing: ")]
    assert said.startswith(f"packing: {choice} (best-fit would deliver some ")
    assert f"the run trains on {steps * 256:,}, and best-fit must outlast it by 30%" in said


def test_what_best_fit_would_deliver_is_estimated_from_a_sample(tiny_config, tmp_path, monkeypatch):
    """From a tenth of the documents, to the margin, which is what the margin is for."""
    corpus = write_corpus(tmp_path / "corpus", documents=600)
    config = tiny_config(corpus=str(corpus), packing="best-fit")
    counted = prepared(config)
    monkeypatch.setattr(module, "PACKING_SAMPLE_DOCS", 120)
    corpus, tokenizer = open_corpus(config, with_gpus=False, echo=silent), Tokenizer.load(counted.tokenizer_dir)
    sample = sample_text(corpus, tokenizer, 32)
    assert sample.docs == 120
    train = counted.manifest.split("train")
    assert sample.corpus_tokens == pytest.approx(sum(shard.tokens_in for shard in train), rel=SIZE_MARGIN)
    kept = sum(shard.rows for shard in train) * 33 / sum(shard.tokens_in for shard in train)
    assert sample.best_fit_share["32"] == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize(("steps", "packing"), [(4, "best-fit"), (400, "keep")])
def test_a_run_keeps_its_packing_when_its_horizon_changes(tiny_config, steps, packing):
    """Another packing is another fingerprint, with which the run could not go on."""
    begun, lines = tiny_config(packing="auto", num_iterations=steps), []
    first = prepared(begun)
    begin(begun, first.manifest.fingerprint)
    other = {"packing": "auto", "num_iterations": 404 - steps}
    later = prepared(tiny_config(**other), maker=never, echo=lines.append)
    assert later.manifest == first.manifest
    assert any(line.startswith(f"packing: {packing}, with which the run ") for line in lines)
    assert prepared(tiny_config(**other, fresh=True)).manifest.spec.packing != packing


def test_a_run_in_an_object_store_keeps_its_packing_on_another_machine(tiny_config):
    with s3_server() as server:
        server.make_bucket("bucket")
        place = {"storage_path": server.uri("bucket/runs"), "packing": "auto"}
        first = prepared(tiny_config(**place))
        store = Store.of(tiny_config(**place).run_uri)
        content = {"config": tiny_config(**place).public(), "data_fingerprint": first.manifest.fingerprint}
        store.write_bytes("config.json", json.dumps(content).encode())
        store.child("checkpoints", "step_00000002").write_bytes("meta.json", b"{}")
        assert prepared(tiny_config(**place, num_iterations=400), maker=never).manifest == first.manifest


def test_keep_throws_nothing_away_but_the_incomplete_last_row_of_each_shard(tiny_config):
    data = prepared(tiny_config(packing="keep"))
    bos = Tokenizer.load(data.tokenizer_dir).bos_id
    for split in ("train", "val"):
        reader, first = RowReader(data.manifest, split), 0
        for shard in data.manifest.split(split):
            rows = reader.rows(np.arange(first, first + shard.rows))
            lost = shard.tokens_in - shard.docs - int((rows != bos).sum())
            assert 0 <= lost < rows.shape[1]
            first += shard.rows


@pytest.mark.parametrize("packing", ["best-fit", "keep"])
def test_packing_that_was_asked_for_is_not_measured(tiny_config, monkeypatch, packing):
    monkeypatch.setattr(module, "sample_text", never)
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
