"""Whole searches with a made-up objective: what is proposed, in which order, and what it costs."""

import random
import sys

import pytest

from raychat.errors import ConfigError
from raychat.planning import recipe
from raychat.search.limits import limit_reached, trial_flops
from raychat.search.rungs import TIES
from raychat.search.spec import BASELINE
from raychat.search.spec_file import read_spec
from raychat.search.strategy import make_strategy
from raychat.search.trial import Outcome

BASE = {"preset": "d4-cpu", "num_iterations": 800, "warmup_ratio": 0.1, "matrix_lr": 0.02}
RATES = [0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05]
KINDS = {
    "rungs": {},
    "grid": {"scheduler": "none"},
    "random": {"searcher": "random", "trials": 6, "space": {"matrix_lr": {"low": 0.005, "high": 0.05, "log": True}}},
    "asha": {"scheduler": "asha", "base": BASE | {"warmdown_ratio": 0.0}},
    "forks": {"fork_at": 0.3, "space": {"final_lr_frac": [0.0, 0.05, 0.1, 0.2]}},
    "rehearsed": {"dry_run_steps": 5, "space": {"matrix_lr": [0.01, 0.02], "device_batch_size": [4, 8]}},
}


def spec(**fields):
    return read_spec({"name": "s", "base": BASE, "space": {"matrix_lr": RATES}, "seeds": [42, 43]} | fields)


def miss(rate, best):
    """What a rate costs: no two of RATES are equally far from a third."""
    return (rate - best) * 1.3 if rate > best else best - rate


class Search:
    """A search that runs in no time. `best`: the rate with the lowest val_bpb; `noise`: sd of perturbed repeats, as a share."""

    def __init__(self, found, *, best=0.03, noise=1e-5, deterministic=True, faults=None, cost=lambda trial: 1.0):
        self.spec, self.strategy = found, make_strategy(found)
        self.best, self.noise, self.deterministic, self.faults, self.cost = (
            best,
            noise,
            deterministic,
            faults or {},
            cost,
        )
        self.done, self.trials = {}, []

    def outcome(self, trial):
        if status := next((s for key, s in self.faults.items() if key in (trial.arm, trial.role)), None):
            return Outcome(status=status, reason="made up", cost_usd=0.0)
        config = self.spec.config(trial)
        shaken = not self.deterministic or "perturbation" in trial.settings
        shake = random.Random(trial.number).gauss(0, self.noise) if shaken else 0.0
        bpb = 1.2 - 0.2 * trial.rung + miss(config.optim.matrix_lr, self.best) + config.optim.final_lr_frac / 10
        bpb = bpb * (1 + shake) + random.Random(trial.seed).gauss(0, 1e-3)  # common to all arms
        return Outcome(status="finished", val_bpb=bpb, cost_usd=self.cost(trial))

    def run(self, steps=None, *, pick=0):
        """To the end, or `steps` outcomes; `pick` chooses which of the proposed trials ends first."""
        while not self.strategy.finished(self.done) and (steps is None or len(self.done) < steps):
            proposed = self.strategy.propose(self.done, ())
            trial = proposed[pick % len(proposed)]
            self.trials.append(trial)
            self.done[trial.tag] = self.outcome(trial)
        return self

    def of(self, *roles):
        return [trial for trial in self.trials if trial.role in roles]

    def at(self, rung, seed=42):
        return [trial.arm for trial in self.of("trial") if trial.rung == rung and trial.seed == seed]

    def steps(self, *roles):
        return sum(
            trial_flops(self.spec, t) / recipe(self.spec.config(t)).flops_per_token / 8192 for t in self.of(*roles)
        )


# What every search keeps


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_a_search_that_goes_on_proposes_the_same_trials_from_any_prefix(fields):
    whole = Search(spec(**fields)).run()
    numbers = [trial.number for trial in whole.trials]
    assert numbers == list(range(len(numbers)))
    for length in range(len(whole.trials)):
        prefix = {trial.tag: whole.done[trial.tag] for trial in whole.trials[:length]}
        proposed = make_strategy(whole.spec).propose(prefix, ())
        assert proposed
        assert proposed == whole.trials[length : length + len(proposed)]


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_the_order_in_which_runs_end_changes_no_trial(fields):
    first, last = Search(spec(**fields)).run(), Search(spec(**fields)).run(pick=-1)
    assert sorted(first.trials, key=lambda t: t.number) == sorted(last.trials, key=lambda t: t.number)
    assert [t.number for t in last.trials] != [t.number for t in first.trials]


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_what_runs_or_is_done_is_not_proposed_again(fields):
    search = Search(spec(**fields)).run(3)
    proposed = search.strategy.propose(search.done, ())
    running = [trial.tag for trial in proposed[:2]]
    assert search.strategy.propose(search.done, running) == proposed[2:]
    assert not {trial.tag for trial in proposed} & search.done.keys()
    assert search.strategy.find(proposed[0].tag, search.done) == proposed[0]


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_no_configuration_runs_twice_at_a_rung_and_seed_but_for_the_noise(fields):
    search = Search(spec(**fields)).run()
    runs = [(t.arm, t.seed, t.rung, t.role == "rehearsal") for t in search.trials if t.role != "noise"]
    assert len(runs) == len(set(runs))
    assert search.strategy.why_finished(search.done) == ""


# Rungs


def test_the_upper_half_goes_on():
    search = Search(spec(), best=0.03).run()
    ranked = sorted(RATES, key=lambda rate: miss(rate, 0.03))
    names = {rate: BASELINE if rate == 0.02 else f"matrix_lr={rate}" for rate in RATES}
    assert set(search.at(0.25)) == set(names.values())
    assert set(search.at(0.5)) == {names[rate] for rate in ranked[:4]}
    assert set(search.at(1.0)) - {BASELINE} == {names[rate] for rate in ranked[:2]} - {BASELINE}
    assert set(search.at(1.0, seed=43)) == {names[rate] for rate in ranked[:2]}


@pytest.mark.parametrize("best", RATES)
def test_rungs_find_the_best_of_the_grid_for_at_most_60_percent_of_its_steps(best):
    rungs, grid = Search(spec(), best=best).run(), Search(spec(scheduler="none"), best=best).run()
    assert rungs.steps("trial") <= 0.6 * grid.steps("trial")
    found = {t.arm for t in rungs.of("confirmation")}
    assert found == {t.arm for t in grid.of("confirmation")}
    assert found == (set() if best == 0.02 else {BASELINE, f"matrix_lr={best}"})


def test_what_lies_within_the_noise_of_the_cut_goes_on_too_up_to_a_quarter_more():
    quiet, loud = Search(spec(), noise=1e-6).run(), Search(spec(), noise=0.2).run()
    assert len(quiet.at(0.5)) == 4
    assert len(loud.at(0.5)) == 4 + TIES * 4
    assert set(quiet.at(0.5)) < set(loud.at(0.5))


def test_configurations_that_fail_do_not_go_on_and_hold_no_place():
    faults = {
        "matrix_lr=0.03": "diverged",
        "matrix_lr=0.025": "OOM",
        "matrix_lr=0.04": "infeasible",
        "matrix_lr=0.05": "failed",
    }
    search = Search(spec(), faults=faults).run()
    assert set(search.at(0.5)) == {BASELINE, "matrix_lr=0.015"}
    assert not faults.keys() & {trial.arm for trial in search.trials if trial.rung > 0.25}


def test_a_failed_first_seed_spares_the_others():
    search = Search(spec(scheduler="none"), faults={"matrix_lr=0.03": "OOM"}).run()
    assert [t.seed for t in search.trials if t.arm == "matrix_lr=0.03"] == [42]


def test_a_search_of_which_everything_fails_ends():
    everything = {BASELINE: "failed"} | {f"matrix_lr={rate}": "OOM" for rate in RATES}
    search = Search(spec(), faults=everything).run()
    assert {trial.rung for trial in search.trials} == {0.25}
    assert len(search.trials) == len(RATES) + 1


def test_asha_goes_on_from_its_own_checkpoint():
    search = Search(spec(**KINDS["asha"])).run()
    tags = {trial.tag: trial for trial in search.trials}
    later = [trial for trial in search.of("trial") if trial.rung == 0.5]
    assert later
    for trial in later:
        before = tags[trial.fork_of]
        assert (before.arm, before.seed, before.rung, trial.fork_step) == (trial.arm, trial.seed, 0.25, 200)


# Noise first, confirmation last


def test_noise_is_measured_first_and_by_perturbations_where_repeats_are_identical():
    search = Search(spec()).run()
    assert [trial.arm for trial in search.trials[:2]] == [BASELINE, BASELINE]
    again, *perturbed = search.of("noise")
    assert (again.rung, again.settings) == (0.25, {})
    assert [(t.rung, dict(t.settings)) for t in perturbed] == [(1.0, {"perturbation": 1}), (1.0, {"perturbation": 2})]
    assert {trial.seed for trial in search.of("noise")} == {42}


def test_noise_of_hardware_that_is_not_deterministic_is_that_of_plain_repeats():
    search = Search(spec(), deterministic=False).run()
    assert [(t.rung, dict(t.settings)) for t in search.of("noise")] == [(0.25, {}), (1.0, {}), (1.0, {})]
    single = Search(spec(scheduler="none"), deterministic=False).run()
    assert [(t.rung, dict(t.settings)) for t in single.of("noise")] == [(1.0, {}), (1.0, {})]


def test_without_noise_repeats_the_baseline_still_has_its_full_run():
    search = Search(spec(noise_repeats=0), best=0.05).run()
    assert not search.of("noise")
    assert BASELINE in search.at(1.0)


def test_the_winner_and_the_baseline_meet_on_fresh_seeds_last():
    search = Search(spec(confirm_seeds=4)).run()
    last = search.trials[-8:]
    assert last == search.of("confirmation")
    assert {(t.arm, t.seed) for t in last} == {(arm, s) for arm in (BASELINE, "matrix_lr=0.03") for s in range(44, 48)}
    assert not Search(spec(confirm_seeds=0)).run().of("confirmation")


def test_nothing_is_confirmed_that_does_not_lead_by_more_than_the_noise():
    assert not Search(spec(), noise=0.05).run().of("confirmation")
    assert not Search(spec(), best=0.02).run().of("confirmation")


# Forks


def test_forks_start_from_the_trunk_of_their_seed_and_train_the_rest():
    search = Search(spec(**KINDS["forks"])).run()
    trunks = {trial.seed: trial for trial in search.of("trunk")}
    assert {trunk.fork_step for trunk in trunks.values()} == {240}
    forks = search.of("fork")
    assert len(forks) == 8
    assert all(f.fork_of == trunks[f.seed].tag and f.fork_step == 240 for f in forks)
    assert search.steps("trunk", "fork") == 2 * (240 + 4 * 560)


def test_a_trunk_that_fails_has_no_forks():
    search = Search(spec(**KINDS["forks"]), faults={"trunk": "failed"}).run()
    assert {trial.role for trial in search.trials} == {"trunk"}


# Rehearsals


def test_each_distinct_shape_is_rehearsed_once_and_first():
    search = Search(spec(**KINDS["rehearsed"])).run()
    rehearsals = search.of("rehearsal")
    assert search.trials[: len(rehearsals)] == rehearsals
    assert [t.settings.get("device_batch_size") for t in rehearsals] == [None, 4]


# Limits


def test_a_budget_stops_the_search_and_says_so():
    base = BASE | {"price_per_hour": 1.0}
    search = Search(spec(base=base, budget_usd=3.1, scheduler="none"), cost=lambda trial: 0.5).run()
    assert sum(o.cost_usd for o in search.done.values()) == 3.0
    assert search.strategy.finished(search.done)
    assert search.strategy.propose(search.done, ()) == []
    assert "pays for no further run" in search.strategy.why_finished(search.done)
    over = Search(spec(base=base, budget_usd=3.0, scheduler="none"), cost=lambda trial: 0.5).run()
    assert over.strategy.why_finished(over.done).startswith("$3.00 of $3.00 are spent")


def test_what_runs_is_counted_before_more_is_started():
    found = spec(base=BASE | {"price_per_hour": 1.0}, budget_usd=3.1, scheduler="none")
    search = Search(found, cost=lambda trial: 0.5).run(3)
    proposed = search.strategy.propose(search.done, ())
    assert len(proposed) == 3
    assert search.strategy.propose(search.done, [t.tag for t in proposed]) == []


def test_a_shorter_rung_is_expected_to_cost_its_share():
    found = spec(base=BASE | {"price_per_hour": 1.0}, budget_usd=5.1)
    search = Search(found, cost=lambda trial: trial.rung).run()
    assert 4.0 <= sum(o.cost_usd for o in search.done.values()) <= 5.1


def test_hours_are_counted_by_whoever_has_the_clock():
    found = spec(max_hours=2)
    assert limit_reached(found, {}, hours=1.9) == ""
    assert "hours are over" in limit_reached(found, {}, hours=2.1)


def test_a_limit_on_configurations_takes_the_first_of_the_grid():
    search = Search(spec(trials=3)).run()
    assert set(search.at(0.25)) == {BASELINE, "matrix_lr=0.005", "matrix_lr=0.01", "matrix_lr=0.015"}


# Optuna


def test_optuna_comes_nearer_and_is_repeatable():
    pytest.importorskip("optuna")
    space = {"matrix_lr": {"low": 0.001, "high": 0.1, "log": True}}
    fields = {"searcher": "optuna", "trials": 24, "space": space, "seeds": [42], "search_seed": 1}
    whole = Search(spec(**fields), best=0.03).run()
    rates = [t.settings["matrix_lr"] for t in whole.of("trial") if t.settings]
    assert len(rates) == len(set(rates)) == 24
    misses = [abs(rate - 0.03) for rate in rates]
    assert sorted(misses[12:])[6] < sorted(misses[:8])[4]
    for length in (0, 3, 10, 20):
        prefix = {trial.tag: whole.done[trial.tag] for trial in whole.trials[:length]}
        assert make_strategy(whole.spec).propose(prefix, ())[0] == whole.trials[length]


def test_optuna_ends_in_a_space_that_it_has_seen_whole():
    pytest.importorskip("optuna")
    fields = {"searcher": "optuna", "trials": 20, "space": {"depth": [2, 3, 4]}, "seeds": [42]}
    search = Search(spec(**fields), faults={"depth=3": "infeasible"}).run()
    assert {t.arm for t in search.of("trial")} == {BASELINE, "depth=2", "depth=3"}


def test_without_optuna_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"raychat\[search\]"):
        make_strategy(spec(searcher="optuna", space={"depth": [2, 3]}))
