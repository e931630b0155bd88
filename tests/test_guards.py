"""What watches over training: spikes of the loss, slow ranks, memory that is not there, and the cost of it all."""

import math
import time

import pytest
import torch
from runs import after, run_here

from raychat.config import Config
from raychat.evaluation.bpb import BitsPerByte
from raychat.model import GPT
from raychat.optim import MuonAdamW
from raychat.training.bad_steps import MAX_ROLLBACKS, MAX_SKIPS_RUNNING, BadStep, BadSteps, DivergedError
from raychat.training.memory import Memory, OutOfMemoryError, fitting_batch, is_out_of_memory, out_of_memory
from raychat.training.spikes import WINDOW_STEPS, LossSpikes
from raychat.training.state import Clock, LoopState, Signal
from raychat.training.stragglers import STEPS_BETWEEN, STEPS_RUNNING, Stragglers

BAD = BadStep(step=7, cursor=56, loss=math.nan, grad_norm=math.inf)


def test_a_loss_far_above_those_before_is_a_spike_and_one_within_them_is_not():
    spikes = LossSpikes()
    losses = [3.0 + 0.1 * (-1) ** step for step in range(WINDOW_STEPS)]  # mean 3.0, standard deviation 0.1
    assert all(spikes.observe(loss) is None for loss in losses)
    assert spikes.observe(3.59) is None
    assert spikes.observe(4.0) == pytest.approx(3.0, abs=0.01)


def test_no_spike_is_named_before_a_hundred_steps_are_known():
    spikes = LossSpikes()
    assert all(spikes.observe(1.0) is None for _ in range(WINDOW_STEPS - 1))
    assert spikes.observe(100.0) is None


def test_a_spike_does_not_hide_in_the_losses_of_long_ago():
    spikes = LossSpikes()
    for step in range(3 * WINDOW_STEPS):
        spikes.observe(1000.0 if step < WINDOW_STEPS else 1.0)
    assert spikes.observe(2.0) == 1.0


def test_a_rank_that_stays_slow_is_named_with_its_host_and_not_again_soon():
    watch = Stragglers(["a", "b", "c", "d"])
    named = {
        step: slow
        for step in range(STEPS_RUNNING + 2 * STEPS_BETWEEN)
        for slow in watch.observe(step, [1.0, 1.1, 1.6, 0.9])
    }
    assert list(named) == [STEPS_RUNNING - 1 + turn * STEPS_BETWEEN for turn in range(3)]
    assert {(slow.rank, slow.host, slow.seconds, slow.median_s) for slow in named.values()} == {(2, "c", 1.6, 1.0)}
    assert watch.spread == pytest.approx(1.6)


def test_a_rank_that_is_slow_now_and_then_is_not_named():
    watch = Stragglers(["a", "b"])
    for step in range(10 * STEPS_RUNNING):
        slow = 1.0 if step % STEPS_RUNNING == 0 else 5.0
        assert watch.observe(step, [1.0, slow]) == []


def test_the_slower_of_two_ranks_is_found():
    watch = Stragglers(["a", "b"])
    named = [slow for step in range(STEPS_RUNNING) for slow in watch.observe(step, [2.0, 1.0])]
    assert [slow.rank for slow in named] == [0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_is_not_there_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_torch_says_that_memory_is_not_there_in_words_that_are_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_the_batch_that_would_fit_comes_from_the_measured_peak_else_it_is_the_half():
    known = Memory(total=1000, peak=900, base=300, per_sequence=50.0)
    assert fitting_batch(32, known, rows=64) == 8  # 12 have room, and 8 is the largest that divides 64
    assert fitting_batch(32, Memory(total=1000, peak=900), rows=64) == 16
    assert fitting_batch(6, Memory(total=1000, peak=900), rows=64) == 2
    assert fitting_batch(1, known, rows=64) is None


def test_out_of_memory_says_what_was_tried_what_there_is_and_what_would_fit():
    memory = Memory(total=8 * 2**30, peak=7 * 2**30)
    message = str(out_of_memory(16, 512, memory, 64))
    for part in ("--device-batch-size 16", "--max-seq-len 512", "7.0 GiB", "8.0 GiB", "Use --device-batch-size 8"):
        assert part in message
    assert "--max-seq-len" in str(out_of_memory(1, 512, memory, 64)).split("left")[1]


def test_a_pass_that_does_not_fit_ends_the_run_with_a_batch_that_would(
    tiny_flags, prepared_base, tmp_path, monkeypatch
):
    def full(self, idx, targets=None, reduction="mean"):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "forward", full)
    own = {"base_dir": str(prepared_base), "storage_path": str(tmp_path), "eval_every": -1}
    with pytest.raises(OutOfMemoryError, match=r"--device-batch-size 2 x.*Use --device-batch-size 1") as raised:
        run_here(Config.from_flat(tiny_flags | own))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("owner", "name", "phase"),
    [
        (MuonAdamW, "reduce_gradients", "the update"),
        (MuonAdamW, "apply_updates", "the update"),
        (BitsPerByte, "add", "the evaluation"),
        (MuonAdamW, "load_owned_state", "loading the checkpoint"),
    ],
)
def test_memory_that_is_missing_elsewhere_ends_the_run_with_what_it_was_for(
    tiny_flags, prepared_base, tmp_path, monkeypatch, owner, name, phase
):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = Config.from_flat(
        tiny_flags | {"base_dir": str(prepared_base), "storage_path": str(tmp_path), "num_iterations": 2}
    )
    if name == "load_owned_state":
        run_here(config, after(1, Signal.STOP))
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OutOfMemoryError, match=rf"Out of memory in {phase}\. The peak was .* GiB.*more workers"):
        run_here(config)


def test_a_step_is_bad_without_a_number_and_an_overflow_of_scaled_gradients_is_not():
    assert not BadSteps.found(3.0, 1.0, scaled=False)
    assert BadSteps.found(math.nan, 1.0, scaled=False)
    assert BadSteps.found(3.0, math.inf, scaled=False)
    assert not BadSteps.found(3.0, math.inf, scaled=True)
    assert BadSteps.found(math.inf, 1.0, scaled=True)


def test_a_run_goes_back_three_times_and_then_says_what_was_tried():
    steps = BadSteps("rollback")
    assert steps.decide(BAD, ()) == "rollback"
    assert steps.decide(BAD, tuple(range(MAX_ROLLBACKS - 1))) == "rollback"
    with pytest.raises(DivergedError, match=r"step 7: the loss is nan.*3 times before.*rows 8, 1,600, 24"):
        steps.decide(BAD, (8, 1600, 24))


def test_updates_are_left_out_until_too_many_are_bad_running():
    steps = BadSteps("skip")
    for _ in range(3):
        assert all(steps.decide(BAD, ()) == "skip" for _ in range(MAX_SKIPS_RUNNING - 1))
        steps.good()
    for _ in range(MAX_SKIPS_RUNNING - 1):
        steps.decide(BAD, ())
    with pytest.raises(DivergedError, match="did not help"):
        steps.decide(BAD, ())


def test_stop_stops_at_once():
    with pytest.raises(DivergedError, match="weights were not updated"):
        BadSteps("stop").decide(BAD, ())


def test_cost_is_that_of_earlier_attempts_and_of_every_machine_of_this_one():
    clock = Clock(attempt_started=time.time() - 1800, before_s=600, price_per_hour=2.0, nodes=3, before_usd=5.0)
    assert clock.cost_usd() == pytest.approx(5.0 + 2.0 * 3 * 0.5, abs=0.01)
    assert clock.wall_s() == pytest.approx(2400, abs=2)
    assert Clock(attempt_started=0.0, before_s=0.0, price_per_hour=None).cost_usd() is None


def test_a_state_without_batches_left_out_is_read_from_older_checkpoints():
    assert LoopState.restore({"step": 3}) == LoopState(step=3)
    assert LoopState.restore({"step": 3, "skipped": [8, 16]}).skipped == (8, 16)
