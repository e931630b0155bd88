"""What each parameter of a space does to the score, on average over the others, with its noise."""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_VALUES = 8
"""numbers that take more values than that were drawn and not listed: halves are compared"""
MIN_LEVEL = 2
"""runs on each side of an unpaired comparison: one has no spread"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: its settings over the base's, seed and score (less is better)."""

    settings: Mapping[str, Any]
    seed: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One value of one parameter against another one."""

    parameter: str
    value: str
    against: str
    """the value that it is compared with: the base's where the space has it, else the first"""
    difference: float
    """mean of score / reference score - 1; below 0: better"""
    standard_error: float | None
    """of `difference`; None: one pair and no measured noise"""
    runs: int
    """pairs, or runs with this value where nothing is paired"""
    paired: bool
    """whether both sides agree in all other settings and the seed"""


def effects(runs: Sequence[Run], *, base: Mapping[str, Any], noise_sd: float | None = None) -> list[Effect]:
    """Effects of every parameter that takes more than one value in `runs`.

    A grid is compared pair by pair: all else equal, seed included. The spread of the pairs holds noise and interaction with the
    other parameters; with a single pair `noise_sd` (of a paired difference, as a share) stands in. In a random search no two
    runs agree in all else: the means of the values are compared, of a number the upper half of the values against the lower.
    """
    names = sorted({name for run in runs for name in run.settings})
    found: list[Effect] = []
    for name in names:
        values = [run.settings.get(name, base.get(name)) for run in runs]
        distinct = list(dict.fromkeys(values))
        if len(distinct) > 1:
            reference = base[name] if name in base and base[name] in distinct else distinct[0]
            drawn = len(distinct) > MAX_VALUES
            pairs = [] if drawn else _paired(runs, values, name, reference, base, noise_sd)
            found += pairs or _unpaired(runs, values, name, reference)
    return found


def _paired(
    runs: Sequence[Run],
    values: Sequence[Any],
    name: str,
    reference: Any,
    base: Mapping[str, Any],
    noise_sd: float | None,
) -> list[Effect]:
    blocks: dict[Hashable, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, value in zip(runs, values, strict=True):
        others = {**base, **run.settings}
        others.pop(name, None)
        blocks[run.seed, tuple(sorted((key, repr(other)) for key, other in others.items()))][value].append(run.score)
    ratios: dict[Any, list[float]] = defaultdict(list)
    for block in blocks.values():
        if reference in block:
            for value, scores in block.items():
                if value != reference:
                    ratios[value].append(float(np.mean(scores) / np.mean(block[reference]) - 1))
    return [
        Effect(
            parameter=name,
            value=str(value),
            against=str(reference),
            difference=float(np.mean(ratio)),
            standard_error=_standard_error(ratio, noise_sd),
            runs=len(ratio),
            paired=True,
        )
        for value, ratio in ratios.items()
    ]


def _standard_error(ratios: Sequence[float], noise_sd: float | None) -> float | None:
    """Of the mean. Never below that of the measured noise: two pairs may agree by chance."""
    floor = 0.0 if noise_sd is None else noise_sd / math.sqrt(len(ratios))
    if len(ratios) > 1:
        return max(float(np.std(ratios, ddof=1)) / math.sqrt(len(ratios)), floor)
    return noise_sd


def _unpaired(runs: Sequence[Run], values: Sequence[Any], name: str, reference: Any) -> list[Effect]:
    levels: dict[str, list[float]] = defaultdict(list)
    against = str(reference)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values):
        middle = float(np.median(numbers))
        against = f"up to {middle:.4g}"
        for run, value in zip(runs, numbers, strict=True):
            levels[against if value <= middle else f"over {middle:.4g}"].append(run.score)
    else:
        for run, value in zip(runs, values, strict=True):
            levels[str(value)].append(run.score)
    base_scores = levels.pop(against)
    if len(base_scores) < MIN_LEVEL:
        return []
    return [
        Effect(
            parameter=name,
            value=value,
            against=against,
            difference=float(np.mean(scores) / np.mean(base_scores) - 1),
            standard_error=_welch_error(scores, base_scores),
            runs=len(scores),
            paired=False,
        )
        for value, scores in levels.items()
        if len(scores) >= MIN_LEVEL
    ]


def _welch_error(scores: Sequence[float], base_scores: Sequence[float]) -> float:
    """Standard error of the difference of two means, as a share of the second."""
    squares = sum(float(np.var(side, ddof=1)) / len(side) for side in (scores, base_scores))
    return math.sqrt(squares) / float(np.mean(base_scores))
