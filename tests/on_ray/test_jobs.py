"""The jobs run from a checkout where only the dependencies are installed, by themselves and submitted to a cluster."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from on_ray.conftest import ROOT
from on_ray.heads import RAY, as_arguments
from raychat.tracking.summary import Summary

pytestmark = pytest.mark.ray

# Added to modules of the copy: a function leaves a file that says which code it is, for each process that calls it.
SPY = """

import functools as _functools
import os as _os


def _seen(function):
    @_functools.wraps(function)
    def spy(*args, **kwargs):
        with open(_os.path.join({folder!r}, function.__name__ + "." + str(_os.getpid())), "w") as file:
            file.write(__file__)
        return function(*args, **kwargs)

    return spy


{name} = _seen({name})
"""
SPIED = {
    "raychat/cli.py": "run_job",
    "raychat/data/shards.py": "make_shard",
    "raychat/on_ray/stream.py": "read_block",
    "raychat/on_ray/worker.py": "train_worker",
}


@dataclass(frozen=True)
class Copy:
    """A copy of the checkout. `seen` takes the files of the spies."""

    root: Path
    seen: Path

    def who_ran(self, root: str) -> set[str]:
        """Which functions ran, each in a process of its own kind and from under `root`; forgets them."""
        processes: dict[str, str] = {}
        for file in list(self.seen.iterdir()):
            name, process = file.name.split(".")
            assert file.read_text().startswith(root), f"{name} came from {file.read_text()}"
            assert processes.setdefault(process, name) == name
            file.unlink()
        return set(processes.values())


@pytest.fixture
def checkout(tmp_path):
    """A copy of the code that tells itself from the installed one."""
    copy = Copy(tmp_path / "checkout", tmp_path / "seen")
    copy.seen.mkdir()
    for folder in ("raychat", "jobs"):
        shutil.copytree(ROOT / folder, copy.root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path, name in SPIED.items():
        with (copy.root / path).open("a") as module:
            module.write(SPY.format(folder=str(copy.seen), name=name))
    return copy


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """The current directory of the jobs, which is no checkout."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture
def run(environment, elsewhere) -> Callable[..., str]:
    """Runs a command to its end; gives what it wrote."""

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_jobs_run_from_a_checkout_that_is_not_installed(cluster, checkout, run, elsewhere, tiny_flags):
    """Driver, data tasks and training worker import the checkout; what one job made, the next one does not make again.

    The base directory is given relative to a current directory that workers do not share.
    """
    base = elsewhere / "base"
    flags = as_arguments(tiny_flags | {"base_dir": "base"})
    jobs, code = checkout.root / "jobs", str(checkout.root / "raychat")

    told = run(sys.executable, jobs / "train_tokenizer.py", *flags)
    assert "vocabulary: 300 tokens" in told
    assert checkout.who_ran(code) == {"run_job"}  # needs no cluster

    told = run(sys.executable, jobs / "prepare_data.py", *flags, "--verify", f"--address={cluster.address}")
    assert "training a tokenizer" not in told
    assert f"prepared: {base / 'tokens'}" in told
    assert checkout.who_ran(code) == {"run_job", "make_shard"}

    told = run(sys.executable, jobs / "pretrain.py", *flags)  # on a cluster that it starts and stops
    assert "starting Ray on this machine" in told
    assert "tokenizing" not in told
    assert checkout.who_ran(code) == {"run_job", "train_worker", "read_block"}
    summary = Summary.read(base / "runs" / "d2" / "summary.json")
    assert summary.status == "finished"
    assert summary.checkpoint == str(base / "runs" / "d2" / "checkpoints" / "step_00000004")
    assert Path(summary.checkpoint).is_dir()


def test_a_submitted_job_runs_the_uploaded_checkout(job_server, checkout, run, tiny_flags, tmp_path):
    """`ray job submit` packs the folder; driver, data tasks and training worker import what was unpacked."""
    base = tmp_path / "base"
    entrypoint = [sys.executable, "jobs/pretrain.py", *as_arguments(tiny_flags | {"base_dir": base})]
    told = run(RAY, "job", "submit", "--address", job_server, "--working-dir", checkout.root, "--", *entrypoint)
    assert "succeeded" in told
    assert "finished: step 4 of 4" in told
    assert Summary.read(base / "runs" / "d2" / "summary.json").status == "finished"
    (unpacked,) = {file.read_text().partition("/raychat/")[0] for file in checkout.seen.iterdir()}
    assert "/working_dir_files/" in unpacked
    assert checkout.who_ran(unpacked) == {"run_job", "make_shard", "train_worker", "read_block"}
