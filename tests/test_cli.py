"""The command line: the flags that exist, what they default to, and which of two sayings holds."""

import dataclasses
import json
import re

import pytest

from raychat.cli import parse
from raychat.config import Config
from raychat.errors import ConfigError

# The interface. A flag that is added, renamed or given another default is a change that users notice.
FLAGS = {
    "run": "",
    "model_tag": "",
    "preset": "",
    "base_dir": "",
    "storage_path": "",
    "seed": 42,
    "init_from": "",
    "perturbation": 0,
    "stop_at": -1,
    "mlflow_parent": "",
    "log_every": 1,
    "resume_from_step": -1,
    "fresh": False,
    "allow_config_change": False,
    "force": False,
    "tracking_uri": "",
    "experiment": "raychat",
    "upload_checkpoint": False,
    "dry_run": False,
    "dry_run_steps": -1,
    "depth": 20,
    "aspect_ratio": 64,
    "head_dim": 128,
    "num_kv_heads": -1,
    "max_seq_len": 2048,
    "window_pattern": "SSSL",
    "short_window_ratio": 0.25,
    "vocab_size": 32768,
    "device_type": "",
    "dtype": "auto",
    "fp8": False,
    "fp8_recipe": "tensorwise",
    "loss": "auto",
    "attention": "auto",
    "compile": "auto",
    "grad_checkpoint": False,
    "num_iterations": -1,
    "target_flops": -1.0,
    "target_param_data_ratio": 12.0,
    "device_batch_size": 32,
    "total_batch_size": -1,
    "embedding_lr": 0.3,
    "unembedding_lr": 0.008,
    "matrix_lr": 0.02,
    "scalar_lr": 0.5,
    "weight_decay": 0.28,
    "adam_beta1": -1.0,
    "adam_beta2": -1.0,
    "warmup_steps": 40,
    "warmup_ratio": -1.0,
    "warmup_from": 0.0,
    "warmdown_ratio": 0.65,
    "final_lr_frac": 0.05,
    "grad_clip": 0.0,
    "muon_momentum_start": 0.85,
    "muon_momentum": 0.97,
    "muon_momentum_steps": 400,
    "muon_momentum_final": 0.9,
    "eval_every": 250,
    "eval_tokens": 41943040,
    "core_metric_every": 2000,
    "core_metric_max_per_task": 500,
    "core_bundle": "",
    "sample_every": 2000,
    "eval_workers": 0,
    "save_every": "auto",
    "keep_checkpoints": 2,
    "corpus": "",
    "val_corpus": "",
    "text_column": "text",
    "num_data_shards": -1,
    "packing": "auto",
    "tokenizer": "",
    "tok_max_chars": 2000000000,
    "tok_doc_cap": 10000,
    "address": "",
    "num_workers": "auto",
    "min_workers": -1,
    "threads": -1,
    "max_failures": 3,
    "max_preemptions": -1,
    "max_wait": -1.0,
    "on_event": "",
    "save_mode": "async",
    "on_bad_step": "rollback",
    "price_per_hour": -1.0,
    "budget_usd": -1.0,
    "max_hours": -1.0,
    "gpu": "",
    "machine": "",
    "prices": "",
    "mfu": -1.0,
    "preemptions_per_hour": 0.0,
}
# Defaults that the lineage fixed; the design page on the model, section 7.
LINEAGE = {
    "depth": 20,
    "aspect_ratio": 64,
    "head_dim": 128,
    "max_seq_len": 2048,
    "window_pattern": "SSSL",
    "short_window_ratio": 0.25,
    "vocab_size": 32768,
    "device_batch_size": 32,
    "total_batch_size": -1,
    "num_iterations": -1,
    "target_flops": -1,
    "target_param_data_ratio": 12,
    "embedding_lr": 0.3,
    "unembedding_lr": 0.008,
    "matrix_lr": 0.02,
    "scalar_lr": 0.5,
    "weight_decay": 0.28,
    "warmup_steps": 40,
    "warmdown_ratio": 0.65,
    "final_lr_frac": 0.05,
    "eval_every": 250,
    "eval_tokens": 41943040,
    "core_metric_every": 2000,
    "core_metric_max_per_task": 500,
    "sample_every": 2000,
    "fp8": False,
    "fp8_recipe": "tensorwise",
    "resume_from_step": -1,
}
LINEAGE_NAMES = (
    "--run --device-type --depth --aspect-ratio --head-dim --max-seq-len --window-pattern --num-iterations --target-flops "
    "--target-param-data-ratio --device-batch-size --total-batch-size --matrix-lr --embedding-lr --unembedding-lr "
    "--scalar-lr --weight-decay --adam-beta1 --adam-beta2 --warmup-steps --warmup-ratio --warmdown-ratio --final-lr-frac "
    "--eval-every --eval-tokens --core-metric-every --core-metric-max-per-task --sample-every --save-every --fp8 "
    "--fp8-recipe --resume-from-step --model-tag"
)
# Off, all, or left to the laws: what -1 means stands in the help of each.
MINUS_ONE = (
    "resume_from_step num_kv_heads num_iterations target_flops target_param_data_ratio total_batch_size adam_beta1 "
    "adam_beta2 warmup_steps warmup_ratio muon_momentum_final eval_every core_metric_every core_metric_max_per_task "
    "sample_every save_every num_data_shards min_workers price_per_hour budget_usd max_hours max_preemptions max_wait "
    "stop_at dry_run_steps mfu threads"
)


def parsed(*args):
    return parse(args, prog="test", description="")


def values(*args):
    return parsed(*args).flat()


def numeric_flags():
    """Flags that take a number, two of them besides `auto`."""
    defaults = Config().flat().items()
    return [
        name
        for name, value in defaults
        if (isinstance(value, int | float) and not isinstance(value, bool)) or name in ("save_every", "num_workers")
    ]


def test_the_flags_and_their_defaults_are_these():
    assert Config().flat() == FLAGS
    assert {name: type(value) for name, value in Config().flat().items()} == {n: type(v) for n, v in FLAGS.items()}


def test_without_flags_the_configuration_is_the_default():
    assert parsed() == Config()


def test_the_lineage_keeps_its_names_and_defaults():
    flat = Config().flat()
    assert {name: flat[name] for name in LINEAGE} == LINEAGE
    assert {name.removeprefix("--").replace("-", "_") for name in LINEAGE_NAMES.split()} <= set(flat)


def test_no_two_groups_share_a_name():
    groups = [getattr(Config(), group.name) for group in dataclasses.fields(Config)]
    names = [leaf.name for group in groups for leaf in dataclasses.fields(group)]
    assert len(names) == len(set(names)) == len(Config().flat())


def test_help_shows_every_flag_with_its_default_and_a_text(capsys):
    with pytest.raises(SystemExit) as done:
        parsed("--help")
    assert done.value.code == 0
    text = re.sub(r"[│╭╰╮╯─\s]+", " ", capsys.readouterr().out)
    for name in Config().flat():
        flag = re.escape(f"--{name.replace('_', '-')}")
        assert re.search(rf" {flag} (?:(?! --[a-z]).)* \((?:default|sets):", text), name


def test_a_flag_may_be_written_with_dashes_underscores_and_an_equals_sign():
    ways = (
        ["--device-batch-size", "16"],
        ["--device_batch_size", "16"],
        ["--device-batch-size=16"],
        ["--device_batch_size=16"],
    )
    assert {parsed(*way).batch.device_batch_size for way in ways} == {16}


def test_the_last_of_two_equal_flags_holds():
    assert parsed("--depth", "4", "--depth", "6").model.depth == 6


@pytest.mark.parametrize("name", [n for n in numeric_flags() if n in MINUS_ONE.split()])
def test_minus_one_is_taken_where_it_means_something(name):
    base = {"num_iterations": 5} if name == "target_param_data_ratio" else {}
    assert Config.from_flat(base | {name: -1}).flat()[name] == -1


@pytest.mark.parametrize("name", [n for n in numeric_flags() if n not in MINUS_ONE.split()])
def test_minus_one_is_refused_where_it_means_nothing(name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .*-1"):
        Config.from_flat({name: -1})


def test_minus_one_is_a_value_on_the_command_line():
    assert values("--eval-every", "-1", "--save-every=-1", "--max-hours", "-1")["eval_every"] == -1


@pytest.mark.parametrize("name", [n for n in numeric_flags() if n not in ("save_every", "num_workers")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -2.0])
def test_no_number_may_be_endless_or_below_minus_one(name, value):
    whole = isinstance(Config().flat()[name], int)
    with pytest.raises(ConfigError, match=name.replace("_", "[-_]")):
        Config.from_flat({name: int(value) if whole and value == -2 else value})


def test_flags_stand_over_presets_wherever_they_are_written():
    before, after = values("--depth", "6", "--preset", "d4-cpu"), values("--preset=d4-cpu", "--depth=6")
    assert before == after
    assert (before["depth"], before["max_seq_len"], before["preset"]) == (6, 512, "d4-cpu")


def test_later_presets_stand_over_earlier_ones(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("max-seq-len = 256  # dashes or underscores\nnum_iterations = 7\n")
    flat = values("--preset", f"d4-cpu,{mine}")
    assert (flat["max_seq_len"], flat["num_iterations"], flat["depth"]) == (256, 7, 4)
    assert values("--preset", f"{mine},d4-cpu")["max_seq_len"] == 512


def test_a_flag_can_restore_a_default_that_a_preset_changed():
    assert values("--preset", "d4-cpu", "--num-iterations", "-1")["num_iterations"] == -1


def test_presets_are_judged_together(tmp_path):
    """4,096 tokens are no whole number of passes of 32 x 2,048, but of the 8 x 512 that the preset below brings."""
    mine = tmp_path / "mine.toml"
    mine.write_text("total_batch_size = 4096\n")
    assert values("--preset", f"d4-cpu,{mine}")["total_batch_size"] == 4096
    with pytest.raises(ConfigError, match="In the preset .*mine.toml.*--device-batch-size|--total-batch-size"):
        parsed("--preset", str(mine))


@pytest.mark.parametrize(
    "args",
    [
        ["--warmup-steps", "10", "--warmup-ratio", "0.1"],
        ["--warmup-steps=40", "--warmup-ratio=0.1"],
        ["--warmup_ratio=0.1", "--warmup-steps", "0"],
    ],
    ids=" ".join,
)
def test_two_warm_ups_are_refused(args):
    with pytest.raises(ConfigError, match=r"--warmup-steps .* --warmup-ratio .* both set the warm-up: give one"):
        parsed(*args)


@pytest.mark.parametrize(
    ("args", "steps", "ratio"),
    [
        (["--preset", "nanochat-feb26", "--warmup-steps", "10"], 10, -1),
        (["--preset", "demo", "--warmup-ratio", "0.1"], -1, 0.1),
        (["--preset", "nanochat-feb26,demo"], 10, -1),
        (["--preset", "4070_d12,nanochat-feb26"], -1, 0.0),
    ],
    ids=str,
)
def test_later_layer_says_how_to_warm_up(args, steps, ratio):
    flat = values(*args)
    assert (flat["warmup_steps"], flat["warmup_ratio"]) == (steps, ratio)


@pytest.mark.parametrize(
    ("args", "steps", "ratio"),
    [
        (["--warmup-ratio", "0.1"], -1, 0.1),
        (["--warmup-steps", "-1", "--warmup-ratio", "0.1"], -1, 0.1),
        (["--warmup-steps", "10", "--warmup-ratio", "-1"], 10, -1),
        (["--preset", "nanochat-feb26", "--warmup-steps", "10", "--warmup-ratio", "-1"], 10, -1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_one_warm_up_is_taken(args, steps, ratio):
    flat = values(*args)
    assert (flat["warmup_steps"], flat["warmup_ratio"]) == (steps, ratio)


@pytest.mark.parametrize(
    "args", [[], ["--preset", "demo"], ["--preset", "nanochat-feb26", "--fp8", "--num-workers", "4"]]
)
def test_flat_and_back_is_the_same_configuration(args):
    config = parsed(*args)
    assert Config.from_flat(config.flat()) == config
    assert Config.from_flat(json.loads(json.dumps(config.flat()))) == config


@pytest.mark.parametrize(
    ("wrong", "right"), [("dpeth", "depth"), ("matrix-learning-rate", "matrix_lr"), ("batch_size", "device_batch_size")]
)
def test_an_unknown_setting_names_the_nearest(wrong, right):
    with pytest.raises(ConfigError, match=f"no setting .*did you mean.* {right}"):
        Config.from_flat({wrong: 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth", 4.5),
        ("depth", "4"),
        ("depth", True),
        ("fp8", 1),
        ("matrix_lr", "0.1"),
        ("corpus", 5),
        ("save_every", 2.5),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused_with_its_default(name, value):
    with pytest.raises(ConfigError, match=f"{name} = .* wrong type: its default is"):
        Config.from_flat({name: value})


def test_a_whole_number_is_a_number_where_a_fraction_may_stand():
    assert isinstance(Config.from_flat({"weight_decay": 0}).optim.weight_decay, float)


def test_a_choice_that_does_not_exist_lists_those_that_do():
    with pytest.raises(ConfigError, match="dtype = 'fp16': use one of 'auto', 'bfloat16', 'float32', 'float16'"):
        Config.from_flat({"dtype": "fp16"})


def test_the_base_directory_is_the_flag_then_the_environment_then_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAYCHAT_BASE_DIR", raising=False)
    assert Config().base_dir == tmp_path / ".cache" / "raychat"
    monkeypatch.setenv("RAYCHAT_BASE_DIR", "~/elsewhere")
    assert Config().base_dir == tmp_path / "elsewhere"
    assert Config.from_flat({"base_dir": "/given"}).base_dir.as_posix() == "/given"


def test_runs_are_kept_where_the_flag_then_the_preset_then_the_environment_says(monkeypatch, tmp_path):
    def chosen(*flags):
        return parse(list(flags), prog="x", description="").run.storage_path

    monkeypatch.delenv("RAYCHAT_STORAGE_PATH", raising=False)
    assert chosen() == ""
    monkeypatch.setenv("RAYCHAT_STORAGE_PATH", "s3://bucket/runs")
    assert chosen("--depth", "6") == "s3://bucket/runs"
    assert chosen("--storage-path", "/elsewhere") == "/elsewhere"
    preset = tmp_path / "mine.toml"
    preset.write_text('storage_path = "/of/the/preset"\n')
    assert chosen("--preset", str(preset)) == "/of/the/preset"
    assert chosen("--preset", "demo") == "s3://bucket/runs"


def test_the_run_directory_follows_depth_tag_and_storage():
    assert Config.from_flat({"base_dir": "/b", "depth": 6}).run_dir.as_posix() == "/b/runs/d6"
    assert Config.from_flat({"base_dir": "/b", "model_tag": "x"}).run_dir.as_posix() == "/b/runs/x"
    assert Config.from_flat({"base_dir": "/b", "storage_path": "/s", "model_tag": "x"}).run_dir.as_posix() == "/s/x"
