"""The depth dial against the worked values of an independent implementation, and its laws."""

import dataclasses

import pytest

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import flops_per_token, make_plan, model_shape, optimal_batch, param_counts, recipe, window_sizes
from raychat.planning.devices import device_peak, mfu_percent

# depth, model_dim, heads, total, scaling, FLOPs/token SSSL, FLOPs/token L, tokens at ratio 12, batch, lr scale, wd, iterations
WORKED = [
    (2, 128, 1, 12976170, 4587532, 31457496, 33816792, 55050384, 131072, 0.500000, 3.360004, 420),
    (4, 256, 2, 36700242, 11534384, 80216496, 94372272, 138412608, 262144, 0.707107, 1.889903, 528),
    (6, 384, 3, 73531538, 23199852, 167510808, 195822360, 278398224, 262144, 0.707107, 0.939612, 1062),
    (8, 512, 4, 125829354, 41943232, 295699728, 352322832, 503318784, 262144, 0.707107, 0.519723, 1920),
    (10, 640, 5, 195952986, 70123820, 495454104, 578029464, 841485840, 524288, 1.000000, 0.439626, 1605),
    (12, 768, 6, 286261730, 110100912, 759696048, 887098032, 1321210944, 524288, 1.000000, 0.280000, 2520),
    (16, 1024, 8, 536871738, 234881792, 1585451664, 1811944080, 2818581504, 524288, 1.000000, 0.131250, 5376),
    (20, 1280, 10, 896533746, 435160240, 2886212784, 3240107184, 5221922880, 1048576, 1.414214, 0.100188, 4980),
    (24, 1536, 12, 1384122122, 729810624, 4775225616, 5284833552, 8757727488, 1048576, 1.414214, 0.059738, 8352),
    (26, 1664, 13, 1681786938, 918423532, 5991051288, 6573797400, 11021082384, 1048576, 1.414214, 0.047470, 10510),
    (32, 2048, 16, 2818575450, 1677724672, 10770991248, 11676960912, 20132696064, 2097152, 2.000000, 0.036750, 9600),
]


@pytest.mark.parametrize("row", WORKED, ids=lambda row: f"d{row[0]}")
def test_dial_gives_the_worked_values(row):
    depth, width, heads, total, scaling, flops, flops_full, tokens, batch, lr_scale, decay, iterations = row
    config = Config.from_flat({"depth": depth})
    shape = model_shape(config.model)
    assert (shape.n_embd, shape.n_head) == (width, heads)
    counts = param_counts(shape)
    assert (counts.total, counts.scaling) == (total, scaling)
    assert flops_per_token(shape) == flops
    assert flops_per_token(dataclasses.replace(shape, windows=(2048,) * depth)) == flops_full
    found = recipe(config)
    assert (found.tokens_target, found.total_batch_size, found.num_iterations) == (tokens, batch, iterations)
    assert found.lr_scale == pytest.approx(lr_scale, abs=5e-7)  # the table has six decimals
    assert found.weight_decay == pytest.approx(decay, abs=5e-7)


def test_width_rounds_up_to_whole_heads():
    assert model_shape(Config.from_flat({"depth": 3, "aspect_ratio": 50}).model).n_embd == 256


def test_windows_tile_and_end_in_full_context():
    assert window_sizes("SSSL", 6, 2048, 0.25) == (512, 512, 512, 2048, 512, 2048)
    assert window_sizes("s", 2, 2048, 0.5) == (1024, 2048)
    assert window_sizes("SL", 3, 300, 0.25) == (128, 300, 300)  # 75 rounds up to 128
    assert window_sizes("SL", 3, 100, 0.25) == (100, 100, 100)  # never more than the context


def test_horizon_precedence_is_iterations_then_flops_then_ratio():
    both = Config.from_flat({"depth": 4, "num_iterations": 7, "target_flops": 1e17})
    assert recipe(both).num_iterations == 7
    flops = recipe(Config.from_flat({"depth": 4, "target_flops": 1e17}))
    assert flops.flops == pytest.approx(1e17, rel=0.5 / flops.num_iterations)


def test_decay_and_batch_follow_the_ratio_even_when_iterations_are_given():
    given, free = (recipe(Config.from_flat({"depth": 6} | extra)) for extra in ({"num_iterations": 5}, {}))
    assert (given.weight_decay, given.total_batch_size) == (free.weight_decay, free.total_batch_size)


def test_without_a_ratio_the_quotient_is_that_of_the_scaling_parameters():
    bare = recipe(Config.from_flat({"depth": 6, "num_iterations": 5, "target_param_data_ratio": -1}))
    free = recipe(Config.from_flat({"depth": 6}))
    assert bare.total_batch_size == free.total_batch_size
    assert bare.weight_decay == pytest.approx(free.weight_decay, rel=1e-6)  # tokens are rounded down to whole ones
    assert bare.tokens_target is None


def test_optimal_batch_is_the_reference_at_the_reference():
    assert optimal_batch(1.0) == 2**19
    assert optimal_batch(2**4) == 2 ** round(19 + 4 * 0.383)


def test_target_flops_below_one_step_are_refused():
    with pytest.raises(ConfigError, match="less than one step"):
        recipe(Config.from_flat({"depth": 4, "target_flops": 1e9}))


def test_plan_states_its_own_arithmetic():
    plan = make_plan(Config.from_flat({"depth": 10}))
    batch, horizon = plan["batch"], plan["horizon"]
    assert batch["rows"] * plan["model"]["max_seq_len"] == batch["total_batch_size"]
    assert horizon["tokens"] == horizon["num_iterations"] * batch["total_batch_size"]
    assert 48 not in batch["device_batch_sizes_that_divide"]


def test_unknown_device_has_no_mfu():
    assert device_peak("Abacus 3000") is None
    assert mfu_percent(1e9, 1e6, None, 8) is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GeForce RTX 4070", 58.3),
        ("NVIDIA L4", 121),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GeForce RTX 4070 Ti", 80.2),
    ],
)
def test_device_names_as_the_driver_spells_them_are_found(name, teraflops):
    peak = device_peak(name)
    assert peak is not None
    assert peak.flops == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    ["NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4070 SUPER", "NVIDIA GeForce RTX 5070 Ti",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"],
)  # fmt: skip
def test_device_that_only_begins_like_a_listed_one_is_unknown(name):
    assert device_peak(name) is None


def test_mfu_is_the_share_of_all_devices_peak():
    assert mfu_percent(1e9, 1e6, 1e15, 2) == pytest.approx(50.0)
