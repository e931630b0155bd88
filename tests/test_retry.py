"""When a run is tried again: while it makes progress, whatever the driver went through meanwhile."""

from typing import get_args

import pytest

from raychat.training.retry import Cause, give_up


def failed(step, cause="crash", error="boom"):
    return {"event": "failure", "cause": cause, "step": step, "error": error}


def saved(step):
    return {"event": "checkpoint", "step": step}


START, FAILED_END = {"event": "start", "driver": "d", "resume_step": 0}, {"event": "end", "status": "failed"}


def verdict(*events, max_failures=3, max_preemptions=-1):
    return give_up(events, max_failures=max_failures, max_preemptions=max_preemptions) or ""


def test_run_that_never_failed_goes_on():
    assert verdict() == ""
    assert verdict(START, saved(10)) == ""


@pytest.mark.parametrize("cause", ["crash", "hang"])
def test_third_failure_at_one_step_is_the_last_even_with_checkpoints_in_between(cause):
    events = [START, failed(57, cause), saved(50), START, failed(57, cause), saved(55), START]
    assert verdict(*events) == ""
    said = verdict(*events, failed(57, cause))
    assert "3 times at the same step, 57" in said


def test_failures_at_other_steps_are_retried_for_ever_while_checkpoints_are_new():
    events = [event for step in range(0, 500, 10) for event in (START, saved(step), failed(step + 3))]
    assert verdict(*events) == ""


def test_failures_without_a_new_checkpoint_in_between_end_the_run():
    events = [START, saved(10), failed(11), START, failed(12), START]
    assert verdict(*events) == ""
    assert "3 times without a new checkpoint" in verdict(*events, failed(13))


def test_checkpoint_of_a_step_that_was_saved_before_is_no_progress():
    events = [START, saved(10), failed(11), saved(10), failed(12), saved(10), failed(13)]
    assert "without a new checkpoint" in verdict(*events)


def test_after_going_back_on_purpose_earlier_steps_are_progress_again():
    events = [
        saved(100),
        {"event": "branch", "from_step": 20},
        failed(25),
        saved(30),
        failed(35),
        saved(40),
        failed(45),
    ]
    assert verdict(*events) == ""


@pytest.mark.parametrize("cause", ["preempted", "lost"])
def test_machines_that_are_taken_away_have_a_budget_of_their_own(cause):
    taken = [failed(5, cause)] * 50
    assert verdict(*taken) == ""
    assert verdict(*taken[:2], max_preemptions=2) == ""
    assert "taken away 3 times, and --max-preemptions is 2" in verdict(*taken[:3], max_preemptions=2)
    assert "taken away once" in verdict(taken[0], max_preemptions=0)
    assert verdict(*taken, failed(5), failed(5)) == ""  # and do not count as crashes


def test_resize_counts_as_nothing():
    assert verdict(*[failed(5, "resize")] * 50, max_preemptions=0) == ""


def test_crash_in_between_preemptions_counts_on():
    events = [failed(5), failed(5, "lost"), failed(5), failed(5, "preempted"), failed(5)]
    assert "3 times at the same step" in verdict(*events)


def test_new_driver_after_the_run_was_given_up_has_all_its_tries_again():
    events = [*[failed(5)] * 3, FAILED_END, START, failed(5), failed(5)]
    assert verdict(*events) == ""
    assert verdict(*events, failed(5)) != ""


def test_driver_that_died_without_a_word_does_not_start_the_count_anew():
    events = [START, failed(5), {**START, "driver": "e"}, failed(5), {**START, "driver": "f"}]
    assert verdict(*events) == ""
    assert verdict(*events, failed(5)) != ""


@pytest.mark.parametrize("most", [0, 1])
def test_without_retries_the_first_failure_is_the_last(most):
    assert "training failed once" in verdict(failed(5), max_failures=most)


def test_every_cause_has_a_verdict():
    assert [verdict(failed(1, cause), max_failures=1, max_preemptions=0) == "" for cause in get_args(Cause)] == [
        False, False, False, False, True,
    ]  # fmt: skip
