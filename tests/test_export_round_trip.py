"""A model that was exported and read back is the same model, whoever reads it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from exports import CPU, make_source, probe

from raychat.errors import CheckpointError, ConfigError
from raychat.export import write as writing
from raychat.export.source import find_source
from raychat.export.weights import write_safetensors
from raychat.export.write import export
from raychat.model import GPT, GPTConfig
from raychat.training.exported import open_export

F32 = torch.float32


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with windows, grouped heads, a padded vocabulary and lambdas that are not those of the start."""
    return make_source(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """Folder with a directory of each layout. Not to be written to."""
    folder = tmp_path_factory.mktemp("out") / "both"
    export(source, folder, ("lineage", "huggingface"), dtype=F32, echo=lambda line: None)
    return folder


def logits(source):
    with torch.no_grad():
        return source.load(CPU, F32).model(probe(source))


@pytest.mark.parametrize("layout", ["lineage", "huggingface"])
def test_exported_model_gives_the_very_logits_of_its_checkpoint(source, exported, layout):
    again = find_source(path=str(exported / layout))
    assert (again.kind, again.name, again.step) == ("export", layout, source.step)
    assert torch.equal(logits(again), logits(source))
    assert again.load(CPU).tokenizer.sha256 == source.load(CPU).tokenizer.sha256


def test_lineage_weights_are_plain_tensors_by_their_interop_names(source, exported):
    state = torch.load(exported / "lineage" / "model_000007.pt", weights_only=True)
    model = source.load(CPU, F32).model
    assert state.keys() == model.state_dict().keys()
    assert {"transformer.h.1.attn.ve_gate.weight", "value_embeds.1.weight", "lm_head.weight"} <= state.keys()
    assert state["lm_head.weight"].shape == (320, 48)  # 300 tokens, padded to a multiple of 64
    meta = json.loads((exported / "lineage" / "meta_000007.json").read_text())
    assert meta["model_config"] == {
        "sequence_len": 512,
        "vocab_size": 300,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 48,
        "window_pattern": "SL",
    }
    assert GPT(GPTConfig(**meta["model_config"])).load_state_dict(state)
    token_bytes = torch.load(exported / "lineage" / "tokenizer" / "token_bytes.pt", weights_only=True)
    assert token_bytes.tolist() == source.load(CPU).tokenizer.token_bytes.tolist()


def test_export_of_an_export_is_the_same(exported, tmp_path):
    """What is known of the training is carried over, and so are the weights, bit for bit."""
    first = find_source(path=str(exported / "huggingface"))
    export(first, tmp_path / "again", ["lineage"], dtype=F32, echo=lambda line: None)
    second = find_source(path=str(tmp_path / "again"))
    assert torch.equal(logits(second), logits(first))
    assert {k: v for k, v in second.meta.items() if k != "files"} == {
        k: v for k, v in first.meta.items() if k != "files"
    }


def test_bfloat16_halves_the_weights_and_keeps_their_values_to_its_precision(source, exported, tmp_path):
    export(source, tmp_path / "half", ["huggingface"], dtype=torch.bfloat16, echo=lambda line: None)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", exported / "huggingface")]
    assert sizes[0] < 0.52 * sizes[1]
    half = find_source(path=str(tmp_path / "half")).load(CPU, F32).model.state_dict()
    for name, tensor in source.load(CPU, F32).model.state_dict().items():
        assert torch.equal(half[name], tensor.bfloat16().float())


def test_large_weights_in_several_files_are_one_model(source, exported, tmp_path):
    folder = Path(shutil.copytree(exported / "huggingface", tmp_path / "shards"))
    (folder / "model.safetensors").unlink()
    (folder / "raychat.json").unlink()  # which holds checksums of the one file
    counted = []
    state = source.load(CPU, F32).model.state_dict()
    write_safetensors(state, folder, advance=counted.append, shard_bytes=40_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) == len(counted) > 2
    assert sum(counted) == sum(tensor.nbytes for tensor in state.values())
    assert torch.equal(logits(find_source(path=str(folder))), logits(source))


class TestForeignDirectories:
    """As other implementations write them: no safetensors, no checksums, odd names and dtypes."""

    @pytest.fixture
    def foreign(self, exported, tmp_path):
        folder = Path(shutil.copytree(exported / "lineage", tmp_path / "base" / "base_checkpoints" / "d2"))
        (folder / "model_000007.safetensors").unlink()
        shutil.move(folder / "tokenizer", tmp_path / "base" / "tokenizer")
        for name in ("tokenizer.json", "tokenizer.tiktoken"):
            (tmp_path / "base" / "tokenizer" / name).unlink()
        meta = json.loads((folder / "meta_000007.json").read_text())
        (folder / "meta_000007.json").write_text(json.dumps({"step": 7, "model_config": meta["model_config"]}))
        return folder

    def rewrite(self, folder, change):
        state = torch.load(folder / "model_000007.pt", weights_only=True)
        torch.save(change(state), folder / "model_000007.pt")

    def test_names_of_a_compiled_model_and_half_precision_tables_are_read(self, foreign, source):
        def as_written_elsewhere(state):
            halved = {k: v.bfloat16() if "wte" in k or "value_embeds" in k else v for k, v in state.items()}
            return {f"_orig_mod.{name}": tensor for name, tensor in halved.items()}

        self.rewrite(foreign, as_written_elsewhere)
        found = find_source(path=str(foreign))
        loaded = found.load(CPU, F32)
        own = source.load(CPU, F32)
        assert torch.equal(loaded.model.lm_head.weight, own.model.lm_head.weight)
        wte = own.model.transformer["wte"].weight
        assert torch.equal(loaded.model.transformer["wte"].weight, wte.bfloat16().float())
        assert loaded.tokenizer.sha256 == own.tokenizer.sha256  # from the pickle beside base_checkpoints/

    def test_missing_and_foreign_parameters_are_named(self, foreign):
        self.rewrite(
            foreign, lambda state: {k: v for k, v in state.items() if "smear" not in k} | {"extra": torch.ones(1)}
        )
        with pytest.raises(CheckpointError, match=r"lacks smear_gate.weight, smear_lambda; it has besides extra"):
            find_source(path=str(foreign)).load(CPU)

    def test_other_shapes_are_named(self, foreign):
        self.rewrite(foreign, lambda state: state | {"x0_lambdas": torch.ones(3)})
        with pytest.raises(CheckpointError, match=r"x0_lambdas \[3\] instead of \[2\]"):
            find_source(path=str(foreign)).load(CPU)

    def test_weights_that_are_a_program_are_not_run(self, foreign, tmp_path):
        torch.save({"lm_head.weight": Mischief(tmp_path / "done")}, foreign / "model_000007.pt")
        with pytest.raises(CheckpointError, match="cannot be read as weights"):
            find_source(path=str(foreign)).load(CPU)
        assert not (tmp_path / "done").exists()

    @pytest.mark.parametrize("content", [b"", b"text\n", b"PK\x03\x04 and no more", b"\x80\x02"])
    def test_weights_that_are_another_file_are_refused(self, foreign, content):
        (foreign / "model_000007.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model_000007.pt cannot be read as weights"):
            find_source(path=str(foreign)).load(CPU)

    def test_weights_in_the_older_format_of_torch_are_read(self, foreign, source):
        state = torch.load(foreign / "model_000007.pt", weights_only=True)
        torch.save(state, foreign / "model_000007.pt", _use_new_zipfile_serialization=False)
        assert torch.equal(logits(find_source(path=str(foreign))), logits(source))

    def test_weights_without_names_are_refused(self, foreign):
        self.rewrite(foreign, lambda state: dict(enumerate(state.values())))
        with pytest.raises(CheckpointError, match="something else than a state dict"):
            find_source(path=str(foreign)).load(CPU)

    def test_damaged_record_of_checksums_is_refused(self, foreign):
        meta = json.loads((foreign / "meta_000007.json").read_text())
        (foreign / "meta_000007.json").write_text(json.dumps(meta | {"raychat": {"files": [1]}}))
        with pytest.raises(CheckpointError, match="its checksums are no pairs"):
            find_source(path=str(foreign))

    def test_older_model_without_a_description_of_its_windows_is_refused(self, foreign):
        meta = json.loads((foreign / "meta_000007.json").read_text())
        del meta["model_config"]["window_pattern"]
        (foreign / "meta_000007.json").write_text(json.dumps(meta))
        with pytest.raises(CheckpointError, match="lacks window_pattern"):
            find_source(path=str(foreign))

    def test_step_is_chosen_among_several(self, foreign):
        for kind, suffix in (("model", "pt"), ("meta", "json")):
            shutil.copy(foreign / f"{kind}_000007.{suffix}", foreign / f"{kind}_000009.{suffix}")
        assert find_source(path=str(foreign)).step == 9
        assert find_source(path=str(foreign), step=7).step == 7
        with pytest.raises(CheckpointError, match="holds the steps 7, 9"):
            find_source(path=str(foreign), step=8)


class Mischief:
    """Pickled, it asks for a file to be written when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_damaged_export_is_refused(exported, tmp_path):
    folder = Path(shutil.copytree(exported / "huggingface", tmp_path / "damaged"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing or damaged"):
        find_source(path=str(folder))


def test_nothing_is_written_over_and_nothing_is_left_half(source, exported, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="not empty"):
        export(source, exported / "lineage", ["lineage"], dtype=F32, echo=lambda line: None)
    monkeypatch.setattr(writing, "TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match="does not give the logits"):
        export(source, tmp_path / "out", ["lineage"], dtype=F32, echo=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_window_ratio_that_the_lineage_does_not_know_is_refused(tmp_path):
    other = make_source(tmp_path / "made", short_window_ratio=0.5)
    with pytest.raises(ConfigError, match=r"short_window_ratio of 0.5.*--format huggingface"):
        export(other, tmp_path / "out", ["lineage"], dtype=F32, echo=lambda line: None)
    export(other, tmp_path / "out", ["huggingface"], dtype=F32, echo=lambda line: None)
    assert open_export(tmp_path / "out").shapes.short_window_ratio == 0.5
