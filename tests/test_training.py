"""Laws of the training loop: what is interrupted goes on as if nothing had happened, and ranks see the same rows."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
import runs
import torch
import torch.distributed as dist
from ranks import run_ranks
from runs import InStep, after, dying_at, open_session, run_here
from safetensors.torch import load_file

from raychat.config import Config
from raychat.data.batches import local_batches, validation_rows
from raychat.data.order import Order, lanes_for
from raychat.data.prepare import make_in_process, prepare
from raychat.data.shards import RowReader
from raychat.errors import CheckpointError
from raychat.evaluation.bpb import BitsPerByte
from raychat.model import GPT
from raychat.optim import MuonAdamW
from raychat.planning import recipe
from raychat.planning.save_interval import MAX_INTERVAL_S, save_interval_s
from raychat.tracking.journal import read_events
from raychat.training import checkpoint, saving, scaler
from raychat.training.build import Job, build_model, train
from raychat.training.device import resolve
from raychat.training.events import Line, Metrics, Note, Saved
from raychat.training.lease import LeaseError
from raychat.training.loop import DivergedError, Signal, Trainer
from raychat.training.reading import read_here
from raychat.training.save_clock import SaveClock
from raychat.training.saver import SaveOutcome, Saver
from raychat.training.saving import LastSaveError
from raychat.training.scaler import GROWTH_STEPS, LossScaler
from raychat.training.state import Clock
from raychat.training.world import World


@pytest.fixture
def config(own_config):
    """Makes a configuration of six steps."""
    return lambda **changes: own_config(**{"num_iterations": 6} | changes)


@pytest.fixture(scope="module")
def whole(tiny_flags, prepared_base, tmp_path_factory):
    """The undisturbed run that others are compared with."""
    runs = tmp_path_factory.mktemp("whole")
    own = {"base_dir": str(prepared_base), "storage_path": str(runs), "num_iterations": 6}
    return run_here(Config.from_flat(tiny_flags | own))


def weights(ran):
    return load_file(sorted((ran.run_dir / "checkpoints").glob("step_*"))[-1] / "model.safetensors")


def test_training_lowers_the_loss_and_reaches_its_horizon(whole):
    assert whole.summary.status == "finished"
    assert len(whole.losses) == whole.summary.step == whole.summary.num_iterations == 6
    assert whole.losses[0] == pytest.approx(
        math.log(300), rel=1e-3
    )  # lm_head starts at nearly nothing: a uniform guess
    assert whole.losses[-1] < whole.losses[0]


def test_same_run_again_is_bit_identical(whole, config):
    again = run_here(config())
    assert again.losses == whole.losses
    assert again.metric("val/bpb") == whole.metric("val/bpb")


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_stopped_run_ends_where_the_undisturbed_one_ends(whole, config, stop_at):
    first = run_here(config(), after(stop_at, Signal.STOP))
    assert (first.summary.status, first.summary.step) == ("stopped", stop_at)
    second = run_here(config())
    assert second.losses == whole.losses  # bit for bit, over both processes' steps
    assert second.metric("val/bpb") == whole.metric("val/bpb")
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(second)[name], tensor)
    assert second.summary.restarts == 1


def test_rates_that_rise_exponentially_go_on_exactly_in_the_middle_of_their_rise(config, tmp_path):
    rise = {"warmup_steps": -1, "warmup_ratio": 1.0, "warmup_from": 0.01, "warmdown_ratio": 0.0}
    undisturbed = run_here(config(**rise, storage_path=str(tmp_path / "undisturbed")))
    assert undisturbed.metric("train/lrm") == pytest.approx([100 ** (step / 5 - 1) for step in range(6)])
    run_here(config(**rise), after(3, Signal.STOP))
    again = run_here(config(**rise))
    assert (again.losses, again.metric("train/lrm")) == (undisturbed.losses, undisturbed.metric("train/lrm"))
    with pytest.raises(CheckpointError, match=r"warmup_from: 0\.01 -> 0\.0"):
        run_here(config(**rise | {"warmup_from": 0.0}))


def test_killed_run_replays_from_its_last_checkpoint_without_a_sawtooth(whole, config):
    with pytest.raises(KeyboardInterrupt):
        run_here(config(save_every=2, save_mode="sync"), dying_at(5))
    second = run_here(config(save_every=2, save_mode="sync"))
    assert second.losses == whole.losses
    assert second.summary.restarts == 1
    steps = [event["step"] for event in read_events(second.run_dir / "metrics.jsonl") if event["event"] == "checkpoint"]
    assert steps == [2, 4, 6]


def test_save_signal_saves_and_goes_on(whole, config):
    ran = run_here(config(save_every=-1), after(2, Signal.SAVE))
    assert (ran.run_dir / "checkpoints" / "step_00000002").is_dir()
    assert ran.losses == whole.losses


@dataclasses.dataclass
class Outside(InStep):
    """A poll that gives `signal` once, when it is first asked outside of steps after so many steps."""

    signal: Signal = Signal.NONE

    def __call__(self) -> Signal:
        inside, self.inside = self.inside, False
        if inside or self.begun != self.steps:
            return Signal.NONE
        given, self.signal = self.signal, Signal.NONE
        return given


def outside(steps, signal):
    return Outside(steps, lambda: Signal.NONE, signal=signal)


def saved_steps(ran):
    return [event["step"] for event in read_events(ran.run_dir / "metrics.jsonl") if event["event"] == "checkpoint"]


def test_a_stop_during_an_evaluation_abandons_it_and_saves(whole, config):
    first = run_here(config(), outside(2, Signal.STOP))
    assert (first.summary.status, first.summary.step) == ("stopped", 2)
    assert len(first.metric("val/bpb")) == 1  # that of step 0
    state = checkpoint.verify(first.run_dir / "checkpoints" / "step_00000002").meta["state"]
    assert state["val_step"] == 0
    second = run_here(config())
    assert second.losses == whole.losses
    assert second.metric("val/bpb") == whole.metric("val/bpb")


def test_a_stop_during_the_last_evaluation_saves_the_finished_weights(whole, config):
    ran = run_here(config(), outside(6, Signal.STOP))
    assert (ran.summary.status, ran.summary.step) == ("stopped", 6)
    assert all(weights(whole)[name].equal(tensor) for name, tensor in weights(ran).items())


def test_a_save_asked_for_during_an_evaluation_is_made_and_the_evaluation_goes_on(whole, config):
    ran = run_here(config(save_every=-1), outside(2, Signal.SAVE))
    assert saved_steps(ran) == [2, 6]
    assert ran.losses == whole.losses
    assert ran.metric("val/bpb") == whole.metric("val/bpb")


def test_a_save_asked_for_before_anything_was_trained_is_made_after_the_first_step(whole, config):
    ran = run_here(config(save_every=-1), outside(0, Signal.SAVE))
    assert saved_steps(ran) == [1, 6]
    assert ran.losses == whole.losses


def test_a_stop_before_the_first_step_trains_and_saves_nothing(whole, config):
    first = run_here(config(), outside(0, Signal.STOP))
    assert (first.summary.status, first.losses, saved_steps(first)) == ("stopped", [], [])
    run_here(config(), after(2, Signal.STOP))
    again = run_here(config(), outside(0, Signal.STOP))
    assert (again.summary.status, saved_steps(again)) == ("stopped", [2])  # nothing has changed since
    assert run_here(config()).losses == whole.losses


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_evaluation_that_is_no_number_is_said_and_does_not_fail_the_saves(whole, config, monkeypatch, value):
    total = BitsPerByte.total
    monkeypatch.setattr(BitsPerByte, "total", lambda meter: value if next(calls) == 2 else total(meter))
    calls = itertools.count()
    ran = run_here(config(save_every=2, save_mode="sync", keep_checkpoints=9))
    states = [event.state for event in ran.events if isinstance(event, Saved)]
    expected = whole.metric("val/bpb")
    assert [state["val_bpb"] for state in states] == [expected[1], None, expected[3]]
    assert [state["val_step"] for state in states] == [2, 4, 6]
    assert states[1]["min_val_bpb"] == min(expected[:2])
    assert ran.metric("val/bpb") == [*expected[:2], None, expected[3]]
    notes = [event.fields for event in ran.events if isinstance(event, Note) and event.kind == "bad_evaluation"]
    assert notes == [{"step": 4, "value": str(value)}]
    assert any(line.startswith("warning: step 00004 | validation bpb: ") for line in ran.lines)


def test_times_are_told_as_the_ledger_reads_them(config):
    first = run_here(config(), after(3, Signal.STOP))
    second = run_here(config())
    for ran, step in ((first, 0), (second, 3)):
        notes = [event.fields for event in ran.events if isinstance(event, Note) and event.kind == "first_step"]
        assert [note["step"] for note in notes] == [step]
    productive = second.metric("time/productive")
    steps = np.diff([0.0, *productive])  # train/dt is read a moment later than the time that counts
    assert all(0 < step <= dt + 1e-6 for step, dt in zip(steps, second.metric("train/dt"), strict=True))
    assert len(second.metric("val/time_s")) == len(second.metric("val/bpb")) == 4
    state = checkpoint.verify(second.run_dir / "checkpoints" / "step_00000006").meta["state"]
    assert productive[-1] == state["step_time_s"]


def test_passes_of_another_size_give_the_same_losses(whole, config):
    """Accumulation changes only the order of sums: 1e-5 relative is some ten times what six float32 steps show."""
    ran = run_here(config(device_batch_size=8))
    assert ran.losses == pytest.approx(whole.losses, rel=1e-5)


def test_logged_loss_is_the_mean_over_the_whole_batch(whole, config):
    found = checkpoint.verify(whole.run_dir / "checkpoints" / "step_00000006")
    more = config(num_iterations=7, storage_path=str(whole.run_dir.parent), model_tag="probe", warmup_steps=40)
    assert found.meta["state"]["rows_consumed"] == 6 * 8
    model = build_model(more, resolve(more, local_world_size=1), torch.device("cpu"))
    manifest = open_manifest(more)
    order = Order([shard.rows for shard in manifest.split("train")], seed=more.run.seed, lanes=lanes_for(8))
    rows = torch.from_numpy(RowReader(manifest, "train").rows(order.batch(0, 8))).long()
    with torch.no_grad():
        direct = model(rows[:, :-1], rows[:, 1:]).item()
    assert whole.losses[0] == pytest.approx(direct, rel=1e-6)


def open_manifest(config):
    return prepare(config, with_gpus=False, maker=make_in_process, echo=lambda line: None).manifest


def test_resume_at_new_differential_rates_trains_on_at_them(config):
    """The source document 000: from step K on, other rates for every group, no warm-up, no warmdown, a longer horizon."""
    run_here(config(num_iterations=4, save_every=2))
    changed = config(
        num_iterations=9,
        resume_from_step=2,
        embedding_lr=0.018,
        unembedding_lr=0.00048,
        matrix_lr=0.0012,
        scalar_lr=0.03,
        warmup_steps=0,
        warmdown_ratio=0.0,
    )
    rates = []
    ran = run_here(changed, lambda: rates.append(1) or Signal.NONE)
    assert ran.summary.step == 9
    assert ran.metric("train/lrm")[2:] == [1.0] * 7  # flat from step 2 on, and the warm-up before it kept as it was
    assert ran.metric("train/lrm")[:2] == [1 / 40, 2 / 40]
    meta = checkpoint.verify(ran.run_dir / "checkpoints" / "step_00000009").meta
    assert meta["config"]["matrix_lr"] == 0.0012
    assert (ran.run_dir / "checkpoints" / "abandoned-2" / "step_00000004").is_dir()


def test_new_rates_act_on_the_weights_whatever_the_checkpoint_holds(config, tmp_path):
    """After a resume with all rates at nearly nothing, the weights stay where they were."""
    first = run_here(config(num_iterations=2))
    before = weights(first)
    still = dict.fromkeys(("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr"), 1e-12)
    second = run_here(config(num_iterations=4, allow_config_change=True, weight_decay=0.0, **still))
    assert second.summary.step == 4
    for name, tensor in weights(second).items():
        if "smear" not in name and "backout" not in name:  # their rate is fixed at 0.2
            assert torch.allclose(tensor, before[name], atol=1e-9)


def test_changed_rates_without_permission_are_refused(config):
    run_here(config(), after(2, Signal.STOP))
    with pytest.raises(CheckpointError, match="matrix_lr: 0.02 -> 0.03.*--allow-config-change"):
        run_here(config(matrix_lr=0.03))


def test_gradient_that_is_no_number_stops_before_the_update(config, monkeypatch):
    forward = GPT.forward
    calls = []

    def poisoned(self, idx, targets=None, reduction="mean"):
        calls.append(1)
        return forward(self, idx, targets, reduction) * (math.nan if len(calls) > 30 else 1.0)

    monkeypatch.setattr(GPT, "forward", poisoned)
    with pytest.raises(DivergedError, match="weights were not updated"):
        run_here(config(num_iterations=20, save_every=1, eval_every=-1, on_bad_step="stop"))
    monkeypatch.undo()
    newest = checkpoint.newest(config().run_dir / "checkpoints", echo=print)
    tensors = load_file(newest.path / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_failed_periodic_save_warns_and_training_goes_on(whole, config, monkeypatch):
    begin = Saver.begin

    def full_disk(self, model, optimizer, meta, **how):
        monkeypatch.setattr(type(self.root), "free_bytes", lambda store: 10 if meta["step"] == 2 else 10**12)
        begin(self, model, optimizer, meta, **how)

    monkeypatch.setattr(Saver, "begin", full_disk)
    ran = run_here(config(save_every=2))
    assert ran.losses == whole.losses
    failures = [event for event in ran.events if isinstance(event, Note) and event.kind == "save_failed"]
    assert [event.fields["step"] for event in failures] == [2]
    assert any("GB free" in line and line.startswith("warning") for line in ran.lines)
    assert [event.step for event in ran.events if isinstance(event, Saved)] == [4, 6]


@pytest.fixture
def impatient(monkeypatch):
    """A save that must succeed is given up soon."""
    monkeypatch.setattr(saving, "PAUSE_S", 0.01)
    monkeypatch.setattr(saving, "INSIST_S", 0.1)


def broken_begin(self, model, optimizer, meta, **how):
    """A save that fails at once, as on a storage that is out of reach."""
    outcome = {"step": meta["step"], "uri": None, "error": "out of reach", "fenced": False, "state": meta["state"]}
    self._outcomes.append(SaveOutcome(**outcome, stall_s=0.0, total_s=0.0, bytes=0))


@pytest.mark.usefixtures("impatient")
def test_a_last_save_that_keeps_failing_ends_the_run_with_an_error(config, monkeypatch):
    monkeypatch.setattr(Saver, "begin", broken_begin)
    with pytest.raises(LastSaveError, match="no checkpoint of step 6.*the same command") as raised:
        run_here(config(eval_every=-1))
    assert raised.value.exit_code == 1  # not a mistake in what was given


def _last_save(job: dict, failures: int) -> tuple[list[str], str]:
    """Train on this of two ranks; the first saves fail on rank 1. Lines that speak of saves, and how it ended."""
    rank, events, begin, tries = dist.get_rank(), [], Saver._own_size, itertools.count()

    def out_of_reach(self, request):
        if rank == 1 and next(tries) < failures:
            raise OSError("out of reach")
        return begin(self, request)

    Saver._own_size, saving.PAUSE_S, saving.INSIST_S = out_of_reach, 0.01, 60.0 if failures < 9 else 0.3
    try:
        train(Job(**job), world=World(rank, 2, rank, 2), batches=read_here, sink=events.append)
    except LastSaveError as error:
        return [], str(error)
    return [event.text for event in events if isinstance(event, Line) and "checkpoint" in event.text], "saved"


@pytest.mark.parametrize(("failures", "ended"), [(3, "saved"), (10**6, "no checkpoint of step 6")])
def test_ranks_try_the_last_save_again_together(config, failures, ended):
    session = open_session(config(eval_every=-1))
    job = dataclasses.asdict(session.begin_attempt(world_size=2))
    (lines, how), (silent, theirs) = run_ranks(_last_save, 2, job, failures)
    session.abort()
    assert silent == []
    assert ended in how
    assert how == theirs
    if how == "saved":
        assert ["out of reach" in line for line in lines] == [True, False] * 3 + [False]
        assert checkpoint.newest(config().run_dir / "checkpoints", echo=print).step == 6


def test_saves_that_are_waited_for_and_those_that_are_not_hold_the_same(whole, config):
    kept = {"save_every": 2, "keep_checkpoints": 9}
    runs = [run_here(config(save_mode=mode, model_tag=mode, **kept)) for mode in ("sync", "async")]
    for ran in runs:
        assert ran.losses == whole.losses
        saved = [event for event in ran.events if isinstance(event, Saved)]
        assert [event.step for event in saved] == [2, 4, 6]
        assert all(min(event.total_s, event.stall_s, event.bytes) > 0 for event in saved)
        # One that is waited for stands still a little longer: until old checkpoints are deleted.
        assert all(event.total_s >= event.stall_s for event in saved if not event.synchronous)
        assert [event.synchronous for event in saved] == [ran is runs[0], ran is runs[0], True]
    for step in (2, 4, 6):
        sync, later = (
            load_file(ran.run_dir / "checkpoints" / f"step_{step:08d}" / "model.safetensors") for ran in runs
        )
        assert all(sync[name].equal(later[name]) for name in sync)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_new_lowest_evaluation_is_saved_and_kept(config, monkeypatch, mode):
    """With saves by time, of which none is due in this short run. The values are those of steps 0, 2, .. 10."""
    values = iter([9.0, 5.0, 4.0, 6.0, 7.0, 4.5])
    monkeypatch.setattr(BitsPerByte, "total", lambda meter: next(values))
    ran = run_here(config(num_iterations=10, save_mode=mode, keep_checkpoints=1))
    assert saved_steps(ran) == [2, 4, 10]
    assert checkpoint.steps(ran.run_dir / "checkpoints") == [10, 4]
    state = checkpoint.newest(ran.run_dir / "checkpoints", echo=print).meta["state"]
    assert (state["min_val_step"], state["min_val_bpb"], state["val_bpb"]) == (4, 4.0, 4.5)


def test_a_save_before_an_evaluation_that_is_the_lowest_will_do(config, monkeypatch):
    values = iter([9.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(BitsPerByte, "total", lambda meter: next(values))
    ran = run_here(config(keep_checkpoints=1), outside(2, Signal.SAVE))
    assert saved_steps(ran) == [2, 6]
    assert checkpoint.steps(ran.run_dir / "checkpoints") == [6, 2]


def test_no_evaluation_is_saved_when_only_the_end_is_to_be(config):
    assert saved_steps(run_here(config(save_every=-1))) == [6]


def test_a_driver_whose_lease_is_gone_writes_nothing_more(config, monkeypatch):
    monkeypatch.setattr("raychat.training.fence.taken_over", lambda store, holder: True)
    with pytest.raises(LeaseError, match="taken over"):
        run_here(config(save_every=2))
    assert checkpoint.steps(config().run_dir / "checkpoints") == []


def test_limits_of_time_and_money_save_and_stop(config, monkeypatch):
    seconds = itertools.count(1)  # each look at the clock is a second later
    with monkeypatch.context() as patch:
        patch.setattr(Clock, "_attempt_s", lambda clock: next(seconds))
        ran = run_here(config(price_per_hour=3600.0, budget_usd=4.5, eval_every=-1))
    assert (ran.summary.status, ran.summary.step) == ("stopped", 2)
    assert ran.summary.cost_usd > 0
    first, last = ran.metric("cost/usd")
    assert first < 4.5 <= last
    ran = run_here(config(max_hours=1e-9, model_tag="other"))
    assert ran.summary.status == "stopped"
    assert ran.summary.cost_usd is None


def test_log_line_is_the_lineages(whole):
    steps = [event.text for event in whole.events if isinstance(event, Line) and event.text.startswith("step 00003/")]
    assert len(steps) == 1
    for part in (
        "(50.00%)",
        "| loss: ",
        "| lrm: ",
        "| dt: ",
        "ms | tok/sec: ",
        "| mfu: n/a",
        "| epoch: 1",
        "| total time: ",
    ):
        assert part in steps[0]


def test_metrics_of_a_step_have_the_contracts_names(whole):
    values = next(event.values for event in whole.events if isinstance(event, Metrics) and "train/loss" in event.values)
    assert set(values) == {
        "train/loss", "train/lrm", "train/dt", "train/tok_per_sec", "train/grad_norm", "time/total_training", "flops/total",
        "time/productive", "goodput",
    }  # fmt: skip


def test_validation_uses_the_same_rows_for_any_world(config):
    manifest = open_manifest(config())
    reader = RowReader(manifest, "val")

    def rows(world_size, batch):
        parts = [
            list(validation_rows(reader, rows=8, device_batch_size=batch, rank=r, world_size=world_size))
            for r in range(world_size)
        ]
        return np.concatenate([block for part in parts for block in part])

    assert len(rows(1, 3)) == 256 // 32
    for world_size, batch in ((2, 2), (3, 1), (5, 8)):
        assert np.array_equal(rows(world_size, batch), rows(1, 3))


def _rank(job: dict) -> tuple[list[Metrics], int]:
    """Train as one of several gloo ranks; what rank 0 told of steps, and how often this rank was asked."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    events, asked = [], itertools.count()

    def poll() -> Signal:
        next(asked)
        return Signal.NONE

    world = World(rank, world_size, rank, world_size)
    train(Job(**job), world=world, batches=read_here, sink=events.append, poll=poll)
    steps = [event for event in events if isinstance(event, Metrics) and "train/loss" in event.values]
    return steps, next(asked)


def test_time_spent_on_reading_is_part_of_the_step(config, monkeypatch):
    """Or a rank that is slow for its data would neither be named nor counted."""
    read, seen, agree = runs.read_here, [], Trainer._agree

    def slow(plan):
        for batch in read(plan):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(runs, "read_here", slow)
    monkeypatch.setattr(
        Trainer, "_agree", lambda self, nats, seconds: seen.append(seconds) or agree(self, nats, seconds)
    )
    ran = run_here(config(num_iterations=2, eval_every=-1))
    assert min(ran.metric("train/dt")) > 0.05
    assert min(seen) > 0.05 / 8  # for each of eight sequences


@pytest.mark.parametrize("world_size", [2, 3])
def test_other_numbers_of_ranks_agree_with_one(whole, config, world_size):
    """The same rows in another summation order: six float32 steps of this model differ by less than 1e-5 relative."""
    session = open_session(config())
    job = dataclasses.asdict(session.begin_attempt(world_size=world_size))
    answers = run_ranks(_rank, world_size, job)
    session.close("finished")
    steps = answers[0][0]
    assert [event.step for event in steps] == list(range(6))
    assert [event.values["train/loss"] for event in steps] == pytest.approx(whole.losses, rel=1e-5)
    assert all(event.values["train/rank_spread"] >= 1 for event in steps)
    # Before the first step, in each of six steps, and in each round of four evaluations of eight rows, two a pass.
    rounds = -(-8 // (2 * world_size))
    assert [asked for _, asked in answers] == [1 + 6 + 4 * rounds] * world_size
    resumed = run_here(config(num_iterations=8, allow_config_change=True))  # on one rank again
    assert checkpoint.verify(resumed.run_dir / "checkpoints" / "step_00000008").meta["state"]["rows_consumed"] == 64


def _save_on_two(job: dict) -> list[tuple[int, bool]]:
    """Train with periodic saves; on rank 0 the steps that were saved, and whether that was waited for."""
    rank, events = dist.get_rank(), []
    train(Job(**job), world=World(rank, 2, rank, 2), batches=read_here, sink=events.append)
    return [(event.step, event.synchronous) for event in events if isinstance(event, Saved)]


def test_ranks_save_together_while_they_train(whole, config):
    session = open_session(config(save_every=2))
    job = dataclasses.asdict(session.begin_attempt(world_size=2))
    saved = run_ranks(_save_on_two, 2, job)
    session.close("finished")
    assert saved == [[(2, False), (4, False), (6, True)], []]
    resumed = run_here(config(num_iterations=8, allow_config_change=True))
    assert resumed.summary.step == 8


def test_save_interval_balances_saving_and_redoing():
    assert save_interval_s(0.5, 3600.0) == pytest.approx(60.0)
    assert save_interval_s(1e9) == MAX_INTERVAL_S
    assert save_interval_s(2.0) == pytest.approx(math.sqrt(2) * save_interval_s(1.0))


def test_save_clock_by_steps_and_never():
    assert [SaveClock(3).due_at(step) for step in range(7)] == [False, False, False, True, False, False, True]
    assert not any(SaveClock(-1).due_at(step) or SaveClock(-1).due_by_time() for step in range(7))
    assert not SaveClock("auto").due_by_time()  # nothing has been done yet that could be lost


def test_loss_scale_halves_on_overflow_and_doubles_after_good_steps():
    scaled = LossScaler(active=True, scale=8.0)
    assert not scaled.accepts(math.inf)
    assert scaled.scale == 4.0
    assert all(scaled.accepts(1.0) for _ in range(GROWTH_STEPS))
    assert scaled.scale == 8.0
    assert scaled.can_shrink
    assert not LossScaler(active=True, scale=1.0).can_shrink
    idle = LossScaler(active=False)
    assert not idle.can_shrink
    assert idle.accepts(math.inf)
    assert idle.scale == 1.0


def test_gradients_without_a_number_at_the_smallest_scale_stop_the_run(config, monkeypatch):
    """The loss is finite all the while: no scale helps, and every update would be left out."""
    reduce = MuonAdamW.reduce_gradients
    monkeypatch.setattr(MuonAdamW, "reduce_gradients", lambda self: reduce(self) * math.nan)
    monkeypatch.setattr(scaler, "FIRST_SCALE", 4.0)
    with pytest.raises(DivergedError, match=r"step 2: the loss is [\d.]+ and the gradient norm nan"):
        run_here(config(dtype="float16", model_tag="half", on_bad_step="stop", eval_every=-1))


def test_half_precision_trains_with_a_scaled_loss(config):
    ran = run_here(config(dtype="float16", model_tag="half"))
    assert ran.losses[-1] < ran.losses[0]
    state = checkpoint.verify(ran.run_dir / "checkpoints" / "step_00000006").meta["state"]
    assert state["loss_scale"] is not None


def test_batches_of_a_resumed_cursor_are_those_of_the_stream(config):
    manifest = open_manifest(config())
    reader, rows = RowReader(manifest, "train"), [shard.rows for shard in manifest.split("train")]
    order = Order(rows, seed=1, lanes=8)
    stream = local_batches(reader, order, cursor=0, rows_per_batch=8, rank=0, world_size=1)
    third = [next(stream) for _ in range(4)][3]
    resumed = next(local_batches(reader, order, cursor=24, rows_per_batch=8, rank=0, world_size=1))
    assert np.array_equal(third.rows, resumed.rows)
    assert (third.rows_consumed, third.epoch) == (resumed.rows_consumed, resumed.epoch) == (32, 0)


def test_recipe_of_the_tiny_run_is_what_it_trains(whole, config):
    run = recipe(config())
    assert whole.summary.tokens == run.tokens
    assert whole.summary.flops == run.flops
    assert whole.summary.rows_consumed * 32 == run.tokens
