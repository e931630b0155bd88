"""What a budget buys: the rule of the proposal, and its laws."""

import itertools

import pytest

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import model_shape, param_counts, recipe
from raychat.planning.outlook import look_ahead, memory_of, rank_memory
from raychat.planning.plan import OPTIMAL_RATIO, optimal_iterations
from raychat.planning.proposal import fit_batch, hours_of, propose, round_down, with_values
from raychat.planning.target import resolve_target


@pytest.fixture
def config(tmp_path):
    """The defaults on one A100 at $4.30 an hour, in a base directory without anything."""
    return Config.from_flat({"gpu": "a100-40gb", "price_per_hour": 4.3, "base_dir": str(tmp_path)})


def proposed(config, budget_usd, **pins):
    """The proposal for so many dollars, with these settings pinned."""
    config = with_values(config, **pins)
    target = resolve_target(config)
    hours, _ = hours_of(config, target, budget_usd=budget_usd, max_hours=None)
    return propose(config, target=target, hours=hours, pins=set(pins))


def hours(config):
    return look_ahead(config, resolve_target(config)).time.total.mid / 3600


def test_horizon_is_the_longest_round_one_that_the_budget_pays_for(config):
    found = proposed(config, 4.4)
    chosen, n = found.chosen.config, found.chosen.outlook.recipe.num_iterations
    grain = 10 ** (len(str(n)) - 2)
    assert n == round_down(n)
    assert hours(chosen) <= found.hours < hours(with_values(chosen, num_iterations=n + grain))


def test_the_deepest_even_depth_that_can_be_made_compute_optimal_is_chosen(config):
    found = proposed(config, 4.4)
    chosen = found.chosen
    assert chosen.depth % 2 == 0
    assert chosen.ratio >= OPTIMAL_RATIO * 0.999  # whole iterations
    deeper = next(other for other in found.neighbours if other.depth == chosen.depth + 2)
    assert deeper.ratio < OPTIMAL_RATIO
    assert "undertrained" in deeper.why


def test_more_money_never_buys_less(config):
    found = [proposed(config, budget) for budget in (1, 2, 4.4, 10, 40, 200)]
    for less, more in itertools.pairwise(found):
        assert more.chosen.depth >= less.chosen.depth
        assert more.chosen.outlook.recipe.flops > less.chosen.outlook.recipe.flops


def test_dollars_are_hours_at_the_price_of_all_machines(config):
    eight = with_values(config, machine="p4d.24xlarge", gpu="", price_per_hour=-1.0)
    spent, _ = hours_of(eight, resolve_target(eight), budget_usd=21.958 * 3, max_hours=None)
    assert spent == pytest.approx(3)
    two = with_values(eight, num_workers=16)
    assert hours_of(two, resolve_target(two), budget_usd=21.958 * 3, max_hours=None)[0] == pytest.approx(1.5)


def test_the_smaller_of_two_limits_counts(config):
    target = resolve_target(config)
    assert hours_of(config, target, budget_usd=4.3, max_hours=0.5)[0] == 0.5
    assert hours_of(config, target, budget_usd=4.3, max_hours=2.0)[0] == pytest.approx(1)


def test_pins_stay(config):
    found = proposed(config, 4.4, depth=11, total_batch_size=262144, window_pattern="L", device_batch_size=4)
    flat = found.chosen.config.flat()
    assert (flat["depth"], flat["total_batch_size"], flat["window_pattern"]) == (11, 262144, "L")
    assert flat["device_batch_size"] == 4
    assert found.without_pins.depth == proposed(config, 4.4).chosen.depth


def test_a_pinned_horizon_stays_and_decides_the_depth(config):
    found = proposed(config, 10, target_param_data_ratio=12.0)
    chosen = found.chosen
    assert chosen.outlook.recipe.num_iterations == recipe(with_values(config, depth=chosen.depth)).num_iterations
    assert chosen.hours <= found.hours
    deeper = next(other for other in found.neighbours if other.depth == chosen.depth + 2)
    assert deeper.hours > found.hours
    assert deeper.why == "more than the budget pays for"


@pytest.mark.parametrize("pin", [{"num_iterations": 1500}, {"target_flops": 4e17}], ids=str)
def test_pinned_iterations_and_flops_go_to_a_model_that_they_train_enough(config, pin):
    chosen = proposed(config, 100, **pin).chosen
    assert chosen.ratio >= OPTIMAL_RATIO * 0.999
    deeper = proposed(config, 100, depth=chosen.depth + 2, **pin).chosen
    assert deeper.ratio < OPTIMAL_RATIO


def test_a_pinned_depth_beyond_the_budget_gets_what_the_budget_pays_for(config):
    chosen = proposed(config, 2, depth=14).chosen
    assert chosen.depth == 14
    assert 0 < chosen.ratio < OPTIMAL_RATIO


def test_device_batch_divides_and_fits_and_is_the_usual_one_where_that_fits(config):
    target = resolve_target(config)
    for depth, most in ((4, 32), (10, 32), (20, 32), (26, 32)):
        sized = fit_batch(with_values(config, depth=depth), target)
        size = sized.batch.device_batch_size
        assert (recipe(sized).total_batch_size // 2048) % size == 0
        assert size <= most
        assert memory_of(sized, target).total <= rank_memory(target)


def test_a_model_that_fits_nowhere_is_refused_with_the_memory_it_needs(config):
    small = with_values(config, gpu="rtx-3080", depth=48)
    with pytest.raises(ConfigError, match=r"one sequence a pass needs .* GiB, of 10\.0 GiB 90% can be used"):
        fit_batch(small, resolve_target(small))


def test_optimal_iterations_are_the_lineages_ratio(config):
    shape = model_shape(with_values(config, depth=10).model)
    assert optimal_iterations(shape, 2**19) == 1404
    assert 1404 * 2**19 <= 10.5 * param_counts(shape).scaling < 1405 * 2**19


def test_a_budget_for_nothing_is_refused_with_what_the_least_takes(config):
    with pytest.raises(ConfigError, match="pays for no model: depth 2 takes"):
        proposed(config, 0.01)


def test_dollars_without_a_price_are_refused(config):
    free = with_values(config, gpu="rtx-4070", price_per_hour=-1.0)
    with pytest.raises(ConfigError, match="needs a price, and none is known for rtx-4070"):
        hours_of(free, resolve_target(free), budget_usd=5, max_hours=None)


@pytest.mark.parametrize(("n", "rounded"), [(7, 7), (99, 99), (101, 100), (1599, 1500), (100_000, 100_000)])
def test_two_digits_stay(n, rounded):
    assert round_down(n) == rounded
