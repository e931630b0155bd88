"""`jobs/export.py` writes what was asked for, says how it was checked and what to type next."""

import importlib.util
import pickle
import re
import stat
import sys
from pathlib import Path

import pytest
import torch
from exports import CPU, make_source, probe

from raychat.errors import CheckpointError, ConfigError
from raychat.export.source import find_source

SCRIPT = Path(__file__).resolve().parents[1] / "jobs" / "export.py"

OWN_TOKENIZER = ("tokenizer.json", "tokenizer.tiktoken")
HUGGINGFACE = (
    "README.md",
    "config.json",
    "configuration_raychat.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_raychat.py",
    "raychat.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base directory with the run `tiny`."""
    folder = tmp_path_factory.mktemp("base")
    make_source(folder)
    return folder


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("export_job", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_both_layouts_are_written_and_what_is_to_be_typed_next_works(job, base, tmp_path, capsys):
    assert job(["--format", "both", "--output", str(tmp_path / "out"), "--base-dir", str(base)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"model: .*/runs/tiny/checkpoints/step_00000007 \(step 7\)", said)
    assert said.count("read back: logits differ by at most 0.0e+00") == 2
    expected = find_source(base_dir=str(base))
    for flag in ("--path", "--init-from"):
        place = re.search(rf"{flag} (\S+)", said)[1]
        with torch.no_grad():
            logits = [source.load(CPU).model(probe(expected)) for source in (find_source(path=place), expected)]
        assert torch.equal(*logits)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path / "out")) for path in files} == {
        *(f"lineage/{name}" for name in ("model_000007.pt", "model_000007.safetensors", "meta_000007.json")),
        *(f"lineage/tokenizer/{name}" for name in ("tokenizer.pkl", "token_bytes.pt")),
        *(f"{layout}/tokenizer/{name}" for layout in ("lineage", "huggingface") for name in OWN_TOKENIZER),
        *(f"huggingface/{name}" for name in HUGGINGFACE),
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def test_one_layout_is_written_to_the_folder_itself(job, base, tmp_path):
    output = tmp_path / "deep" / "out"
    job(
        [
            "--format",
            "huggingface",
            "--output",
            str(output),
            "--path",
            str(base / "runs" / "tiny"),
            "--dtype",
            "bfloat16",
        ]
    )
    assert find_source(path=str(output)).load(CPU).model.lm_head.weight.abs().sum() > 0
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_mistakes_are_refused_before_anything_is_written(job, base, tmp_path):
    output = tmp_path / "out"
    flags = ["--format", "lineage", "--output", str(output), "--base-dir", str(base)]
    with pytest.raises(ConfigError, match="holds the steps 7"):
        job([*flags, "--step", "8"])
    with pytest.raises(ConfigError, match="Runs that do: tiny"):
        job([*flags, "--model-tag", "absent"])
    (base / "runs" / "broken" / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="None of the checkpoints"):
        job([*flags, "--model-tag", "broken"])
    assert not output.exists()
    output.write_text("a file")
    for place in (output, output / "below"):
        with pytest.raises(ConfigError, match=rf"--output {place}: {output} is a file"):
            job([*flags, "--model-tag", "tiny", "--output", str(place)])
    assert output.read_text() == "a file"


def test_output_that_is_no_folder_of_this_machine_is_refused(job, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("s3://user:hidden@bucket/x", ""):
        with pytest.raises(ConfigError, match="is no folder of this machine") as refused:
            job(["--format", "lineage", "--output", place, "--base-dir", str(base)])
        assert "hidden" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_source_may_be_sent_to_another_process(base):
    source = find_source(base_dir=str(base), model_tag="tiny")
    assert pickle.loads(pickle.dumps(source)) == source
