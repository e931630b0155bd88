"""The forecast of time: the documents' runs, the accounts of the loop, and the laws between them."""

import dataclasses
import json

import pytest

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import model_shape, recipe
from raychat.planning.duration import Measured, evaluations, forecast_time
from raychat.planning.efficiency import core_rate
from raychat.planning.ranges import Range
from raychat.planning.target import resolve_target

SHARD_CHARS = 250e6
A100_D10 = {"depth": 10, "num_iterations": 1500, "device_batch_size": 32, "eval_every": 250, "core_metric_every": -1,
            "tok_max_chars": 1_000_000_000, "corpus": "climbmix", "gpu": "a100-40gb"}  # fmt: skip
RTX_4070 = {"depth": 12, "window_pattern": "L", "device_batch_size": 8, "total_batch_size": 65_536, "gpu": "4070",
            "num_iterations": 100_000, "eval_every": 10_000, "core_metric_every": -1}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_base(tmp_path, monkeypatch):
    """No calibration and no CORE tasks of this machine."""
    monkeypatch.setenv("RAYCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def forecast(settings, measured=None, *, ready=True, chars=None, **more):
    config = Config.from_flat(settings | more)
    return forecast_time(
        config,
        recipe(config),
        model_shape(config.model),
        resolve_target(config),
        tokens_ready=ready,
        tokenizer_ready=ready,
        corpus_chars=chars,
        measured=measured,
    )


def minutes(found):
    return found.scaled(1 / 60)


def test_the_documents_hour_on_an_a100_lies_in_the_range():
    found = forecast(A100_D10, ready=False, chars=18 * SHARD_CHARS)
    total = minutes(found.total)
    assert total.includes(60.7)
    assert total.mid == pytest.approx(60.7, rel=0.15)
    assert total.high / total.mid < 1.25
    assert total.low / total.mid > 0.75


def test_the_documents_evaluations_take_about_ten_minutes():
    found = forecast(A100_D10)
    assert found.evaluations == 7
    assert found.eval_s.mid == pytest.approx(70, rel=0.05)
    assert minutes(found.evaluation).includes(10)


def test_the_documents_step_times_come_back():
    assert forecast(A100_D10).step_s.mid == pytest.approx(1.77, rel=0.01)
    assert forecast(A100_D10, device_batch_size=16).step_s.mid == pytest.approx(1.82, rel=0.01)


def test_the_documents_tokenizer_times_come_back():
    for chars, seconds in ((1_000_000_000, 45), (2_000_000_000, 85)):
        found = forecast(A100_D10, ready=False, chars=18 * SHARD_CHARS, tok_max_chars=chars)
        assert found.tokenizer.includes(seconds)


def test_the_documents_33_hours_on_a_4070_lie_in_the_range():
    found = forecast(RTX_4070)
    assert found.steps.scaled(1 / 3600).includes(33)
    assert found.total.scaled(1 / 3600).includes(33)
    assert found.total.scaled(1 / 3600).mid == pytest.approx(33, rel=0.1)


def test_the_documents_47_minutes_of_d12_on_an_h100_lie_in_the_range():
    found = forecast(
        {"depth": 12, "gpu": "h100", "core_metric_every": -1, "target_param_data_ratio": 10.5}, ready=False
    )
    assert minutes(found.total).includes(47)


def test_the_parts_add_up():
    found = forecast(A100_D10, ready=False, chars=1e9, preemptions_per_hour=0.5)
    parts = [found.startup, found.tokenizer, found.tokenizing, found.steps, found.evaluation, found.checkpoints]
    assert Range.total(parts) == found.undisturbed
    assert found.undisturbed + found.replay == found.total
    assert found.steps.mid == pytest.approx(found.step_s.mid * 1500)
    assert found.tok_per_sec.mid == pytest.approx(524_288 / found.step_s.mid)


@pytest.mark.parametrize(
    ("steps", "every"), [(1500, 250), (1499, 250), (1501, 250), (1, 250), (7, 1), (100, 1000), (5, -1)]
)
def test_evaluations_are_counted_as_the_loop_makes_them(steps, every):
    made = {step for step in range(steps) if every > 0 and step % every == 0} | ({steps} if every > 0 else set())
    assert evaluations(every, steps) == len(made)


def test_twice_the_iterations_take_twice_the_steps_and_nothing_else_of_the_start():
    once, twice = forecast(A100_D10), forecast(A100_D10, num_iterations=3000)
    assert twice.steps.as_list() == pytest.approx(once.steps.scaled(2).as_list())
    assert twice.startup == once.startup


def test_workers_share_the_work_less_what_they_lose_by_it():
    one, eight = forecast(A100_D10), forecast(A100_D10, num_workers=8)
    assert one.steps.mid / 8 < eight.steps.mid < one.steps.mid / 6
    assert "NVLink" in eight.sources["exchange"]
    assert eight.steps.high / eight.steps.low > one.steps.high / one.steps.low


def test_the_rank_with_the_most_rows_sets_the_pace():
    even, uneven = forecast(A100_D10, num_workers=4), forecast(A100_D10, num_workers=5)  # 256 rows: 64, and 52 at most
    passes = [found.step_s.mid - found.parts.exchange.mid - found.parts.muon.mid for found in (even, uneven)]
    assert passes[1] == pytest.approx(passes[0] * 52 / 64, rel=0.001)


def test_ready_data_takes_no_time():
    found = forecast(A100_D10, ready=True, chars=1e9)
    assert found.tokenizer == found.tokenizing == Range.exactly(0)


def test_recomputed_activations_take_longer_but_less_than_a_third():
    plain, again = forecast(A100_D10), forecast(A100_D10, grad_checkpoint=True)
    assert 1.15 < again.step_s.mid / plain.step_s.mid < 4 / 3
    assert again.mfu.mid < plain.mfu.mid


def test_an_unknown_device_has_no_time_unless_it_was_measured(monkeypatch):
    monkeypatch.setattr("raychat.planning.target.local_gpu", lambda: ("Abacus 3000", 2))
    bare = {key: value for key, value in A100_D10.items() if key != "gpu"}
    assert forecast(bare) is None
    found = forecast(bare, Measured(step_s=2.0))
    assert found.steps.mid == 3000
    assert found.mfu is None


def test_what_was_measured_replaces_what_was_forecast():
    measured = Measured(step_s=2.0, save_s=4.0, save_stall_s=0.5, eval_tok_per_sec=1e6, startup_s=30.0)
    found = forecast(A100_D10, measured, save_every=500)
    assert found.step_s.as_list() == pytest.approx([1.94, 2.0, 2.06])
    assert found.eval_s.mid == pytest.approx(41.943040)
    assert found.startup.mid == 30
    assert found.mfu.mid == pytest.approx(100 * recipe(Config.from_flat(A100_D10)).flops_per_token * 262_144 / 312e12)
    assert found.checkpoints.mid == pytest.approx(0.5 * (found.saves.mid - 1) + 4.0)
    assert all("measured" in found.sources[part] for part in ("steps", "evaluation", "startup", "checkpoints"))


def test_noisy_steps_give_a_range_as_wide_as_they_were():
    found = forecast(A100_D10, Measured(step_s=2.0, step_spread=0.2))
    assert found.step_s.as_list() == pytest.approx([1.6, 2.0, 2.4])


def test_saves_only_at_the_end_are_one():
    found = forecast(A100_D10, save_every=-1)
    assert found.saves == Range.exactly(1)
    assert found.checkpoints.mid == pytest.approx(195_952_986 * 12 / 0.5e9)


def test_saves_that_training_waits_for_stall_it_longer():
    assert forecast(A100_D10, save_mode="sync").checkpoints.mid > 4 * forecast(A100_D10).checkpoints.mid


def test_other_workers_evaluate_while_training_goes_on():
    found = forecast(A100_D10, eval_workers=1)
    assert found.evaluation == found.eval_s.scaled(2)


def test_core_takes_time_where_its_tasks_are(empty_base):
    without = forecast(A100_D10, core_metric_every=500)
    (empty_base / "core_bundle").mkdir()
    once, thrice = forecast(A100_D10, core_metric_every=1500), forecast(A100_D10, core_metric_every=500)
    assert without.evaluation.mid < once.evaluation.mid
    core = [found.evaluation.mid - without.evaluation.mid for found in (once, thrice)]
    assert core[1] == pytest.approx(3 * core[0])


def test_replay_is_half_an_interval_and_a_recovery_for_each_preemption():
    settings = A100_D10 | {"save_every": 100, "compile": "off"}
    found = forecast(settings, preemptions_per_hour=0.2)
    lost = 50 * found.step_s.mid + 12
    expected = 0.2 * found.total.mid / 3600 * lost  # preemptions of the whole time, the replay's own included
    assert found.replay.mid == pytest.approx(expected)
    assert forecast(settings).replay == Range.exactly(0)


def test_more_machines_are_taken_away_more_often():
    one, two = (forecast(A100_D10, preemptions_per_hour=0.2, num_workers=n) for n in (8, 16))
    assert two.replay.mid / two.undisturbed.mid > 1.9 * one.replay.mid / one.undisturbed.mid


def test_a_run_that_loses_more_than_it_makes_is_refused():
    with pytest.raises(ConfigError, match="does not end"):
        forecast(A100_D10, preemptions_per_hour=60)


def test_a_calibration_of_this_base_directory_is_used(empty_base):
    entry = {"gpu": "a100-40gb", "depth": 10, "fp8": False, "dtype": "bfloat16", "percent": 40.0, "n": 2}
    (empty_base / "calibration.json").write_text(json.dumps({"entries": [entry]}))
    found = forecast(A100_D10)
    assert found.mfu.as_list() == pytest.approx([40, 40, 40])
    assert "2 finished runs" in found.sources["steps"]


def test_a_cpu_takes_as_long_as_its_cores_need(monkeypatch):
    settings = {"depth": 4, "max_seq_len": 512, "head_dim": 64, "vocab_size": 8192, "device_batch_size": 8,
                "total_batch_size": 8192, "num_iterations": 100, "device_type": "cpu", "dtype": "float32"}  # fmt: skip
    times = []
    for cores in (2, 4):
        monkeypatch.setattr("raychat.planning.target.local_cores", lambda cores=cores: cores)
        times.append(forecast(settings).steps.mid)
    assert times[0] == pytest.approx(2 * times[1])
    config = Config.from_flat(settings)
    rate = core_rate("float32", depth=4, width=256).flops
    assert times[0] == pytest.approx(recipe(config).flops / (2 * rate.mid))
    assert forecast(settings).mfu is None


def test_the_demo_of_the_readme_lies_in_the_range(monkeypatch):
    """2 cores of an AMD EPYC: 20,054 tokens/s, 2m32s of wall time, evaluations of 2.3 to 3.3 s."""
    monkeypatch.setattr("raychat.planning.target.local_cores", lambda: 2)
    settings = {"depth": 4, "aspect_ratio": 32, "head_dim": 64, "max_seq_len": 256, "vocab_size": 4096,
                "window_pattern": "L", "device_batch_size": 16, "total_batch_size": 8192, "num_iterations": 300,
                "eval_every": 50, "eval_tokens": 131_072, "device_type": "cpu", "dtype": "bfloat16"}  # fmt: skip
    found = forecast(settings)
    assert found.tok_per_sec.includes(20_054)
    assert found.total.includes(152)
    assert found.eval_s.includes(2.6)


def test_every_part_that_is_not_nothing_says_where_it_is_from():
    found = forecast(A100_D10, ready=False, chars=1e9, preemptions_per_hour=0.1)
    parts = {"startup", "tokenizer", "tokenizing", "steps", "evaluation", "checkpoints", "replay"}
    assert parts == set(found.sources)
    assert parts < {field.name for field in dataclasses.fields(found)}


def test_evaluation_computes_nothing_again():
    plain, again = (forecast(A100_D10, grad_checkpoint=value) for value in (False, True))
    assert again.step_s.mid > plain.step_s.mid
    assert again.eval_s.mid == pytest.approx(plain.eval_s.mid)


def test_there_are_no_more_saves_than_steps(monkeypatch):
    monkeypatch.setattr("raychat.planning.target.local_cores", lambda: 2)
    found = forecast({"depth": 20, "gpu": "cpu", "num_iterations": 100, "core_metric_every": -1})
    assert found.step_s.mid > 600
    assert found.saves.low <= 100
    assert found.saves.high <= 101


@pytest.mark.parametrize(("workers", "slower"), [(2, 1), (4, 1), (3, 1.5), (5, 2), (16, 1)])
def test_cpu_workers_wait_for_the_one_with_most_rows_and_leave_cores_over(monkeypatch, workers, slower):
    """Of 8 cores and 16 rows: 3 workers compute 6 rows at most with 2 cores each, 5 compute 4 with one."""
    monkeypatch.setattr("raychat.planning.target.local_cores", lambda: 8)
    settings = {"depth": 4, "max_seq_len": 512, "total_batch_size": 8192, "device_batch_size": 1, "gpu": "cpu"}
    alone, several = (forecast(settings, num_workers=n).step_s.mid for n in (1, workers))
    assert several / alone == pytest.approx(slower)


@pytest.mark.parametrize(("threads", "slower"), [(8, 1), (4, 2), (1, 8), (16, 1)])
def test_a_cpu_worker_with_fewer_threads_is_slower_by_as_much(monkeypatch, threads, slower):
    monkeypatch.setattr("raychat.planning.target.local_cores", lambda: 8)
    settings = {"depth": 4, "max_seq_len": 512, "total_batch_size": 8192, "device_batch_size": 1, "gpu": "cpu"}
    alone, fewer = (forecast(settings, threads=n).step_s.mid for n in (-1, threads))
    assert fewer / alone == pytest.approx(slower)
