"""Tokenizers and token shards in an object store: made once for all nodes, and read by ranges."""

import json
import os
import shutil

import numpy as np
import pytest
from s3_server import proxy

from raychat.config import Config
from raychat.data import chunks
from raychat.data.prepare import make_in_process, prepare
from raychat.data.shards import RowReader, read_manifest
from raychat.errors import ConfigError, DataError
from raychat.storage import Store


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node's temporary folder that nothing has been kept in yet."""
    folder = tmp_path / "node"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def prepared(config, echo=lambda line: None):
    return prepare(config, with_gpus=False, maker=make_in_process, echo=echo)


@pytest.fixture(scope="module")
def local(tiny_flags, prepared_base):
    """The same data in a folder."""
    return prepared(Config.from_flat(tiny_flags | {"base_dir": str(prepared_base)}))


@pytest.fixture(scope="module")
def remote(server, tiny_flags, tmp_path_factory):
    """The data in the object store, made by a machine that is gone."""
    base = tmp_path_factory.mktemp("first") / "base"
    return prepared(Config.from_flat(tiny_flags | {"base_dir": str(base), "storage_path": server.uri("bucket/runs")}))


def test_another_machine_finds_all_of_it_and_makes_nothing(remote, server, tiny_config, monkeypatch):
    """Its base directory is empty. The tokenizer comes from the store, too: training it again could take an hour."""
    monkeypatch.setattr("raychat.data.prepare.train_tokenizer", None)
    monkeypatch.setattr("raychat.data.prepare._make", None)
    lines = []
    config = tiny_config(storage_path=server.uri("bucket/runs"))
    data = prepared(config, lines.append)
    assert data.manifest == remote.manifest
    assert Store.of(server.uri("bucket/runs")).names() == ["tokenizers", "tokens"]
    assert not (config.base_dir / "tokens").exists()
    assert any(line.startswith("tokenizer: from s3://") for line in lines)
    assert "hidden" not in "".join(lines) + repr(data)


@pytest.mark.parametrize("packing", ["keep", "auto"])
def test_a_run_goes_on_where_its_corpus_is_not(packing, server, tiny_config, corpus_dir, tmp_path):
    """As long as its settings ask for the same text; a run that begins needs the files, and so does another corpus."""
    corpus = shutil.copytree(corpus_dir, tmp_path / "corpus")
    settings = {"storage_path": server.uri(f"bucket/{packing}"), "packing": packing, "corpus": str(corpus)}
    begun = tiny_config(**settings)
    first = prepared(begun)
    run = Store.of(begun.run_uri)
    facts = {"config": begun.public(), "data_fingerprint": first.manifest.fingerprint, "corpus_files": 2}
    run.write_bytes("config.json", json.dumps(facts).encode())
    run.child("checkpoints").write_bytes("step_00000002/meta.json", b"{}")
    shutil.rmtree(corpus)
    elsewhere, lines = settings | {"base_dir": str(tmp_path / "elsewhere")}, []
    again = prepared(tiny_config(**elsewhere), lines.append)
    assert (again.manifest, again.shared_tokenizer) == (first.manifest, first.shared_tokenizer)
    assert (again.corpus.name, again.corpus_files) == ("corpus", first.corpus_files)
    assert any("as the run began with it" in line for line in lines)
    for other in ({"model_tag": "new"}, {"vocab_size": 310}, {"fresh": True}):
        with pytest.raises(DataError, match="there is no "):
            prepared(tiny_config(**elsewhere, **other))


def test_rows_are_those_of_a_folder(remote, local, node):
    assert remote.manifest.fingerprint == local.manifest.fingerprint
    for split in ("train", "val"):
        near, far = RowReader(local.manifest, split), RowReader(remote.manifest, split)
        ids = np.random.default_rng(1).permutation(near.num_rows)
        assert np.array_equal(far.rows(ids), near.rows(ids))
        assert len(far.rows(ids[:0])) == 0


def test_a_chunk_is_read_by_range_once_for_all_processes_of_a_node(server, remote, node):
    """No shard is read whole for a row of it, and what one reader has read the next one does not ask for."""
    asked = []

    def note(method, path):
        asked.append((method, path))

    with proxy(server, note) as port:
        place = Store.of(server.uri("bucket/runs", port=port)).child("tokens", remote.manifest.fingerprint)
        manifest = read_manifest(place)
        ids = np.arange(4)
        first = RowReader(manifest, "train").rows(ids)
        shards = {path.partition("?")[0] for _, path in asked if path.partition("?")[0].endswith(".arrow")}
        assert len(shards) == 1
        asked.clear()
        assert np.array_equal(RowReader(manifest, "train").rows(ids), first)
        assert asked == []
    kept = list(chunks.own_folder().rglob("train-*"))
    assert len(kept) == 1
    assert kept[0].stat().st_size <= 256 * first.shape[1] * first.itemsize
    assert oct(kept[0].parents[1].stat().st_mode)[-3:] == "700"


def test_rows_come_when_nothing_can_be_kept(remote, local, node, monkeypatch):
    def full(self, path, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunks.RemoteChunks, "_keep", full)
    ids = np.arange(20)
    assert np.array_equal(RowReader(remote.manifest, "train").rows(ids), RowReader(local.manifest, "train").rows(ids))


def test_a_store_that_is_away_for_a_while_is_waited_for(server, remote, local, node, monkeypatch, caplog):
    monkeypatch.setattr(chunks, "RETRY_S", 0.01)
    failures = iter([500] * 30)

    def away(method, path):
        return next(failures, None) if ".arrow" in path else None

    with proxy(server, away) as port:
        place = Store.of(server.uri("bucket/runs", port=port)).child("tokens", remote.manifest.fingerprint)
        rows = RowReader(read_manifest(place), "train").rows(np.arange(3))
    assert np.array_equal(rows, RowReader(local.manifest, "train").rows(np.arange(3)))
    assert next(failures, None) is None
    assert "trying again" in caplog.text
    assert "hidden" not in caplog.text


def test_what_is_missing_or_damaged_is_named_without_credentials(server, tiny_config, node):
    storage = server.uri("bucket/damaged")
    manifest = prepared(tiny_config(storage_path=storage)).manifest
    name = manifest.split("train")[0].file
    manifest.store.write_bytes(name, bytes(manifest.shards[0].bytes))
    with pytest.raises(DataError, match=f"Token shard s3://.*/{name} cannot be read") as error:
        RowReader(manifest, "train").rows(np.arange(3))
    assert "hidden" not in str(error.value)
    manifest.store.delete(name)
    with pytest.raises(
        DataError, match=f"Token shard s3://.*/{name} is missing: delete s3://.*/manifest.json"
    ) as error:
        read_manifest(manifest.store)
    assert "hidden" not in str(error.value)
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        RowReader(manifest, "train").rows(np.arange(3))


def test_what_is_kept_stays_within_its_limit(tmp_path):
    """The oldest go first, until there is room for a while."""
    for number in range(10):
        file = tmp_path / f"train-{number}"
        file.write_bytes(bytes(100))
        os.utime(file, (number, number))
    chunks.clear(tmp_path, 1000)
    assert len(list(tmp_path.iterdir())) == 10
    chunks.clear(tmp_path, 800)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"train-{number}" for number in range(4, 10)]


def test_a_run_cannot_have_the_name_of_the_shards(tiny_config):
    with pytest.raises(ConfigError, match="--model-tag tokens: in an object store"):
        tiny_config(storage_path="s3://bucket/runs", model_tag="tokens")
    assert tiny_config(model_tag="tokens").model_tag == "tokens"
