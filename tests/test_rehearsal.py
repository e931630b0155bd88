"""`--dry-run-steps`: really trains a few steps, plans with what they took, and leaves the run alone."""

import contextlib
import json
import os
from pathlib import Path

import pytest
from runs import after, run_here

from raychat import cli
from raychat.data.prepare import make_in_process, prepare
from raychat.errors import ConfigError
from raychat.planning import make_plan
from raychat.planning.duration import Measured
from raychat.planning.plan import MADE
from raychat.tracking.journal import read_journal
from raychat.tracking.summary import Summary
from raychat.training import __main__ as module
from raychat.training.rehearsal import (
    LEAST_SPREAD,
    Rehearsal,
    RehearsalStoppedError,
    describe,
    measure,
    short_config,
    steps_only,
)
from raychat.training.state import Signal


@pytest.fixture
def flags(tiny_flags, prepared_base, tmp_path):
    """Flags of a run whose data are there, in a base directory of its own that sees them."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("tokenizers", "tokens"):
        (base / name).symlink_to(prepared_base / name)
    return {**tiny_flags, "base_dir": str(base), "num_iterations": 40, "eval_every": 10, "run": "told"}


@pytest.fixture
def call(flags):
    """Calls the job with the flags and more."""

    def typed(*more, **changes):
        return module.main(
            [*(f"--{name.replace('_', '-')}={value}" for name, value in (flags | changes).items()), *more]
        )

    return typed


def kept(tmp_path):
    [file] = (tmp_path / "base" / "rehearsals").iterdir()
    return file, json.loads(file.read_text())


def test_a_short_run_measures_and_leaves_nothing_but_what_it_measured(call, tmp_path, capsys):
    assert call("--dry-run-steps", "8") == 0
    assert {path.name for path in (tmp_path / "base").iterdir()} == {"tokenizers", "tokens", "rehearsals"}
    _, plan = kept(tmp_path)
    assert plan["horizon"]["num_iterations"] == 40
    assert {name for name, value in plan["measured"].items() if value is None} == set()
    step_s = plan["measured"]["step_s"]
    assert plan["time"]["steps"][1] == pytest.approx(40 * step_s)
    assert plan["memory"]["total"] == plan["measured"]["peak_memory_bytes"]
    out = capsys.readouterr().out
    assert "finished: step 8 of 8" in out
    assert "the run in" in out
    assert ".json" in out.splitlines()[-1]
    assert "summary.json" not in out  # it is gone


def test_the_run_that_follows_is_forecast_from_what_was_measured_and_held_against_it(call, tmp_path):
    call("--dry-run-steps", "8")
    assert call(run="dummy") == 0
    run_dir = tmp_path / "base" / "runs" / "d2"
    plan, measured = json.loads((run_dir / "plan.json").read_text()), kept(tmp_path)[1]["measured"]
    assert plan["measured"] == measured
    assert plan["made_for"]["workers"] == 1
    found = Summary.read(run_dir / "summary.json").forecast
    assert found["measured"]
    assert found["steps_s"]["mid"] == pytest.approx(40 * measured["step_s"])
    assert found["tokens"]["off_percent"] == 0.0
    [last] = [record for record in read_journal(run_dir / "metrics.jsonl") if "forecast/time_s" in record]
    assert last["forecast/time_s_off_percent"] == found["time_s"]["off_percent"]


def test_a_resumed_run_keeps_its_first_forecast(own_config):
    config = own_config(save_every=2)
    run_here(config, after(2, Signal.STOP))
    first = (config.run_dir / "plan.json").read_bytes()
    ran = run_here(own_config(save_every=2, device_batch_size=4))
    assert (config.run_dir / "plan.json").read_bytes() == first
    assert ran.summary.forecast["step"] == 4


def test_a_forecast_of_another_model_is_made_again(own_config):
    config = own_config()  # the run of this name that was begun before had another depth, and no save
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "plan.json").write_text(json.dumps(make_plan(own_config(depth=3)) | {MADE: {}}))
    run_here(config)
    assert json.loads((config.run_dir / "plan.json").read_text())["model"]["depth"] == config.model.depth


def test_a_dry_run_beside_a_run_does_not_touch_it(call, tmp_path):
    call(run="dummy", num_iterations=4)
    run_dir = tmp_path / "base" / "runs" / "d2"
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    call("--dry-run-steps", "2")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_run_that_will_not_fit_is_refused_with_what_would(call, tmp_path):
    with pytest.raises(ConfigError, match=r"will not fit: it takes .* hours and --max-hours is 1e-06") as refusal:
        call("--dry-run-steps", "2", max_hours=1e-6)
    assert refusal.value.exit_code == 2
    assert kept(tmp_path)  # the plan is there to be read


def test_a_short_run_that_is_stopped_leaves_nothing_and_plans_nothing(call, tmp_path, monkeypatch):
    read, poll = module.read_here, after(2, Signal.STOP)

    def told(plan):
        for batch in read(plan):
            poll.step_begins()
            yield batch

    monkeypatch.setattr(module, "read_here", told)
    monkeypatch.setattr(module, "_stop_on_signals", lambda: contextlib.nullcontext(poll))
    with pytest.raises(RehearsalStoppedError) as stopped:
        call("--dry-run-steps", "8")
    assert stopped.value.exit_code == 1
    assert {path.name for path in (tmp_path / "base").iterdir()} == {"tokenizers", "tokens"}


def test_a_short_run_that_dies_leaves_nothing(call, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("--dry-run-steps", "8")
    assert {path.name for path in (tmp_path / "base").iterdir()} == {"tokenizers", "tokens"}


def test_what_a_killed_one_left_goes_after_a_day(own_config, tmp_path):
    config = own_config(base_dir=str(tmp_path))
    old, new = (tmp_path / "rehearsals" / f".{name}-1" for name in ("old", "new"))
    for folder in (old, new):
        (folder / "d2").mkdir(parents=True)
    os.utime(old, (0, 0))
    with Rehearsal(config, on_ray=False, echo=str):
        assert [old.exists(), new.exists()] == [False, True]


def test_the_short_run_is_like_the_run_in_all_that_costs_time(own_config):
    config = own_config(
        dry_run_steps=20, num_iterations=1000, eval_tokens=10**6, run="told", max_hours=1.0, eval_workers=1, fresh=True
    )
    data = prepare(config, with_gpus=False, maker=make_in_process, echo=str)
    short = short_config(config, data, Path("/place"))
    assert (short.model, short.precision, short.batch, short.optim) == (
        config.model, config.precision, config.batch, config.optim,
    )  # fmt: skip
    assert (short.run.run, short.run.storage_path, short.run.dry_run_steps) == ("dummy", "/place", -1)
    assert (short.horizon.num_iterations, short.save.save_every, short.eval.eval_every) == (20, 15, 20)
    assert short.eval.eval_tokens == 8 * config.batch.total_batch_size
    assert short.data.packing == data.manifest.spec.packing


@pytest.mark.parametrize(("asked", "steps"), [(20, 4), (3, 3)])
def test_it_is_no_longer_than_the_run(own_config, asked, steps):
    assert steps_only(own_config(dry_run_steps=asked)).horizon.num_iterations == steps


@pytest.mark.parametrize(
    ("typed", "steps"),
    [
        (["--dry-run-steps"], 20),
        (["--dry-run-steps", "--depth", "4"], 20),
        (["--dry-run-steps", "7", "--depth", "4"], 7),
        (["--dry_run_steps=5"], 5),
        (["--dry-run-steps", "-1"], -1),
        (["--depth", "4"], -1),
    ],
)
def test_the_flag_alone_means_twenty_steps(typed, steps):
    assert cli.parse(typed, prog="test", description="").run.dry_run_steps == steps


def records(*times):
    return [{"step": step, "train/dt": dt} for step, dt in enumerate(times)]


def test_step_time_is_the_median_after_warm_up_and_the_warm_up_is_start_up():
    events = [{"event": "start", "productive_s": 0.0}, {"event": "first_step", "step_time_s": 9.0}]
    found = measure(Summary(status="finished", startup_s=2.0), events, records(9, 5, *[1] * 8, 3, 1), eval_tokens=0)
    assert (found.step_s, found.startup_s) == (1.0, 10.0)
    assert found.step_spread == LEAST_SPREAD
    assert (found.save_s, found.save_stall_s, found.eval_tok_per_sec) == (None, None, None)


@pytest.mark.parametrize(
    ("times", "words"), [([1] * 12, "half of them within 3%"), ([1, 3] * 6, "the forecast is rough")]
)
def test_what_is_told_of_the_step_says_how_even_the_pace_was(times, words):
    assert words in describe(measure(Summary(status="finished"), [], records(*times), eval_tokens=0))[1]


def test_one_step_is_enough():
    assert measure(Summary(status="finished"), [], records(2.0), eval_tokens=0) == Measured(step_s=2.0)


def test_the_save_beside_training_gives_the_stall_and_the_last_one_the_whole_time():
    saves = [
        {"event": "checkpoint", "stall_s": 0.1, "total_s": 4.0, "synchronous": False},
        {"event": "checkpoint", "stall_s": 3.0, "total_s": 3.0, "synchronous": True},
    ]
    evaluations = [{"step": 0, "val/time_s": 9.0}, {"step": 2, "val/time_s": 2.0}]
    found = measure(Summary(status="finished"), saves, records(1, 1) + evaluations, eval_tokens=100)
    assert (found.save_stall_s, found.save_s, found.eval_tok_per_sec) == (0.1, 3.0, 50.0)
