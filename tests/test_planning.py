"""The depth dial against worked values and its laws; the plan against the arithmetic of the source documents."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raychat.cli import load_presets, preset_names
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import (
    flops_per_token,
    format_plan,
    keep_plan,
    make_plan,
    model_shape,
    optimal_batch,
    param_counts,
    recipe,
    window_sizes,
)
from raychat.planning.devices import GIB, device_peak, mfu_percent
from raychat.planning.duration import Measured
from raychat.planning.layout import WIDTH, dollars, duration, spread
from raychat.planning.plan import MADE
from raychat.planning.proposal import with_values
from raychat.planning.target import resolve_target

ROOT = Path(__file__).resolve().parents[1]

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


@pytest.fixture
def a100(tmp_path):
    """The run of document 004, planned for its machine and price."""
    return with_values(load_presets("a100_d10"), price_per_hour=4.3, base_dir=str(tmp_path))


def within(three, value):
    low, _, high = three
    return low <= value <= high


def size_of(plan, device_batch_size):
    """The row of the table of device batch sizes."""
    return next(size for size in plan["batch"]["sizes"] if size["device_batch_size"] == device_batch_size)


def test_horizon_of_the_a100_run_is_that_of_its_document(a100):
    horizon = make_plan(a100)["horizon"]
    assert (horizon["num_iterations"], horizon["tokens"]) == (1500, 1500 * 524288)
    assert horizon["optimal_iterations"] == 1404
    assert "786M tokens needed" in format_plan(make_plan(a100))


def test_a_batch_of_48_is_refused_before_a_machine_is_rented(a100):
    with pytest.raises(ConfigError, match=r"524,288 tokens / \(48 x 2,048\) = 5\.33 passes"):
        make_plan(with_values(a100, device_batch_size=48))
    assert "48 is impossible: 524,288 / (48 x 2,048) = 5.33 passes" in format_plan(make_plan(a100))


def test_batch_table_has_the_documents_passes_memory_and_steps(a100):
    plan = make_plan(a100)
    half, usual, double = (size_of(plan, size) for size in (16, 32, 64))
    assert (half["passes"], usual["passes"]) == (16, 8)
    assert half["memory_bytes"] == pytest.approx(11.6 * GIB, rel=0.1)
    assert usual["memory_bytes"] == pytest.approx(21.2 * GIB, rel=0.1)
    assert (half["fits"], usual["fits"], double["fits"]) == (True, True, False)
    assert usual["step_s"][1] == pytest.approx(1.77, rel=0.01)
    assert half["step_s"][1] == pytest.approx(1.82, rel=0.01)
    assert plan["memory"]["largest_batch"] == 32
    assert plan["memory"]["with_full_loss"] is None  # it is the one chosen


def test_another_loss_says_what_full_would_need_and_why(a100):
    memory = make_plan(with_values(a100, loss="chunked"))["memory"]
    full = memory["with_full_loss"]
    assert full["total"] == make_plan(a100)["memory"]["total"]
    assert memory["total"] < full["total"]
    assert (memory["largest_batch"], full["largest_batch"]) == (64, 32)
    assert "logits over the whole vocabulary" in full["why"]


def test_parts_of_memory_and_of_time_are_the_whole(a100):
    plan = make_plan(a100)
    sizes = [value for value in plan["memory"]["parts"].values() if isinstance(value, int)]
    assert sum(sizes) == plan["memory"]["total"]
    parts = ("startup", "tokenizer", "tokenizing", "steps", "evaluation", "checkpoints", "replay")
    for i in range(3):
        assert sum(plan["time"][part][i] for part in parts) == pytest.approx(plan["time"]["total"][i])


def test_shards_are_those_of_the_document_before_packing_and_more_after(a100):
    data = make_plan(a100)["data"]
    low, _, high = data["shards_by"]["unpacked"]
    assert (low, high) == (12, 16)
    assert data["shards_by"]["best-fit"][2] > high
    assert data["shards_there"] == 17  # 18 with the one that validates
    assert within(data["tokens_by"]["keep"], 17 * 250e6 / 4.2)


def test_time_and_money_of_the_document_lie_in_the_ranges(a100):
    plan = make_plan(a100)
    time, money = plan["time"], plan["money"]
    assert within(time["total"], 60.7 * 60)
    assert within(money["on_demand"], 4.36)
    assert time["eval_passes"] == 640
    assert within(time["evaluation"], 600)
    assert within(time["eval_s"], 70)
    assert money["on_demand"][1] == pytest.approx(4.3 * time["total"][1] / 3600)


def test_the_4070_takes_the_33_hours_of_its_document(tmp_path):
    plan = make_plan(with_values(load_presets("4070_d12"), base_dir=str(tmp_path)))
    assert plan["horizon"]["num_iterations"] == 100_000
    assert within(plan["time"]["total"], 33 * 3600)
    assert plan["horizon"]["of_optimal"] > 5  # far beyond: the plan says it
    assert "5.67 times" in format_plan(plan)


def test_limits_say_by_how_much_they_are_too_small(a100):
    def exceeded(**limits):
        return [limit["exceeded"] for limit in make_plan(with_values(a100, **limits))["limits"]]

    assert exceeded() == []
    low, mid, high = make_plan(a100)["money"]["on_demand"]
    assert exceeded(budget_usd=0.9 * low) == ["surely"]
    assert exceeded(budget_usd=(low + mid) / 2) == ["probably"]
    assert exceeded(budget_usd=(mid + high) / 2) == ["possibly"]
    assert exceeded(budget_usd=1.1 * high, max_hours=0.5) == ["surely", "no"]


def test_what_is_not_known_is_null_and_the_text_says_why(tmp_path):
    unpriced = make_plan(with_values(load_presets("4070_d12"), base_dir=str(tmp_path)))
    assert unpriced["money"]["on_demand"] is None
    assert unpriced["money"]["spot"] is None
    assert "no price is known for rtx-4070: give --price-per-hour" in format_plan(unpriced)
    config = with_values(load_presets("l4_d6"), base_dir=str(tmp_path))
    nameless = dataclasses.replace(resolve_target(config), gpu="Abacus 3000", peak=None, memory_bytes=None)
    unknown = make_plan(config, target=nameless)
    assert (unknown["time"], unknown["money"], unknown["memory"]["fits"]) == (None, None, None)
    assert "no speed of 'Abacus 3000' is known: give --mfu" in format_plan(unknown)


def test_what_was_measured_takes_the_place_of_the_forecast(a100):
    plan = make_plan(a100, measured=Measured(step_s=2.0, peak_memory_bytes=30 * GIB))
    assert plan["time"]["step_s"][1] == 2.0
    assert (plan["memory"]["total"], plan["memory"]["measured"]) == (30 * GIB, True)
    assert plan["memory"]["calculated"] == make_plan(a100)["memory"]["total"]
    assert plan["measured"]["step_s"] == 2.0
    assert "30.0 GiB of 40.0 GiB, measured (calculated: 21." in format_plan(plan)


def test_a_measured_step_scales_those_of_the_other_batch_sizes(a100):
    before, after = make_plan(a100), make_plan(a100, measured=Measured(step_s=3.54))
    ratio = 3.54 / before["time"]["step_s"][1]
    for one, other in zip(before["batch"]["sizes"], after["batch"]["sizes"], strict=True):
        assert other["step_s"][1] == pytest.approx(ratio * one["step_s"][1])


def test_a_step_measured_where_no_speed_is_known_says_nothing_of_other_sizes(tmp_path):
    config = with_values(load_presets("l4_d6"), base_dir=str(tmp_path))
    nameless = dataclasses.replace(resolve_target(config), gpu="Abacus 3000", peak=None, memory_bytes=None)
    plan = make_plan(config, target=nameless, measured=Measured(step_s=2.0))
    chosen = plan["batch"]["device_batch_size"]
    timed = {size["device_batch_size"]: size["step_s"][1] for size in plan["batch"]["sizes"] if size["step_s"]}
    assert timed == {chosen: 2.0}


@pytest.mark.parametrize("name", preset_names())
def test_every_plan_is_plain_values_and_fits_the_terminal(name, tmp_path):
    plan = make_plan(with_values(load_presets(name), base_dir=str(tmp_path), max_hours=2.0))
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    lines = format_plan(plan).splitlines()
    assert max(map(len, lines)) <= WIDTH
    labels = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    several = ["exchange"] if plan["target"]["workers"] > 1 else []
    assert labels == [
        *(
            "model",
            "batch",
            "rates",
            "horizon",
            "machine",
            "memory",
            "data",
            "time",
            *several,
            "money",
            "limits",
            "sources",
        )
    ]


def test_a_plan_says_how_the_warmup_rises(a100):
    assert "exponentially" not in format_plan(make_plan(a100))
    plan = make_plan(with_values(a100, warmup_from=0.01))
    assert plan["rates"]["warmup_from"] == 0.01
    assert "the warm-up rises exponentially from 0.01 of these rates" in format_plan(plan)


def test_a_dry_run_keeps_the_forecast_that_a_run_began_with(a100):
    plan = make_plan(a100)
    path = a100.run_dir / "plan.json"
    assert keep_plan(plan, a100.run_dir) == f"written to {path}"
    assert json.loads(path.read_text()) == plan
    path.write_text(json.dumps(plan | {MADE: {"workers": 1}}))
    assert keep_plan(plan, a100.run_dir).startswith("not written")
    assert MADE in json.loads(path.read_text())


def test_a_dry_run_loads_nothing_heavy(tmp_path):
    code = (
        "import json, runpy, sys; sys.argv[:] = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(json.dumps(sorted({'torch', 'ray', 'numpy', 'pyarrow', 'mlflow'} & set(sys.modules))))"
    )
    flags = ["--dry-run", "--preset", "a100_d10", "--base-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "jobs" / "pretrain.py"), *flags],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "runs" / "d10" / "plan.json").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ([48 * 60, 55 * 60, 63 * 60], "55 (48 to 63) min"),
        ([1.6, 1.77, 2.0], "1.8 (1.6 to 2.0) s"),
        ([0.276, 0.387, 0.644], "387 (276 to 644) ms"),
        ([3600 * 31, 3600 * 33, 3600 * 36], "33 (31 to 36) h"),
        ([70, 70, 70], "70 s"),
        ([0, 0, 0], "0 s"),
    ],
)
def test_durations_are_in_the_unit_of_the_middle(seconds, text):
    assert duration(seconds) == text


def test_numbers_of_a_range_have_the_same_digits():
    assert spread([0.82, 0.92, 1.1]) == "0.92 (0.82 to 1.10)"
    assert spread([845.2, 944.4, 1214.3]) == "944 (845 to 1,214)"
    assert dollars([3.5, 4, 4.85]) == "$4.00 ($3.50 to $4.85)"
    assert dollars([151.2, 169, 204]) == "$169 ($151 to $204)"


def test_fp8_is_refused_before_a_machine_without_it_is_rented(a100):
    eight_bits = dataclasses.replace(a100.precision, fp8=True)
    with pytest.raises(ConfigError, match="--fp8 cannot be used on a100-40gb, which has no 8-bit floats"):
        make_plan(dataclasses.replace(a100, precision=eight_bits))
    hopper = dataclasses.replace(a100, precision=eight_bits, plan=dataclasses.replace(a100.plan, gpu="h100"))
    assert make_plan(hopper)["memory"]["fits"]


def test_a_plan_that_cannot_be_written_is_refused_with_the_place(tmp_path):
    (tmp_path / "file").write_text("")
    config = Config.from_flat({"depth": 4, "gpu": "h100", "base_dir": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match=r"cannot be written to .*file/runs/d4/plan\.json .*give a --base-dir"):
        keep_plan(make_plan(config), config.run_dir)


def test_few_and_many_are_written_as_people_write_them(tmp_path):
    small = {"total_batch_size": 8 * 2048, "device_batch_size": 8, "base_dir": str(tmp_path)}
    text = format_plan(make_plan(Config.from_flat(small | {"gpu": "h100"})))
    assert "8 sequences a step: 1 pass of 8 (16,384 tokens)" in text
    three = Config.from_flat(small | {"gpu": "h100", "device_batch_size": 1, "num_workers": 3})
    assert "8 sequences a step, at most 3 on each device: 3 passes of 1" in format_plan(make_plan(three))
    slow = Config.from_flat(small | {"gpu": "cpu", "depth": 40})
    assert re.search(r"in all; [1-9][\d.]* \([\d.]+ to [\d.]+\) tokens/s", format_plan(make_plan(slow)))
    assert re.search(r"\d,\d{3}\.\d GiB", format_plan(make_plan(Config.from_flat(small | {"depth": 100}))))
