"""Calibration: finished runs become the entries that forecasts read, and say how far those were off."""

import json

import pytest

from raychat.errors import ConfigError
from raychat.planning.calibration import calibrate, calibrate_runs
from raychat.planning.efficiency import core_rate, mfu_range

CPU = {"device_type": "cpu", "device_name": "cpu", "dtype": "float32"}
A100 = {"device_type": "cuda", "device_name": "NVIDIA A100-SXM4-40GB", "dtype": "bfloat16"}


def a_run(name="one", *, resolved=A100, depth=10, mfu=47.0, speed=1000.0, step=100, off=5.0, cores=2, **settings):
    return {
        "name": name,
        "summary": {
            "step": step,
            "tok_per_sec": speed,
            "mfu": mfu,
            "forecast": {"time_s": {"off_percent": off}},
        },
        "config": {
            "config": {"depth": depth, "fp8": False, "grad_checkpoint": False} | settings,
            "recipe": {"flops_per_token": 4e7},
            "resolved": resolved,
        },
        "plan": {"target": {"cores": cores, "machines": 1}},
    }


def test_runs_of_a_kind_become_one_entry_with_their_median_and_their_bounds():
    found = calibrate([a_run(mfu=mfu, off=off) for mfu, off in ((44.0, 9.0), (48.0, -2.0), (47.0, 1.0))], as_of="today")
    assert found.entries == [
        {
            "gpu": "a100-40gb", "depth": 10, "fp8": False, "dtype": "bfloat16", "percent": 47.0, "n": 3, "low": 44.0,
            "high": 48.0, "as_of": "today",
        }
    ]  # fmt: skip
    assert found.off == {"time_s": [9.0, -2.0, 1.0]}


def test_depths_and_precisions_are_apart():
    runs = [a_run(), a_run(depth=12), a_run(fp8=True), a_run(resolved=A100 | {"dtype": "float16"})]
    assert [entry["n"] for entry in calibrate(runs, as_of="").entries] == [1, 1, 1, 1]


def test_a_cpu_is_counted_by_core():
    [entry] = calibrate([a_run(resolved=CPU, speed=2000.0, mfu=None)], as_of="").entries
    assert (entry["gpu"], entry["flops_per_core"]) == ("cpu", 4e10)
    assert "percent" not in entry


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"step": 5}, "fewer than 20 steps"),
        ({"speed": None}, "fewer than 20 steps"),
        ({"grad_checkpoint": True}, "computed activations twice"),
        ({"mfu": None}, "peak of NVIDIA A100-SXM4-40GB is not known"),
        ({"resolved": A100 | {"device_name": "Abacus"}}, "peak of Abacus"),
        ({"resolved": CPU, "cores": 0}, "how many cores"),
    ],
)
def test_a_run_that_says_nothing_is_left_out_with_the_reason(changes, why):
    found = calibrate([a_run("odd", **changes)], as_of="")
    assert found.entries == []
    assert why in found.left_out["odd"]


def write(folder, run):
    folder.mkdir(parents=True)
    for name in ("summary", "config", "plan"):
        (folder / f"{name}.json").write_text(json.dumps(run[name]))


def test_what_is_written_is_what_forecasts_read(tmp_path):
    write(tmp_path / "runs" / "gpu", a_run(mfu=33.0))
    write(tmp_path / "runs" / "cpu", a_run(resolved=CPU, speed=2000.0, depth=4))
    (tmp_path / "runs" / "empty").mkdir()
    lines = []
    calibrate_runs(tmp_path, tmp_path / "runs", lines.append)
    file = tmp_path / "calibration.json"
    known = {"device_batch_size": 32, "sequence_len": 2048, "dtype": "bfloat16", "user_mfu": -1.0}
    assert mfu_range("a100-40gb", 10, fp8=False, calibration=file, **known).percent.mid == pytest.approx(33.0)
    assert core_rate("float32", depth=4, width=256, calibration=file).flops.mid == pytest.approx(4e10)
    assert "a100-40gb d10 bfloat16: 33 (33 to 33)% MFU, 1 run" in lines
    assert "forecast of time: off by +5% (+5% to +5%, 2 runs)" in lines


@pytest.mark.parametrize(
    ("part", "content"),
    [("config", {"recipe": {}, "config": {}, "resolved": CPU}), ("summary", {"step": 30, "tok_per_sec": "fast"})],
)
def test_a_run_with_damaged_files_is_left_out_and_the_others_count(part, content):
    found = calibrate([a_run("odd", resolved=CPU) | {part: content}, a_run("good")], as_of="")
    assert "damaged" in found.left_out["odd"]
    assert [entry["n"] for entry in found.entries] == [1]
    assert found.off == {"time_s": [5.0]}


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no runs in .*elsewhere to calibrate with: give the --base-dir"):
        calibrate_runs(tmp_path, tmp_path / "elsewhere", lambda line: None)


def test_no_runs_write_nothing(tmp_path):
    (tmp_path / "runs").mkdir()
    lines = []
    calibrate_runs(tmp_path, tmp_path / "runs", lines.append)
    assert "nothing is written" in lines[-1]
    assert not (tmp_path / "calibration.json").exists()
