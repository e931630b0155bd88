"""The jobs run from a checkout where only the dependencies are installed. Submitted ones are in test_submit_on_ray.py."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from on_ray.heads import as_arguments
from on_ray.spied_checkout import SpiedCheckout, copy_checkout
from raychat.tracking.summary import Summary

pytestmark = pytest.mark.ray


@pytest.fixture
def checkout(tmp_path) -> SpiedCheckout:
    return copy_checkout(tmp_path)


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
