"""The loss as a function of compute: L(C) = E + A C^-alpha, or without the floor E where the figures cannot tell it from 0."""

from dataclasses import dataclass

import numpy as np

from raychat.search.iso_flops import Interval, interval

_ALPHAS = (1e-3, 2.0)
"""exponents that are thought possible"""
_COARSE, _FINE, _ROUNDS = 80, 9, 6
"""points of the first grid, and of each of the finer ones between the neighbours of the best"""


@dataclass(frozen=True, kw_only=True)
class LossLaw:
    """L(C) = floor + coefficient * (C / centre)^-alpha, in the unit of the losses."""

    floor: float
    coefficient: float
    alpha: float
    centre: float
    """FLOPs: geometric mean of the budgets"""
    alpha_interval: Interval | None
    floor_interval: Interval | None
    """of a fit with a floor; None: no noise to resample"""
    note: str
    """why there is no floor; empty where there is one"""

    def at(self, flops: float) -> float:
        """The loss at a budget."""
        return self.floor + self.coefficient * (flops / self.centre) ** -self.alpha

    def local_exponent(self, flops: float) -> float:
        """-d ln L / d ln C: what a percent of compute is worth in percent of loss there."""
        return self.alpha * (1 - self.floor / self.at(flops))


def fit_loss_law(flops: np.ndarray, losses: np.ndarray, draws: np.ndarray | None) -> LossLaw:
    """Least squares of the relative error. `draws` are resampled losses, draws x budgets.

    The floor stays only if its 95% interval leaves 0 out and is narrower than the floor itself. Over a decade or two of compute
    it seldom is; a law without it then describes the same figures with one number less.
    """
    centre = float(np.exp(np.log(flops).mean()))
    c = flops / centre
    floor, coefficient, alpha = (float(value) for value in _search(c, losses[None])[0])
    found = None if draws is None else _search(c, draws)
    floors = None if found is None else interval(found[:, 0])
    if found is not None and floors is not None and floors.low > 0 and floors.high - floors.low < floor:
        alphas = interval(found[:, 2])
        return LossLaw(
            floor=floor,
            coefficient=coefficient,
            alpha=alpha,
            centre=centre,
            alpha_interval=alphas,
            floor_interval=floors,
            note="",
        )
    slope, level = np.polyfit(np.log(c), np.log(losses), 1)
    slopes = None if draws is None else interval(-np.polyfit(np.log(c), np.log(draws).T, 1)[0])
    why = "there is no noise to judge it by" if floors is None else f"0 to {floors.high:.3g} fit"
    return LossLaw(
        floor=0.0,
        coefficient=float(np.exp(level)),
        alpha=float(-slope),
        centre=centre,
        alpha_interval=slopes,
        floor_interval=floors,
        note=f"no floor: {why}",
    )


def _search(c: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """draws x (floor, coefficient, alpha): least squares for each row of `losses`, by ever finer grids of alpha.

    Floor and coefficient are linear once alpha is given; all rows go through a grid together.
    """
    best = np.full(len(losses), np.inf)
    found = np.zeros((len(losses), 3))
    factors, around = np.geomspace(*_ALPHAS, _COARSE), np.ones(len(losses))
    for _ in range(1 + _ROUNDS):
        for factor in factors:
            alpha = around * factor
            floor, coefficient, error = _linear(c, losses, alpha)
            better = error < best
            best[better] = error[better]
            found[better] = np.stack([floor, coefficient, alpha], axis=1)[better]
        around, step = found[:, 2].copy(), factors[1] / factors[0]
        factors = np.geomspace(1 / step, step, _FINE)
    return found


def _linear(c: np.ndarray, losses: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best floor >= 0 and coefficient for the alpha of each row, with the sum of squared relative errors."""
    weights = losses**-2.0
    weights /= weights.sum(axis=1, keepdims=True)
    z = c ** -alpha[:, None]
    mean_z, mean_y = ((values * weights).sum(axis=1, keepdims=True) for values in (z, losses))
    slope = ((losses - mean_y) * (z - mean_z) * weights).sum(axis=1) / ((z - mean_z) ** 2 * weights).sum(axis=1)
    through_zero = (losses * z * weights).sum(axis=1) / (z**2 * weights).sum(axis=1)
    floor = mean_y[:, 0] - slope * mean_z[:, 0]
    slope = np.where(floor < 0, through_zero, slope)
    floor = np.maximum(floor, 0.0)
    error = ((losses - floor[:, None] - slope[:, None] * z) ** 2 * weights).sum(axis=1)
    return floor, slope, error
