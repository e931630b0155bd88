"""Which settings a resumed run may change: every flag has a class, and a refusal names the fields."""

from pathlib import Path

import pytest

from raychat.config import Config
from raychat.errors import CheckpointError
from raychat.planning import recipe
from raychat.training.changes import check_changes, kind_of

NEVER = (
    "depth aspect_ratio head_dim num_kv_heads max_seq_len window_pattern short_window_ratio vocab_size seed init_from "
    "perturbation"
)
PERMISSION = (
    "dtype fp8 fp8_recipe embedding_lr unembedding_lr matrix_lr scalar_lr weight_decay adam_beta1 adam_beta2 "
    "warmup_steps warmup_ratio warmup_from warmdown_ratio final_lr_frac grad_clip muon_momentum_start muon_momentum "
    "muon_momentum_steps muon_momentum_final num_iterations target_flops target_param_data_ratio total_batch_size"
)
FREE = (
    "run model_tag preset base_dir storage_path log_every resume_from_step fresh allow_config_change force tracking_uri "
    "experiment upload_checkpoint dry_run device_type loss attention compile device_batch_size eval_every eval_tokens "
    "core_metric_every core_metric_max_per_task sample_every save_every keep_checkpoints address num_workers min_workers "
    "threads core_bundle eval_workers "
    "max_failures max_preemptions max_wait on_event save_mode on_bad_step price_per_hour budget_usd max_hours "
    "dry_run_steps stop_at mlflow_parent grad_checkpoint gpu machine prices mfu preemptions_per_hour"
)
# What these say is compared by the fingerprint of the data that come out of them.
DATA = "corpus val_corpus text_column num_data_shards packing tokenizer tok_max_chars tok_doc_cap"
BASE = {"depth": 4, "num_iterations": 100}


def changes(old, new, *, permitted=False, fingerprints=("aa", "aa")):
    """What `check_changes` permits between two sets of flags."""
    return check_changes(
        Config.from_flat(BASE | old).flat(),
        Config.from_flat(BASE | new),
        old_fingerprint=fingerprints[0],
        new_fingerprint=fingerprints[1],
        permitted=permitted,
    )


def test_every_flag_has_its_class():
    """A new flag must be put into one of these lists, which is a decision about resuming."""
    classes = dict.fromkeys(NEVER.split(), "never")
    classes |= dict.fromkeys(PERMISSION.split(), "permission")
    classes |= dict.fromkeys((FREE + " " + DATA).split(), "free")
    assert {name: kind_of(name) for name in Config().flat()} == classes


def test_the_place_of_the_first_weights_is_the_same_without_its_password_and_from_here():
    assert changes({"init_from": "s3://key@b/x"}, {"init_from": "s3://key:pw@b/x"}) == []
    assert changes({"init_from": str(Path("d12").absolute())}, {"init_from": "d12"}) == []
    with pytest.raises(CheckpointError, match="init_from"):
        changes({"init_from": "d12"}, {"init_from": "d13"})


def test_the_same_flags_are_no_change():
    assert changes({}, {}) == []


@pytest.mark.parametrize(
    "change",
    [
        {"device_batch_size": 8},
        {"num_workers": 3, "min_workers": 2},
        {"eval_every": 7, "save_every": 10, "log_every": 5},
        {"run": "another", "tracking_uri": "sqlite:////tmp/x.db"},
        {"base_dir": "/elsewhere", "storage_path": "/shared"},
        {"loss": "full", "compile": "off", "device_type": "cpu"},
        {"corpus": "/moved"},
        {"price_per_hour": 2.0, "budget_usd": 10.0},
    ],
    ids=lambda change: "+".join(change),
)
def test_free_settings_change_without_a_word(change):
    assert changes({}, change) == []


@pytest.mark.parametrize(
    "change",
    [
        {"matrix_lr": 0.01},
        {"weight_decay": 0.1},
        {"warmup_steps": 3},
        {"num_iterations": 200},
        {"dtype": "float32"},
        {"total_batch_size": 2**17},
        {"grad_clip": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_rates_schedule_and_horizon_change_with_permission_and_are_named(change):
    name, value = next(iter(change.items()))
    with pytest.raises(CheckpointError, match=f"{name}: .* --allow-config-change"):
        changes({}, change)
    named = changes({}, change, permitted=True)
    assert [text.split(":")[0] for text in named if text.startswith(name)] == [name]
    if name not in ("weight_decay", "total_batch_size"):
        assert named == [f"{name}: {Config.from_flat(BASE).flat()[name]} -> {value}"]


@pytest.mark.parametrize(
    "change",
    [{"depth": 6}, {"head_dim": 64}, {"max_seq_len": 1024}, {"window_pattern": "L"}, {"vocab_size": 4096}, {"seed": 1}],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("permitted", [False, True])
def test_what_the_weights_are_made_of_never_changes(change, permitted):
    name = next(iter(change))
    with pytest.raises(CheckpointError, match=f"another .*{name}: .*another --model-tag, or --fresh"):
        changes({}, change | {"total_batch_size": 2**18}, permitted=permitted)


def test_other_data_are_refused_even_with_permission():
    with pytest.raises(CheckpointError, match=r"the data \(fingerprint aa -> bb"):
        changes({}, {}, permitted=True, fingerprints=("aa", "bb"))


def test_a_horizon_asked_for_in_another_way_is_no_change():
    """By the ratio, by FLOPs and as a number of steps: what is compared is what they come to."""
    by_ratio = Config.from_flat({"depth": 4})
    run = recipe(by_ratio)
    asked = [{"num_iterations": run.num_iterations}, {"target_flops": run.flops, "num_iterations": -1}]
    for flags in asked:
        assert recipe(Config.from_flat({"depth": 4} | flags)).num_iterations == run.num_iterations
        assert changes({"num_iterations": -1}, flags) == []
        assert changes(flags, {"num_iterations": -1}) == []


def test_a_batch_that_the_law_would_choose_is_no_change_when_it_is_given():
    assert changes({}, {"total_batch_size": recipe(Config.from_flat(BASE)).total_batch_size}) == []


def test_small_letters_are_the_same_windows():
    assert changes({"window_pattern": "SSSL"}, {"window_pattern": "sssl"}) == []


def test_all_refused_fields_are_named_at_once():
    with pytest.raises(CheckpointError, match=r"seed: 42 -> 1; depth: 4 -> 6"):
        changes({}, {"depth": 6, "seed": 1, "total_batch_size": 2**18})
