"""Scaling laws from a sweep of several FLOPs budgets: optimal parameters and tokens, with bootstrap intervals and refusals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from raychat.errors import RaychatError
from raychat.search.iso_flops import (
    BudgetOptimum,
    Interval,
    IsoFlops,
    budget_optimum,
    budgets_of,
    interval,
    resampled_optima,
)
from raychat.search.loss_law import LossLaw, fit_loss_law

MIN_BUDGETS = 5
MIN_SPAN = 10.0
"""largest budget over smallest: a decade"""
FIT_BUDGETS = 3
"""a line through two points fits whatever they are"""
LOST_DRAWS = 0.05
"""share of resamplings without an optimum from which on an interval would be of the lucky ones"""


class NotEnoughEvidence(RaychatError):  # noqa: N818 (a refusal, not an accident)
    """A prediction that the figures at hand do not carry. The message says what would."""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """value = coefficient * (C / centre)^exponent."""

    exponent: float
    coefficient: float
    centre: float
    """FLOPs: geometric mean of the budgets"""
    exponent_interval: Interval | None

    def at(self, flops: float) -> float:
        """The value at a budget."""
        return self.coefficient * (flops / self.centre) ** self.exponent


class Estimate(NamedTuple):
    """A value and its 95% interval, None where there was no noise to resample."""

    value: float
    interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The compute-optimal model at one budget."""

    flops: float
    parameters: Estimate
    tokens: Estimate
    ratio: Estimate
    """tokens per parameter"""
    loss: float
    decades_beyond: float
    """how far outside the budgets that were measured; 0: between them"""


@dataclass(frozen=True, kw_only=True)
class ScalingFit:
    """What a sweep says. The laws are None where fewer than three budgets have an optimum."""

    optima: tuple[BudgetOptimum, ...]
    """of every budget, refused ones too, in rising order"""
    parameters: PowerLaw | None
    tokens: PowerLaw | None
    loss: LossLaw | None
    refusal: str
    """why nothing may be predicted beyond the measured budgets; empty if it may"""
    notes: tuple[str, ...]
    """what a reader of the figures must know"""
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)
    """resampled laws: draws x (parameters, tokens) x (exponent, ln coefficient)"""

    def predict(self, flops: float) -> Prediction:
        """The compute-optimal model for `flops`. NotEnoughEvidence without laws, or beyond the budgets if `refusal` says so."""
        measured = [optimum.budget for optimum in self.optima if not optimum.refusal]
        if self.parameters is None or self.tokens is None or self.loss is None:
            raise NotEnoughEvidence(f"No prediction for {flops:.3g} FLOPs: {self.refusal}")
        beyond = max(0.0, math.log10(flops / max(measured)), math.log10(min(measured) / flops))
        if beyond > 1e-9 and self.refusal:
            between = f"{min(measured):.3g} to {max(measured):.3g}"
            raise NotEnoughEvidence(f"No prediction for {flops:.3g} FLOPs, measured are {between}: {self.refusal}")
        parameters, tokens = self.parameters.at(flops), self.tokens.at(flops)
        logs = None
        if self.draws is not None:
            logs = self.draws[:, :, 0] * math.log(flops / self.parameters.centre) + self.draws[:, :, 1]
        return Prediction(
            flops=flops,
            parameters=_estimate(parameters, None if logs is None else logs[:, 0]),
            tokens=_estimate(tokens, None if logs is None else logs[:, 1]),
            ratio=_estimate(tokens / parameters, None if logs is None else logs[:, 1] - logs[:, 0]),
            loss=self.loss.at(flops),
            decades_beyond=beyond,
        )


def fit_scaling(points: Iterable[IsoFlops], *, draws: int = 1000, seed: int = 0) -> ScalingFit:
    """Parabolas per budget, then N_opt ~ C^a, D_opt ~ C^b and L(C) through their lowest points.

    Intervals come from `draws` resamplings of the residuals about the parabolas (`seed`): they hold the noise of the runs, not
    the error of the model (a loss that is no parabola in ln N, a law that is no power law, rates that were not tuned per size).
    """
    groups = budgets_of(points)
    optima = tuple(budget_optimum(group) for group in groups)
    usable = [(group, optimum) for group, optimum in zip(groups, optima, strict=True) if not optimum.refusal]
    refusal = _refusal(optima)
    notes = [f"{optimum.budget:.3g} FLOPs: {optimum.refusal}" for optimum in optima if optimum.refusal]
    if len(usable) < FIT_BUDGETS:
        return ScalingFit(optima=optima, parameters=None, tokens=None, loss=None, refusal=refusal, notes=tuple(notes))
    flops = np.array([optimum.budget for _, optimum in usable])
    logs = np.log([[o.parameters or 0.0, o.tokens or 0.0, o.loss or 0.0] for _, o in usable])
    resampled, note = _draws([group for group, _ in usable], draws, seed)
    loss = fit_loss_law(flops, np.exp(logs[:, 2]), None if resampled is None else np.exp(resampled[:, :, 2]))
    x = np.log(flops) - np.log(flops).mean()
    lines = np.polyfit(x, logs[:, :2], 1).T
    spread = None if resampled is None else np.stack([np.polyfit(x, resampled[:, :, i].T, 1).T for i in (0, 1)], axis=1)
    laws = [_power_law(lines[i], None if spread is None else spread[:, i], loss.centre) for i in (0, 1)]
    return ScalingFit(
        optima=optima,
        parameters=laws[0],
        tokens=laws[1],
        loss=loss,
        refusal=refusal,
        notes=tuple(text for text in [*notes, note, loss.note] if text),
        draws=spread,
    )


def _refusal(optima: Sequence[BudgetOptimum]) -> str:
    budgets = [optimum.budget for optimum in optima if not optimum.refusal]
    if len(budgets) < MIN_BUDGETS:
        return f"{len(budgets)} of {len(optima)} budgets have an optimum, a law takes {MIN_BUDGETS}"
    if max(budgets) < MIN_SPAN * min(budgets) * (1 - 1e-9):
        return f"the budgets differ by a factor of {max(budgets) / min(budgets):.3g}, a law takes {MIN_SPAN:g}"
    return ""


def _draws(groups: Sequence[Sequence[IsoFlops]], draws: int, seed: int) -> tuple[np.ndarray | None, str]:
    """Resampled optima of the draws in which every budget has one, and a note on why there are none."""
    found = resampled_optima(groups, draws, np.random.default_rng(seed))
    if found is None:
        return None, "no intervals: three runs per budget leave no residuals; add sizes or seeds"
    whole = ~np.isnan(found).any(axis=(1, 2))
    lost = 1 - float(whole.mean())
    if lost > LOST_DRAWS:
        return (
            None,
            f"no intervals: in {lost:.0%} of the resamplings some budget has no optimum; the runs are too noisy",
        )
    return found[whole], ""


def _power_law(line: np.ndarray, spread: np.ndarray | None, centre: float) -> PowerLaw:
    return PowerLaw(
        exponent=float(line[0]),
        coefficient=float(np.exp(line[1])),
        centre=centre,
        exponent_interval=None if spread is None else interval(spread[:, 0]),
    )


def _estimate(value: float, logs: np.ndarray | None) -> Estimate:
    return Estimate(value, None if logs is None else interval(np.exp(logs)))
