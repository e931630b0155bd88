"""Two jobs at once on one cluster: one that was uploaded and is stopped and submitted again, and one of the installed code.

They share machines, base directory and storage, and must end alike: same settings, same losses.
"""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from on_ray.conftest import ROOT
from on_ray.heads import RAY, as_arguments
from on_ray.spied_checkout import copy_checkout
from raychat.config import Config
from raychat.tracking.journal import read_events, read_journal
from raychat.tracking.summary import Summary

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

STEPS = 60
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}

# Added to the copy that is uploaded: it is slow while a file is there, and finished soon when it is not.
PACE = """

import time as _time
from pathlib import Path as _Path

_batches = RankStream.batches


def _paced(self, plan):
    for batch in _batches(self, plan):
        if _Path({file!r}).exists():
            _time.sleep(0.3)
        yield batch


RankStream.batches = _paced
"""


@pytest.fixture
def slow(tmp_path) -> Path:
    """While this file is there, the uploaded job is slow."""
    file = tmp_path / "slow"
    file.touch()
    return file


@pytest.fixture
def upload(tmp_path, slow) -> Path:
    """A checkout to be uploaded."""
    copy = tmp_path / "upload"
    for folder in ("raychat", "jobs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "raychat" / "on_ray" / "stream.py").open("a") as module:
        module.write(PACE.format(file=str(slow)))
    return copy


@pytest.fixture
def config(tiny_flags, prepared_base, tmp_path) -> Callable[[str], Config]:
    """Settings of one of the runs, by its tag: all else is the same."""
    base = tmp_path / "base"
    for folder in ("tokens", "tokenizers"):
        shutil.copytree(prepared_base / folder, base / folder)
    flags = {"base_dir": str(base), "num_workers": 2, "num_iterations": STEPS, "eval_every": 20}
    return lambda tag: Config.from_flat(tiny_flags | flags | {"model_tag": tag})


@pytest.fixture
def jobs(job_server) -> JobSubmissionClient:
    return JobSubmissionClient(job_server)


def command(config: Config) -> str:
    """What the user types after --."""
    given = {name: value for name, value in config.flat().items() if value != Config().flat()[name]}
    return shlex.join([sys.executable, "jobs/pretrain.py", *as_arguments(given)])


def curve(config: Config) -> list[tuple[int, float]]:
    return [(r["step"], r["train/loss"]) for r in read_journal(config.run_dir / "metrics.jsonl") if "train/loss" in r]


def wait(what: str, condition: Callable[[], object], logs: Callable[[], str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within 240 s\n{logs()}"
        time.sleep(0.2)


def test_two_jobs_at_once_do_not_meet_and_one_is_stopped_and_goes_on(jobs, config, upload, slow):
    one, other = config("one"), config("other")

    def logs() -> str:
        return "\n".join(jobs.get_job_logs(name)[-3000:] for name in ("one", "other"))

    def status(name: str) -> JobStatus:
        return jobs.get_job_status(name)

    uploaded = {"working_dir": str(upload), "env_vars": STOP_WAIT}
    jobs.submit_job(entrypoint=command(one), submission_id="one", runtime_env=uploaded)
    jobs.submit_job(entrypoint=command(other), submission_id="other")
    wait("both train", lambda: all((c.run_dir / "metrics.jsonl").exists() and curve(c) for c in (one, other)), logs)
    assert jobs.stop_job("one")
    wait("it is stopped", lambda: status("one").is_terminal(), logs)
    assert status("one") == JobStatus.STOPPED
    log, at = jobs.get_job_logs("one"), Summary.read(one.run_dir / "summary.json")
    assert at.status == "stopped", log
    assert 0 < at.step < STEPS
    assert at.checkpoint == str(one.run_dir / "checkpoints" / f"step_{at.step:08d}")
    assert "SIGTERM: saving and stopping" in log
    assert f"stopped: step {at.step} of {STEPS}" in log

    slow.unlink()
    jobs.submit_job(entrypoint=command(one), submission_id="again", runtime_env=uploaded)
    wait("it goes on to its end", lambda: status("again").is_terminal(), lambda: jobs.get_job_logs("again"))
    again = jobs.get_job_logs("again")
    assert status("again") == JobStatus.SUCCEEDED, again
    assert f"finished: step {STEPS} of {STEPS}" in again
    starts = [event for event in read_events(one.run_dir / "metrics.jsonl") if event["event"] == "start"]
    assert [(start["resume_step"], start["replayed"]) for start in starts] == [(0, 0), (at.step, 0)]

    wait("the other one ends", lambda: (other.run_dir / "summary.json").exists(), logs)
    ends = [Summary.read(c.run_dir / "summary.json") for c in (one, other)]
    assert [end.status for end in ends] == ["finished", "finished"]
    assert curve(one) == curve(other)
    assert len(curve(one)) == STEPS


def test_a_job_that_fails_says_so(job_server, environment, config, tmp_path):
    """Its exit code is the command line's, whatever it was, and the last line of the log names the mistake.

    It is submitted as the README has it: what ran is the folder that was packed.
    """
    checkout = copy_checkout(tmp_path)
    mistaken = shlex.split(command(Config.from_flat({"corpus": "/nowhere"}, base=config("failed"))))
    known = environment | {"RAY_API_SERVER_ADDRESS": job_server}
    failed = subprocess.run(
        [RAY, "job", "submit", "--working-dir", checkout.root, "--", *mistaken],
        env=known,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert failed.returncode == 1
    assert "error: there is no /nowhere" in failed.stdout
    assert "failed" in failed.stderr + failed.stdout
    (unpacked,) = checkout.roots()
    assert "/working_dir_files/" in unpacked
    assert checkout.who_ran(unpacked) == {"run_job"}
