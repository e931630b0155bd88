"""The run directory: where a run starts, what it records, how it says it ended."""

import dataclasses
import json
import shutil
import time

import pytest
from runs import after, dying_at, open_session, run_here

from raychat.errors import CheckpointError
from raychat.tracking.journal import read_events, read_journal, records_from
from raychat.tracking.ledger import Ledger, ledger
from raychat.tracking.summary import Summary
from raychat.training import checkpoint, device
from raychat.training.events import Metrics, Note, Saved
from raychat.training.lease import LeaseError
from raychat.training.retry import give_up
from raychat.training.state import LoopState, Signal

FIELDS = {field.name for field in dataclasses.fields(Summary)}
# No CORE, no peak of a CPU, no price, no tracking, no failure.
MAY_BE_NULL = {"core_metric", "mfu", "cost_usd", "mlflow_run_id", "error", "retry_helps"}


@pytest.fixture
def config(own_config):
    return lambda **changes: own_config(**{"save_every": 2, "keep_checkpoints": 9} | changes)


def test_finished_run_has_every_file_and_every_field(config):
    ran = run_here(config())
    written = json.loads((ran.run_dir / "summary.json").read_text())
    assert set(written) == FIELDS
    assert written["status"] == "finished"
    assert written["checkpoint"] == str(ran.run_dir / "checkpoints" / "step_00000004")
    assert {name for name, value in written.items() if value is None} == MAY_BE_NULL
    assert 0 < written["goodput"] <= 1
    assert sum(written[name] for name in Ledger().accounts()) == pytest.approx(written["wall_time_s"])
    assert min(written[name] for name in ("productive_s", "startup_s", "checkpoint_stall_s", "evaluation_s")) > 0
    assert written["goodput"] == pytest.approx(written["productive_s"] / written["wall_time_s"])
    [last] = [record for record in ran.records if "ledger/productive_s" in record]
    assert (last["step"], last["ledger/productive_s"]) == (4, written["productive_s"])
    assert (ran.run_dir / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((ran.run_dir / "config.json").read_text())
    assert saved["config"] == config().flat()
    assert saved["recipe"]["num_iterations"] == 4
    assert json.loads((ran.run_dir / "plan.json").read_text())["horizon"]["num_iterations"] == 4
    assert not (ran.run_dir / "lease.json").exists()


def test_run_that_is_done_says_so_and_tries_nothing(config):
    ran = run_here(config())
    before = (ran.run_dir / "metrics.jsonl").read_bytes()
    session = open_session(config())
    assert session.done
    assert "reached its horizon of 4 steps" in session.done_line()
    session.abort()
    assert (ran.run_dir / "metrics.jsonl").read_bytes() == before
    assert Summary.read(ran.run_dir / "summary.json") == ran.summary


def test_failed_run_leaves_a_summary_that_says_so(config):
    def fail():
        raise OSError("the machine is gone")

    with pytest.raises(OSError, match="the machine is gone"):
        run_here(config(), fail)
    assert Summary.read(config().run_dir / "summary.json").status == "failed"


def test_second_driver_on_a_live_run_is_refused_and_named(config):
    session = open_session(config())
    with pytest.raises(LeaseError, match="Another driver is training in .* process "):
        open_session(config())
    session.abort()
    open_session(config()).abort()


def test_fresh_starts_over_and_keeps_the_old_run(config):
    first = run_here(config())
    again = run_here(config(fresh=True))
    assert again.losses == first.losses
    kept = config().run_dir.with_name("d2.old-1")
    assert checkpoint.steps(kept / "checkpoints") == [4, 2]
    assert [
        event["attempt"] for event in read_events(again.run_dir / "metrics.jsonl") if event["event"] == "start"
    ] == [1]


def test_longer_horizon_goes_on_with_permission(config):
    run_here(config())
    with pytest.raises(CheckpointError, match="num_iterations: 4 -> 6"):
        run_here(config(num_iterations=6))
    assert run_here(config(num_iterations=6, allow_config_change=True)).summary.step == 6


def test_horizon_before_the_checkpoint_is_refused(config):
    run_here(config())
    with pytest.raises(CheckpointError, match="at step 4 and the horizon is now 3"):
        run_here(config(num_iterations=3, allow_config_change=True))


def test_another_shape_seed_or_data_is_refused_whatever_is_permitted(config, corpus_dir):
    run_here(config())
    for change in ({"depth": 3, "model_tag": "d2"}, {"seed": 7}, {"packing": "best-fit"}):
        with pytest.raises(CheckpointError, match="cannot go on with another"):
            run_here(config(allow_config_change=True, **change))


def test_rollback_branches_the_journal_and_moves_later_checkpoints(config):
    first = run_here(config())
    rolled = run_here(config(resume_from_step=2, embedding_lr=9.0))
    assert checkpoint.steps(rolled.run_dir / "checkpoints") == [4, 2]
    assert checkpoint.steps(rolled.run_dir / "checkpoints" / "abandoned-2") == [4]
    branches = [
        event["from_step"] for event in read_events(rolled.run_dir / "metrics.jsonl") if event["event"] == "branch"
    ]
    assert branches == [2]
    records = read_journal(rolled.run_dir / "metrics.jsonl")
    steps = [record["step"] for record in records if "train/loss" in record]
    assert steps == [0, 1, 2, 3]
    assert rolled.losses[:3] == first.losses[:3]
    assert rolled.losses[3] != first.losses[3]
    assert [r["step"] for r in records if "val/bpb" in r] == [0, 2, 4]  # that of step 2 is in the checkpoint, and kept


def test_rollback_without_a_change_gives_the_same_run(config):
    first = run_here(config())
    rolled = run_here(config(resume_from_step=2))
    assert rolled.losses == first.losses
    assert rolled.metric("val/bpb") == first.metric("val/bpb")


def test_step_that_was_not_saved_cannot_be_resumed_from(config):
    run_here(config())
    with pytest.raises(CheckpointError, match="--resume-from-step 3.* holds the steps 2, 4"):
        run_here(config(resume_from_step=3))


def test_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(config):
    whole = run_here(config(num_iterations=6, model_tag="whole"))
    first = run_here(config(num_iterations=6), after(4, Signal.STOP))
    model = first.run_dir / "checkpoints" / "step_00000004" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 255
    model.write_bytes(data)
    session_lines = []
    open_session(config(num_iterations=6), session_lines.append).abort()
    assert any("checkpoint skipped" in line and "step_00000004" in line for line in session_lines)
    second = run_here(config(num_iterations=6))
    assert second.losses == whole.losses
    assert second.summary.replayed_steps == 2


def test_damaged_checkpoint_is_moved_where_it_cannot_displace_a_good_one(config):
    first = run_here(config(num_iterations=6, keep_checkpoints=1), after(4, Signal.STOP))
    (first.run_dir / "checkpoints" / "step_00000004" / "checkpoint.json").unlink()
    second = run_here(config(num_iterations=6, keep_checkpoints=1), after(1, Signal.STOP))
    assert second.summary.step == 3  # step 4 was not evaluated when it was told to stop, and 2 is the best one
    assert checkpoint.steps(second.run_dir / "checkpoints") == [3, 2]
    assert checkpoint.steps(second.run_dir / "checkpoints" / "damaged-2") == [4]


def test_longer_horizon_goes_on_in_the_same_branch(config):
    run_here(config())
    longer = run_here(config(num_iterations=6, allow_config_change=True))
    assert not [event for event in read_events(longer.run_dir / "metrics.jsonl") if event["event"] == "branch"]
    assert [record["step"] for record in longer.records if "train/loss" in record] == list(range(6))


def test_batch_that_does_not_fit_the_lanes_of_the_run_is_refused(config):
    run_here(config())
    with pytest.raises(CheckpointError, match="reads its rows in 8 lanes.*multiple of 256"):
        run_here(config(num_iterations=6, total_batch_size=128, allow_config_change=True))
    doubled = run_here(config(num_iterations=6, total_batch_size=512, allow_config_change=True))
    assert doubled.summary.rows_consumed == 4 * 8 + 2 * 16


def test_choices_made_on_the_machine_are_in_the_run_directory(config):
    ran = run_here(config())
    resolved = json.loads((ran.run_dir / "config.json").read_text())["resolved"]
    assert (resolved["device_type"], resolved["dtype"], resolved["loss"]) == ("cpu", "float32", "chunked")
    assert resolved["threads"] == 1  # of this one core (conftest.py)
    assert device.resolve(config(threads=3), local_world_size=2).threads == 3


def test_driver_that_lost_its_lease_writes_nothing_more(config):
    def take_over():
        lease.write_text(json.dumps(json.loads(lease.read_text()) | {"holder": "another"}))
        return Signal.SAVE

    lease = config().run_dir / "lease.json"
    with pytest.raises(LeaseError, match="taken over"):
        run_here(config(), take_over)
    assert checkpoint.steps(config().run_dir / "checkpoints") == []
    assert json.loads(lease.read_text())["holder"] == "another"


def test_metrics_that_a_dying_driver_did_not_read_are_in_the_checkpoint(config):
    whole = run_here(config(model_tag="whole"))
    stopped = run_here(config(), after(3, Signal.STOP))
    journal = stopped.run_dir / "metrics.jsonl"
    read = [line for line in journal.read_text().splitlines(keepends=True) if '"step": 2, "time"' not in line]
    assert len(read) < len(journal.read_text().splitlines())
    journal.write_text("".join(read))
    again = run_here(config())
    assert [record["step"] for record in again.records if "train/loss" in record] == list(range(len(whole.losses)))
    assert again.losses == whole.losses


def test_run_that_died_before_its_first_save_begins_again_in_its_branch(config):
    with pytest.raises(KeyboardInterrupt):
        run_here(config(save_every=-1), dying_at(3))
    again = run_here(config(save_every=-1))
    assert not [event for event in read_events(again.run_dir / "metrics.jsonl") if event["event"] == "branch"]
    assert again.summary.replayed_steps == 2


def test_other_settings_in_a_directory_without_a_checkpoint_are_another_branch(config):
    with pytest.raises(KeyboardInterrupt):
        run_here(config(save_every=-1), dying_at(3))
    other = run_here(config(save_every=-1, seed=7))
    assert [e["from_step"] for e in read_events(other.run_dir / "metrics.jsonl") if e["event"] == "branch"] == [0]
    assert len(other.losses) == 4


def test_wall_time_and_restarts_add_up_over_attempts(config):
    first = run_here(config(num_iterations=6), after(2, Signal.STOP))
    second = run_here(config(num_iterations=6))
    assert second.summary.restarts == 1
    assert second.summary.wall_time_s > first.summary.wall_time_s
    assert second.summary.goodput < 1


def told_of_steps(session, steps):
    """The driver hears of steps of a second each."""
    for step in steps:
        session.receive(Metrics(step, {"train/loss": 1.0, "time/productive": step + 1.0}, time.time()))


def told_of_save(session, step):
    state = dataclasses.asdict(LoopState(step=step, rows_consumed=8 * step, step_time_s=float(step)))
    path = str(session.run_dir / "checkpoints")
    session.receive(Saved(step, path, state, stall_s=0.1, total_s=0.3, bytes=1000, synchronous=False))


def die(session):
    """What is left when a driver is killed."""
    session.journal.close()
    session.lease.release()


def test_attempts_are_given_up_when_they_fail_at_one_step_over_all_drivers(config):
    session = open_session(config())
    for _ in range(2):
        session.begin_attempt()
        told_of_steps(session, range(3))
        assert session.attempt_failed("crash", "boom") is None
    die(session)
    second = open_session(config())
    second.begin_attempt()
    told_of_steps(second, range(3))
    assert second.attempt_failed("lost", "a node is gone") is None
    second.begin_attempt()
    told_of_steps(second, range(3))
    assert "3 times at the same step, 3" in second.attempt_failed("hang", "silent")
    second.close("failed")
    failures = [e for e in read_events(second.journal.path) if e["event"] == "failure"]
    assert [(e["cause"], e["step"], e["error"]) for e in failures] == [
        ("crash", 3, "boom"), ("crash", 3, "boom"), ("lost", 3, "a node is gone"), ("hang", 3, "silent"),
    ]  # fmt: skip
    third = open_session(config())
    third.begin_attempt()
    assert third.attempt_failed("crash", "boom") is None  # somebody decided to run it again
    third.abort()


def test_every_loss_of_a_machine_is_told_from_a_crash_in_the_summary(config):
    session = open_session(config())
    for cause in ("preempted", "crash", "preempted", "lost", "resize"):
        session.begin_attempt()
        session.attempt_failed(cause, "x")
    session.begin_attempt()
    session.receive(Note("save_failed", {"step": 1, "error": "disk full"}))
    summary = session.close("stopped")
    assert (summary.restarts, summary.preemptions, summary.failed_saves) == (5, 2, 1)


def test_what_a_session_keeps_in_mind_is_what_the_journal_says(config, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    fields = {"from_step": 2, "bad_step": 4, "cursor": 32, "reason": "nan"}
    for driver in range(2):
        session = open_session(config(price_per_hour=3.0))
        for cause in ("crash", "lost"):
            job = session.begin_attempt(nodes=2)
            assert job.attempt == 1 + 2 * driver + ["crash", "lost"].index(cause)
            for act, *about in (
                (told_of_steps, session, range(2)),
                (told_of_save, session, 2),
                (told_of_steps, session, range(2, 5)),
                (session.receive, Note("rollback", fields)),
                (told_of_steps, session, range(2, 4)),
            ):
                now[0] += 7
                act(*about)
                records = [record for record, _ in records_from(session.journal.path)]
                end = {"event": "now", "time": now[0], "driver": session.lease.holder}
                assert session.ledger() == ledger([*records, end], price_per_hour=3.0)
            losses = [r["step"] for r in read_journal(session.journal.path) if "train/loss" in r]
            assert session.journal.last_step("train/loss") == max(losses) == 3
            verdict = session.attempt_failed(cause, "x")
            assert verdict == give_up(read_events(session.journal.path), max_failures=3, max_preemptions=-1)
        die(session)
    starts = [event for event in read_events(session.journal.path) if event["event"] == "start"]
    assert [start["replayed"] for start in starts] == [0, 4, 4, 4]


def test_rollback_within_an_attempt_supersedes_the_steps_after_it(config):
    session = open_session(config())
    session.begin_attempt()
    told_of_steps(session, range(2))
    told_of_save(session, 2)
    told_of_steps(session, range(2, 4))
    session.receive(Note("rollback", {"from_step": 2, "bad_step": 4, "cursor": 32, "reason": "nan"}))
    session.receive(Metrics(2, {"train/loss": 7.0, "time/productive": 3.0}, time.time()))
    summary = session.close("stopped")
    losses = {r["step"]: r["train/loss"] for r in read_journal(session.journal.path) if "train/loss" in r}
    assert losses == {0: 1.0, 1: 1.0, 2: 7.0}
    assert (summary.rollbacks, summary.skipped_batches, summary.replayed_steps) == (1, 1, 2)


def test_evaluation_in_a_replay_is_booked_though_its_metrics_are_not_repeated(config, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    session = open_session(config())
    for _ in range(2):
        session.begin_attempt()
        now[0] += 3
        session.receive(Metrics(0, {"val/bpb": 3.0, "val/time_s": 2.0}, now[0]))
        session.attempt_failed("crash", "x")
    assert session.close("failed").evaluation_s == 4.0


def test_machines_of_each_attempt_are_paid_for(config, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    session = open_session(config(price_per_hour=3600.0))
    job = session.begin_attempt(nodes=2)
    assert (job.nodes, job.cost_before_usd) == (2, 0.0)
    now[0] += 5
    session.attempt_failed("lost", "x")
    job = session.begin_attempt(nodes=1)
    assert (job.nodes, job.cost_before_usd, job.wall_before_s) == (1, 10.0, 5.0)
    now[0] += 3
    assert session.cost_usd() == 13.0
    assert session.close("stopped").cost_usd == 13.0


def test_disk_too_small_for_two_checkpoints_is_refused_at_the_start(config, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1))
    with pytest.raises(Exception, match="two checkpoints of this model take"):
        open_session(config())
    monkeypatch.undo()
    open_session(config()).abort()  # the lease was given back
