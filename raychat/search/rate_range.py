"""A learning-rate range test (Smith 2015, arXiv:1506.01186): from the loss under a rising rate to a range to search."""

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
MIN_POINTS = 8


class NoRange(RaychatError):  # noqa: N818 (a refusal, not an accident)
    """A range test that suggests nothing. The message says what to change."""


@dataclass(frozen=True, kw_only=True)
class RateRange:
    """Multipliers of all rates between which a search should look."""

    low: float
    """where the loss falls fastest"""
    high: float
    """the last one before the loss climbs for good"""
    diverges: float | None
    """where it has climbed; None: the test ended before"""
    note: str
    """what a reader must know; may be empty"""


def smoothed(losses: Sequence[float], *, memory: float = 0.9) -> list[float]:
    """Exponential mean of `losses`, corrected for its start. A loss that is no number makes all that follow none."""
    mean, weight, found = 0.0, 0.0, []
    for loss in losses:
        mean, weight = memory * mean + (1 - memory) * loss, memory * weight + 1 - memory
        found.append(mean / weight)
    return found


def suggest_range(multipliers: Sequence[float], losses: Sequence[float]) -> RateRange:
    """From steepest descent to before divergence. `losses` (smoothed) belong to `multipliers`, which rise.

    NoRange where the loss never falls, or fewer than eight points come before it is no number any more.
    """
    rates, values = np.asarray(multipliers, dtype=float), np.asarray(losses, dtype=float)
    if len(rates) != len(values) or not (rates > 0).all() or not (np.diff(rates) > 0).all():
        raise NoRange(
            f"A range test has one loss for each rising rate; here {len(rates)} rates and {len(values)} losses."
        )
    finite = np.isfinite(values)
    end = len(values) if finite.all() else int(np.argmin(finite))
    if end < MIN_POINTS:
        raise NoRange(f"Only {end} losses before the first that is no number: start the range test at a lower rate.")
    x, y = np.log(rates[:end]), values[:end]
    lowest = int(np.argmin(y))
    descent = float(y[0] - y[lowest])
    if descent <= 0:
        raise NoRange(
            "The loss never falls below its first value: start the range test at a lower rate, or take more steps."
        )
    climbed = np.flatnonzero(y[lowest:] > y[lowest] + _RISE * descent)
    stop = lowest + int(climbed[0]) if climbed.size else end
    diverges = float(rates[stop]) if stop < len(rates) else None
    note = "" if diverges is not None else "the loss had not climbed at the highest rate: the range may go on above it"
    high = float(rates[stop - 1])
    return RateRange(low=min(_steepest(x, y, lowest), high), high=high, diverges=diverges, note=note)


def _steepest(x: np.ndarray, y: np.ndarray, lowest: int) -> float:
    """The rate of the steepest fall before the lowest point, by straight lines through windows of the curve."""
    grid = np.linspace(x[0], x[-1], _GRID)
    slope = savgol_filter(np.interp(grid, x, y), _WINDOW, 1, deriv=1)
    before = grid <= x[lowest]
    return float(np.exp(grid[before][np.argmin(slope[before])]))
