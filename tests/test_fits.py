"""Iso-FLOP parabolas, scaling laws, effects of parameters and the rate range test, on data whose truth is known."""

import math

import numpy as np
import pytest

from raychat.search.effects import Run, effects
from raychat.search.fits import NotEnoughEvidence, fit_scaling
from raychat.search.iso_flops import IsoFlops, budget_optimum
from raychat.search.loss_law import fit_loss_law
from raychat.search.rate_range import NoRange, smoothed, suggest_range

BUDGETS = (1e12, 2e12, 4e12, 8e12, 16e12)
A_EXPONENT, LOSS_EXPONENT = 0.46, 0.05


def sweep(*, noise=0.0, seed=0, budgets=BUDGETS, spread=(-1.2, -0.6, 0.0, 0.6, 1.2), curvature=0.02, drift=0.0):
    """Runs whose loss is exactly a parabola in ln N about 1e5 (C / 4e12)^0.46; `drift` moves the sizes off the optimum."""
    rng, found = np.random.default_rng(seed), []
    for budget in budgets:
        best = 1e5 * (budget / 4e12) ** A_EXPONENT
        for offset in spread:
            parameters = best * math.exp(offset + drift)
            level = 2.0 * (budget / 4e12) ** -LOSS_EXPONENT
            loss = level * (1 + curvature * (offset + drift) ** 2) * (1 + noise * rng.normal())
            found.append(IsoFlops(budget=budget, parameters=parameters, tokens=budget / 6 / parameters, loss=loss))
    return found


# One budget


def test_parabola_finds_its_lowest_point_from_uneven_sizes():
    points = sweep(budgets=(4e12,), spread=(-1.5, -0.2, 0.3, 0.9))
    found = budget_optimum(points[::-1])
    assert found.refusal == ""
    assert found.parameters == pytest.approx(1e5)
    assert found.tokens == pytest.approx(4e12 / 6 / 1e5)
    assert found.loss == pytest.approx(2.0)
    assert [found.curve_at(p.parameters) for p in found.points] == pytest.approx([p.loss for p in found.points])


@pytest.mark.parametrize(("drift", "side", "wanted"), [(1.5, "smallest", "smaller"), (-1.5, "largest", "larger")])
def test_minimum_beyond_the_models_is_a_boundary_and_no_optimum(drift, side, wanted):
    found = budget_optimum(sweep(budgets=(4e12,), drift=drift))
    assert found.parameters is None
    assert found.refusal.startswith(f"boundary: the lowest loss lies beyond the {side} model")
    assert found.refusal.endswith(f"add {wanted} ones")
    assert found.curve is not None  # a picture still shows it


def test_parabola_that_opens_downwards_has_no_optimum():
    assert "opens downwards" in budget_optimum(sweep(budgets=(4e12,), curvature=-0.02)).refusal


def test_repeats_of_two_sizes_are_not_three_sizes():
    assert budget_optimum(sweep(budgets=(4e12,), spread=(-1, -1, 1, 1))).refusal == "2 model sizes; a parabola takes 3"


# Laws


def test_exact_figures_give_exact_exponents():
    found = fit_scaling(sweep())
    assert found.parameters.exponent == pytest.approx(A_EXPONENT)
    assert found.tokens.exponent == pytest.approx(1 - A_EXPONENT)
    assert found.loss.local_exponent(4e12) == pytest.approx(LOSS_EXPONENT, rel=1e-3)
    assert found.refusal == ""
    there = found.predict(1e14)
    assert there.parameters.value == pytest.approx(1e5 * 25**A_EXPONENT)
    assert there.parameters.value * there.tokens.value * 6 == pytest.approx(1e14)
    assert there.ratio.value == pytest.approx(there.tokens.value / there.parameters.value)
    assert there.decades_beyond == pytest.approx(math.log10(1e14 / 16e12))


def test_intervals_cover_the_truth_at_about_their_level():
    """50 sweeps with 0.1% noise: 95% of the intervals should hold the exponent; 88% is 2 sd of 50 draws less."""
    fits = [fit_scaling(sweep(noise=0.001, seed=seed), draws=200) for seed in range(50)]
    held = [low <= A_EXPONENT <= high for low, high in (fit.parameters.exponent_interval for fit in fits)]
    assert np.mean(held) >= 0.88
    exponents = np.array([fit.parameters.exponent for fit in fits])
    assert abs(exponents.mean() - A_EXPONENT) < 3 * exponents.std() / math.sqrt(50)
    widths = [high - low for low, high in (fit.parameters.exponent_interval for fit in fits)]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * exponents.std(), rel=0.25)  # and they are no wider than needed


def test_noisier_runs_give_wider_intervals_and_the_seed_fixes_them():
    quiet, loud = (fit_scaling(sweep(noise=noise), draws=200).parameters.exponent_interval for noise in (0.0005, 0.002))
    assert loud.high - loud.low > 2 * (quiet.high - quiet.low)
    assert fit_scaling(sweep(noise=0.0005), draws=200).parameters.exponent_interval == quiet


def test_prediction_gets_less_certain_with_distance():
    found = fit_scaling(sweep(noise=0.001), draws=200)
    widths = [math.log(p.high / p.low) for p in (found.predict(c).ratio.interval for c in (4e12, 1e14, 1e16))]
    assert widths == sorted(widths)
    assert widths[2] > 3 * widths[0]


@pytest.mark.parametrize(
    ("budgets", "reason"),
    [
        (BUDGETS[:4], "4 of 4 budgets have an optimum, a law takes 5"),
        ((1e12, 1.5e12, 2e12, 3e12, 9e12), "differ by a factor of 9, a law takes 10"),
    ],
    ids=["four budgets", "less than a decade"],
)
def test_nothing_is_extrapolated_from_too_little(budgets, reason):
    found = fit_scaling(sweep(budgets=budgets), draws=50)
    assert found.predict(2.5e12).decades_beyond == 0  # between the budgets the law is a description
    with pytest.raises(NotEnoughEvidence, match=reason):
        found.predict(1e14)


def test_budget_without_an_optimum_does_not_count():
    points = [*sweep(budgets=BUDGETS[:4]), *sweep(budgets=BUDGETS[4:], drift=2.0)]
    found = fit_scaling(points, draws=50)
    assert found.refusal == "4 of 5 budgets have an optimum, a law takes 5"
    assert any("boundary" in note for note in found.notes)
    assert found.parameters.exponent == pytest.approx(A_EXPONENT)


def test_two_budgets_give_no_law_at_all():
    found = fit_scaling(sweep(budgets=BUDGETS[:2]))
    assert (found.parameters, found.loss) == (None, None)
    with pytest.raises(NotEnoughEvidence, match="2 of 2"):
        found.predict(1.5e12)


def test_three_runs_per_budget_have_no_intervals_but_repeats_give_them():
    three = fit_scaling(sweep(noise=0.001, spread=(-1, 0, 1)), draws=50)
    assert three.parameters.exponent_interval is None
    assert any("three runs per budget leave no residuals" in note for note in three.notes)
    twice = fit_scaling(sweep(noise=0.001, spread=(-1, -1, 0, 0, 1, 1)), draws=50)
    assert twice.parameters.exponent_interval is not None


def test_noise_that_drowns_the_parabola_gets_no_intervals():
    noisy = (fit_scaling(sweep(noise=0.02, seed=seed, curvature=0.004), draws=50) for seed in range(20))
    fits = [fit for fit in noisy if fit.parameters is not None]
    assert fits
    assert all(fit.parameters.exponent_interval is None for fit in fits)


def test_floor_is_found_where_the_figures_show_it():
    flops = np.geomspace(1e12, 1e18, 9)
    losses = 0.6 + 0.9 * (flops / 1e15) ** -0.2
    rng = np.random.default_rng(0)
    found = fit_loss_law(flops, losses, losses * (1 + 0.001 * rng.normal(size=(200, 9))))
    assert found.floor == pytest.approx(0.6, rel=1e-4)
    assert found.alpha == pytest.approx(0.2, rel=1e-4)
    assert found.floor_interval.low < 0.6 < found.floor_interval.high
    assert [float(found.at(c)) for c in flops] == pytest.approx(losses.tolist(), rel=1e-5)
    assert found.local_exponent(1e15) == pytest.approx(0.2 * 0.9 / 1.5, rel=1e-3)


def test_floor_that_cannot_be_told_from_none_is_left_out():
    found = fit_scaling(sweep(noise=0.001), draws=200).loss
    assert found.floor == 0
    assert found.note.startswith("no floor")
    low, high = found.alpha_interval
    assert low < LOSS_EXPONENT < high


# Effects


def grid(noise=0.0):
    rng = np.random.default_rng(0)
    return [
        Run(
            settings={"depth": depth, "rate": rate},
            seed=seed,
            score=(2.0 - 0.1 * depth) * rate_factor * (1 + 0.01 * seed + noise * rng.normal()),
        )
        for depth in (2, 3, 4)
        for rate, rate_factor in ((0.01, 1.0), (0.03, 0.98))
        for seed in (1, 2)
    ]


def test_grid_gives_each_effect_free_of_the_others():
    """The rate brings 2% at every depth and seed: all pairs say so, and there is no spread."""
    found = {(e.parameter, e.value): e for e in effects(grid(), base={"depth": 3, "rate": 0.01})}
    rate = found["rate", "0.03"]
    assert (rate.against, rate.runs, rate.paired) == ("0.01", 6, True)
    assert rate.difference == pytest.approx(-0.02)
    assert rate.standard_error == pytest.approx(0, abs=1e-12)
    assert found["depth", "4"].difference == pytest.approx(1.6 / 1.7 - 1)
    assert found.keys() == {("rate", "0.03"), ("depth", "2"), ("depth", "4")}


def test_error_of_an_effect_is_that_of_its_pairs():
    (rate,) = (e for e in effects(grid(noise=0.001), base={}) if e.parameter == "rate")
    assert rate.standard_error == pytest.approx(0.001 * math.sqrt(2 / 6), rel=0.8)
    assert abs(rate.difference + 0.02) < 4 * rate.standard_error
    (floor,) = (e for e in effects(grid(), base={}, noise_sd=0.006) if e.parameter == "rate")
    assert floor.standard_error == pytest.approx(0.006 / math.sqrt(6))


def test_base_stands_in_for_what_a_run_leaves_unsaid():
    runs = [Run(settings={}, seed=1, score=1.0), Run(settings={"rate": 0.03}, seed=1, score=0.9)]
    (found,) = effects(runs, base={"rate": 0.01}, noise_sd=0.002)
    assert (found.against, found.value, found.runs) == ("0.01", "0.03", 1)
    assert found.difference == pytest.approx(-0.1)
    assert found.standard_error == 0.002


def test_random_search_compares_upper_with_lower_half():
    rng = np.random.default_rng(0)
    settings = [{"rate": float(rng.uniform()), "window": str(rng.choice(["L", "S"]))} for _ in range(200)]
    runs = [Run(settings=s, seed=1, score=1 - 0.1 * s["rate"] + 0.02 * (s["window"] == "S")) for s in settings]
    found = {e.parameter: e for e in effects(runs, base={"window": "L"})}
    assert not found["rate"].paired
    assert found["rate"].difference == pytest.approx(-0.05, abs=3 * found["rate"].standard_error)
    assert (found["window"].value, found["window"].against) == ("S", "L")
    assert found["window"].difference == pytest.approx(0.02, abs=3 * found["window"].standard_error)


# The rate range test


def range_test(noise=0.0, until=2.0, steepest=0.1, cliff=1.0):
    """Loss falls along a sigmoid whose middle is `steepest`, and explodes beyond `cliff`."""
    rates = np.geomspace(1e-3, until, 120)
    fall = 1 / (1 + np.exp(-3 * np.log(rates / steepest)))
    climb = np.maximum(0, np.log(rates / cliff)) * 8
    return rates, 10 - 4 * fall + climb + noise * np.random.default_rng(0).normal(size=120)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_range_goes_from_steepest_descent_to_before_divergence(noise):
    found = suggest_range(*range_test(noise))
    assert found.low == pytest.approx(0.1, rel=0.35)
    assert found.low < found.lowest <= found.high < found.diverges
    assert 0.8 < found.high < 1.1
    assert found.note == ""


def test_loss_that_becomes_no_number_is_a_divergence():
    rates, losses = range_test(until=0.9)
    losses[100:] = math.nan
    found = suggest_range(rates, losses)
    assert (found.diverges, found.high) == (rates[100], rates[99])


def test_range_without_divergence_says_that_it_may_go_on():
    rates, losses = range_test(until=0.9)
    found = suggest_range(rates, losses)
    assert (found.diverges, found.high) == (None, rates[-1])
    assert "may go on" in found.note


@pytest.mark.parametrize(
    ("rates", "losses", "said"),
    [
        (range(1, 21), range(1, 21), "never falls"),
        (range(1, 21), [1.0] * 5 + [math.inf] * 15, "Only 5 losses"),
        (range(1, 21), [1.0] * 19, "20 rates and 19 losses"),
        ([1.0, 1.0, 2.0], [1.0] * 3, "rising rate"),
        (range(1, 21), [4.0 - 0.001 * n for n in range(20)], r"falls by 0\.4\d% only"),
    ],
)
def test_range_test_that_shows_nothing_suggests_nothing(rates, losses, said):
    with pytest.raises(NoRange, match=said):
        suggest_range(list(rates), list(losses))


@pytest.mark.parametrize("number", [1, 2, 5, 20, 200])
def test_smoothing_keeps_a_straight_line_and_delays_nothing(number):
    line = [5 - 0.01 * n for n in range(number)]
    assert smoothed(line) == pytest.approx(line)


def test_smoothing_takes_noise_out_and_ends_where_a_loss_is_no_number():
    noise = np.random.default_rng(0).normal(size=200)
    noise[190] = math.nan
    smooth = smoothed(list(noise))
    assert np.std(smooth[:190]) < np.std(noise[:190]) / 3
    assert np.isnan(smooth[190:]).all()


def test_a_steep_cliff_is_found_through_the_smoothing_and_never_too_late():
    rates, losses = range_test(noise=0.05, until=4.0, cliff=1.0)
    found = suggest_range(rates, smoothed(list(losses)))
    assert 0.5 < found.high < 1.1
    assert found.high / found.low >= 3


def test_a_fall_at_the_very_beginning_is_said():
    rates, losses = range_test(until=2.0, steepest=1.5e-3)
    assert "may begin below" in suggest_range(rates, losses).note
