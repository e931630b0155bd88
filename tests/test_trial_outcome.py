"""What a trial came to, from how its process ended and what its run left."""

import json

import pytest

from raychat.on_ray.trial_outcome import outcome_of
from raychat.on_ray.trial_process import TrialEnd
from raychat.planning import model_shape, param_counts
from raychat.search.trial import Trial
from raychat.tracking.journal import Journal
from raychat.tracking.summary import Summary

DIVERGED = "step 3: the loss is nan. The weights were not updated; the last checkpoint is good."


def trial_of(**changes) -> Trial:
    values = {"number": 0, "tag": "s-000", "title": "baseline", "settings": {}, "arm": "base", "seed": 42}
    return Trial(**(values | changes))


@pytest.fixture
def config(tiny_config):
    return tiny_config(model_tag="s-000")


def leave(config, status="finished", steps=4, **values) -> None:
    """What a run leaves."""
    journal = Journal(config.run_dir / "metrics.jsonl")
    journal.event("start", attempt=1)
    for step in range(steps):
        journal.log(step, {"train/loss": 2.0, "train/dt": 0.5})
    journal.event("end", status=status)
    journal.close()
    told = {"step": steps, "num_iterations": 4, "wall_time_s": 9.0, "val_bpb": 1.5, "peak_memory_bytes": 10**9}
    Summary(status=status, **(told | values)).write(config.run_dir / "summary.json")


def test_a_finished_run_gives_its_figures(config):
    leave(config, cost_usd=0.5, mfu=12.0, tokens=1024, preemptions=1, replayed_s=3.0)
    found = outcome_of(trial_of(), config, TrialEnd(exit_code=0))
    assert (found.status, found.reason, found.val_bpb) == ("finished", "", 1.5)
    assert (found.wall_s, found.cost_usd, found.mfu, found.step_s) == (9.0, 0.5, 12.0, 0.5)
    assert (found.tokens, found.preemptions, found.replayed_s) == (1024, 1, 3.0)
    assert found.parameters == param_counts(model_shape(config.model)).scaling


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("Out of memory: a pass of --device-batch-size 64 does not fit.", "OOM"),
        ("rank 0: CUDA out of memory", "OOM"),
        (DIVERGED, "diverged"),
        ("machines were taken away 3 times, and --max-preemptions is 2.", "preempted"),
        ("The machines for 8 workers did not come within --max-wait 2 hours.", "preempted"),
        ("training failed 3 times at the same step", "failed"),
    ],
)
def test_errors_have_their_status(config, error, status):
    leave(config, "failed", error=error, val_bpb=None)
    found = outcome_of(trial_of(), config, TrialEnd(exit_code=1))
    assert (found.status, found.reason) == (status, error)


def test_input_that_is_refused_before_anything_began_is_infeasible(config):
    found = outcome_of(trial_of(), config, TrialEnd(exit_code=2, error="--depth 99 is too deep"))
    assert (found.status, found.reason, found.wall_s) == ("infeasible", "--depth 99 is too deep", None)


def test_a_process_that_died_without_a_word_has_failed_with_its_last_line(config):
    found = outcome_of(trial_of(), config, TrialEnd(exit_code=-9, text="step 1\nstep 2\n"))
    assert (found.status, found.reason) == ("failed", "killed by signal 9: step 2")


def test_a_summary_of_an_earlier_end_says_nothing_about_this_one(config):
    leave(config)
    journal = Journal(config.run_dir / "metrics.jsonl")
    journal.event("start", attempt=2)
    journal.close()
    assert outcome_of(trial_of(), config, TrialEnd(exit_code=-9)).status == "failed"


def test_memory_beyond_the_limit_is_oom_whether_it_was_seen_in_time_or_at_the_end(config):
    leave(config, "stopped")
    seen = outcome_of(
        trial_of(), config, TrialEnd(exit_code=0, over_memory_bytes=2 * 10**9), memory_limit_bytes=15 * 10**8
    )
    assert (seen.status, seen.reason) == (
        "OOM",
        "a worker used more than the 1.5 GB of memory_limit_gb",
    )
    leave(config, "finished", peak_memory_bytes=2 * 10**9)
    assert outcome_of(trial_of(), config, TrialEnd(exit_code=0), memory_limit_bytes=15 * 10**8) == seen
    leave(config, "finished")
    assert outcome_of(trial_of(), config, TrialEnd(exit_code=0), memory_limit_bytes=15 * 10**8).status == "finished"


def test_a_loss_that_is_no_number_at_the_end_is_divergence(config):
    leave(config, val_bpb=None)
    assert outcome_of(trial_of(), config, TrialEnd(exit_code=0)).status == "diverged"


def test_a_trunk_that_stops_at_its_step_has_finished(tiny_config):
    config = tiny_config(model_tag="s-000", stop_at=2)
    leave(config, "stopped", steps=2, val_bpb=None)
    assert outcome_of(trial_of(role="trunk", fork_step=2), config, TrialEnd(exit_code=0)).status == "finished"
    leave(config, "stopped", steps=1, val_bpb=None)
    assert outcome_of(trial_of(role="trunk", fork_step=2), config, TrialEnd(exit_code=0)).status == "stopped early"


def test_a_run_that_reached_its_own_limit_is_over_budget(tiny_config):
    config = tiny_config(model_tag="s-000", max_hours=1.0)
    leave(config, "stopped", steps=3, wall_time_s=3601.0)
    found = outcome_of(trial_of(), config, TrialEnd(exit_code=0))
    assert (found.status, found.reason) == ("over budget", "it took its 1 h and is at step 3 of 4")


def test_a_rehearsal_gives_what_it_measured(tiny_config, tmp_path):
    config, plan = tiny_config(model_tag="s-000", dry_run_steps=2), tmp_path / "plan.json"
    plan.write_text(json.dumps({"measured": {"step_s": 0.25, "peak_memory_bytes": 5}}))
    text, trial = f"measured\nwritten to {plan}\n", trial_of(role="rehearsal")
    found = outcome_of(trial, config, TrialEnd(exit_code=0, text=text))
    assert (found.status, found.step_s, found.peak_memory_bytes, found.tok_per_sec) == ("finished", 0.25, 5, 1024.0)
    slow = outcome_of(trial, config, TrialEnd(exit_code=2, text=text, error="it takes 9 hours"))
    assert (slow.status, slow.reason) == ("too slow", "it takes 9 hours")
    refused = outcome_of(trial, config, TrialEnd(exit_code=2, error="--depth is wrong"))
    assert refused.status == "infeasible"
    memory = outcome_of(trial, config, TrialEnd(exit_code=2, error="Out of memory: a pass does not fit"))
    assert memory.status == "OOM"
