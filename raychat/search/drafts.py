"""Trials before they have a number: of an arm, a rehearsal of each shape, a winner on fresh seeds."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.search.ranking import FAULTS, baseline_noise, ranking
from raychat.search.roll import Roll
from raychat.search.spec import BASELINE, Arm, SearchSpec
from raychat.search.trial import Outcome, Trial

Role = Literal["trial", "noise", "confirmation", "trunk", "fork", "rehearsal"]

_SHAPE = ("model", "precision", "batch", "cluster")
"""groups of settings that decide how fast a step is and what memory it takes"""


def draft(arm: Arm, seed: int, rung: float = 1.0, role: Role = "trial", **fields: Any) -> Trial:
    """A trial of `arm` that has no number yet."""
    return Trial(
        number=-1,
        tag="",
        title=arm.title,
        settings=arm.settings,
        arm=arm.name,
        seed=seed,
        rung=rung,
        role=role,
        **fields,
    )


def shape_of(spec: SearchSpec, trial: Trial) -> tuple[Any, ...] | None:
    """What decides the speed and memory of `trial`; equal for trials that one rehearsal speaks for. None: it cannot be."""
    try:
        config: Config = spec.config(trial)
    except ConfigError:
        return None
    return tuple(value for group in _SHAPE for value in dataclasses.astuple(getattr(config, group)))


def add_rehearsals(spec: SearchSpec, roll: Roll, arms: Sequence[Arm]) -> bool:
    """Add a rehearsal of each shape among `arms` that had none; whether all of the roll's rehearsals are through."""
    if spec.dry_run_steps == -1:
        return True
    there = {shape_of(spec, trial) for trial in roll.trials if trial.role == "rehearsal"} | {None}
    new = []
    for arm in arms:
        trial = draft(arm, spec.seeds[0], role="rehearsal")
        shape = shape_of(spec, trial)
        if shape not in there:
            there.add(shape)
            new.append(trial)
    roll.add(new)
    return roll.settled([trial for trial in roll.trials if trial.role == "rehearsal"])


def add_confirmation(spec: SearchSpec, roll: Roll) -> bool:
    """Add the best arm and the baseline on fresh seeds, if it leads by more than the noise; whether all are through."""
    winner = leader(spec, roll.runs())
    if winner is None or spec.confirm_seeds == 0:
        return True
    trial = next(trial for trial in roll.trials if trial.arm == winner)
    arms = (Arm(name=winner, title=trial.title, settings=trial.settings), spec.arm({}))
    first = max(spec.seeds) + 1
    seeds = range(first, first + spec.confirm_seeds)
    return roll.settled(roll.add([draft(arm, seed, role="confirmation") for seed in seeds for arm in arms]))


def leader(spec: SearchSpec, runs: Sequence[tuple[Trial, Outcome]]) -> str | None:
    """The arm to confirm: the best, if it beats the baseline by more than the noise, or by anything where that is not known."""
    noise = baseline_noise(runs, spec.objective, baseline=BASELINE)
    places = ranking(runs, spec.objective, baseline=BASELINE, noise=noise)
    best = next((place for place in places if place.place is not None and place.arm != BASELINE), None)
    against = best.against_baseline if best else None
    if best is None or against is None or against.difference is None:
        return None
    leads = against.promotes or (against.relation == "unknown" and against.difference < 0)
    return best.arm if leads else None


def failed(outcome: Outcome) -> bool:
    """Whether `outcome` speaks against its configuration, on any seed."""
    return outcome.status in FAULTS
