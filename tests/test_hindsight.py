"""Hindsight: what was forecast of a run stands beside what it came to, and only what can be compared is."""

import pytest

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import hindsight
from raychat.planning.limits import iterations_within, refuse_beyond_limits

PLAN = {
    "horizon": {"num_iterations": 100, "tokens": 100_000},
    "memory": {"total": 2_000_000_000},
    "time": {
        "total": [90.0, 120.0, 150.0],
        "steps": [80.0, 100.0, 120.0],
        "evaluation": [8.0, 10.0, 12.0],
        "checkpoints": [0.0, 0.0, 1.0],
        "startup": [5.0, 10.0, 15.0],
        "tok_per_sec": [800.0, 1000.0, 1250.0],
        "mfu": None,
    },
    "money": {"on_demand": [3.0, 4.0, 5.0]},
    "measured": None,
}
SUMMARY = {
    "status": "finished",
    "step": 100,
    "wall_time_s": 132.0,
    "productive_s": 112.0,
    "startup_s": 8.0,
    "evaluation_s": 9.0,
    "checkpoint_stall_s": 0.5,
    "peak_memory_bytes": 2_100_000_000,
    "tokens": 100_000,
    "tok_per_sec": 980.0,
    "mfu": None,
    "cost_usd": None,
}


def off(record):
    return {name: value["off_percent"] for name, value in record.items() if isinstance(value, dict)}


def test_a_whole_run_is_held_against_all_that_was_forecast_of_it():
    found = off(hindsight.record(PLAN, SUMMARY))
    assert found == {
        "time_s": pytest.approx(10.0),
        "steps_s": pytest.approx(12.0),
        "evaluation_s": pytest.approx(-10.0),
        "checkpoints_s": None,  # nothing was expected: there is no percentage of it
        "startup_s": pytest.approx(-20.0),
        "memory_bytes": pytest.approx(5.0),
        "tokens": 0.0,
        "tok_per_sec": pytest.approx(-2.0),
        "cost_usd": None,  # the run had no price
    }


def test_what_first_steps_took_longer_is_start_up_on_both_sides():
    found = hindsight.record(PLAN, SUMMARY, warm_up_s=12.0)
    assert (found["steps_s"]["actual"], found["startup_s"]["actual"]) == (100.0, 20.0)
    assert found["time_s"] == hindsight.record(PLAN, SUMMARY)["time_s"]


def test_warm_up_is_what_the_first_step_of_each_attempt_took_beyond_a_typical_one():
    events = [
        {"event": "start", "productive_s": 0.0},
        {"event": "first_step", "step_time_s": 5.0},
        {"event": "compiled", "step_s": 9.0},
        {"event": "start", "productive_s": 40.0},
        {"event": "first_step", "step_time_s": 43.0},
        {"event": "start", "productive_s": 50.0},
        {"event": "first_step", "step_time_s": 50.5},  # a quick one takes nothing away
    ]
    assert hindsight.warm_up_s(events, 1.0) == 4.0 + 8.0 + 2.0
    assert hindsight.warm_up_s(events, None) == 0.0


def test_of_half_a_run_the_steps_that_were_done_are_compared_and_no_totals():
    half = hindsight.record(PLAN, SUMMARY | {"status": "stopped", "step": 50, "productive_s": 55.0})
    assert half["steps_s"]["mid"] == 50.0
    compared = {name for name, value in off(half).items() if value is not None}
    assert compared == {"steps_s", "startup_s", "memory_bytes", "tok_per_sec"}
    assert half["time_s"]["actual"] == 132.0
    assert "after 50 steps of the 100" in hindsight.table(half)[-1]


def test_a_run_that_did_nothing_is_compared_with_nothing():
    nothing = hindsight.record(PLAN, {"status": "failed", "step": None, "wall_time_s": 3.0})
    assert set(off(nothing).values()) == {None}
    assert hindsight.table(nothing) == []


def test_unknown_quantities_stay_unknown():
    found = hindsight.record(PLAN | {"time": None, "money": None}, SUMMARY)
    assert found["time_s"] == {"low": None, "mid": None, "high": None, "actual": 132.0, "off_percent": None}
    assert "mfu" not in found
    assert all(value is not None for value in hindsight.metrics(found).values())


def test_metrics_hold_forecast_and_error_of_each_quantity():
    found = hindsight.metrics(hindsight.record(PLAN, SUMMARY))
    assert (found["forecast/time_s"], found["forecast/time_s_off_percent"]) == (120.0, pytest.approx(10.0))
    assert "forecast/cost_usd_off_percent" not in found


def test_the_table_has_a_line_for_each_quantity_with_range_actual_and_error():
    lines = hindsight.table(hindsight.record(PLAN, SUMMARY))
    assert lines[0].split() == ["forecast", "(calculated)", "actual", "off", "by"]
    assert lines[1].split() == ["time", "2", "(1.5", "to", "2.5)", "min", "2.2", "min", "+10%"]
    assert [line for line in lines if line.split()[0] == "dollars"][0].split() == [
        "dollars",
        "4",
        "(3",
        "to",
        "5)",
        "-",
    ]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(("limit", "said"), [("max_hours", "hours and --max-hours is 0.02"), ("budget_usd", "dollars")])
def test_a_run_that_will_not_fit_is_refused_with_the_iterations_that_would(limit, said):
    config = Config.from_flat({"price_per_hour": 1.0, limit: {"max_hours": 0.02, "budget_usd": 2.4}[limit]})
    with pytest.raises(ConfigError, match=said) as refusal:
        refuse_beyond_limits(PLAN, config)
    assert refusal.value.exit_code == 2
    assert "of its 100 iterations 56 would fit (--num-iterations 56)" in str(refusal.value).replace("Of its", "of its")


def test_a_run_within_its_limits_or_of_unknown_time_passes():
    config = Config.from_flat({"price_per_hour": 1.0, "max_hours": 1.0, "budget_usd": 4.0})
    refuse_beyond_limits(PLAN, config)
    refuse_beyond_limits(PLAN | {"time": None, "money": None}, Config.from_flat({"max_hours": 0.001}))


def test_what_fits_takes_no_longer_than_there_is():
    for share in (0.05, 0.1, 0.5, 0.99):
        fitting = iterations_within(1000.0, 100.0, 12_345, share)
        assert 100.0 + 900.0 * fitting / 12_345 <= max(100.0, share * 1000.0)
    assert iterations_within(1000.0, 100.0, 12_345, 0.1) == 0
