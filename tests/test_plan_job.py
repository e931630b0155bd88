"""`jobs/plan.py`: a budget becomes a proposal and a preset, depths and machines become a table."""

import csv
import importlib.util
import json
import shlex
import tomllib
from pathlib import Path

import pytest

from raychat.errors import ConfigError
from raychat.planning import make_plan, recipe
from raychat.planning.money import priced
from raychat.planning.proposal import with_values

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def job():
    """jobs/plan.py as a module."""
    spec = importlib.util.spec_from_file_location("plan_job", ROOT / "jobs" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(job, tmp_path, capsys):
    """Runs the job in an empty base directory; gives what it prints."""

    def call(*args):
        assert job.main([*args, "--base-dir", str(tmp_path / "base")]) == 0
        return capsys.readouterr().out

    return call


def test_the_proposal_stands_among_its_neighbours(run):
    out = run("--gpu", "a100-40gb", "--gpus", "1", "--price-per-hour", "4.3", "--budget-usd", "4.4")
    assert out.startswith("proposal  depth 10, 32 sequences a pass, ")
    assert "budget: $4.40 at $4.30 an hour = 1.02 hours" in out
    rows = [line.split() for line in out.splitlines() if "undertrained" in line or "depth 10 makes" in line]
    assert [row[0] for row in rows] == ["8", "11", "12"]
    assert "python jobs/pretrain.py --depth 10 " in out
    assert " --price-per-hour 4.3" in next(line for line in out.splitlines() if line.startswith("to train it"))


def test_the_preset_that_is_written_is_the_proposal(run, tmp_path):
    file = tmp_path / "mine.toml"
    out = run("--gpu", "h100", "--budget-usd", "20", "--write-preset", str(file), "--eval-every", "500", "--gpus", "2")
    assert f"written to {file}" in out
    values = tomllib.loads(file.read_text())
    assert {"depth", "num_iterations", "device_batch_size", "eval_every", "gpu", "num_workers"} == set(values)
    assert (values["gpu"], values["num_workers"], values["eval_every"]) == ("h100", 2, 500)
    comment = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert "#     python jobs/plan.py --gpu h100 --budget-usd 20 --eval-every 500 --gpus 2" in comment


def test_a_preset_from_a_preset_holds_its_values_and_its_limits_are_the_budget(run, job, tmp_path):
    mine, written = tmp_path / "mine.toml", tmp_path / "written.toml"
    mine.write_text('window_pattern = "SL"\nmatrix_lr = 0.01\nmax_hours = 1.0\n')
    out = run("--preset", str(mine), "--gpu", "h100", "--write-preset", str(written))
    assert "budget: 1 hours" in out
    assert f"python jobs/pretrain.py --preset {mine}" in out
    values = tomllib.loads(written.read_text())
    assert (values["window_pattern"], values["matrix_lr"]) == ("SL", 0.01)
    assert "max_hours" not in values


def test_what_is_written_can_be_planned_and_costs_what_was_said(run, job, tmp_path):
    file = tmp_path / "mine.toml"
    run("--gpu", "a100-40gb", "--price-per-hour", "4.3", "--budget-usd", "9", "--write-preset", str(file))
    config = with_values(job.cli.load_presets(str(file)), base_dir=str(tmp_path / "base"), price_per_hour=4.3)
    cost = make_plan(config)["money"]["on_demand"][1]
    assert cost <= 9
    longer = with_values(config, num_iterations=round(1.1 * recipe(config).num_iterations))
    assert make_plan(longer)["money"]["on_demand"][1] > 9


def test_depths_and_machines_stand_side_by_side(run, tmp_path):
    out = run(
        "--depths", "8,10", "--machines", "p4d.24xlarge", "--gpus-list", "h100,8xh100", "--output", str(tmp_path / "o")
    )
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:7]] == ["8", "10"] * 3
    assert max(map(len, lines[:7])) <= 100
    rows = list(csv.DictReader((tmp_path / "o" / "plans.csv").read_text().splitlines()))
    kept = json.loads((tmp_path / "o" / "plans.json").read_text())
    assert [row["machine"] for row in rows] == [row["machine"] for row in kept]
    assert {row["machine"] for row in rows} == {"p4d.24xlarge", "1 x h100", "8 x h100"}
    for row, whole in zip(rows, kept, strict=True):
        assert int(row["tokens"]) == whole["plan"]["horizon"]["tokens"]
        low, mid, high = (float(row[f"hours_{end}"]) for end in ("low", "mid", "high"))
        assert low <= mid <= high
    assert float(rows[0]["usd_on_demand_mid"]) > 0


def test_a_row_that_cannot_be_says_why_and_keeps_its_place(run):
    out = run("--depths", "4,40", "--gpus-list", "rtx-4070")
    assert "depth 40 on 1 x rtx-4070: one sequence a pass needs" in out
    assert out.splitlines()[2].split() == ["40", "1", "x", "rtx-4070"]


def test_a_device_batch_that_is_given_is_kept_in_every_row(run, tmp_path):
    run("--depths", "4,6", "--gpus-list", "h100", "--device-batch-size", "8", "--output", str(tmp_path / "o"))
    rows = list(csv.DictReader((tmp_path / "o" / "plans.csv").read_text().splitlines()))
    assert {row["device_batch_size"] for row in rows} == {"8"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--depths", "8,x"], "--depths 'x' is no whole number"),
        (["--machines", "p4d.24xlarg"], "p4d.24xlarge"),
        (["--gpu", "h100", "--budget-usd", "-3"], "--budget-usd must be above 0"),
        (["--gpu", "h100", "--max-hours", "1e300"], "more than a century"),
        (["--gpu", "h100", "--budget-usd", "1e300"], "more than a century"),
        (["--gpu", "a100", "--max-hours", "3", "--fp8"], "^--fp8 cannot be used on a100-40gb"),
        (["--gpus-list", "0xh100"], "'0xh100' asks for no GPU"),
        (["--gpu", "h100", "--max-hours", "3", "--write-preset", "mine"], "ends in .toml, for example mine.toml"),
        (["--gpu", "h100", "--max-hours", "3", "--write-preset", "/none/x.toml"], "/none/x.toml cannot be written"),
        (["--gpu", "h100", "--depths", "4", "--output", "/dev/null"], "--output /dev/null cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(job, args, message):
    with pytest.raises(ConfigError, match=message):
        job.main(args)


def test_help_names_its_own_flags_and_where_the_others_are(job, capsys):
    with pytest.raises(SystemExit) as end:
        job.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "--write-preset" in out
    assert "flags are those of jobs/pretrain.py" in out


def command_to_train(out):
    """The arguments of the command that a proposal ends with."""
    line = next(line for line in out.splitlines() if line.startswith("to train it"))
    return shlex.split(line.partition("jobs/pretrain.py")[2])


def test_the_run_of_a_proposal_has_its_price_and_its_places(run, job, tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text('[[machine]]\nname = "mine"\ngpu = "h100"\ngpus = 2\non_demand = 5.0\n')
    limits = ["--budget-usd", "20", "--max-hours", "9"]
    out = run("--machine", "mine", "--prices", str(prices), *limits, "--seed", "3", "--preset", "h100_d12")
    assert "at $5.00 an hour of 1 x mine" in out
    config = job.cli.parse(command_to_train(out), prog="", description="")
    assert priced(config).money.price_per_hour == 5
    assert config.base_dir == tmp_path / "base"
    assert (config.run.seed, config.cluster.num_workers, config.model.depth) == (3, 2, 12)
    assert config.money.max_hours == config.money.budget_usd == -1
    cost = make_plan(config)["money"]["on_demand"]
    assert f"${cost[1]:.2f} (${cost[0]:.2f} to ${cost[2]:.2f})" in out


def test_credentials_are_neither_shown_nor_written(run, tmp_path):
    file, secret = tmp_path / "mine.toml", "s3://key:hidden@bucket/text"
    places = ["--corpus", secret, f"--storage-path={secret}"]
    out = run("--gpu", "h100", "--max-hours", "3", *places, "--write-preset", str(file))
    assert "s3://key@bucket/text" in command_to_train(out)
    assert "hidden" not in out + file.read_text()


def test_flags_may_be_written_with_underscores(run):
    assert run("--gpu", "h100", "--budget_usd=3") == run("--gpu", "h100", "--budget-usd", "3")


def test_the_price_table_is_listed_with_ones_own_and_sources(run, tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text('[[machine]]\nname = "mine"\ngpu = "l4"\ngpus = 1\nspot = [1.0, 10.0]\nas_of = "2026-11-01"\n')
    out = run("--list-prices", "--prices", str(prices))
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert lines["p5.4xlarge"] == ["1", "x", "h100", "AWS", "$6.88"]
    assert lines["mine"] == ["1", "x", "l4", "$1.00", "to", "$10.00"]
    assert f"mine: of 2026-11-01 ({prices})" in out


def test_long_reasons_stay_in_their_column(run):
    lines = run("--gpu", "rtx-3080", "--max-hours", "100000").splitlines()
    head = next(line for line in lines if line.endswith("why"))
    first = next(index for index, line in enumerate(lines) if "one sequence a pass" in line)
    at = head.index("why")
    assert max(map(len, lines[: first + 2])) <= 100
    assert lines[first][:at].split() == [lines[first].split()[0]]
    assert (lines[first + 1][:at].strip(), lines[first + 1][at] != " ") == ("", True)


def test_several_numbers_of_gpus_become_a_table_that_is_kept(run, tmp_path):
    out = run("--depth", "12", "--gpu", "h100", "--gpus", "1,8", "--output", str(tmp_path / "plans"))
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["GPUs", "1", "8"]
    assert "plain data parallelism pays no more" in out
    kept = json.loads((tmp_path / "plans" / "plans.json").read_text())
    assert [row["plan"]["target"]["workers"] for row in kept] == [1, 8]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget-usd", "5"], "without a budget"),
        (["--gpu", "cpu"], "kind of GPU"),
        (["--depths", "4,6"], "one depth"),
    ],
)
def test_several_numbers_of_gpus_go_with_one_model_and_a_gpu(job, more, said):
    with pytest.raises(ConfigError, match=said):
        job.main(["--depth", "12", "--gpu", "h100", "--gpus", "1,8", *more])
