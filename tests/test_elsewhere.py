"""Evaluations within training and beside it: the same values either way, none lost, and none that holds a checkpoint."""

import dataclasses
import json

import pytest
import torch
from core_bundles import write_bundle
from runs import after, open_session, run_here, train_for_others

from raychat.data import chunks
from raychat.errors import ConfigError, DataError
from raychat.export.source import find_source
from raychat.storage import Store
from raychat.tracking.journal import read_events, read_journal
from raychat.training import checkpoint, local_copy
from raychat.training.evaluate_checkpoint import evaluate_checkpoint
from raychat.training.events import Note, Saved
from raychat.training.state import LoopState, Signal
from raychat.training.world import World

TASKS = {"core/choosing", "core/resolving", "core/continuing"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("core") / "bundle")


@pytest.fixture
def config(own_config, bundle):
    """Six steps, evaluated every second one."""
    defaults = {
        "num_iterations": 6,
        "eval_every": 2,
        "core_metric_every": 2,
        "core_bundle": str(bundle),
        "core_metric_max_per_task": 4,
    }
    return lambda **changes: own_config(**defaults | {"save_every": -1, "keep_checkpoints": 1} | changes)


def curve(records, name):
    return {record["step"]: record[name] for record in records if name in record}


def evaluate_rest(session):
    """What evaluation workers do, here."""
    while session.elsewhere.pending:
        owed = session.elsewhere.pending[min(session.elsewhere.pending)]
        session.elsewhere.take(owed, evaluate_checkpoint(World(), session.elsewhere.assignment(owed)))


def kept(config):
    return checkpoint.steps(config.run_dir / "checkpoints")


@pytest.fixture
def in_line(config):
    return run_here(config(model_tag="in-line"))


def test_core_is_evaluated_in_training_every_n_steps_and_at_the_last_one(config):
    ran = run_here(config(core_metric_every=4))
    core = curve(ran.records, "core_metric")
    assert list(core) == [4, 6]
    at_4 = next(record for record in ran.records if "core_metric" in record)
    assert at_4.keys() >= TASKS
    assert at_4["core_metric"] == pytest.approx(sum(at_4[task] for task in TASKS) / 3)
    assert ran.summary.core_metric == core[6]
    assert ran.summary.evaluation_s >= sum(curve(ran.records, "time/core").values())
    state = checkpoint.newest(ran.run_dir / "checkpoints", echo=print).meta["state"]
    assert (state["core_step"], state["core_metric"]) == (6, core[6])


def test_a_stop_within_core_leaves_it_to_the_next_start(config, in_line):
    asked = []

    def stop_late() -> Signal:
        """Once four rounds of the evaluation of step 0, six steps and their evaluations are over: in the last CORE."""
        asked.append(1)
        return Signal.STOP if len(asked) == late else Signal.NONE

    late = 10**9
    run_here(config(model_tag="count"), stop_late)
    late = len(asked) - 1
    asked.clear()
    first = run_here(config(), stop_late)
    assert (first.summary.status, first.summary.step) == ("stopped", 6)
    assert list(curve(first.records, "core_metric")) == [2, 4]
    second = run_here(config())
    assert second.summary.status == "finished"
    assert curve(second.records, "core_metric") == curve(in_line.records, "core_metric")


def test_a_bundle_that_comes_later_is_evaluated_once(config):
    run_here(config(core_bundle=""))
    session = open_session(config())
    assert not session.done
    session.abort()
    assert run_here(config()).summary.core_metric is not None
    session = open_session(config())
    assert session.done
    session.abort()


def test_a_bundle_with_a_bad_line_is_refused_before_anything_is_trained(config, tmp_path):
    folder = write_bundle(tmp_path / "broken")
    with (folder / "eval_data" / "a" / "choosing.jsonl").open("a") as file:
        file.write('{"query": "half\n')
    with pytest.raises(DataError, match=r"choosing\.jsonl"):
        run_here(config(core_bundle=str(folder)))
    with pytest.raises(ConfigError, match="--core-metric-max-per-task"):
        run_here(config(core_metric_max_per_task=1))
    assert not (config().run_dir / "checkpoints").exists()
    assert not (config().run_dir / "lease.json").exists()


def test_a_run_without_a_bundle_says_what_to_give(config):
    lines = []
    open_session(config(core_bundle=""), lines.append).abort()
    assert [line for line in lines if "--core-bundle" in line] != []
    lines.clear()
    open_session(config(core_bundle="", core_metric_every=-1), lines.append).abort()
    assert [line for line in lines if "--core-bundle" in line] == []


def test_evaluation_workers_need_ray(config):
    with pytest.raises(ConfigError, match="--eval-workers 2 needs Ray"):
        run_here(config(eval_workers=2))


def test_what_others_evaluate_is_what_training_would_have(config, in_line):
    """Values bit for bit, joined to their steps; the best checkpoint and the newest are kept when all is settled."""
    session, finished, lines = train_for_others(config(eval_workers=1, sample_every=4))
    assert finished
    assert list(session.elsewhere.pending) == kept(config())[::-1] == [2, 4, 6]
    assert not curve(read_journal(session.journal.path), "core_metric")
    evaluate_rest(session)
    summary = session.close("finished")
    records = read_journal(session.journal.path)
    for name in ("val/bpb", "core_metric", *TASKS, "train/loss"):
        assert curve(records, name) == curve(in_line.records, name)
    assert (summary.val_bpb, summary.min_val_bpb, summary.core_metric) == (
        in_line.summary.val_bpb, in_line.summary.min_val_bpb, in_line.summary.core_metric,
    )  # fmt: skip
    assert [event["step"] for event in read_events(session.journal.path) if event["event"] == "sample"][::7] == [4, 6]
    told = [line for line in lines if "validation bpb" in line or "CORE:" in line]
    assert [line.split()[1] for line in told] == ["00000", "00002", "00002", "00004", "00004", "00006", "00006"]
    bpb = {step: value for step, value in curve(records, "val/bpb").items() if step}
    best = min(bpb, key=bpb.__getitem__)
    session.elsewhere.tidy()
    assert kept(config()) == sorted({6, best}, reverse=True)
    again = open_session(config(eval_workers=1), eval_workers=True)
    assert again.done
    again.abort()


def test_what_a_driver_leaves_unevaluated_the_next_one_finds(config):
    first, finished, _ = train_for_others(config(eval_workers=1), after(5, Signal.STOP))
    assert not finished
    assert list(first.elsewhere.pending) == [2, 4]
    owed, beats = first.elsewhere.pending[2], []
    task = first.elsewhere.assignment(owed)
    first.elsewhere.take(owed, evaluate_checkpoint(World(), task, beat=lambda: beats.append(1)))
    assert len(beats) >= 2 * len(owed.kinds)  # between passes, and when a kind is done
    first.close("stopped")
    second, finished, _ = train_for_others(config(eval_workers=1))
    assert finished
    assert list(second.elsewhere.pending) == [4, 6]
    evaluate_rest(second)
    assert second.close("finished").restarts == 1


def test_a_run_at_its_horizon_is_not_done_while_an_earlier_checkpoint_waits(config):
    """Its last one, which was made before that step was the last, is evaluated in line."""
    early = {"eval_workers": 1, "eval_every": 4, "core_metric_every": -1}
    first, _, _ = train_for_others(config(**early), after(5, Signal.STOP))
    first.close("stopped")
    early |= {"num_iterations": 5, "allow_config_change": True}
    second, finished, _ = train_for_others(config(**early))
    assert finished
    second.close("stopped")
    third = open_session(config(**early), eval_workers=True)
    assert list(third.elsewhere.pending) == [4]
    assert not third.done
    evaluate_rest(third)
    assert third.done
    third.abort()


def test_a_run_that_goes_on_without_evaluation_workers_lets_the_rest_go(config):
    session, _, _ = train_for_others(config(eval_workers=1), after(5, Signal.STOP))
    session.close("stopped")
    ran = run_here(config())
    assert list(curve(ran.records, "core_metric")) == [6]
    assert set(kept(config())) <= {6, 4, 2}
    given_up = [e["step"] for e in read_events(ran.run_dir / "metrics.jsonl") if e["event"] == "evaluation_given_up"]
    assert given_up == [2, 4]
    checkpoint.prune(config().run_dir / "checkpoints", 1)
    assert len(kept(config())) <= 2


def test_a_bundle_that_comes_later_is_evaluated_once_by_others_too(config):
    """And what is known of the checkpoint already stays: it may be the best one."""
    first, _, _ = train_for_others(config(eval_workers=1, core_bundle=""))
    evaluate_rest(first)
    first.close("finished")
    settled = checkpoint.evaluated(config().run_dir / "checkpoints")
    without = open_session(config(eval_workers=1, core_bundle=""), eval_workers=True)
    assert without.done
    without.abort()
    second, finished, _ = train_for_others(config(eval_workers=1))
    assert finished
    assert {step: owed.kinds for step, owed in second.elsewhere.pending.items()} == {6: ("core",)}
    evaluate_rest(second)
    assert second.close("finished").core_metric is not None
    assert checkpoint.evaluated(config().run_dir / "checkpoints") == settled
    third = open_session(config(eval_workers=1), eval_workers=True)
    assert third.done
    third.abort()


@pytest.mark.parametrize("branched", [False, True])
def test_a_replayed_step_is_evaluated_again_only_in_another_branch(config, branched):
    session, _, _ = train_for_others(config(eval_workers=1), after(3, Signal.STOP))
    evaluate_rest(session)
    session.elsewhere.forget_after(1, branched=branched)
    session.elsewhere.saved(2, dataclasses.asdict(LoopState(step=2, owed=("bpb", "core"))))
    assert list(session.elsewhere.pending) == ([2] if branched else [])
    assert (checkpoint.evaluated(config().run_dir / "checkpoints").get(2) is None) == branched  # it may be the best
    session.close("stopped")


def test_a_result_for_a_checkpoint_of_before_a_rollback_is_dropped(config):
    session, _, _ = train_for_others(config(eval_workers=1), after(3, Signal.STOP))
    owed = session.elsewhere.pending[2]
    findings = evaluate_checkpoint(World(), session.elsewhere.assignment(owed))
    state = dataclasses.asdict(LoopState(step=2, owed=("bpb", "core")))
    session.receive(Note("rollback", {"from_step": 0, "bad_step": 3, "cursor": 0, "reason": "a test"}))
    assert session.elsewhere.pending == {}
    session.receive(Saved(2, "there", state, stall_s=0.0, total_s=0.0, bytes=1, synchronous=True))
    session.elsewhere.take(owed, findings)
    assert list(session.elsewhere.pending) == [2]
    assert 2 not in curve(read_journal(session.journal.path), "core_metric")
    session.close("stopped")


def test_old_checkpoints_wait_for_their_evaluation_unless_the_disk_is_full(config):
    session, _, _ = train_for_others(config(eval_workers=1))
    root = config().run_dir / "checkpoints"
    assert checkpoint.prune(root, 1) == []
    assert checkpoint.make_room(root)
    assert kept(config()) == [6, 4]
    session.elsewhere.give_up([4], "a test")
    assert checkpoint.prune(root, 1) == [4]
    assert json.loads((root / checkpoint.EVALUATED).read_text()) == {"4": None}
    session.close("finished")


def test_in_an_object_store_the_rest_is_evaluated_too_and_nothing_owed_is_deleted(
    server, config, in_line, tmp_path, monkeypatch
):
    """By another driver than the one that trained, which has nothing but the store; settled, it is deleted as ever.

    What training has brought to this machine meanwhile stays there.
    """
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    there = config(eval_workers=1, eval_every=4, core_metric_every=4, storage_path=server.uri("bucket/runs"))
    root = Store.of(there.run_uri).child("checkpoints")
    first, finished, _ = train_for_others(there)
    assert finished
    first.close("stopped")
    assert checkpoint.prune(root, 1) == []
    second = open_session(there, eval_workers=True)
    assert not second.done
    second.begin_attempt(world_size=1)
    trainings = local_copy._folder(root.child("step_00000006"), World())
    trainings.mkdir()
    evaluate_rest(second)
    find_source(path=root.child("step_00000006").address, base_dir=str(there.base_dir)).load(torch.device("cpu"))
    left = {path for path in tmp_path.iterdir() if path.name.startswith("raychat-")}
    assert left == {trainings, chunks.own_folder()}  # the second holds token shards, for whoever reads them next
    for name in ("val/bpb", "core_metric"):
        found, expected = curve(read_journal(second.journal.path), name), curve(in_line.records, name)
        assert found == {step: value for step, value in expected.items() if step != 2}
    settled = checkpoint.evaluated(root)
    assert list(settled) == [4, 6]
    second.elsewhere.tidy()
    assert checkpoint.steps(root) == sorted({6, min(settled, key=settled.__getitem__)}, reverse=True)
    second.close("finished")
