"""Keeping a run alive from outside: when its job is submitted again, and what its log and its journal say."""

import json
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.on_ray import submission
from raychat.on_ray.limits import RunFailedError, check_wait
from raychat.on_ray.resubmission import JobEnd, RunState, decide, read_log, read_run
from raychat.on_ray.submission import JobServer, SubmissionError, see_to_end
from raychat.tracking.journal import Journal
from raychat.tracking.segments import segment_name
from raychat.tracking.summary import Summary
from raychat.training.lease import STALE_S, Lease, LeaseError
from raychat.training.outcome import closing_lines
from raychat.training.retry import give_up


def succeeded(**facts):
    return JobEnd(status="succeeded", exit_code=0, **facts)


def crashed(step=7, **facts):
    return JobEnd(status="failed", **({"exit_code": 1, "run_status": "failed", "step": step} | facts))


def killed(step=7):
    return JobEnd(status="failed", exit_code=-9, step=step)


LOST = JobEnd(status="lost")
STOPPED = JobEnd(status="stopped", run_status="stopped")
CLUSTER_GONE = (
    "error: The Ray cluster at a:1 is gone (RaySystemError). The same command goes on from the newest checkpoint."
)
HELD = "error: Another driver is training in /runs/d2: process 7 on node-b, last seen 3s ago. Wait for it, ..."
TAKEN_OVER = "error: Another driver has taken over /runs/d2: this one writes nothing more."


def given_up(cause):
    """What the driver says, word for word."""
    events = [{"event": "failure", "cause": cause, "step": 7}] * 3
    return f"error: {give_up(events, max_failures=3, max_preemptions=2)}"


def no_machines():
    session = SimpleNamespace(config=Config.from_flat({"max_wait": 2}))
    with pytest.raises(RunFailedError) as caught:
        check_wait(session, 7201.0, fewest=4)
    return f"error: {caught.value}"


AGAIN = None
TABLE = {
    "finished": ([succeeded(run_status="finished")], 0),
    "done before": ([succeeded()], 0),
    "over budget": ([succeeded(run_status="stopped")], 0),
    "stopped by its user": ([STOPPED], 0),
    "stopped before it could save": ([JobEnd(status="stopped")], 0),
    "finished, and the job died at the end": ([crashed(run_status="finished")], 0),
    "bad input": ([crashed(step=None, exit_code=2)], 2),
    "driver killed": ([killed()], AGAIN),
    "driver killed without a step": ([killed(None)], AGAIN),
    "crashed": ([crashed()], AGAIN),
    "cluster gone": ([crashed(error=CLUSTER_GONE)], AGAIN),
    "given up at one step": ([crashed(error=given_up("crash"))], 1),
    "given up as machines are taken": ([crashed(error=given_up("preempted"))], 1),
    "given up without machines": ([crashed(error=no_machines())], 1),
    "a failure that no retry mends": ([crashed(hopeless=True)], 1),
    "a failure that no retry mends, of bad input": ([crashed(hopeless=True, exit_code=2)], 2),
    "head lost": ([LOST], AGAIN),
    "head lost again and again": ([LOST] * 9, AGAIN),
    "stopped by a dying head": ([replace(LOST, run_status="stopped")], AGAIN),
    "finished and then lost": ([replace(LOST, run_status="finished")], 0),
    "twice at one step": ([crashed(), killed()], AGAIN),
    "three times at one step": ([crashed(), killed(), crashed()], 1),
    "three times at one step, heads lost between": ([crashed(), LOST, crashed(), LOST, crashed()], 1),
    "three times with progress": ([crashed(5), crashed(6), crashed(7)], AGAIN),
    "three times before any step": ([crashed(None)] * 3, 1),
    "held by another driver": ([crashed(error=HELD, exit_code=2)], AGAIN),
    "held again and again": ([crashed(error=HELD, exit_code=2)] * 9, AGAIN),
    "taken over by another driver again and again": ([crashed(error=TAKEN_OVER, exit_code=1)] * 9, AGAIN),
    "held, and finished by the other driver": ([crashed(error=HELD, exit_code=2, run_status="finished")], 0),
    "twice at one step, and held between": ([crashed(), crashed(error=HELD, exit_code=2), crashed()], AGAIN),
    "at one step long ago": ([crashed(5), crashed(5), crashed(7), killed(9)], AGAIN),
}


@pytest.mark.parametrize(("ends", "code"), TABLE.values(), ids=TABLE)
def test_a_job_is_submitted_again_until_its_run_is_done(ends, code):
    verdict = decide(ends)
    assert (verdict.again, None if verdict.again else verdict.exit_code) == (code is AGAIN, code)
    assert verdict.why


def test_a_refusal_by_a_lease_is_told_from_other_bad_input_and_waited_out(tmp_path):
    held = Lease(tmp_path)
    held.acquire()
    with pytest.raises(LeaseError) as refused:
        Lease(tmp_path).acquire()
    held.release()
    end = replace(read_log(f"error: {refused.value}\n"), exit_code=refused.value.exit_code)
    verdict = decide([end])
    assert (verdict.again, verdict.exit_code, verdict.after_s) == (True, 2, STALE_S)
    assert str(tmp_path) in verdict.why
    assert decide([crashed()]).after_s == 0


def test_the_log_of_a_driver_gives_step_status_and_error():
    log = (
        "resuming at step 4, 32 rows consumed\n"
        "step 00004/00010 (40.00%) | loss: 5.1\n"
        "step 00005/00010 (50.00%) | loss: 5.0\n"
        "step 00005 | validation bpb: 2.0\n"
        "failed: step 5 of 10, 1 min wall time\n"
        "error: training failed\n"
    )
    assert read_log(log) == JobEnd(status="failed", run_status="failed", step=5, error="error: training failed")
    assert read_log("") == JobEnd(status="failed")


def write_journal(folder, *, begun, ended):
    """A journal of a run that started now; of `begun` at step 4 it did one step more."""
    journal = Journal(folder / "metrics.jsonl")
    for step in range(3):
        journal.log(step, {"train/loss": 1.0})
    if begun:
        journal.event("start", resume_step=4)
        journal.log(4, {"train/loss": 1.0})
    if ended:
        journal.event("end", status=ended)
    journal.close()


@pytest.mark.parametrize("ended", ["finished", "stopped", "failed", None])
@pytest.mark.parametrize("segments", [0, 1, 3], ids=["on a disk", "in one segment", "in segments"])
def test_the_journal_says_how_the_run_of_a_job_ended(tmp_path, ended, segments):
    write_journal(tmp_path, begun=True, ended=ended)
    if segments:
        cut_up(tmp_path / "metrics.jsonl", segments)
    assert read_run(str(tmp_path), time.time() - 60) == RunState(ended, 4)


@pytest.mark.parametrize("retry_helps", [False, True])
def test_journal_and_log_agree_on_whether_a_retry_helps(tmp_path, retry_helps):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.event("start", resume_step=0)
    journal.event("end", status="failed", error="the loss is nan", retry_helps=retry_helps)
    journal.close()
    assert read_run(str(tmp_path), 0) == RunState("failed", 0, hopeless=not retry_helps)
    lines = closing_lines(Summary(status="failed", retry_helps=retry_helps), tmp_path, [])
    assert read_log("\n".join([*lines, "error: the loss is nan\n"])).hopeless == (not retry_helps)


def test_a_retry_after_a_hopeless_end_is_a_new_start(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.event("start", resume_step=0)
    journal.event("end", status="failed", error="x", retry_helps=False)
    journal.event("start", resume_step=4)
    journal.close()
    assert read_run(str(tmp_path), 0) == RunState(None, 4)


def cut_up(journal, segments):
    """Lay a journal out as it is in an object store."""
    lines, first = journal.read_bytes().splitlines(keepends=True), 0
    size = -(-len(lines) // segments)
    (journal.parent / "journal").mkdir()
    for start in range(0, len(lines), size):
        content = b"".join(lines[start : start + size])
        (journal.parent / "journal" / segment_name(first)).write_bytes(content)
        first += len(content)
    journal.unlink()


def test_a_journal_of_another_run_at_the_same_place_says_nothing(tmp_path):
    write_journal(tmp_path, begun=True, ended="finished")
    assert read_run(str(tmp_path), time.time() + 60) is None
    assert read_run(str(tmp_path / "absent"), 0) is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "journal", "version": 99}) + "\n")
    assert read_run(str(tmp_path), 0) is None


class StandIn:
    """A job server whose jobs end as they are told to."""

    def __init__(self, *ends):
        self.ends, self.followed = list(ends), []

    def follow(self, job):
        self.followed.append(job)
        return self.ends.pop(0), 0.0


def run_to_end(server, tmp_path, *, keep_alive, job=""):
    names = iter("abcdefgh")
    return see_to_end(
        server, lambda: next(names), job=job, place=str(tmp_path), keep_alive=keep_alive, echo=lambda line: None
    )


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(submission, "AGAIN_S", 0.0)
    monkeypatch.setattr(submission, "LOOK_S", 0.01)


def test_a_run_is_kept_alive_over_lost_heads_and_killed_drivers(hasty, tmp_path):
    server = StandIn(LOST, killed(), crashed(), succeeded())
    assert run_to_end(server, tmp_path, keep_alive=True, job="first") == 0
    assert server.followed == ["first", "a", "b", "c"]


def test_a_job_that_is_refused_by_a_lease_is_submitted_again_when_it_is_stale(monkeypatch, tmp_path):
    slept, told = [], []
    monkeypatch.setattr(submission.time, "sleep", slept.append)
    server = StandIn(crashed(error=HELD, exit_code=2), killed(), succeeded())
    names = iter("abc")
    code = see_to_end(server, lambda: next(names), place=str(tmp_path), keep_alive=True, echo=told.append)
    assert (code, slept) == (0, [STALE_S, submission.AGAIN_S])
    assert "submitting it again in 60s" in told


def test_a_job_that_is_not_kept_alive_is_submitted_once(hasty, tmp_path):
    server = StandIn(killed(), succeeded())
    assert run_to_end(server, tmp_path, keep_alive=False) == 1
    assert server.followed == ["a"]


def test_the_journal_stands_over_the_log(hasty, tmp_path):
    """Each of the three jobs got to another step, as the journal knows; the logs say the same."""
    server = StandIn(crashed(1), crashed(1), crashed(1), succeeded())
    steps = iter([RunState(None, 4), RunState(None, 5), RunState(None, 6), RunState("finished", 9)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "read_run", lambda place, since: next(steps))
        assert run_to_end(server, tmp_path, keep_alive=True) == 0


def test_a_head_that_is_away_is_waited_for_aloud_and_not_for_ever(hasty, monkeypatch):
    monkeypatch.setattr(submission, "TELL_S", 0.1)
    told = []
    server = JobServer("http://127.0.0.1:9", patience_s=0.5, echo=told.append, show=told.append)
    with pytest.raises(SubmissionError, match=r"has not answered .* --keep-alive"):
        server.follow("job")
    assert 2 <= len(told) <= 6
    assert all("waiting for the job server at http://127.0.0.1:9" in line for line in told)


def test_an_address_that_is_no_job_server_is_refused(hasty, tmp_path):
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server = JobServer(f"http://127.0.0.1:{web.server_port}", patience_s=5, echo=print, show=print)
        with pytest.raises(ConfigError, match="refuses"):
            server.follow("job")
        web.shutdown()


REFUSED = {
    "address": (["--address", "127.0.0.1:6379"], "http://HOST:8265"),
    "working directory": (["--working-dir", "/nowhere"], "no jobs/pretrain.py"),
    "time to stop": (["--stop-wait-s", "0"], "above 0"),
    "a fresh start each time": (["--keep-alive", "--", "--fresh"], "--follow JOB without that flag"),
    "going back each time": (["--keep-alive", "--", "--resume-from-step", "3"], "--follow JOB without that flag"),
    "password": (["--", "--tracking-uri", "http://me:word@host"], "credentials"),
    "secret": (["--", "--storage-path=s3://key:word@bucket/runs"], "credentials"),
    "secret option": (["--", "--storage-path=s3://bucket/runs?secret_key=word"], "credentials"),
}


@pytest.mark.parametrize(("arguments", "remedy"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_submitted_is_refused_with_a_remedy(arguments, remedy, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    job = Path(__file__).parents[1] / "jobs" / "submit.py"
    main = runpy.run_path(str(job), run_name="submit")["main"]
    with pytest.raises(ConfigError, match=remedy) as refusal:
        main(arguments)
    assert "word" not in str(refusal.value)
