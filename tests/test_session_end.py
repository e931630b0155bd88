"""How a session ends: in order, whatever the disk says, and not at all once the run is another driver's."""

import dataclasses
import json
import time

import pytest
from runs import open_session

from raychat.tracking.journal import read_events
from raychat.tracking.summary import NO_RETRY, Summary
from raychat.training import session as module
from raychat.training.events import Failed, Metrics, Note
from raychat.training.lease import LeaseLostError


@pytest.fixture
def config(own_config):
    return own_config


def test_attempt_of_a_driver_that_lost_its_lease_changes_nothing(config):
    session = open_session(config())
    session.lease.why_lost = "Another driver has taken over."
    before = {path: path.read_bytes() for path in session.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(LeaseLostError, match="taken over"):
        session.begin_attempt()
    assert {path: path.read_bytes() for path in session.run_dir.rglob("*") if path.is_file()} == before
    session.abort()


def test_end_of_a_driver_that_has_not_yet_noticed_another_one_is_not_written(config):
    session = open_session(config())
    session.begin_attempt()
    lease = session.run_dir / "lease.json"
    lease.write_text(json.dumps(json.loads(lease.read_text()) | {"holder": "another"}))
    session.receive(Failed("Another driver has taken over", 2))  # a worker met it in a save
    summary = session.close("failed")
    assert summary.retry_helps
    assert not [event for event in read_events(session.journal.path) if event["event"] == "end"]
    assert json.loads(lease.read_text())["holder"] == "another"


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_full_disk_at_the_start_of_an_attempt_is_a_warning(config, monkeypatch):
    lines = []
    session = open_session(config(), lines.append)
    monkeypatch.setattr(module, "write_json", no_space)
    assert session.begin_attempt().attempt == 1
    session.receive(Note("resolved", {"dtype": "float32"}))
    assert [line for line in lines if "warning: the configuration cannot be written" in line] * 2 == lines[-2:] * 2
    session.abort()


@pytest.mark.parametrize("broken", ["picture", "summary", "both"])
def test_full_disk_at_the_end_hides_neither_the_error_of_the_run_nor_the_hook(config, monkeypatch, broken):
    lines, told = [], []
    session = open_session(config(on_event='echo "$RAYCHAT_EVENT: $RAYCHAT_ERROR"'), lines.append)
    session.begin_attempt()
    session.receive(Metrics(0, {"train/loss": 1.0, "time/productive": 1.0}, time.time()))
    if broken != "summary":
        monkeypatch.setattr(module, "loss_curve", no_space)
    if broken != "picture":
        monkeypatch.setattr(Summary, "write", no_space)
    summary = session.close("failed", error="boom", finish_tracking=told.append)
    assert (summary.status, summary.error, told) == ("failed", "boom", [summary])
    assert lines[-1] == "on-event: failed: boom"
    assert sum("cannot be written: [Errno 28]" in line for line in lines) == (2 if broken == "both" else 1)
    assert not (session.run_dir / "lease.json").exists()
    assert read_events(session.journal.path)[-1]["error"] == "boom"


def test_tracking_is_finished_between_the_summary_and_the_mirror(config, monkeypatch):
    order = []
    session = open_session(config(on_event="true"))
    session.begin_attempt()
    for owner, name in ((session.journal, "close"), (session.mirror, "close"), (session.lease, "release")):
        real = getattr(owner, name)
        what = f"{type(owner).__name__} {name}"
        monkeypatch.setattr(owner, name, lambda *args, real=real, what=what: (order.append(what), real(*args)))
    monkeypatch.setattr(module, "run_hook", lambda *args, **kwargs: order.append("hook"))

    def finish_tracking(summary):
        order.append("tracking")
        assert Summary.read(session.run_dir / "summary.json") == summary

    session.close("stopped", finish_tracking=finish_tracking)
    assert order == ["Journal close", "tracking", "Mirror close", "Lease release", "hook"]


def test_failure_that_no_retry_mends_is_told_from_one_that_may_pass(config):
    def ended(fail):
        session = open_session(config(fresh=True))
        session.begin_attempt()
        fail(session)
        summary = session.close("failed", error="the cluster is gone")
        last = read_events(session.journal.path)[-1]
        assert (last["error"], last["retry_helps"]) == (summary.error, summary.retry_helps)
        assert (f"  {NO_RETRY}" in session.closing_lines(summary)) == (summary.retry_helps is False)
        return summary.error, summary.retry_helps

    def give_up_on(session):
        while session.attempt_failed("crash", "boom") is None:
            session.begin_attempt()

    assert ended(lambda session: session.receive(Failed("the loss is nan", 1))) == ("the loss is nan", False)
    assert ended(lambda session: None) == ("the cluster is gone", True)
    error, retry_helps = ended(give_up_on)
    assert "3 times at the same step" in error
    assert error.endswith("boom")
    assert not retry_helps


def test_command_of_the_user_runs_after_the_summary_is_written(config):
    lines = []
    command = 'echo "$RAYCHAT_EVENT $RAYCHAT_MODEL_TAG $RAYCHAT_RUN_DIR"; grep status "$RAYCHAT_SUMMARY"; ' + (
        'echo "$RAYCHAT_STATUS_LINE"; test ! -e "$RAYCHAT_RUN_DIR/lease.json"; exit 7'
    )
    session = open_session(config(on_event=command), lines.append)
    session.begin_attempt()
    assert session.close("stopped").status == "stopped"
    assert lines[-4] == f"on-event: stopped d2 {session.run_dir}"
    assert '"status": "stopped"' in lines[-3]
    assert lines[-2].startswith("on-event: stopped: step 0 of 4")
    assert "exit code 7" in lines[-1]


def test_closing_lines_say_what_the_money_bought(config):
    session = open_session(config(price_per_hour=3.0))
    session.begin_attempt()
    summary = dataclasses.replace(
        session.close("stopped"), tokens=1234, tok_per_sec=56.0, cost_usd=0.42, productive_s=3.0, startup_s=1.0
    )
    text = "\n".join(session.closing_lines(summary))
    assert "stopped: step 0 of 4" in text
    assert "1,234 tokens" in text
    assert "time: 75% productive, 0% replayed, 25% start-up" in text
    assert "$0.42" in text


@pytest.mark.parametrize("closing", [lambda session: session.close("stopped"), lambda session: session.abort()])
def test_lease_is_given_back_whatever_fails_before(config, monkeypatch, closing):
    lines = []
    session = open_session(config(), lines.append)
    session.begin_attempt()
    monkeypatch.setattr(session.journal, "close", no_space)
    monkeypatch.setattr(session.mirror, "close", no_space)
    monkeypatch.setattr(module.checkpoint, "steps", no_space)
    closing(session)
    assert sum("Errno 28" in line for line in lines) >= 2
    assert not (session.run_dir / "lease.json").exists()
