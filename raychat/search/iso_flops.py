"""One FLOPs budget spent on models of several sizes: the size at which the loss is lowest, and how sure that is.

The approach is the second one of Hoffmann et al. 2022 (arXiv:2203.15556): a parabola of the loss in log parameters per budget.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

MIN_SIZES = 3
"""of models per budget: a parabola has three coefficients"""


@dataclass(frozen=True, kw_only=True)
class IsoFlops:
    """One run of a sweep. Runs of a budget carry exactly the same `budget`; repeats over seeds are points of their own."""

    budget: float
    """FLOPs that the sweep meant to spend"""
    parameters: float
    """as the law shall count them: raychat's scaling parameters"""
    tokens: float
    loss: float
    """val_bpb, or nats per token"""


class Interval(NamedTuple):
    """A 95% bootstrap interval."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class BudgetOptimum:
    """The best model for one budget, or why there is none."""

    budget: float
    points: tuple[IsoFlops, ...]
    """in the order of their parameters"""
    curve: tuple[float, float, float] | None
    """c0, c1, c2 of loss = c0 + c1 x + c2 x^2 with x = ln(parameters / centre); None: no parabola through these points"""
    centre: float
    """geometric mean of the smallest and the largest model"""
    parameters: float | None
    tokens: float | None
    loss: float | None
    refusal: str
    """why there is no optimum; empty where there is one"""

    def curve_at(self, parameters: float) -> float:
        """Loss of the fitted parabola, for a picture. ValueError where there is none."""
        if self.curve is None:
            raise ValueError(self.refusal)
        x = np.log(parameters / self.centre)
        return float(_powers(x) @ np.array(self.curve))


@dataclass(frozen=True)
class _Frame:
    """The linear algebra of one budget: what maps losses to coefficients."""

    x: np.ndarray
    """ln(parameters / centre), n"""
    y: np.ndarray
    """losses, n"""
    solve: np.ndarray
    """3 x n: coefficients of the parabola = solve @ losses"""
    design: np.ndarray
    """n x 3"""
    tokens_line: np.ndarray
    """slope and intercept of ln tokens over x"""


def budgets_of(points: Iterable[IsoFlops]) -> list[list[IsoFlops]]:
    """`points` by budget, both in rising order (budget, parameters)."""
    groups: dict[float, list[IsoFlops]] = defaultdict(list)
    for point in points:
        groups[point.budget].append(point)
    return [sorted(groups[budget], key=lambda p: (p.parameters, p.loss)) for budget in sorted(groups)]


def budget_optimum(points: Sequence[IsoFlops]) -> BudgetOptimum:
    """The lowest point of the parabola through the points of one budget.

    Refused: fewer than three sizes; a parabola that opens downwards; a minimum beyond the smallest or largest model, where the
    parabola says nothing (`boundary`: the sweep needs models on that side).
    """
    points = sorted(points, key=lambda p: (p.parameters, p.loss))
    low, high = points[0].parameters, points[-1].parameters
    sizes = len({point.parameters for point in points})
    if sizes < MIN_SIZES:
        return _refused(points, None, f"{sizes} model sizes; a parabola takes {MIN_SIZES}")
    frame = _frame(points)
    curve = frame.solve @ frame.y
    if curve[2] <= 0:
        return _refused(points, curve, "the loss has no lowest point among these sizes: the parabola opens downwards")
    x = _vertex(curve)
    if not frame.x[0] <= x <= frame.x[-1]:
        side, size = ("smallest", low) if x < 0 else ("largest", high)
        wanted = "smaller" if x < 0 else "larger"
        reason = f"boundary: the lowest loss lies beyond the {side} model ({size:,.0f} parameters); add {wanted} ones"
        return _refused(points, curve, reason)
    return BudgetOptimum(
        budget=points[0].budget,
        points=tuple(points),
        curve=_triple(curve),
        centre=_centre(points),
        parameters=float(_centre(points) * np.exp(x)),
        tokens=float(np.exp(np.polyval(frame.tokens_line, x))),
        loss=float(_powers(x) @ curve),
        refusal="",
    )


def resampled_optima(groups: Sequence[Sequence[IsoFlops]], draws: int, rng: np.random.Generator) -> np.ndarray | None:
    """Bootstrap of the optima: draws x budgets x (ln parameters, ln tokens, ln loss); nan where a draw has no lowest point.

    Residuals (as shares of the loss, divided by sqrt(1 - leverage)) are pooled over the budgets and dealt out anew. None where
    every parabola goes through its points exactly: three points of one seed each leave nothing to resample.
    """
    frames = [_frame(points) for points in groups]
    pool = np.concatenate([_residuals(frame) for frame in frames])
    if pool.size < MIN_SIZES or not pool.any():
        return None
    freedom = sum(len(points) - MIN_SIZES for points in groups)
    # few residuals know their own size badly: as wide as Student's t instead of a normal
    pool = (pool - pool.mean()) * stats.t.isf(0.025, freedom) / stats.norm.isf(0.025)
    found = []
    for points, frame in zip(groups, frames, strict=True):
        fitted = frame.design @ (frame.solve @ frame.y)
        losses = fitted * (1 + rng.choice(pool, (draws, len(fitted))))
        curves = losses @ frame.solve.T
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.where(curves[:, 2] > 0, -curves[:, 1] / (2 * curves[:, 2]), np.nan)
        lowest = np.sum(_powers(x) * curves, axis=1)
        x = np.where(lowest > 0, x, np.nan)  # so flat that its lowest point lies in nowhere
        tokens = np.polyval(frame.tokens_line, x)
        found.append(
            np.stack([np.log(_centre(points)) + x, tokens, np.log(np.where(lowest > 0, lowest, np.nan))], axis=1)
        )
    return np.stack(found, axis=1)


def interval(draws: np.ndarray, level: float = 0.95) -> Interval:
    """The middle `level` of `draws`."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _powers(x: np.ndarray | float) -> np.ndarray:
    """1, x, x^2 in a last axis."""
    return np.stack([np.ones_like(x), x, np.square(x)], axis=-1)


def _centre(points: Sequence[IsoFlops]) -> float:
    return float(np.sqrt(points[0].parameters * points[-1].parameters))


def _frame(points: Sequence[IsoFlops]) -> _Frame:
    x = np.log([point.parameters for point in points]) - np.log(_centre(points))
    design = _powers(x)
    return _Frame(
        x=x,
        y=np.array([point.loss for point in points], dtype=float),
        solve=np.linalg.pinv(design),
        design=design,
        tokens_line=np.polyfit(x, np.log([point.tokens for point in points]), 1),
    )


def _residuals(frame: _Frame) -> np.ndarray:
    """Relative residuals with the variance of the noise; points that the parabola must go through have none."""
    fitted = frame.design @ (frame.solve @ frame.y)
    room = 1 - np.diag(frame.design @ frame.solve)
    free = room > 1e-6
    return (frame.y / fitted - 1)[free] / np.sqrt(room[free])


def _vertex(curve: np.ndarray) -> float:
    return float(-curve[1] / (2 * curve[2]))


def _triple(curve: np.ndarray) -> tuple[float, float, float]:
    return float(curve[0]), float(curve[1]), float(curve[2])


def _refused(points: Sequence[IsoFlops], curve: np.ndarray | None, reason: str) -> BudgetOptimum:
    return BudgetOptimum(
        budget=points[0].budget,
        points=tuple(points),
        curve=None if curve is None else _triple(curve),
        centre=_centre(points),
        parameters=None,
        tokens=None,
        loss=None,
        refusal=reason,
    )
