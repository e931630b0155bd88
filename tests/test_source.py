"""A trained model is found wherever it is kept, with its tokenizer, and loaded as it was saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import run_here

from raychat.errors import CheckpointError, ConfigError, DataError
from raychat.export.source import find_source
from raychat.export.write import export
from raychat.model import GPT
from raychat.storage import Store
from raychat.training import checkpoint
from raychat.training.build import gpt_config

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def trained(tiny_flags, prepared_base, tmp_path_factory):
    """Configuration of a run of four steps with checkpoints of the steps 2 and 4. Not to be written to."""
    from raychat.config import Config

    own = {"base_dir": str(prepared_base), "storage_path": str(tmp_path_factory.mktemp("kept") / "runs")}
    config = Config.from_flat(tiny_flags | own | {"model_tag": "tiny", "save_every": 2})
    run_here(config)
    return config


@pytest.fixture
def moved(trained, tmp_path):
    """The run directory alone, in another place."""
    return Path(shutil.copytree(trained.run_dir, tmp_path / "elsewhere" / "tiny"))


def where(config):
    return {"base_dir": str(config.base_dir), "storage_path": str(config.runs_dir)}


def saved_logits(config, step, ids):
    model = GPT(gpt_config(config))
    checkpoint.trusted(config.run_dir / "checkpoints" / checkpoint.folder_name(step)).load(model)
    with torch.no_grad():
        return model(ids)


def test_newest_run_gives_its_newest_checkpoint(trained):
    source = find_source(**where(trained))
    assert (source.kind, source.name, source.step, source.run_dir) == ("checkpoint", "tiny", 4, trained.run_dir)
    loaded = source.load(CPU)
    ids = torch.tensor([[loaded.tokenizer.bos_id, *loaded.tokenizer.encode("kalomi")]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids), saved_logits(trained, 4, ids))
    assert not loaded.model.training


@pytest.mark.parametrize("within", [".", "checkpoints", "checkpoints/step_00000002"])
def test_run_directory_alone_is_enough(moved, within, monkeypatch, tmp_path):
    """It keeps a copy of its tokenizer, so nothing of the base directory is needed."""
    monkeypatch.setenv("RAYCHAT_BASE_DIR", str(tmp_path / "empty"))
    for record in moved.glob("checkpoints/*/checkpoint.json"):
        assert str(tmp_path) not in json.loads(record.read_text())["config"]["base_dir"]
    source = find_source(path=str(moved / within), base_dir=str(tmp_path / "empty"))
    assert source.step == (2 if "step" in within else 4)
    assert source.run_dir == moved
    assert Path(source.tokenizer_address).is_relative_to(moved)
    assert source.load(CPU).tokenizer.vocab_size == 300


def test_older_step_is_given_when_asked_for(trained):
    assert find_source(**where(trained), model_tag="tiny", step=2).step == 2


def test_compute_dtype_is_the_runs_unless_another_is_asked_for(trained):
    source = find_source(**where(trained))
    assert source.load(CPU).model.compute_dtype is torch.float32
    assert source.load(CPU, torch.bfloat16).model.compute_dtype is torch.bfloat16


def test_damaged_newest_checkpoint_is_passed_over(moved):
    weights = moved / "checkpoints" / "step_00000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    assert find_source(path=str(moved)).step == 2
    with pytest.raises(CheckpointError, match="checksum"):
        find_source(path=str(moved), step=4)


def test_checkpoint_that_is_gone_by_the_time_of_loading_is_named(moved):
    source = find_source(path=str(moved))
    shutil.rmtree(source.place)
    with pytest.raises(CheckpointError, match="is missing"):
        source.load(CPU)


class TestTokenizer:
    """Runs of earlier versions keep no copy: their data say which tokenizer they were made with."""

    def test_old_checkpoint_needs_only_its_base_directory(self, tmp_path):
        base = tmp_path / "base"
        run = base / "runs" / "d1"
        shutil.copytree(FIXTURES / "format-2" / "checkpoint", run / "checkpoints" / "step_00000003")
        tokens = json.loads((FIXTURES / "format-1" / "tokens" / "manifest.json").read_text())
        folder = base / "tokens" / tokens["fingerprint"]
        folder.mkdir(parents=True)
        shutil.copy(FIXTURES / "format-1" / "tokens" / "manifest.json", folder)
        shutil.copytree(FIXTURES / "format-1" / "tokenizer", base / "tokenizers" / "any-name")
        source = find_source(base_dir=str(base))
        assert source.tokenizer_address == str(base / "tokenizers" / "any-name")
        assert source.load(CPU).tokenizer.vocab_size == 270

    def test_lost_tokenizer_is_asked_for_by_name(self, tmp_path):
        folder = shutil.copytree(FIXTURES / "format-2" / "checkpoint", tmp_path / "step_00000003")
        with pytest.raises(DataError, match=r"--base-dir, or the tokenizer's folder as --tokenizer"):
            find_source(path=str(folder), base_dir=str(tmp_path / "base"))
        given = str(FIXTURES / "format-1" / "tokenizer")
        source = find_source(path=str(folder), base_dir=str(tmp_path / "base"), tokenizer=given)
        assert (source.name, source.run_dir, source.tokenizer_address) == ("d1", None, given)

    def test_another_tokenizer_is_refused(self, trained):
        with pytest.raises(ConfigError, match="trained with another tokenizer"):
            find_source(**where(trained), tokenizer=str(FIXTURES / "format-1" / "tokenizer"))


def test_run_in_a_bucket_is_found_and_loaded_with_its_tokenizer(server, own_config, tmp_path):
    """By tag, by the URI of the run and by that of the checkpoint; no password goes into what may be shown."""
    config = own_config(storage_path=server.uri("bucket/runs"), model_tag="far", num_iterations=2)
    run_here(config)
    base = {"base_dir": str(tmp_path / "empty")}
    found = [
        find_source(storage_path=server.uri("bucket/runs"), **base),
        find_source(path=server.uri("bucket/runs/far"), **base),
        find_source(path=server.uri("bucket/runs/far/checkpoints/step_00000002"), **base),
    ]
    for source in found:
        assert (source.name, source.step, source.run_dir) == ("far", 2, None)
        assert "hidden" not in repr(source)
    assert find_source(storage_path=server.uri("bucket/runs"), base_dir=str(config.base_dir)).run_dir == config.run_dir
    loaded = found[0].load(CPU)
    assert loaded.tokenizer.vocab_size == 300
    assert loaded.model.resid_lambdas.abs().sum() > 0


@pytest.fixture(scope="module")
def exported(trained, server, tmp_path_factory):
    """Addresses in the bucket of an export of `trained` in each layout."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    source = find_source(**where(trained))
    export(source, folder, ("lineage", "huggingface"), dtype=torch.float32, echo=lambda line: None)
    there = Store.of(server.uri("bucket/out"))
    for path in folder.rglob("*"):
        if path.is_file():
            there.write_bytes(str(path.relative_to(folder)), path.read_bytes())
    return {layout: there.child(layout).address for layout in ("lineage", "huggingface")}


@pytest.mark.parametrize("layout", ["lineage", "huggingface"])
def test_export_in_a_bucket_is_the_same_model(exported, trained, layout):
    source = find_source(path=exported[layout])
    assert (source.kind, source.name, source.step, source.run_dir) == ("export", layout, 4, None)
    assert "hidden" not in repr(source)
    loaded = source.load(CPU)
    ids = torch.tensor([[loaded.tokenizer.bos_id, *loaded.tokenizer.encode("kalomi")]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids), saved_logits(trained, 4, ids))


def test_damaged_export_in_a_bucket_is_refused(exported):
    there = Store.of(exported["huggingface"])
    whole = there.read_bytes("model.safetensors")
    there.write_bytes("model.safetensors", whole[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing or damaged"):
        find_source(path=there.address)
    there.write_bytes("model.safetensors", whole)


def test_run_begins_with_weights_in_a_bucket_and_keeps_no_password(exported, own_config):
    """Its settings name the place without credentials."""
    given = {"eval_every": -1, "num_iterations": 1, "seed": 7}
    ran = run_here(own_config(**given, init_from=exported["lineage"], model_tag="new"))
    random = run_here(own_config(**given, model_tag="random"))
    assert ran.losses[0] < random.losses[0]  # the weights have seen four batches
    text = "".join(path.read_text() for path in ran.run_dir.iterdir() if path.suffix in (".json", ".jsonl"))
    assert "bucket/out/lineage" in text
    assert "hidden" not in text


def test_mistakes_name_what_there_is(trained, tmp_path):
    with pytest.raises(ConfigError, match="holds the steps 2, 4"):
        find_source(**where(trained), step=3)
    with pytest.raises(ConfigError, match=r"Runs that do: tiny \(--model-tag\)"):
        find_source(**where(trained), model_tag="large")
    with pytest.raises(ConfigError, match="holds no run with a checkpoint"):
        find_source(base_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="is not there"):
        find_source(path=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="is a file: give the folder that it is in"):
        find_source(path=str(trained.run_dir / "config.json"))
    with pytest.raises(ConfigError, match="give one of them"):
        find_source(path=str(tmp_path), model_tag="tiny")
    with pytest.raises(ConfigError, match="is of step 4"):
        find_source(path=str(trained.run_dir / "checkpoints" / "step_00000004"), step=2)
