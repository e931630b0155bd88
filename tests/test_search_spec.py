"""Specifications of searches: read, refused, written, and turned into configurations."""

import random
import tomllib
from pathlib import Path

import pytest

from raychat.errors import ConfigError
from raychat.planning import recipe
from raychat.search.drafts import draft
from raychat.search.ranking import Objective
from raychat.search.space import Choices, Range, grid, parameter, sample, samples, spelled
from raychat.search.spec import BASELINE, SearchSpec
from raychat.search.spec_file import literal, load_spec, read_spec, to_toml

BASE = {"preset": "d4-cpu", "num_iterations": 100, "warmup_ratio": 0.1}
SPACE = {"depth": [2, 4], "matrix_lr": {"low": 0.01, "high": 0.04, "log": True, "num": 3}}
SEARCHES = Path(__file__).resolve().parents[1] / "jobs" / "searches"


def spec(**fields):
    return read_spec({"name": "s", "base": BASE, "space": SPACE} | fields)


def config_of(found, settings=None, **fields):
    trial = draft(found.arm(settings or {}), 7, **fields)
    return found.config(trial)


# The space


def test_a_grid_is_all_combinations_with_the_last_setting_fastest():
    space = {"depth": Choices(values=(2, 4)), "matrix_lr": Range(low=0.01, high=0.04, log=True, num=3)}
    assert list(grid(space)) == [{"depth": d, "matrix_lr": lr} for d in (2, 4) for lr in (0.01, 0.02, 0.04)]


def test_a_range_holds_its_ends_exactly_and_rounded_points_once():
    assert Range(low=0.1, high=0.7, num=7).grid() == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert Range(low=1, high=4, num=9, integer=True).grid() == (1, 2, 3, 4)


def test_draws_stay_inside_and_a_logarithmic_range_is_even_in_its_logarithm():
    rng = random.Random(0)
    space = {"matrix_lr": Range(low=0.001, high=0.1, log=True), "depth": Range(low=2, high=5, integer=True)}
    drawn = [sample(space, rng) for _ in range(2000)]
    assert all(0.001 <= d["matrix_lr"] <= 0.1 for d in drawn)
    assert {d["depth"] for d in drawn} == {2, 3, 4, 5}
    assert 0.47 < sum(d["matrix_lr"] < 0.01 for d in drawn) / 2000 < 0.53  # sd 0.011


def test_more_samples_begin_with_the_same_ones_and_none_comes_twice():
    space = {"depth": Choices(values=(2, 3, 4)), "matrix_lr": Choices(values=(0.01, 0.02))}
    found = samples(space, 20, 3)
    assert samples(space, 4, 3) == found[:4]
    assert len(found) == 6
    assert samples(space, 4, 4) != found[:4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "empty"),
        (4, "neither a list"),
        ([2, 3, 2], "twice"),
        ({"low": 1, "high": 2, "nmu": 3}, "did you mean num"),
        ({"low": 2, "high": 1}, "low < high"),
        ({"low": "a", "high": 1}, "low < high"),
        ({"low": 0, "high": 1, "log": True}, "above 0"),
        ({"low": 0, "high": 1, "num": 1}, "at least 2"),
        ({"low": 0, "high": 1, "log": 1}, "true or false"),
    ],
)
def test_values_that_are_no_parameter_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        parameter("matrix_lr", given)


# The file


def test_a_written_spec_reads_as_an_equal_one(tmp_path):
    found = spec(
        seeds=[1, 2],
        objective={"best_under": {"max_hours": 2}},
        rungs=[0.5, 1],
        budget_usd=4,
        base=BASE | {"price-per-hour": 2.0, "val_corpus": 'a "b"\\c\n'},
        space=SPACE | {"window_pattern": ["L", "SL"], "fp8": [True, False]},
    )
    (tmp_path / "s.toml").write_text(to_toml(found))
    again = load_spec(tmp_path / "s.toml")
    assert again == found
    assert again.objective == Objective(max_hours=2.0)
    assert again.base_config.money.price_per_hour == 2.0


def test_flags_stand_over_the_file_and_merge_with_its_tables(tmp_path):
    path = tmp_path / "lr-search.toml"
    path.write_text("seeds = [1]\n[base]\npreset = 'd4-cpu'\nnum-iterations = 50\n[space]\ndepth = [2, 4]\n")
    flags = {"seeds": [5], "noise-repeats": 0, "base": {"num-iterations": 80}, "space": {"matrix-lr": [0.01]}}
    found = load_spec(path, flags)
    assert (found.name, found.seeds, found.noise_repeats) == ("lr-search", (5,), 0)
    assert found.base_config.horizon.num_iterations == 80
    assert list(found.space) == ["depth", "matrix_lr"]
    assert load_spec(None, {"name": "a", "base": BASE, "space": {"depth": [2]}}).name == "a"


def test_a_preset_beside_the_caller_is_found_from_elsewhere_too(tmp_path, monkeypatch):
    (tmp_path / "own.toml").write_text("matrix_lr = 0.03\n")
    monkeypatch.chdir(tmp_path)
    written = to_toml(spec(base={"preset": "d4-cpu, own.toml"}))
    monkeypatch.chdir("/")
    again = read_spec(tomllib.loads(written))
    assert (again.base_config.optim.matrix_lr, again.base_config.model.depth) == (0.03, 4)


def test_literals_of_a_command_line_are_toml_or_text():
    assert literal("0.02") == 0.02
    assert literal("2,3") == [2, 3]
    assert literal("[2, 3]") == [2, 3]
    assert literal("{low = 1, high = 2}") == {"low": 1, "high": 2}
    assert literal("SSSL") == "SSSL"
    assert literal("L,SL") == ["L", "SL"]
    assert literal("true") is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": [1]}, "did you mean seeds"),
        ({"base": {"prest": "a"}}, r"\[base\].*did you mean preset"),
        ({"base": {"preset": "d4-cup"}}, "did you mean d4-cpu"),
        ({"base": BASE | {"seed": 3}}, "seeds = "),
        ({"base": BASE | {"depth": "two"}}, "wrong type"),
        ({"base": BASE | {"device_batch_size": 3}}, "impossible"),
        ({"space": {}}, "empty"),
        ({"space": {"depht": [2]}}, "did you mean depth"),
        ({"space": {"depth": [2, "three"]}}, "wrong type"),
        ({"space": {"depth": [2, 2.5]}}, "wrong type"),
        ({"space": {"depth": {"low": 1.5, "high": 3, "num": 2}}}, "whole numbers"),
        ({"space": {"dtype": ["float31"]}}, "use one of"),
        ({"space": {"window_pattern": ["L", "XL"]}}, "window-pattern"),
        ({"space": {"matrix_lr": {"low": 0.01, "high": 0.1}}}, "add `num`"),
        ({"space": {"eval_tokens": [1, 2]}}, "one validation text"),
        ({"space": {"corpus": ["a", "b"]}}, "val_corpus"),
        ({"space": {"seed": [1, 2]}}, "seeds = "),
        ({"space": {"price_per_hour": [1.0]}}, "nothing of the model"),
        ({"seeds": []}, "empty"),
        ({"seeds": [1, 2, 1]}, "1 twice"),
        ({"seeds": 42}, "list of numbers"),
        ({"seeds": [-1]}, "at least 0"),
        ({"rungs": [0.25, 0.5]}, "exactly 1"),
        ({"rungs": [0.5, 0.25, 1]}, "must rise"),
        ({"rungs": [0, 1]}, "above 0"),
        ({"keep": 1}, "below 1"),
        ({"keep": "half"}, "a number is needed"),
        ({"budget_usd": 5}, "needs a price"),
        ({"objective": "val_bpb_per_dollar"}, "needs a price"),
        ({"objective": {"best_under": {"budget_usd": 5}}}, "needs a price"),
        ({"objective": "core"}, "use 'val_bpb'"),
        ({"objective": ["val_bpb"]}, "use 'val_bpb'"),
        ({"objective": {"best_under": {"hours": 5}}}, "best_under"),
        ({"objective": {"best_under": {"max_hours": -5}}}, "above 0"),
        ({"searcher": "bayes"}, "'optuna'"),
        ({"scheduler": "hyperband"}, "'rungs'"),
        ({"searcher": "optuna", "scheduler": "rungs"}, "scheduler = 'none'"),
        ({"scheduler": "asha"}, "rank correlation"),
        ({"trials": 0}, "above 0"),
        ({"trials": 2.5}, "whole number"),
        ({"noise_repeats": -1}, "0 or more"),
        ({"concurrency": "many"}, "'auto'"),
        ({"concurrency": 0}, "'auto'"),
        ({"name": "a/b"}, "names a folder"),
        ({"name": ".."}, "names a folder"),
        ({"fork_at": 0.3}, "acts from the first step on"),
        ({"fork_at": 1.0}, "below 1"),
        (
            {"fork_at": 0.3, "scheduler": "rungs", "space": {"final_lr_frac": [0.0, 0.1]}},
            "goes with scheduler = 'none'",
        ),
        ({"fork_at": 0.6, "space": {"final_lr_frac": [0.0, 0.1]}}, "up to 0.35"),
        ({"base": 3}, "is a table"),
        ({"base": {"eval_every": -1}}, "would not be measured"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_in_one_message(fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        spec(**fields)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.toml").write_text("a = = b")
    for name, message in (("none.toml", "No such file"), ("bad.toml", "not valid TOML")):
        with pytest.raises(ConfigError, match=message) as caught:
            load_spec(tmp_path / name)
        assert name in str(caught.value)


def test_a_spec_without_a_name_or_with_a_typo_in_a_file_says_where(tmp_path):
    (tmp_path / "x.toml").write_text("keeep = 0.5\n")
    with pytest.raises(ConfigError, match=r"x\.toml.*did you mean keep"):
        load_spec(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match="no name"):
        load_spec(None, {"space": {"depth": [2]}})


def test_asha_is_offered_where_all_rates_are_constant():
    constant = BASE | {"warmdown_ratio": 0.0}
    assert spec(scheduler="asha", base=constant).scheduler == "asha"
    with pytest.raises(ConfigError, match=r"warmdown_ratio in \[space\] is 0\.4"):
        spec(scheduler="asha", base=constant, space={"warmdown_ratio": [0.0, 0.4]})


def test_a_fork_is_refused_only_where_the_trunk_would_have_trained_otherwise():
    late = {"warmdown_ratio": [0.2, 0.4], "final_lr_frac": [0.0, 0.1], "muon_momentum_final": [0.9, -1]}
    found = spec(fork_at=0.6, base=BASE | {"warmdown_ratio": 0.3}, space=late)
    assert (found.scheduler, found.fork_step()) == ("none", 60)
    with pytest.raises(ConfigError, match=r"warmdown_ratio in \[space\] 0\.41.*up to 0\.4 in"):
        spec(fork_at=0.6, base=BASE | {"warmdown_ratio": 0.3}, space={"warmdown_ratio": [0.2, 0.41]})


# Arms and configurations


def test_settings_that_are_the_bases_make_no_arm_of_their_own():
    found = spec()
    assert found.arm({"depth": 4}).name == BASELINE
    assert found.arm({"depth": 4, "matrix_lr": 0.03}) == found.arm({"matrix_lr": 0.03})
    assert found.arm({"depth": 2, "matrix_lr": 0.03}).title == "depth 2, matrix-lr 0.03"


def test_the_baseline_comes_first_and_once():
    arms = spec().arms()
    assert [arm.name for arm in arms].count(BASELINE) == 1
    assert arms[0].name == BASELINE
    assert len(arms) == 6  # of 6 in the grid, one is the base
    assert len(spec(base=BASE | {"depth": 3}).arms()) == 7
    assert len(spec(trials=2).arms()) == 3
    assert len(spec(searcher="random", trials=5).arms()) == 6


@pytest.mark.parametrize(
    ("horizon", "full"),
    [
        ({"num_iterations": 100}, 100),
        ({"num_iterations": -1, "target_flops": 1e15}, None),
        ({"num_iterations": -1}, None),
    ],
    ids=["iterations", "flops", "ratio"],
)
def test_a_rung_is_a_whole_run_of_that_share_of_the_horizon(horizon, full):
    found = spec(base=BASE | horizon)
    whole, half = config_of(found), config_of(found, rung=0.5)
    assert full is None or recipe(whole).num_iterations == full
    assert recipe(half).num_iterations == pytest.approx(recipe(whole).num_iterations / 2, abs=1)
    assert (half.optim, half.run.stop_at) == (whole.optim, -1)


def test_a_trial_differs_from_the_base_by_its_settings_seed_and_tag_alone():
    found = spec()
    own = config_of(found, {"matrix_lr": 0.03}).flat()
    base = found.base_config.flat()
    assert {name for name in own if own[name] != base[name]} == {"matrix_lr", "seed"}
    assert (own["matrix_lr"], own["seed"]) == (0.03, 7)


def test_a_way_to_warm_up_in_the_space_replaces_that_of_the_base():
    found = spec(space={"warmup_steps": [5, 10]})
    optim = config_of(found, {"warmup_steps": 5}).optim
    assert (optim.warmup_steps, optim.warmup_ratio) == (5, -1)


def test_on_constant_rates_asha_stops_in_the_middle_of_the_full_horizon():
    found = spec(scheduler="asha", base=BASE | {"warmdown_ratio": 0.0})
    half = config_of(found, rung=0.5)
    assert (half.run.stop_at, recipe(half).num_iterations) == (50, 100)
    assert config_of(found).run.stop_at == -1


def test_roles_decide_how_a_run_ends_and_what_it_may_change():
    found = spec(fork_at=0.3, base=BASE, space={"final_lr_frac": [0.0, 0.1]}, dry_run_steps=3, max_trial_hours=0.5)
    assert config_of(found, role="trunk", fork_step=30).run.stop_at == 30
    assert config_of(found, role="rehearsal").run.dry_run_steps == 3
    assert config_of(found, {"final_lr_frac": 0.1}, role="fork", fork_of="s-000").run.allow_config_change
    assert not config_of(found).run.allow_config_change
    assert config_of(found).money.max_hours == 0.5


def test_defaults_follow_from_the_searcher():
    assert spec().scheduler == "rungs"
    assert spec(searcher="random").trials == 20
    assert (spec(searcher="optuna").scheduler, spec(searcher="optuna").trials) == ("none", 20)


@pytest.mark.parametrize("path", sorted(SEARCHES.glob("*.toml")), ids=lambda path: path.stem)
def test_searches_that_ship_are_whole(path):
    found = load_spec(path)
    assert found.name == path.stem
    assert read_spec(tomllib.loads(to_toml(found))) == found
    assert isinstance(found, SearchSpec)


@pytest.mark.parametrize(
    ("value", "text"), [(1.8e12, "1.8e12"), (0.02, "0.02"), (1 / 3, repr(1 / 3)), (3, "3"), ("L", "L")]
)
def test_a_value_in_a_title_is_short_and_reads_back_the_same(value, text):
    assert spelled(value) == text
    assert isinstance(value, str) or float(spelled(value)) == value
