"""What a search leaves open, and what an answer would cost."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from raychat.search.confirmation import MIN_SEEDS
from raychat.search.pairing import Noise
from raychat.search.ranking import Place
from raychat.search.report.contents import Finding, Question
from raychat.search.spec import BASELINE, SearchSpec
from raychat.search.trial import Outcome, Trial

MISSING = ("preempted", "stopped early", "over budget")
"""ends that say nothing about the configuration"""
MORE_REPEATS = 4

Found = Sequence[tuple[Trial, Outcome | None]]


def open_questions(
    spec: SearchSpec, trials: Found, places: Sequence[Place], noise: Noise, found: Finding
) -> tuple[Question, ...]:
    """The most useful ones first."""
    asked: list[Question] = []
    best = next((p for p in places if p.place is not None and p.arm != BASELINE), None)
    if found.state == "not confirmed" and best is not None:
        text = f"Does {best.title} really beat the baseline? ({MIN_SEEDS} fresh seeds of both)"
        asked.append(_asked(text, trials, [best.arm, BASELINE], MIN_SEEDS))
    if noise.sd is None:
        text = f"How large is the noise? ({MORE_REPEATS} repeats of the baseline)"
        asked.append(_asked(text, trials, [BASELINE], MORE_REPEATS))
    tied = [p for p in places if p.place == 1 and p.tied]
    if len(tied) > 1:
        names = " and ".join(p.title for p in tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
        asked.append(
            _asked(f"Which is best of {names}? ({MIN_SEEDS} more seeds each)", trials, [p.arm for p in tied], 3)
        )
    leader = places[0].arm if found.state == "not confirmed" else found.winner
    asked += _edges(spec, trials, leader)
    asked += _missing(trials)
    return tuple(asked)


def _edges(spec: SearchSpec, trials: Found, winner: str) -> list[Question]:
    """`winner` at an end of a range: what lies beyond?"""
    asked = []
    base = spec.base_config.flat()
    own = next((trial.settings for trial, _ in trials if trial.arm == winner), {})
    for name in spec.space:
        tried = {s for t, _ in trials if _number(s := t.settings.get(name, base.get(name)))}
        value = own.get(name, base.get(name))
        if len(tried) > 1 and value in (min(tried), max(tried)):
            side, more = ("lowest", "lower") if value == min(tried) else ("highest", "higher")
            text = f"--{name.replace('_', '-')} {value} is the {side} value tried: is a {more} one better?"
            asked.append(_asked(text, trials, [winner], len(spec.seeds)))
    return asked


def _missing(trials: Found) -> list[Question]:
    """Configurations that never ended for reasons of their surroundings."""
    ended = {trial.arm for trial, outcome in trials if outcome and outcome.status == "finished" and trial.rung == 1}
    lost: dict[str, tuple[str, str]] = {}
    for trial, outcome in trials:
        if outcome and outcome.status in MISSING and trial.arm not in ended:
            lost[trial.arm] = trial.title, outcome.status
    return [_asked(f"What does {title} reach? ({status})", trials, [arm], 1) for arm, (title, status) in lost.items()]


def _asked(text: str, trials: Found, arms: Sequence[str], runs: int) -> Question:
    """`runs` full runs of each of `arms`."""
    walls = [_typical(trials, arm, lambda o: o.wall_s) for arm in arms]
    costs = [_typical(trials, arm, lambda o: o.cost_usd) for arm in arms]
    return Question(
        text=text,
        runs=runs * len(arms),
        hours=None if None in walls else runs * sum(w for w in walls if w is not None) / 3600,
        cost_usd=None if None in costs else runs * sum(c for c in costs if c is not None),
    )


def _typical(trials: Found, arm: str, value: Any) -> float | None:
    """Of a full run of `arm`; of any where it has none. Shorter rungs are carried to the full horizon."""
    ended = [(t, v) for t, o in trials if o and o.status == "finished" and (v := value(o)) is not None]
    own = [v / t.rung for t, v in ended if t.arm == arm] or [v / t.rung for t, v in ended]
    return fmean(own) if own else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
