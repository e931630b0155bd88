"""`jobs/submit.py` against a real job server: killed jobs come again, followers come and go, stops wait for the save."""

import re
import signal
import subprocess
import sys

import pytest

from on_ray.conftest import ROOT
from on_ray.heads import as_arguments
from on_ray.spied_checkout import SpiedCheckout, copy_checkout
from raychat.tracking.summary import Summary

pytestmark = pytest.mark.ray

# In place of jobs/pretrain.py: killed at the first start, the real one at the second, and from the third on it waits for
# a stop, with a save that takes longer than the 3 s that Ray leaves by itself.
STAND_IN = """
import os, runpy, signal, sys, time

starts = {starts!r}
with open(starts, "a") as file:
    file.write("x")
number = os.path.getsize(starts)
if number == 1:
    print("step 00001/00009", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if number == 2:
    runpy.run_path("jobs/real_pretrain.py", run_name="__main__")

def save(*_):
    time.sleep(5)
    print("stopped: step 3 of 9", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
print("it trains", flush=True)
time.sleep(100)
"""


@pytest.fixture
def submit(job_server, environment):
    """Starts jobs/submit.py with these arguments."""

    def submit(*arguments):
        command = [sys.executable, ROOT / "jobs" / "submit.py", "--address", job_server, "--python", sys.executable]
        return subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return submit


@pytest.fixture
def checkout(tmp_path) -> SpiedCheckout:
    """A copy of the checkout with the stand-in, which counts its starts in the file `starts` beside it."""
    copy = copy_checkout(tmp_path)
    job = copy.root / "jobs" / "pretrain.py"
    job.rename(job.with_name("real_pretrain.py"))
    job.write_text(STAND_IN.format(starts=str(tmp_path / "starts")))
    return copy


def test_a_killed_job_comes_again_and_a_stopped_one_has_saved(submit, checkout, tmp_path, tiny_flags):
    """Driver, data tasks and training worker import what was uploaded."""
    base = tmp_path / "base"
    flags = ["--working-dir", checkout.root, "--", *as_arguments(tiny_flags | {"base_dir": base})]

    kept = submit("--keep-alive", *flags)
    told, _ = kept.communicate(timeout=250)
    assert kept.returncode == 0, told
    assert "the job crashed at step 1" in told
    assert told.count("step 00001/00009") == told.count("finished: step 4 of 4") == 1
    assert "succeeded: the run is finished" in told
    assert Summary.read(base / "runs" / "d2" / "summary.json").status == "finished"
    assert (tmp_path / "starts").read_text() == "xx"
    (unpacked,) = checkout.roots()
    assert "/working_dir_files/" in unpacked
    assert checkout.who_ran(unpacked) == {"run_job", "make_shard", "train_worker", "read_block"}

    follower = submit(*flags)
    lines = iter(follower.stdout.readline, "")
    job = next(found[0] for line in lines if (found := re.search(r"raychat-\w+", line)))
    assert any("it trains" in line for line in lines)
    follower.send_signal(signal.SIGINT)
    told, _ = follower.communicate(timeout=60)
    assert follower.returncode == 130, told
    assert f"--stop {job}" in told

    stopper = submit("--stop", job)
    told, _ = stopper.communicate(timeout=60)
    assert stopper.returncode == 0, told
    assert f"{job}: stopped: step 3 of 9" in told
