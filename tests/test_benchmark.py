"""The benchmark trains as a run does, on the rows it was given, and its figures add up."""

import json
import re

import numpy as np
import pytest
import torch

from raychat.benchmark import sweep
from raychat.benchmark.fixed_rows import batches_of, load_rows
from raychat.benchmark.options import Options, prepared, steps_of
from raychat.benchmark.profile import ATTENTION, DATA, EXCHANGE, HEAD, MLP_PART, OPTIMIZER, PartsProfiler
from raychat.benchmark.run import Bench
from raychat.benchmark.samples import Sample, figures, timed
from raychat.config import Config
from raychat.errors import CheckpointError, ConfigError
from raychat.optim.schedule import lr_multiplier, muon_momentum, weight_decay_at
from raychat.planning import model_shape, recipe, warmup_steps
from raychat.planning.scaling import causal_flops_per_token, flops_per_token
from raychat.training.build import build_model, build_optimizer_of
from raychat.training.device import resolve
from raychat.training.world import World

FLAGS = {
    "depth": 2,
    "aspect_ratio": 16,
    "head_dim": 16,
    "max_seq_len": 32,
    "vocab_size": 300,
    "device_batch_size": 2,
    "dtype": "float32",
    "device_type": "cpu",
    "compile": "off",
}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.random.default_rng(0).integers(0, 300, (5, 33)).astype(np.uint16))
    return str(path)


def bench(rows, config=None, **options):
    config = prepared(config or Config.from_flat(FLAGS), 1)
    return Bench.make(config, Options(rows=rows, **options), World(), print)


def ignore(line):
    pass


def test_its_losses_are_those_of_a_plain_loop_over_the_rows(rows):
    """Step i takes the rows from 2 i on, modulo 5; rates follow the schedule of the whole horizon."""
    config = prepared(Config.from_flat(FLAGS | {"num_iterations": 50}), 1)
    run = recipe(config)
    model = build_model(config, resolve(config, local_world_size=1), torch.device("cpu"))
    optimizer = build_optimizer_of(config, run, model)
    given = torch.from_numpy(np.load(rows).astype(np.int64))
    expected = []
    for step in range(6):
        batch = given[[(2 * step) % 5, (2 * step + 1) % 5]]
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        expected.append(loss.item())
        optim = config.optim
        lrm = lr_multiplier(step, 50, warmup_steps(config, 50), optim.warmdown_ratio, optim.final_lr_frac, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lrm
        muon = optimizer.param_groups[-1]
        muon["momentum"] = muon_momentum(step, 50, 0.65, start=0.85, peak=0.97, ramp_steps=400, final=0.9)
        muon["weight_decay"] = weight_decay_at(step, 50, run.weight_decay)
        optimizer.step()
        optimizer.zero_grad()
    samples = bench(rows, config).run(6, ignore)
    assert [sample.loss for sample in samples] == pytest.approx(expected, rel=2e-6)
    assert all(sample.wall_s > 0 for sample in samples)
    assert [s.ended_at_s for s in samples] == sorted(s.ended_at_s for s in samples)


def test_given_weights_replace_the_seeds(rows, tmp_path):
    config = Config.from_flat(FLAGS | {"seed": 7})
    weights = build_model(config, resolve(config, local_world_size=1), torch.device("cpu")).state_dict()
    torch.save(weights, tmp_path / "init.pt")
    seeded = [s.loss for s in bench(rows, config).run(2, ignore)]
    given = [s.loss for s in bench(rows, init=str(tmp_path / "init.pt")).run(2, ignore)]
    assert given == seeded
    assert given != [s.loss for s in bench(rows).run(2, ignore)]


def test_ranks_share_the_rows_of_a_step():
    rows = np.arange(7)[:, None]
    whole = batches_of(rows, rows_per_batch=4, rank=0, world_size=1)
    parts = [batches_of(rows, rows_per_batch=4, rank=rank, world_size=3) for rank in range(3)]
    for step in range(5):
        batch, shares = next(whole), [next(part) for part in parts]
        assert np.concatenate([share.rows for share in shares]).tolist() == batch.rows.tolist()
        assert batch.rows[:, 0].tolist() == [(4 * step + i) % 7 for i in range(4)]
        assert {share.rows_consumed for share in shares} == {batch.rows_consumed} == {4 * step + 4}


def test_the_result_is_json_with_the_stated_keys(rows):
    made = bench(rows)
    result = json.loads(json.dumps(made.report(made.run(3, ignore))))
    stated = """tok_s_median tok_s_best tok_per_cpu_s cpu_ms_per_step first_step_at_s peak_rss_mb mfu mfu_causal loss_first
        loss_last config versions resolved"""
    assert set(stated.split()) <= set(result)
    assert result["mfu"] is None  # a CPU has no peak in the table
    assert result["tok_s_best"] >= result["tok_s_median"] > 0
    assert result["tokens_per_step"] == 64


def test_speeds_are_those_of_the_steps_after_the_first_quarter():
    samples = [
        Sample(5.0 - i, wall, 2 * wall, 10.0 + i) for i, wall in enumerate([9.0, 8.0, 1.0, 2.0, 4.0, 2.0, 2.0, 3.0])
    ]
    assert timed(samples) == samples[2:]
    assert timed(samples[:1]) == samples[:1]
    found = figures(
        samples, tokens=12, world_size=2, flops_per_token=100.0, causal_flops_per_token=50.0, peak_flops=1200.0
    )
    assert (found["tok_s_median"], found["tok_s_best"]) == (6.0, 12.0)
    assert (found["cpu_ms_per_step"], found["tok_per_cpu_s"]) == (4000.0, 1.5)
    assert (found["mfu"], found["mfu_causal"]) == (25.0, 12.5)  # 6 * 100 of two devices with 1,200
    assert (found["loss_first"], found["loss_last"], found["first_step_at_s"]) == (5.0, -2.0, 10.0)


@pytest.mark.parametrize(
    ("depth", "pattern", "whole", "causal"),
    [(12, "SSSL", 0.760, 0.726), (20, "SSSL", 2.886, 2.793), (24, "SSSL", 4.775, 4.641), (12, "L", 0.887, 0.774)],
)
def test_flops_with_and_without_what_causality_hides(depth, pattern, whole, causal):
    """GFLOPs per token at T=2048, V=32768, computed independently, to the digits that were given."""
    shape = model_shape(Config.from_flat({"depth": depth, "window_pattern": pattern}).model)
    assert flops_per_token(shape) / 1e9 == pytest.approx(whole, abs=6e-4)
    assert causal_flops_per_token(shape) / 1e9 == pytest.approx(causal, abs=6e-4)


def test_the_time_of_a_step_is_taken_apart(rows, tmp_path):
    made = bench(rows)
    profiler = PartsProfiler(tmp_path / "traces", made.model, made.optimizer)
    made.run(3, ignore, profiler)
    told = []
    parts = profiler.finish(told.append)
    assert {ATTENTION, MLP_PART, HEAD, OPTIMIZER, EXCHANGE, DATA} <= set(parts)
    assert all(ms > 0 for ms in parts.values())
    known = sum(ms for part, ms in parts.items() if part != "everything else")
    assert known > 0.7 * sum(parts.values())  # backward passes find their part too: without them it is a third
    assert (tmp_path / "traces" / "trace.json.gz").stat().st_size > 1000
    assert any("attention" in line for line in told)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((4, 20), np.uint16), r"rows of 20 tokens, and --max-seq-len 32 needs 33.*Use --max-seq-len 19"),
        (np.full((4, 33), 300, np.uint16), "holds the token 300, and --vocab-size is 300"),
        (np.full((4, 33), -1, np.int32), "holds the token -1"),
        (np.zeros((4, 33)), "holds float64"),
        (np.zeros((0, 33), np.uint16), "token ids of the shape"),
        (b"no array", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path, content, message):
    path = tmp_path / "rows.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ConfigError, match=message):
        load_rows(str(path), Config.from_flat(FLAGS).model)


def test_weights_of_another_model_are_refused(rows, tmp_path):
    with pytest.raises(ConfigError, match="init.pt cannot be read"):
        bench(rows, init=str(tmp_path / "init.pt"))
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "init.pt")
    with pytest.raises(CheckpointError, match="lacks"):
        bench(rows, init=str(tmp_path / "init.pt"))


def test_steps_are_the_horizon_that_was_given_else_twenty():
    config = prepared(Config.from_flat(FLAGS), 1)
    assert steps_of(config, Options()) == min(20, recipe(config).num_iterations)
    given = Config.from_flat({"num_iterations": 7}, base=config)
    assert steps_of(given, Options()) == 7
    assert steps_of(given, Options(steps=3)) == 3
    with pytest.raises(ConfigError, match="beyond the horizon of 7"):
        steps_of(given, Options(steps=8))
    with pytest.raises(ConfigError, match="--steps"):
        Options(steps=0)


def test_a_batch_is_one_pass_of_every_rank_unless_it_was_given():
    assert prepared(Config.from_flat(FLAGS), 3).batch.total_batch_size == 3 * 2 * 32
    assert prepared(Config.from_flat(FLAGS | {"total_batch_size": 128}), 3).batch.total_batch_size == 128


class TestSweep:
    def test_all_combinations_are_cases(self):
        found = sweep.cases(["depth=2,4", "--dtype=float32,bfloat16"])
        assert found == [{"depth": d, "dtype": t} for d in ("2", "4") for t in ("float32", "bfloat16")]
        assert sweep.flags_of({"device_batch_size": "8", "fp8": "true"}) == ["--device-batch-size", "8", "--fp8"]
        assert sweep.flags_of({"fp8": "off"}) == []

    @pytest.mark.parametrize(
        ("axis", "message"),
        [("depth", "gives no values"), ("depth=", "gives no values"), ("dept=2", "did you mean depth")],
    )
    def test_what_is_no_axis_is_refused(self, axis, message):
        with pytest.raises(ConfigError, match=message):
            sweep.cases([axis])

    def test_a_table_has_a_row_a_case_and_says_what_failed(self):
        results = [
            {"case": {"compile": "on"}, "tok_s_median": 1234.5, "mfu": None, "loss_last": 2.5},
            {"case": {"compile": "off"}, "error": "out of memory"},
        ]
        lines = sweep.table(results).splitlines()
        assert lines[0] == "| compile | tok/s | last loss |"
        assert lines[2:] == ["| on | 1,234 | 2.5000 |", "| off | out of memory |  |"]

    def test_a_case_is_measured_in_a_process_of_its_own(self, tmp_path):
        program = tmp_path / "program.py"
        program.write_text(
            "import json, sys\nprint('step')\nprint(json.dumps({'flags': sys.argv[1:]}))\nsys.exit('--depth' not in sys.argv)"
        )
        told = []
        result = sweep.measure({"depth": "2"}, [str(program), "--steps", "1"], told.append)
        assert result == {"case": {"depth": "2"}, "flags": ["--steps", "1", "--depth", "2"]}
        assert told == ["  step", "  done"]
        failed = sweep.measure({"seed": "2"}, [str(program)], told.append)
        assert re.search("flags", failed["error"])
