"""The order of a search's configurations: by an objective, with what lies within the noise of each other named as tied."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from raychat.search.pairing import Comparison, Noise, compare, paired_noise
from raychat.search.trial import Outcome, Status, Trial

COST_EXPONENT = 0.048
"""0.1% of val_bpb is worth 2.1% of cost (GPT-2 small with Muon, public runs); an iso-FLOP fit gives a better one"""

FAULTS: frozenset[Status] = frozenset({"diverged", "OOM", "too slow", "infeasible", "failed"})
"""ends that speak against the configuration: one seed of these and it cannot win"""

Runs = Sequence[tuple[Trial, Outcome]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run is judged by: a score of which less is better."""

    kind: Literal["val_bpb", "val_bpb_per_dollar"] = "val_bpb"
    budget_usd: float | None = None
    """best under X dollars: what a single run may cost at most"""
    max_hours: float | None = None
    """best under Y hours"""
    cost_exponent: float = COST_EXPONENT
    """of `val_bpb_per_dollar`: alpha of val_bpb ~ cost^-alpha"""

    def score(self, outcome: Outcome) -> float | None:
        """The score of a run, None if it has none and cannot win (`refusal` says why).

        Per dollar: val_bpb carried along `cost_exponent` to what it would be for one dollar. A plain quotient would make the
        cheapest, worst model the best one: val_bpb changes by a tenth where cost changes tenfold.
        """
        if outcome.val_bpb is None or self.refusal(outcome):
            return None
        if self.kind == "val_bpb" or outcome.cost_usd is None:
            return outcome.val_bpb
        return outcome.val_bpb * outcome.cost_usd**self.cost_exponent

    def refusal(self, outcome: Outcome) -> str:
        """Why a run cannot win; empty if it can."""
        hours = None if outcome.wall_s is None else outcome.wall_s / 3600
        if outcome.status != "finished":
            return f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status
        if outcome.val_bpb is None:
            return "no val_bpb"
        if not outcome.cost_usd and (self.kind == "val_bpb_per_dollar" or self.budget_usd is not None):
            return "its cost is not known"
        if self.budget_usd is not None and (outcome.cost_usd or 0.0) > self.budget_usd:
            return f"${outcome.cost_usd:.2f} is over ${self.budget_usd:.2f}"
        if self.max_hours is not None and (hours is None or hours > self.max_hours):
            return "its wall time is not known" if hours is None else f"{hours:.2f} h is over {self.max_hours:g} h"
        return ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a configuration stands."""

    arm: str
    title: str
    place: int | None
    """1 is best; configurations with the same number are tied; None: it cannot win"""
    tied: bool
    rung: float
    """the highest that it finished"""
    score: float | None
    """mean over its seeds"""
    seeds: tuple[int, ...]
    """with a score, at `rung`"""
    against_baseline: Comparison | None
    """at the highest rung that both finished; None for the baseline itself, and where there is no such rung"""
    reason: str = ""
    """why it cannot win, or why some seed has no score"""


def baseline_noise(runs: Iterable[tuple[Trial, Outcome]], objective: Objective, *, baseline: str) -> Noise:
    """Paired noise from the repeats (role `noise`) of the baseline's arm together with its ordinary runs."""
    plain: dict[tuple[int, float], list[float]] = defaultdict(list)
    shaken: dict[tuple[int, float], list[float]] = defaultdict(list)
    first: dict[tuple[int, float, float | None], float] = {}
    for trial, outcome in runs:
        score = objective.score(outcome)
        if score is None or not (trial.role == "noise" or (trial.role == "trial" and trial.arm == baseline)):
            continue
        if trial.settings.get("perturbation"):
            shaken[trial.seed, trial.rung].append(score)
        else:  # equal val_bpb is the same training: a score that differs by its wall time alone is no noise of training
            plain[trial.seed, trial.rung].append(first.setdefault((trial.seed, trial.rung, outcome.val_bpb), score))
    return paired_noise(plain.values(), [[*plain[key][:1], *scores] for key, scores in shaken.items()])


def ranking(runs: Runs, objective: Objective, *, baseline: str, noise: Noise) -> list[Place]:
    """All arms of `runs`, best first; those that cannot win last.

    Arms are compared at the highest rung that they finished: one that went further stands above one that did not. A place is
    shared by all arms within noise of its first one. Confirmations, rehearsals and trunks take no part.
    """
    arms: dict[str, list[tuple[Trial, Outcome]]] = defaultdict(list)
    for trial, outcome in runs:
        if trial.role in ("trial", "fork") or (trial.role == "noise" and trial.arm == baseline):
            arms[trial.arm].append((trial, outcome))
    scores = {arm: _scores(own, objective) for arm, own in arms.items()}
    places = [_place(arm, own, scores, objective, baseline, noise) for arm, own in arms.items()]
    able = sorted((p for p in places if p.score is not None), key=lambda p: (-p.rung, p.score, p.arm))
    unable = [p for p in places if p.score is None]
    return [*_numbered(able, scores, noise), *unable]


Scores = Mapping[float, Mapping[int, float]]
"""rung -> seed -> score"""


def _scores(runs: Runs, objective: Objective) -> Scores:
    found: dict[float, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial, outcome in runs:
        score = objective.score(outcome)
        if score is not None:
            found[trial.rung][trial.seed].append(score)
    return {rung: {seed: fmean(values) for seed, values in seeds.items()} for rung, seeds in found.items()}


def _place(
    arm: str, runs: Runs, scores: Mapping[str, Scores], objective: Objective, baseline: str, noise: Noise
) -> Place:
    refusals = [objective.refusal(outcome) for _, outcome in runs]
    reason = next((r for r in refusals if r), "")
    fault = next((r for r, (_, outcome) in zip(refusals, runs, strict=True) if outcome.status in FAULTS), "")
    rung = max(scores[arm], default=max(trial.rung for trial, _ in runs))
    own = {} if fault else scores[arm].get(rung, {})
    score = fmean(own.values()) if own else None
    against = None
    if own and arm != baseline and (shared := scores[arm].keys() & scores.get(baseline, {}).keys()):
        theirs = scores[baseline][max(shared)]
        against = compare(scores[arm][max(shared)], theirs, noise)
        # a candidate that has only some of the baseline's seeds must not stand higher because they are lucky ones
        if max(shared) == rung and against.difference is not None:
            score = fmean(theirs.values()) * (1 + against.difference)
    return Place(
        arm=arm,
        title=runs[0][0].title or arm,
        place=None,
        tied=False,
        rung=rung,
        score=score,
        seeds=tuple(sorted(own)),
        against_baseline=against,
        reason=fault or reason,
    )


def _numbered(able: Sequence[Place], scores: Mapping[str, Scores], noise: Noise) -> list[Place]:
    groups: list[list[Place]] = []
    for place in able:
        first = groups[-1][0] if groups else None
        if first is not None and first.rung == place.rung and _tie(place, first, scores, noise):
            groups[-1].append(place)
        else:
            groups.append([place])
    numbered, number = [], 1
    for group in groups:
        numbered += [replace(place, place=number, tied=len(group) > 1) for place in group]
        number += len(group)
    return numbered


def _tie(place: Place, first: Place, scores: Mapping[str, Scores], noise: Noise) -> bool:
    found = compare(scores[place.arm][place.rung], scores[first.arm][first.rung], noise)
    return found.relation in ("within noise", "better") or place.score == first.score
