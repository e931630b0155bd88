"""A winner against the baseline on fresh seeds: Welch's test, corrected for how many configurations were compared."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

MIN_SEEDS = 3
SIGNIFICANT = 0.05
"""the corrected p below which a difference counts"""

Finding = Literal["better", "worse", "no difference", "not enough seeds", "failed"]


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What the fresh seeds say about one configuration."""

    arm: str
    finding: Finding
    """failed: it has no result on a seed on which the baseline has one"""
    seeds: int
    """on which both have a result"""
    compared: int
    """configurations that p was corrected for"""
    difference: float | None = None
    """(mean - baseline's mean) / baseline's mean; below 0: better"""
    p: float | None = None
    """two-sided, uncorrected"""
    p_corrected: float | None = None


def confirm(
    candidates: Mapping[str, Mapping[int, float | None]], baseline: Mapping[int, float | None], *, compared: int
) -> list[Confirmation]:
    """Each candidate (arm -> seed -> score, less is better) against the baseline's scores on the same fresh seeds.

    None is a seed that was tried and has no score. `compared` is the number of configurations that the search compared: those
    that were not confirmed count in Holm's correction (as the least significant ones): the candidates were picked from them.
    """
    found = [_test(arm, scores, baseline, max(compared, len(candidates))) for arm, scores in candidates.items()]
    corrected = holm({c.arm: c.p for c in found if c.p is not None}, family=max(compared, len(candidates)))
    return [_decide(c, corrected.get(c.arm)) for c in found]


def holm(p_values: Mapping[str, float], *, family: int) -> dict[str, float]:
    """p corrected by Holm's step-down method (1979); `family` may be larger than the number of p values at hand."""
    corrected, worst = {}, 0.0
    for position, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, p * (family - position)))
        corrected[name] = worst
    return corrected


def welch(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p of Welch's test that `a` and `b` have the same mean. At least one of them has a spread."""
    sds = float(a.std(ddof=1)), float(b.std(ddof=1))
    found = stats.ttest_ind_from_stats(a.mean(), sds[0], len(a), b.mean(), sds[1], len(b), equal_var=False)
    return float(found.pvalue)


def _test(
    arm: str, scores: Mapping[int, float | None], baseline: Mapping[int, float | None], compared: int
) -> Confirmation:
    there = {seed: value for seed, value in baseline.items() if value is not None}
    pairs = [(value, there[seed]) for seed, value in scores.items() if value is not None and seed in there]
    ours, theirs = (np.array([pair[i] for pair in pairs], dtype=float) for i in (0, 1))
    difference = float(ours.mean() / theirs.mean() - 1) if pairs else None
    finding: Finding = "no difference"
    if any(value is None and seed in there for seed, value in scores.items()):
        finding = "failed"
    elif len(pairs) < MIN_SEEDS or not (np.ptp(ours) or np.ptp(theirs)):  # seeds that change nothing are one seed
        finding = "not enough seeds"
    p = welch(ours, theirs) if finding == "no difference" else None
    return Confirmation(arm=arm, finding=finding, seeds=len(pairs), compared=compared, difference=difference, p=p)


def _decide(found: Confirmation, p_corrected: float | None) -> Confirmation:
    finding = found.finding
    if p_corrected is not None and p_corrected < SIGNIFICANT and found.difference:
        finding = "better" if found.difference < 0 else "worse"
    return replace(found, finding=finding, p_corrected=p_corrected)
