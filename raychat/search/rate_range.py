"""A learning-rate range test (Smith 2015, arXiv:1506.01186): from the loss under a rising rate to a range to search.

Smith takes the range from where training begins to work to where it gets worse. "Begins to work" is read off as the steepest
descent over the logarithm of the rate, as fastai's `steep` does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.signal import savgol_filter

from raychat.errors import RaychatError

_GRID = 200
"""points, evenly spaced in the logarithm of the rate, that the slope is taken on"""
_WINDOW = 31
"""of them, that a straight line is laid through for a slope: about a sixth of the range"""
_RISE = 0.1
"""share of the whole descent that the loss may climb back before that counts as divergence"""
_LEAST_DESCENT = 0.01
"""share of the first loss that it must fall by, or the curve shows nothing"""
_SMOOTH = 10
"""the smoothing window is this part of the steps: a tenth"""
_LEAST_WIDTH = 3.0
"""the range is at least so many times as high as it is low, or there is nothing to search"""
MIN_POINTS = 8


class NoRange(RaychatError):  # noqa: N818 (a refusal, not an accident)
    """A range test that suggests nothing. The message says what to change."""


@dataclass(frozen=True, kw_only=True)
class RateRange:
    """Multipliers of all rates between which a search should look."""

    low: float
    """where the loss falls fastest; at most a third of `high`"""
    high: float
    """the last one before the loss climbs for good"""
    lowest: float
    """where the loss is lowest"""
    diverges: float | None
    """where it has climbed; None: the test ended before"""
    note: str
    """what a reader must know; may be empty"""


def smoothed(losses: Sequence[float]) -> list[float]:
    """`losses` under straight lines through windows of a tenth of them, each about its own step: nothing is delayed.

    From the first loss that is no number on, there are none.
    """
    values = np.asarray(losses, dtype=float)
    end = _finite_until(values)
    window = min(2 * (len(values) // _SMOOTH // 2) + 1, end - (end + 1) % 2)  # odd
    kept = np.asarray(savgol_filter(values[:end], window, 1)) if window >= 3 else values[:end]
    return [*kept.tolist(), *[math.nan] * (len(values) - end)]


def suggest_range(multipliers: Sequence[float], losses: Sequence[float]) -> RateRange:
    """From steepest descent to before divergence. `losses` (smoothed) belong to `multipliers`, which rise.

    NoRange where the loss never falls, or fewer than eight points come before it is no number any more.
    """
    rates, values = np.asarray(multipliers, dtype=float), np.asarray(losses, dtype=float)
    if len(rates) != len(values) or not (rates > 0).all() or not (np.diff(rates) > 0).all():
        raise NoRange(
            f"A range test has one loss for each rising rate; here {len(rates)} rates and {len(values)} losses."
        )
    end = _finite_until(values)
    if end < MIN_POINTS:
        raise NoRange(f"Only {end} losses before the first that is no number: start the range test at a lower rate.")
    x, y = np.log(rates[:end]), values[:end]
    lowest = int(np.argmin(y))
    descent = float(y[0] - y[lowest])
    if descent <= 0:
        raise NoRange(
            "The loss never falls below its first value: start the range test at a lower rate, or take more steps."
        )
    if descent < _LEAST_DESCENT * y[0]:
        raise NoRange(
            f"The loss falls by {descent / y[0]:.2%} only, from {y[0]:.4g} to {y[lowest]:.4g}, which may be chance: let the "
            "rates of the range test rise higher, or take more steps."
        )
    climbed = np.flatnonzero(y[lowest:] > y[lowest] + _RISE * descent)
    stop = lowest + int(climbed[0]) if climbed.size else end
    diverges = float(rates[stop]) if stop < len(rates) else None
    high = float(rates[stop - 1])
    steepest, at_the_start = _steepest(x, y, lowest)
    notes = []
    if diverges is None:
        notes.append("the loss had not climbed at the highest rate: the range may go on above it, --range-most")
    if at_the_start:
        notes.append("the loss fell fastest at the lowest rates: the range may begin below them, --range-least")
    return RateRange(
        low=min(steepest, high / _LEAST_WIDTH),
        high=high,
        lowest=float(rates[lowest]),
        diverges=diverges,
        note="; ".join(notes),
    )


def _finite_until(values: np.ndarray) -> int:
    """How many come before the first that is no number."""
    finite = np.isfinite(values)
    return len(values) if finite.all() else int(np.argmin(finite))


def _steepest(x: np.ndarray, y: np.ndarray, lowest: int) -> tuple[float, bool]:
    """The rate of the steepest fall before the lowest point, and whether that is where the test begins.

    By straight lines through windows of the curve.
    """
    grid = np.linspace(x[0], x[-1], _GRID)
    slope = np.asarray(savgol_filter(np.interp(grid, x, y), _WINDOW, 1, deriv=1))
    before = int((grid <= x[lowest]).sum())
    at = int(np.argmin(slope[:before]))
    return float(np.exp(grid[at])), at <= _WINDOW // 2
