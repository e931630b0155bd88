"""Which differences of a search are real: paired noise, fresh seeds, the order, the sentence."""

import math

import numpy as np
import pytest
from scipy import stats

from raychat.search.confirmation import confirm, holm
from raychat.search.pairing import Noise, compare, paired_noise
from raychat.search.ranking import Objective, baseline_noise, ranking
from raychat.search.trial import Outcome, Trial
from raychat.search.verdict import verdict

QUIET = Noise(sd=0.0001, freedom=4, source="repeats")
"""one ten-thousandth: a difference counts from 0.07% on"""


def run(arm, bpb, *, seed=42, status="finished", settings=None, **fields):
    """One run: `fields` are those of the trial, and cost_usd, wall_s, reason of its outcome."""
    ends = {key: fields.pop(key) for key in ("cost_usd", "wall_s", "reason") if key in fields}
    trial = Trial(number=0, tag=f"s-{arm}-{seed}", title=arm, settings=settings or {}, arm=arm, seed=seed, **fields)
    return trial, Outcome(status=status, val_bpb=bpb, **ends)


def order(runs, objective=None, noise=QUIET):
    return ranking(runs, objective or Objective(), baseline="base", noise=noise)


# Paired noise


def test_noise_of_a_difference_is_that_of_two_runs():
    runs = [1.0, 1.001, 0.999, 1.002, 0.998]
    noise = paired_noise([runs])
    assert noise.sd == pytest.approx(math.sqrt(2) * np.std(runs, ddof=1), rel=1e-9)
    assert noise.freedom == 4


def test_seeds_and_rungs_are_pooled_by_their_freedom_and_not_by_their_level():
    noise = paired_noise([[1.0, 1.002], [2.0, 2.004, 2.002], [3.0]])  # the second rung has twice the loss
    shares = [np.var([1.0, 1.002], ddof=1) / 1.001**2, np.var([2.0, 2.004, 2.002], ddof=1) / 2.002**2]
    assert noise.sd == pytest.approx(math.sqrt(2 * (shares[0] + 2 * shares[1]) / 3))
    assert noise.freedom == 3


def test_few_repeats_promote_noise_no_oftener_than_three_known_sd():
    """Two of 100 would be 6 of 300 here, and a limit of three sd gives a fifth of them after two repeats."""
    rng = np.random.default_rng(0)
    for repeats in (2, 3):
        promoted = naive = 0
        for _ in range(800):
            *same, baseline, candidate = rng.normal(1.0, 0.0001, repeats + 2)
            found = compare({1: candidate}, {1: baseline}, paired_noise([same]))
            promoted += found.relation != "within noise"
            naive += abs(found.units) > 3
        assert promoted <= 8
        assert naive > 4 * 8


def test_limit_falls_to_three_as_repeats_grow():
    limits = [Noise(sd=1.0, freedom=n, source="").limit for n in (1, 2, 4, 1000)]
    assert limits == pytest.approx([235.8, 19.2, 6.62, 3.01], rel=0.01)
    assert limits[2] == pytest.approx(stats.t.ppf(1 - 0.0026998 / 2, 4), rel=1e-4)


def test_identical_repeats_are_not_divided_by():
    noise = paired_noise([[0.897, 0.897, 0.897]])
    assert noise.sd is None
    assert noise.threshold() == math.inf
    assert "--perturbation" in noise.source
    found = compare({1: 0.8}, {1: 0.897}, noise)
    assert (found.relation, found.units, found.promotes) == ("unknown", None, False)
    assert "deterministic" in found.reason


def test_perturbed_weights_stand_in_for_identical_repeats():
    shaken = [0.897, 0.8971, 0.8969]
    noise = paired_noise([[0.897, 0.897]], [shaken])
    assert noise.sd == pytest.approx(math.sqrt(2) * np.std(shaken, ddof=1) / 0.897, rel=1e-6)
    assert (noise.freedom, noise.source) == (2, "perturbed weights")


def test_repeats_that_vary_are_pooled_with_perturbed_ones():
    noise = paired_noise([[1.0, 1.001]], [[1.0, 1.001]])
    assert noise.sd == pytest.approx(paired_noise([[1.0, 1.001]]).sd)
    assert noise.freedom == 2


def test_perturbations_that_change_nothing_measure_nothing():
    noise = paired_noise([[1.0, 1.0]], [[1.0, 1.0]])
    assert noise.sd is None
    assert "perturbed" in noise.source


def test_comparison_is_antisymmetric():
    a, b = {1: 1.0, 2: 1.1}, {1: 1.002, 2: 1.1021}
    there, back = compare(a, b, QUIET), compare(b, a, QUIET)
    assert (there.relation, back.relation) == ("better", "worse")
    assert there.units == pytest.approx(-back.units, rel=0.01)


def test_level_of_a_seed_cancels_in_a_pair():
    """A seed that is 5% harder for both arms leaves the difference as it is."""
    found = compare({1: 0.998, 2: 1.05 * 0.998, 3: 9.0}, {1: 1.0, 2: 1.05}, QUIET)
    assert found.pairs == 2
    assert found.difference == pytest.approx(-0.002)
    assert found.units == pytest.approx(-0.002 * math.sqrt(2) / (0.0001 * math.sqrt(4 / 5)), rel=1e-6)


def test_spread_over_seeds_counts_as_noise():
    """The mean gain is 0.3%, but it comes and goes with the seed."""
    base = {1: 1.0, 2: 1.0, 3: 1.0}
    assert compare({1: 0.997, 2: 0.997, 3: 0.997}, base, QUIET).promotes
    assert not compare({1: 0.980, 2: 1.010, 3: 1.001}, base, QUIET).promotes


def test_seeds_alone_measure_the_noise_where_nothing_else_does():
    unknown = paired_noise([])
    base = {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}
    found = compare({seed: value * (0.99 + seed * 1e-5) for seed, value in base.items()}, base, unknown)
    assert found.promotes
    assert compare({1: 0.9}, base, unknown).relation == "unknown"
    assert compare({7: 0.9}, base, QUIET).reason == "no seed in common"


# Fresh seeds


def test_welch_agrees_with_scipy_and_is_corrected_for_all_configurations():
    ours, theirs = [0.890, 0.8905, 0.8898], [0.897, 0.8964, 0.8971]
    (found,) = confirm({"a": dict(enumerate(ours))}, dict(enumerate(theirs)), compared=8)
    assert found.p == pytest.approx(stats.ttest_ind(ours, theirs, equal_var=False).pvalue)
    assert found.p_corrected == pytest.approx(8 * found.p)
    assert (found.finding, found.seeds) == ("better", 3)


def test_holm_steps_down_and_never_turns_the_order():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}, family=3) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.01}, family=20) == pytest.approx({"a": 0.2})
    assert holm({"a": 0.4}, family=20) == {"a": 1.0}


def test_more_configurations_need_more_evidence():
    ours, theirs = {1: 0.9950, 2: 0.9960, 3: 0.9952}, {1: 1.0, 2: 0.9990, 3: 1.0002}
    findings = [confirm({"a": ours}, theirs, compared=n)[0].finding for n in (1, 1000)]
    assert findings == ["better", "no difference"]


def test_two_seeds_are_not_enough_however_far_apart():
    (found,) = confirm({"a": {1: 0.5, 2: 0.5001, 3: 0.5}}, {1: 1.0, 2: 1.001}, compared=1)
    assert (found.finding, found.seeds, found.p) == ("not enough seeds", 2, None)


def test_candidate_that_fails_on_a_seed_is_not_confirmed():
    (found,) = confirm({"a": {1: 0.5, 2: 0.5, 3: 0.51, 4: None}}, dict.fromkeys(range(1, 5), 1.0), compared=1)
    assert found.finding == "failed"


def test_seeds_that_change_nothing_are_one_seed():
    (found,) = confirm({"a": dict.fromkeys(range(3), 0.5)}, dict.fromkeys(range(3), 1.0), compared=1)
    assert found.finding == "not enough seeds"


def test_false_winners_are_rarer_than_the_level():
    """The best of eight equal arms, confirmed on three fresh seeds: the test after its correction holds 5%."""
    rng = np.random.default_rng(1)
    draws = rng.normal(1.0, 0.0004, (400, 2, 3))
    wins = sum(
        confirm({"a": dict(enumerate(a))}, dict(enumerate(b)), compared=8)[0].finding != "no difference"
        for a, b in draws
    )
    assert wins <= 0.05 * 400


# The order


@pytest.mark.parametrize(
    "status", ["diverged", "OOM", "preempted", "too slow", "infeasible", "failed", "over budget", "stopped early"]
)
def test_what_has_not_finished_never_wins(status):
    places = order([run("base", 1.0), run("a", 0.1, status=status, reason="why"), run("b", 1.1)])
    assert [(p.arm, p.place) for p in places] == [("base", 1), ("b", 2), ("a", None)]
    assert places[-1].reason == f"{status}: why"


def test_one_diverged_seed_is_enough_to_lose_but_a_preempted_one_is_not():
    base = [run("base", 1.0, seed=1), run("base", 1.1, seed=2)]
    for status, place in (("diverged", None), ("preempted", 1)):
        places = order([*base, run("a", 0.9, seed=1), run("a", None, seed=2, status=status)])
        assert {p.arm: p.place for p in places}["a"] == place


def test_differences_within_the_noise_are_ties():
    places = order([run("base", 1.0), run("a", 0.9), run("b", 0.9003), run("c", 0.91)])
    assert [(p.arm, p.place, p.tied) for p in places] == [
        ("a", 1, True),
        ("b", 1, True),
        ("c", 3, False),
        ("base", 4, False),
    ]


def test_lucky_seed_alone_does_not_win():
    """b ran only on the easy seed: lower on average, and worse than the baseline on it."""
    runs = [run("base", 1.0, seed=1), run("base", 2.0, seed=2), run("b", 1.1, seed=1)]
    assert [p.arm for p in order(runs)] == ["base", "b"]


def test_arm_that_went_further_stands_above():
    runs = [
        run("base", 1.2, rung=0.5),
        run("base", 1.0),
        run("a", 1.1, rung=0.5),
        run("b", 1.3, rung=0.5),
        run("b", 1.4),
    ]
    places = order(runs)
    assert [(p.arm, p.rung) for p in places] == [("base", 1.0), ("b", 1.0), ("a", 0.5)]
    assert places[-1].against_baseline.difference == pytest.approx(1.1 / 1.2 - 1)


def test_confirmations_rehearsals_and_trunks_are_not_ranked():
    runs = [run("base", 1.0), *(run("a", 0.5, role=role) for role in ("confirmation", "rehearsal", "trunk", "noise"))]
    assert [p.arm for p in order(runs)] == ["base"]


def test_limits_of_money_and_time_are_kept():
    runs = [run("base", 1.0, cost_usd=4.0, wall_s=3600), run("a", 0.9, cost_usd=6.0, wall_s=9000), run("b", 0.8)]
    places = order(runs, Objective(budget_usd=5.0))
    assert [(p.arm, p.place, p.reason) for p in places[1:]] == [
        ("a", None, "$6.00 is over $5.00"),
        ("b", None, "its cost is not known"),
    ]
    assert order(runs, Objective(max_hours=2.0))[1].reason == "2.50 h is over 2 h"
    assert order(runs, Objective(budget_usd=7.0))[0].arm == "a"


def test_per_dollar_neither_the_dearest_nor_the_cheapest_wins_by_itself():
    """Doubling the cost must bring 3.3% (2^-0.048) to be worth it."""
    objective = Objective(kind="val_bpb_per_dollar")
    for gain, best in ((0.04, "dear"), (0.025, "base")):
        runs = [run("base", 1.0, cost_usd=2.0), run("dear", 1 - gain, cost_usd=4.0), run("tiny", 1.5, cost_usd=0.05)]
        assert order(runs, objective)[0].arm == best


def test_noise_comes_from_the_repeats_of_the_baseline():
    plain = [run("base", 1.0), run("base", 1.001, role="noise"), run("a", 0.2), run("base", 3.0, seed=7)]
    assert baseline_noise(plain, Objective(), baseline="base") == paired_noise([[1.0, 1.001]])
    shaken = [run("base", 1.002, role="noise", settings={"perturbation": 1})]
    same = [run("base", 1.0), run("base", 1.0, role="noise"), *shaken]
    noise = baseline_noise(same, Objective(), baseline="base")
    assert (noise.sd, noise.source) == (paired_noise([[1.0, 1.002]]).sd, "perturbed weights")


def test_wall_time_alone_is_no_noise_of_training():
    runs = [run("base", 1.0, cost_usd=1.0), run("base", 1.0, cost_usd=1.01, role="noise")]
    assert baseline_noise(runs, Objective(kind="val_bpb_per_dollar"), baseline="base").sd is None


# The sentence


def sentence(runs, confirmations=(), noise=QUIET):
    return verdict(order(runs, noise=noise), confirmations, baseline="base")


def test_confirmed_winner_is_named_with_its_evidence():
    fresh = confirm({"d4": {1: 0.9920, 2: 0.9921, 3: 0.9919}}, {1: 1.0, 2: 1.0001, 3: 0.9999}, compared=8)
    found = sentence([run("base", 1.0), run("d4", 0.992)], fresh)
    assert (found.winner, found.state) == ("d4", "confirmed")
    assert (
        found.sentence
        == "D4 beats the baseline by 0.8% (p < 0.001 after correction for 8 configurations, 3 seeds each)."
    )


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (
            [run("base", 1.0), run("a", 0.9995)],
            "a is 0.05% better (5.0 paired standard deviations, where 6.6 are needed)",
        ),
        ([run("base", 1.0), run("a", 1.02), run("b", 1.01)], "the best of 2 others, b, is 1% worse"),
        ([run("base", 1.0), run("a", None, status="OOM")], "no other configuration has a result"),
    ],
    ids=["within noise", "worse", "alone"],
)
def test_nothing_beat_the_baseline(runs, said):
    found = sentence(runs)
    assert (found.winner, found.state) == ("base", "baseline stays")
    assert found.sentence.startswith(f"Nothing beat the baseline: {said}")


def test_fresh_seeds_overrule_the_lead():
    fresh = confirm({"a": {1: 1.0, 2: 1.002, 3: 0.9975}}, {1: 1.001, 2: 0.999, 3: 1.0}, compared=2)
    found = sentence([run("base", 1.0), run("a", 0.9)], fresh)
    assert found.winner == "base"
    assert "which may be chance (p = 1 after correction for 2 configurations, 3 seeds each)" in found.sentence


def test_lead_without_fresh_seeds_is_called_not_confirmed():
    found = sentence([run("base", 1.0), run("a", 0.9)], confirm({"a": {1: 0.9, 2: 0.9}}, {1: 1.0, 2: 1.0}, compared=1))
    assert (found.winner, found.state) == ("base", "not confirmed")
    assert "not enough seeds to confirm it: 2 fresh, 3 needed" in found.sentence
    unknown = sentence([run("base", 1.0), run("a", 0.9)], noise=paired_noise([[1.0, 1.0]]))
    assert unknown.state == "not confirmed"
    assert "deterministic hardware" in unknown.sentence


def test_baseline_without_a_result_is_not_recommended():
    found = sentence([run("base", None, status="OOM", reason="40 GB"), run("a", 0.9)])
    assert (found.winner, found.state) == ("a", "no baseline")
    assert "(OOM: 40 GB)" in found.sentence


def test_search_without_a_result_says_why():
    found = sentence([run("base", None, status="OOM", reason="40 GB"), run("a", None, status="diverged")])
    assert (found.state, found.sentence) == ("no result", "No configuration has a result (OOM, diverged).")
