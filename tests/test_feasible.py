"""What is known of a trial before it is started."""

from dataclasses import replace

import pytest

from raychat.planning.target import resolve_target
from raychat.search.drafts import draft
from raychat.search.feasible import foreseen, infeasible
from raychat.search.limits import spent_usd
from raychat.search.roll import Roll
from raychat.search.spec_file import read_spec
from raychat.search.strategy import make_strategy
from raychat.search.trial import Outcome

BASE = {"preset": "d4-cpu", "num_iterations": 100, "warmup_ratio": 0.1, "gpu": "cpu"}
A100 = {"preset": "a100_d10"}


def spec(**fields):
    space = {"depth": [2, 4], "device_batch_size": [4, 8]}
    return read_spec({"name": "s", "base": BASE, "space": space, "dry_run_steps": 5} | fields)


def trial_of(found, settings=None, **fields):
    return Roll(found.name, {}).add([draft(found.arm(settings or {}), 42, **fields)])[0]


def found_of(found, settings=None, runs=(), **fields):
    return foreseen(found, trial_of(found, settings, **fields), runs)


def test_what_can_be_is_run():
    assert found_of(spec(), {"depth": 2}) is None
    assert found_of(spec(), {"depth": 2}, role="rehearsal") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_batch_size": 3}, "5.33 passes"),
        ({"total_batch_size": 1000}, "no whole number of sequences"),
        ({"num_kv_heads": 3}, "does not divide"),
        ({"depth": 0}, "above 0"),
        ({"num_workers": 99}, "more than the 16 sequences"),
        ({"num_iterations": -1, "target_flops": 1.0}, "less than one step"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_cannot_be_together_are_infeasible_and_cost_nothing(settings, message):
    found = spec(space={name: [value] for name, value in settings.items()})
    outcome = found_of(found, settings)
    assert outcome.status == "infeasible"
    assert message in outcome.reason
    assert (outcome.cost_usd, outcome.wall_s) == (None, None)


def test_what_does_not_fit_the_memory_is_infeasible_by_the_plan():
    """Document 004: a batch of 32 takes 21 GB of an A100 with 40 GB, 64 runs out of memory, and 48 is no divisor."""
    found = spec(base=A100, space={"device_batch_size": [16, 32, 48, 64]})
    assert found_of(found, {"device_batch_size": 16}) is None
    assert found_of(found) is None
    assert "passes" in found_of(found, {"device_batch_size": 48}).reason
    outcome = found_of(found, {"device_batch_size": 64})
    assert outcome.status == "infeasible"
    assert "40.8 GiB by the plan" in outcome.reason


def test_the_target_that_is_given_counts():
    found = spec(base=A100)
    small = replace(resolve_target(found.base_config), memory_bytes=8 * 2**30)
    assert foreseen(found, trial_of(found), (), small).status == "infeasible"
    assert infeasible(found.base_config, small).startswith("it needs 21.4 GiB")
    assert infeasible(found.base_config, replace(small, memory_bytes=None)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_trial_hours": 0.5}, "over the limit of 0.5 h"),
        ({"budget_usd": 3.0}, "over the limit of $3.00"),
        ({"objective": {"best_under": {"budget_usd": 2.0}}}, "over the limit of $2.00"),
        ({"objective": {"best_under": {"max_hours": 0.6}}}, "over the limit of 0.6 h"),
    ],
)
def test_what_surely_breaks_a_limit_is_infeasible(fields, message):
    """The A100's 1,500 iterations take 49 to 68 minutes and $3.52 to $4.84 by the plan."""
    base = A100 | {"price_per_hour": 4.3, "num_data_shards": 18}
    outcome = found_of(spec(base=base, **fields))
    assert outcome.status == "infeasible"
    assert message in outcome.reason
    wide = {"max_trial_hours": 1.0, "budget_usd": 4.0}
    assert found_of(spec(base=base, **wide)) is None
    assert found_of(spec(base=base, **fields), role="rehearsal") is None


@pytest.mark.parametrize("status", ["OOM", "failed", "infeasible", "too slow"])
def test_what_befell_the_rehearsal_befalls_all_runs_of_its_shape(status):
    found = spec()
    settings = {"depth": 2, "device_batch_size": 4}
    runs = [(trial_of(found, settings, role="rehearsal"), Outcome(status=status, reason="2 GB"))]
    outcome = foreseen(found, replace(trial_of(found, settings), seed=7), runs)
    assert (outcome.status, outcome.reason, outcome.cost_usd) == (status, "in its rehearsal: 2 GB", None)
    assert found_of(found, {"depth": 2}, runs) is None
    assert found_of(found, settings, runs, rung=0.25).status == status


def test_a_shape_that_measures_as_too_slow_is_not_run():
    found = spec(max_trial_hours=0.1)
    runs = [(trial_of(found, {"depth": 2}, role="rehearsal"), Outcome(status="finished", step_s=4.0))]
    outcome = found_of(found, {"depth": 2}, runs)
    assert outcome.status == "too slow"
    assert "0.11 h at 4 s each" in outcome.reason
    assert found_of(found, {"depth": 2}, runs, rung=0.5) is None
    assert found_of(spec(), {"depth": 2}, runs) is None


def test_a_preempted_rehearsal_speaks_against_nothing():
    found = spec()
    runs = [(trial_of(found, role="rehearsal"), Outcome(status="preempted"))]
    assert found_of(found, None, runs) is None


def test_a_search_with_infeasible_configurations_spends_nothing_on_them():
    found = spec(space={"device_batch_size": [3, 4, 8], "depth": [2, 4]}, dry_run_steps=-1, scheduler="none")
    strategy, done, runs, made = make_strategy(found), {}, [], []
    while not strategy.finished(done):
        for trial in strategy.propose(done, ()):
            outcome = foreseen(found, trial, runs)
            if outcome is None:
                made.append(trial)
                outcome = Outcome(status="finished", val_bpb=1.0, cost_usd=1.0)
            done[trial.tag] = outcome
            runs.append((trial, outcome))
    refused = [trial for trial, outcome in runs if outcome.status == "infeasible"]
    assert {trial.settings["device_batch_size"] for trial in refused} == {3}
    assert all(trial.settings.get("device_batch_size") != 3 for trial in made)
    assert spent_usd(done) == len(made)
