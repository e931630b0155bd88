"""Optuna's choice of configurations, in generations: each is chosen from the results of all before it.

The study is not kept: it is built again from the outcomes in the order of the numbers, with a seeded sampler, so that a search
that goes on is proposed what it would have been.
"""

from collections.abc import Callable
from typing import Any

from raychat.errors import ConfigError
from raychat.search.drafts import add_rehearsals, draft
from raychat.search.noise_first import begin, measure
from raychat.search.roll import Roll
from raychat.search.rungs import finish
from raychat.search.space import Choices, Parameter
from raychat.search.spec import BASELINE, Arm, SearchSpec
from raychat.search.trial import Trial

GENERATION = 4
"""configurations that are chosen at once, and may run at once"""
STARTUP = 8
"""drawn at random before the sampler models anything"""
ASKS = 5
"""times `trials` that Optuna is asked at most: in a small space it repeats itself"""


def plot_optuna() -> Callable[[SearchSpec, Roll], bool]:
    """The plot of Optuna's searches.

    Raises:
        ConfigError: where Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "searcher = 'optuna' needs Optuna, which is not installed: pip install 'raychat[search]', or use searcher = "
            "'random'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def plot(spec: SearchSpec, roll: Roll) -> bool:
        sampler = optuna.samplers.TPESampler(seed=spec.search_seed, n_startup_trials=STARTUP)
        study = optuna.create_study(sampler=sampler)
        return _plot(spec, roll, study, {name: _distribution(optuna, values) for name, values in spec.space.items()})

    return plot


def _plot(spec: SearchSpec, roll: Roll, study: Any, distributions: dict[str, Any]) -> bool:
    if not add_rehearsals(spec, roll, [spec.arm({})]):
        return False
    begun = begin(spec, roll)
    known, noise, asks = {BASELINE: begun[0]}, None, ASKS * spec.trials
    while len(known) <= spec.trials and asks > 0:
        asked: list[tuple[Any, Arm]] = []
        new: dict[str, Arm] = {}
        while len(new) < min(GENERATION, spec.trials + 1 - len(known)) and asks > 0:
            asks -= 1
            point = study.ask(distributions)
            arm = spec.arm({name: _rounded(value) for name, value in point.params.items()})
            asked.append((point, arm))
            if arm.name not in known:
                new[arm.name] = arm
        if not add_rehearsals(spec, roll, list(new.values())):
            return False
        known |= {trial.arm: trial for trial in roll.add([draft(arm, spec.seeds[0]) for arm in new.values()])}
        noise = measure(spec, roll, begun) if noise is None else noise
        if noise is None or not roll.settled([*known.values(), *noise]):
            return False
        for point, arm in asked:
            _tell(spec, roll, study, point, known[arm.name])
    return finish(spec, roll, list(known.values()))


def _tell(spec: SearchSpec, roll: Roll, study: Any, point: Any, trial: Trial) -> None:
    """What became of a choice. One without a score counts as worse than all that have one."""
    score = spec.objective.score(roll.done[trial.tag])
    if score is None:
        study.tell(point, state=type(point.study.trials[point.number].state).PRUNED)
    else:
        study.tell(point, score)


def _rounded(value: Any) -> Any:
    """To six digits, which a person can still read in a title."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _distribution(optuna: Any, values: Parameter) -> Any:
    if isinstance(values, Choices):
        return optuna.distributions.CategoricalDistribution(values.values)
    if values.integer:
        return optuna.distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)
