"""Devices by name, and the share of their peak they reach: the documents' figures, and the laws between them."""

import json

import pytest

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import flops_per_token, model_shape
from raychat.planning.devices import CPU_CORE_FLOPS, PEAKS, device_peak, find_gpu, local_gpu, plan_name
from raychat.planning.efficiency import COMPILED_GAIN, core_rate, mfu_range, pass_factor

NO_RUNS = {"mi300x", "mi250x"}  # devices whose peak is known, and no run on them or on one like them


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA GeForce RTX 4070 Ti", "rtx-4070-ti"),
    ],
)
def test_the_drivers_names_are_plan_names(name, plan):
    assert plan_name(name) == plan
    assert device_peak(name) == PEAKS[plan]


@pytest.mark.parametrize(
    ("spoken", "plan"),
    [("4070", "rtx-4070"), ("RTX4070", "rtx-4070"), ("rtx 4070 ti", "rtx-4070-ti"), ("A100 40GB", "a100-40gb"),
     ("a100 80 gb", "a100-80gb"), ("A100", "a100-40gb"), ("H-100", "h100"), ("h100_pcie", "h100-pcie"), ("L4", "l4")],
)  # fmt: skip
def test_a_person_may_write_a_gpu_in_many_ways(spoken, plan):
    assert find_gpu(spoken) == plan


def test_every_plan_name_means_itself():
    assert [find_gpu(name) for name in PEAKS] == list(PEAKS)
    assert [plan_name(name) for name in PEAKS] == list(PEAKS)


def test_an_unknown_gpu_is_refused_with_near_names():
    with pytest.raises(ConfigError, match=r"'a600'.*did you mean .*rtx-a6000"):
        find_gpu("a600")


def test_the_documents_step_times_are_what_the_table_gives():
    flops = flops_per_token(model_shape(Config.from_flat({"depth": 10}).model))
    for batch, seconds in ((32, 1.77), (16, 1.82)):
        percent = 100 * flops * 524_288 / seconds / 312e12
        found = mfu_range("a100-40gb", 10, device_batch_size=batch)
        assert found.percent.mid == pytest.approx(percent, rel=0.005)
        assert "document" in found.source


def test_a_mid_of_the_table_lies_between_those_of_the_depths_around():
    low, mid, high = (mfu_range("h100", depth).percent.mid for depth in (12, 15, 18))
    assert low < mid < high
    assert mid == pytest.approx((low + high) / 2)


def test_the_further_from_what_was_measured_the_wider():
    def width(depth):
        percent = mfu_range("rtx-4070", depth, device_batch_size=8).percent
        return percent.high / percent.low

    assert width(12) < width(10) < width(6) < width(4)


def test_larger_passes_are_never_less_efficient():
    found = [mfu_range("a100-40gb", 10, device_batch_size=2**k).percent.mid for k in range(7)]
    assert found == sorted(found)
    assert pass_factor(4096, 4096) == 1


def test_a_neighbours_figure_says_so_and_is_wider_than_the_neighbours():
    near, own = mfu_range("h200", 12), mfu_range("h100", 12)
    assert "no run on h200 is known: taken from h100" in near.source
    assert near.percent.low < own.percent.low <= own.percent.high < near.percent.high


def test_only_devices_without_any_run_have_no_mfu():
    assert {gpu for gpu in PEAKS if mfu_range(gpu, 12) is None} == NO_RUNS
    assert mfu_range("abacus-3000", 12) is None


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("gpu", sorted(set(PEAKS) - NO_RUNS))
def test_no_device_is_forecast_above_its_peak(gpu, fp8):
    for depth in (2, 12, 40):
        percent = mfu_range(gpu, depth, fp8=fp8, device_batch_size=64).percent
        assert 0 < percent.low <= percent.mid <= percent.high <= 100


def test_fp8_pays_where_the_lineage_found_that_it_pays():
    plain, fast = (mfu_range("h100", 24, fp8=fp8, device_batch_size=16).percent for fp8 in (False, True))
    assert fast.mid / plain.mid == pytest.approx(1.17, abs=0.01)
    assert mfu_range("h100", 12, fp8=True).percent.mid < mfu_range("h100", 12).percent.mid


def test_float32_reaches_a_part_of_the_bf16_peak_at_most():
    assert mfu_range("h100", 12, dtype="float32").percent.high <= mfu_range("h100", 12).percent.high / 2


def test_the_users_mfu_replaces_all_others():
    found = mfu_range("abacus-3000", 12, user_mfu=40.0)
    assert found.percent.as_list() == pytest.approx([36, 40, 44])
    assert "--mfu 40" in found.source


def calibration(path, *entries):
    path.write_text(json.dumps({"entries": list(entries)}))
    return path


def test_a_calibration_goes_over_the_table(tmp_path):
    entry = {"gpu": "h100", "depth": 12, "fp8": False, "dtype": "bfloat16", "percent": 44.0, "n": 3, "low": 43.0,
             "high": 45.5, "as_of": "2026-11-20"}  # fmt: skip
    path = calibration(tmp_path / "calibration.json", entry)
    found = mfu_range("h100", 12, calibration=path)
    assert found.percent.as_list() == [43.0, 44.0, 45.5]
    assert "3 finished runs" in found.source
    assert "2026-11-20" in found.source
    for other in ({"fp8": True}, {"dtype": "float32"}):
        assert mfu_range("h100", 12, calibration=path, **other) == mfu_range("h100", 12, **other)
    assert mfu_range("h100", 12, calibration=tmp_path / "none.json") == mfu_range("h100", 12)


def test_a_cpus_rate_is_that_of_its_cores_or_what_was_calibrated(tmp_path):
    for dtype in CPU_CORE_FLOPS:  # what refuses runs that would take days is an order of magnitude
        assert core_rate(dtype, depth=4).flops.scaled(1 / CPU_CORE_FLOPS[dtype]).includes(1)
    entry = {
        "gpu": "cpu",
        "depth": 4,
        "dtype": "float32",
        "flops_per_core": 6e10,
        "n": 1,
        "low": 5.8e10,
        "high": 6.1e10,
    }
    path = calibration(tmp_path / "calibration.json", entry)
    assert core_rate("float32", depth=4, calibration=path).flops.as_list() == [5.8e10, 6e10, 6.1e10]
    assert core_rate("bfloat16", depth=4, calibration=path) == core_rate("bfloat16", depth=4)


def test_wider_models_run_nearer_to_a_cores_peak_and_bf16_faster_than_float32():
    for dtype in ("bfloat16", "float32"):
        rates = [core_rate(dtype, depth=4, width=width).flops.mid for width in (64, 128, 256, 384, 4096)]
        assert rates == sorted(rates)
    assert core_rate("bfloat16", depth=4).flops.mid > 1.5 * core_rate("float32", depth=4).flops.mid


def test_compiled_a_core_is_faster_and_float16_which_nobody_measured_is_not():
    for dtype, gain in COMPILED_GAIN.items():
        plain, compiled = core_rate(dtype, depth=4), core_rate(dtype, depth=4, compiled=True)
        assert compiled.flops.mid == pytest.approx(gain * plain.flops.mid)
        assert "compiled" in compiled.source
        assert "compiled" not in plain.source
    assert core_rate("float16", depth=4, compiled=True).flops == core_rate("float16", depth=4).flops


def test_a_cores_rate_holds_for_runs_that_it_was_not_taken_from():
    assert core_rate("float32", depth=4, width=256).flops.includes(4.9e10)  # d4-cpu, docs/LOG.md
    assert core_rate("bfloat16", depth=6, width=384).flops.includes(16.7e10)  # 2.2 s a step, docs/checkpoints.md


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": [{"gpu": "h100", "depth": 12}]}'])
def test_a_damaged_calibration_is_named(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ConfigError, match=r"calibration\.json is damaged.*--calibrate"):
        mfu_range("h100", 12, calibration=tmp_path / "calibration.json")


def test_local_gpus_are_those_that_the_driver_shows(tmp_path, monkeypatch):
    monkeypatch.setattr("raychat.planning.devices.DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_gpu() is None
    for bus in ("0000:07:00.0", "0000:0f:00.0"):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text("Model: \t\t NVIDIA A100-SXM4-40GB\nIRQ:   \t\t 47\n")
    assert local_gpu() == ("NVIDIA A100-SXM4-40GB", 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert local_gpu() == ("NVIDIA A100-SXM4-40GB", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local_gpu() is None
