"""Paired noise: how far two runs that should be equal lie apart, and whether a difference is more than that.

All arms of a search share initial weights and row order, so their differences are far less noisy than the figures themselves.
Scores are figures of which less is better; noise and differences are shares of them, so that they hold for every rung.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

THREE_SD = 3.0
"""what promotion takes, in standard deviations of a paired difference that are known for certain"""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviation of the difference of two runs with the same seed and row order that should be equal."""

    sd: float | None
    """of the difference, as a share of the score; None: not measured"""
    freedom: int
    """degrees of freedom that `sd` was estimated with"""
    source: str
    """where it comes from, or why there is none, for a person"""

    @property
    def limit(self) -> float:
        """Standard deviations that a difference must exceed. infinity where nothing was measured."""
        return limit(self.freedom) if self.sd is not None else math.inf

    def threshold(self, pairs: int = 1) -> float:
        """The least mean difference of `pairs` seeds that counts, as a share of the score."""
        return math.inf if self.sd is None else self.limit * self.sd / math.sqrt(pairs)


def limit(freedom: int) -> float:
    """Student's t that is exceeded as rarely as three sd of a normal (0.27%, both sides): 235.8, 19.2, 9.2, 6.6, ..., 3.

    An sd from few repeats is itself uncertain; a fixed limit of three would promote noise in one of five comparisons after two
    repeats (`freedom` 1) instead of one of 370.
    """
    return float(stats.t.isf(stats.norm.sf(THREE_SD), freedom))


def paired_noise(repeats: Iterable[Sequence[float]], perturbed: Iterable[Sequence[float]] = ()) -> Noise:
    """Noise from repeats of one configuration, one group for each seed and rung, pooled.

    `repeats` differ by nothing but the hardware; `perturbed` by the last bits of some initial weights (the run without may be
    among them). Where the hardware is deterministic repeats are identical and say nothing about how far a difference of no
    importance carries: then the perturbed ones stand in. Both are used where both vary.
    """
    plain, shaken = _deviations(repeats), _deviations(perturbed)
    deterministic = plain[1] > 0 and plain[0] == 0
    if deterministic and not shaken[0]:
        tried = "so are those with perturbed weights" if shaken[1] else "repeat with --perturbation 1, 2, 3"
        return Noise(
            sd=None, freedom=0, source=f"{plain[1] + 1} repeats are identical: deterministic hardware; {tried}"
        )
    squares = shaken[0] if deterministic else plain[0] + shaken[0]
    freedom = shaken[1] if deterministic else plain[1] + shaken[1]
    if not freedom or not squares:
        return Noise(sd=None, freedom=0, source="no configuration was run twice with the same seed")
    kinds = [("repeats", plain), ("perturbed weights", shaken)]
    source = " and ".join(name for name, (spread, _) in kinds if spread)
    return Noise(sd=math.sqrt(2 * squares / freedom), freedom=freedom, source=source)


def _deviations(groups: Iterable[Sequence[float]]) -> tuple[float, int]:
    """Sum of squared relative deviations from the means of the groups, and its degrees of freedom."""
    squares, freedom = 0.0, 0
    for group in groups:
        if len(group) > 1:
            values = np.asarray(group, dtype=float)
            if np.ptp(values):  # equal values: not even the rounding of their mean may count as noise
                squares += float(((values / values.mean() - 1) ** 2).sum())
            freedom += len(group) - 1
    return squares, freedom


Relation = Literal["better", "worse", "within noise", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A configuration against another one on the seeds that both have."""

    relation: Relation
    """unknown: no common seed, or no noise to measure by"""
    difference: float | None
    """mean over seeds of (candidate - baseline) / baseline; below 0: the candidate is better"""
    units: float | None
    """the difference in standard deviations of it"""
    limit: float
    """the number of them that it had to exceed"""
    pairs: int
    """common seeds"""
    reason: str = ""
    """of `unknown`"""

    @property
    def promotes(self) -> bool:
        """Whether the candidate may take the place of the baseline."""
        return self.relation == "better"


def compare(candidate: Mapping[int, float], baseline: Mapping[int, float], noise: Noise) -> Comparison:
    """`candidate` against `baseline`, both seed -> score.

    With several common seeds the spread of their differences is a second measurement of the same noise; the two are pooled by
    their degrees of freedom. Without measured noise it is the only one; with one seed there is then nothing to divide by.
    """
    seeds = sorted(candidate.keys() & baseline.keys())
    if not seeds:
        return _unknown(None, 0, "no seed in common")
    differences = np.array([candidate[seed] / baseline[seed] - 1 for seed in seeds])
    mean, pairs = float(differences.mean()), len(seeds)
    freedom = noise.freedom if noise.sd is not None else 0
    squares = freedom * (noise.sd or 0.0) ** 2 + float(((differences - mean) ** 2).sum())
    freedom += pairs - 1
    if not freedom or not squares:
        return _unknown(mean, pairs, f"the noise is not known ({noise.source})")
    units = mean / math.sqrt(squares / freedom / pairs)
    beyond = abs(units) > limit(freedom)
    relation: Relation = "within noise" if not beyond else "better" if mean < 0 else "worse"
    return Comparison(relation=relation, difference=mean, units=units, limit=limit(freedom), pairs=pairs)


def _unknown(difference: float | None, pairs: int, reason: str) -> Comparison:
    return Comparison(relation="unknown", difference=difference, units=None, limit=math.inf, pairs=pairs, reason=reason)
