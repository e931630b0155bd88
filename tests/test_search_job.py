"""jobs/search.py: what its command line means."""

import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from raychat.cli import parse
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.on_ray.orders import as_flags
from raychat.search.book import Book, search_dir
from raychat.search.range_run import lines, range_config, recorded
from raychat.search.range_test import RATES, RangeTest

ROOT = Path(__file__).resolve().parents[1]
job = runpy.run_path(str(ROOT / "jobs" / "search.py"))


def spec_of(*argv: str):
    """The search that a command line describes."""
    at = argv.index("--") if "--" in argv else len(argv)
    flags = argv[at + 1 :]
    base = job["base_flags"](flags, parse(flags, prog="search", description=""))
    return job["specification"](job["parser"]().parse_args(argv[:at]), base)


def test_options_stand_over_the_file_and_flags_go_into_the_base(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'seeds = [1]\nkeep = 0.6\n[base]\npreset = "d4-cpu"\ndepth = 6\n[space]\nmatrix_lr = [0.01, 0.02]\n'
    )
    spec = spec_of(str(file), "--seeds", "3,4", "--space", "depth=2,3", "--", "--depth", "20", "--warmup-ratio", "0.1")
    assert (spec.name, spec.seeds, spec.keep) == ("mine", (3, 4), 0.6)
    assert spec.base == {"preset": "d4-cpu", "depth": 20, "warmup_ratio": 0.1}
    assert sorted(spec.space) == ["depth", "matrix_lr"]
    assert spec.base_config.optim.warmup_steps == -1


def test_a_search_needs_no_file(tmp_path):
    spec = spec_of("--name", "rates", "--space", "matrix-lr={low = 0.01, high = 0.04, log = true, num = 3}")
    assert [round(value, 4) for value in spec.space["matrix_lr"].grid()] == [0.01, 0.02, 0.04]
    assert spec_of("--name", "one", "--space", "depth=3").space["depth"].grid() == (3,)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "Nothing says what to search"),
        (("--space", "depth"), "--space 'depth': write a flag and its values"),
        (("--iso-flops", "1e12"), "--iso-flops needs --depths"),
        (("--resume", "x", "--space", "depth=2"), "leave out its file"),
        (("--resume", "absent"), "There is no search in"),
        (("--name", "s", "--space", "depht=2"), "There is no setting 'depht'"),
    ],
)
def test_what_cannot_be_is_refused(argv, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        spec_of("--base-dir", str(tmp_path), *argv)


def test_iso_flops_is_a_grid_of_whole_runs_without_a_run_of_its_own_for_the_base():
    spec = spec_of("--iso-flops", "1e12,1e13", "--depths", "2,3,4", "--", "--preset", "d4-cpu")
    points = {(arm.settings.get("target_flops", 1e12), arm.settings.get("depth", 2)) for arm in spec.arms()}
    assert points == {(flops, depth) for flops in (1e12, 1e13) for depth in (2, 3, 4)}
    assert len(spec.arms()) == 6
    assert (spec.name, spec.scheduler, spec.noise_repeats, spec.confirm_seeds) == ("iso-flops", "none", 0, 0)


def test_depths_alone_are_a_miniseries():
    spec = spec_of("--depths", "2,4", "--", "--preset", "d4-cpu")
    assert (spec.name, [arm.settings.get("depth", 2) for arm in spec.arms()]) == ("miniseries", [2, 4])


def test_resume_takes_the_search_as_it_was_begun_with_other_limits(tmp_path):
    spec = spec_of("--base-dir", str(tmp_path), "--name", "s", "--space", "depth=2,3", "--", "--preset", "d4-cpu")
    Book.open(search_dir(tmp_path, "s"), spec).close()
    again = spec_of("--base-dir", str(tmp_path), "--resume", "s", "--max-hours", "2")
    assert (again.base, again.max_hours) == (spec.base, 2)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"preset": "d4-cpu", "depth": 3, "matrix_lr": 0.015, "allow_config_change": True, "model_tag": "s-001"},
        {"preset": "d4-cpu", "warmup_steps": -1, "warmup_ratio": 0.25, "num_workers": 2, "save_every": 10},
        {"grad_clip": 1.0, "corpus": "a folder/with spaces", "eval_every": -1, "address": "127.0.0.1:6379"},
    ],
)
def test_the_command_of_a_trial_parses_to_its_configuration(flags):
    from raychat.cli import load_presets

    flags = dict(flags)
    config = Config.from_flat(flags, load_presets(flags.pop("preset", "")) if "preset" in flags else None)
    assert parse(as_flags(config), prog="pretrain", description="") == config


def test_what_a_range_test_prints_is_the_command_of_a_search_from_the_same_base(tmp_path):
    flags = ["--preset=d4-cpu", "--depth=3", "--matrix-lr=0.03", "--corpus=my texts", "--seed=7", "--model-tag=mine"]
    config = parse([*flags, f"--base-dir={tmp_path}"], prog="search", description="")
    rates = {name: getattr(config.optim, name) for name in RATES}
    multiples = [0.01 * 1000 ** (n / 99) for n in range(100)]
    losses = [9 - 4 / (1 + (0.2 / m) ** 3) + (5.0 if m > 4 else 0.0) for m in multiples]
    found = RangeTest.of(rates, multiples, losses)
    spec = spec_of(*shlex.split(lines(config, found)[-2])[2:])
    assert spec.name == "mine-rates"
    assert spec.base == {"preset": "d4-cpu", "depth": 3, "matrix_lr": 0.03, "corpus": "my texts"}
    grid = spec.space["matrix_lr"].grid()
    assert (grid[0], grid[-1]) == pytest.approx((0.03 * found.found.low, 0.03 * found.found.high), rel=5e-3)

    test = range_config(config, steps=100, least=0.1, most=5.0)
    again = shlex.split(recorded(config, test, least=0.1, most=5.0).command)[2:]
    at = again.index("--")
    args = job["parser"]().parse_args(again[:at])
    assert (args.lr_range, args.range_steps, args.range_least, args.range_most) == (True, 100, 0.1, 5.0)
    assert sorted(again[at + 1 :]) == sorted(flags)


def test_a_range_test_is_no_search_and_has_a_plan(tmp_path, capsys):
    flags = ["--preset", "d4-cpu", "--gpu", "cpu", "--dry-run"]
    with pytest.raises(ConfigError, match="--lr-range is one run and no search"):
        job["main"](["--lr-range", "--space", "depth=2", "--", *flags])
    assert job["main"](["--base-dir", str(tmp_path), "--lr-range", "--range-steps", "99", "--", *flags]) == 0
    said = capsys.readouterr().out
    assert "warm-up 99 steps" in said
    assert "rises exponentially from 0.001 of these rates" in said
    assert not list(tmp_path.iterdir())


def test_help_loads_neither_torch_nor_ray():
    code = (
        "import runpy, sys\nsys.argv = ['jobs/search.py', '--help']\n"
        "try:\n    runpy.run_path('jobs/search.py', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "sys.exit(len({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
