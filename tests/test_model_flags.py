"""The flags that name a model: the same in every job that takes one, and those that `find_source` understands."""

import importlib.util
import inspect
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from raychat.errors import ConfigError
from raychat.export.flags import ModelFlags
from raychat.export.source import find_source

JOBS = Path(__file__).resolve().parents[1] / "jobs"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Ray Serve imports

REQUIRED = {"export": ["--format=lineage", "--output=out"]}


@pytest.fixture(params=["evaluate", "export", "sample", "serve"])
def job(request):
    """A job that takes a model, as a module, and the flags that it cannot do without."""
    spec = importlib.util.spec_from_file_location(f"{request.param}_job", JOBS / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, REQUIRED.get(request.param, [])


def test_the_flags_are_what_find_source_takes():
    taken = {name: one.default for name, one in inspect.signature(find_source).parameters.items()}
    assert asdict(ModelFlags()) == taken


def test_every_job_explains_all_of_them_alike(job, capsys):
    module, _ = job
    with pytest.raises(SystemExit):
        module.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for one in fields(ModelFlags):
        flag = one.name.replace("_", "-")
        assert f"--{flag} {one.name.upper()} {one.metadata['help']}" in said, flag


def test_every_job_looks_for_the_model_that_they_name(job, tmp_path):
    module, required = job
    (tmp_path / "bucket" / "mine").mkdir(parents=True)
    where = ["--storage-path", str(tmp_path / "bucket"), "--base-dir", str(tmp_path / "base")]
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/bucket/mine holds no checkpoint")):
        module.main([*required, *where, "--model-tag", "mine", "--step", "3", "--tokenizer", "none"])
