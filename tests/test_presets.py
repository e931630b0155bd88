"""Presets: every one of them works, and those that stand for documents hold the documents' values."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from raychat.cli import PRESETS, load_presets, preset_names
from raychat.config import Config
from raychat.planning import make_plan, recipe

FEBRUARY = {
    "unembedding_lr": 0.004,
    "weight_decay": 0.2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "muon_momentum_start": 0.85,
    "muon_momentum": 0.95,
    "muon_momentum_steps": 300,
    "muon_momentum_final": -1,
    "warmup_steps": -1,
    "warmup_ratio": 0,
    "warmdown_ratio": 0.5,
    "final_lr_frac": 0,
    "target_param_data_ratio": 10.5,
    "short_window_ratio": 0.5,
    "eval_tokens": 20971520,
}
A100_D10 = {
    "depth": 10,
    "num_iterations": 1500,
    "device_batch_size": 32,
    "eval_every": 250,
    "core_metric_every": -1,
    "sample_every": -1,
    "tok_max_chars": 10**9,
    "num_data_shards": 18,
    "corpus": "climbmix",
    "gpu": "a100-40gb",
}
RTX_4070_D12 = {
    "depth": 12,
    "window_pattern": "L",
    "device_batch_size": 8,
    "total_batch_size": 65536,
    "embedding_lr": 0.018,
    "unembedding_lr": 0.00048,
    "matrix_lr": 0.0012,
    "scalar_lr": 0.03,
    "weight_decay": 0.28,
    "warmup_steps": 0,
    "warmdown_ratio": 0,
    "corpus": "climbmix",
    "num_iterations": 100000,
    "eval_every": 10000,
    "gpu": "rtx-4070",
}
D4_CPU = {
    "depth": 4,
    "head_dim": 64,
    "max_seq_len": 512,
    "vocab_size": 8192,
    "window_pattern": "L",
    "device_batch_size": 8,
    "total_batch_size": 8192,
    "num_iterations": 300,
    "eval_every": 100,
    "eval_tokens": 262144,
    "core_metric_every": -1,
    "sample_every": -1,
    "dtype": "float32",
}
# What jobs/plan.py decides. The rest of a preset is what its document fixed, or how often something is done.
DECIDED = ("depth", "window_pattern", "total_batch_size", "device_batch_size", "fp8", "gpu", "num_workers")
FOR_A_GPU = ("4070_d12", "a100_d10", "h100_d12", "h100x8_d24", "l4_d6")


def proposing_command(name):
    """The arguments of the jobs/plan.py command in the comment of a preset."""
    text = (PRESETS / f"{name}.toml").read_text()
    found = re.search(r"^#     python jobs/plan\.py ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return shlex.split(found[1].replace("\\\n#", ""))


@pytest.fixture(scope="module")
def plan_job():
    """jobs/plan.py as a module."""
    path = Path(__file__).resolve().parents[1] / "jobs" / "plan.py"
    spec = importlib.util.spec_from_file_location("plan_job", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FOR_A_GPU)
def test_the_command_in_a_preset_proposes_the_preset(plan_job, tmp_path, name):
    written = tmp_path / "proposed.toml"
    where = ["--base-dir", str(tmp_path / "empty"), "--write-preset", str(written)]
    assert plan_job.main([*proposing_command(name), *where]) == 0
    proposed, shipped = load_presets(str(written)), load_presets(name)
    assert {key: shipped.flat()[key] for key in DECIDED} == {key: proposed.flat()[key] for key in DECIDED}
    assert recipe(shipped).num_iterations == recipe(proposed).num_iterations


@pytest.mark.parametrize("name", FOR_A_GPU)
def test_a_preset_for_a_gpu_fits_its_memory(name):
    plan = make_plan(load_presets(name))
    assert plan["target"]["gpu"] == load_presets(name).plan.gpu
    assert plan["memory"]["fits"] is True


def test_the_speed_run_is_the_preset_for_eight_h100s_on_any_gpus():
    eight, any_gpus = (tomllib.loads((PRESETS / f"{name}.toml").read_text()) for name in ("h100x8_d24", "speedrun-d24"))
    assert recipe(load_presets("h100x8_d24")) == recipe(load_presets("speedrun-d24"))
    assert {key: eight[key] for key in any_gpus} == any_gpus
    assert set(eight) - set(any_gpus) == {"gpu", "num_workers", "target_param_data_ratio"}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_plan_that_works(name):
    config = load_presets(name)
    run = recipe(config)
    assert run.num_iterations > 0
    assert run.total_batch_size % (config.batch.device_batch_size * config.model.max_seq_len) == 0
    assert make_plan(config)["batch"]["passes_on_one_device"] >= 1


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_says_in_its_first_line_what_it_is_for(name):
    assert (PRESETS / f"{name}.toml").read_text().startswith("# ")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_sets_what_it_lists_and_nothing_else(name):
    listed = tomllib.loads((PRESETS / f"{name}.toml").read_text())
    flat, defaults = load_presets(name).flat(), Config().flat()
    assert {key: flat[key] for key in listed} == listed
    assert {key for key in flat if flat[key] != defaults[key]} <= {*listed, "preset"}
    assert flat["preset"] == name


@pytest.mark.parametrize(
    ("name", "values"),
    [("nanochat-feb26", FEBRUARY), ("a100_d10", A100_D10), ("4070_d12", RTX_4070_D12), ("d4-cpu", D4_CPU)],
)
def test_presets_of_documents_hold_their_values_and_defaults_elsewhere(name, values):
    """The values are those of the design page on the model, section 7."""
    assert load_presets(name).flat() == Config().flat() | values | {"preset": name}


def test_the_4070_accumulates_four_passes():
    assert make_plan(load_presets("4070_d12"))["batch"]["passes_on_one_device"] == 4


def test_the_february_preset_says_what_it_does_not_reproduce():
    text = (PRESETS / "nanochat-feb26.toml").read_text()
    assert "is not reproduced" in text


def test_the_demo_needs_no_download_and_one_worker():
    demo = load_presets("demo")
    assert (demo.data.corpus, demo.cluster.num_workers) == ("embedded", 1)
    assert demo.eval.core_metric_every == -1  # its tasks are not in an installation


def test_the_depth_of_a_preset_is_still_a_dial():
    """A preset fixes what its document fixed; depth 6 on the February values has the February decay and horizon."""
    february = Config.from_flat({"depth": 6}, load_presets("nanochat-feb26"))
    assert recipe(february).tokens_target == int(10.5 / 12 * recipe(Config.from_flat({"depth": 6})).tokens_target)
