"""Axes of a picture: where the ticks stand, what they say, and where a value comes to lie."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from raychat.search.report import words

Show = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of values with its ticks."""

    label: str
    """what it shows, with its unit"""
    low: float
    high: float
    ticks: tuple[float, ...]
    show: Show
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)


def axis(
    values: Iterable[float],
    label: str,
    *,
    show: Show | None = None,
    log: bool = False,
    zero: bool = False,
    room: float = 0.06,
) -> Axis:
    """An axis that holds `values` with some room; `zero` begins it at 0. Logarithmic only over more than a factor of three."""
    found = [value for value in values if math.isfinite(value)]
    if log and found and min(found) > 0 and max(found) / min(found) >= 3:
        return _logarithmic(found, label, show or words.count, room)
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    low = min(low, 0.0) if zero else low
    span = (high - low) or abs(high) * 0.02 or 1.0
    low = low if zero and low == 0 else low - span * room
    high += span * room
    ticks = linear_ticks(low, high)
    return Axis(label=label, low=low, high=high, ticks=ticks, show=show or decimals(ticks))


def linear_ticks(low: float, high: float, wanted: int = 5) -> tuple[float, ...]:
    """Round values, about `wanted` of them, from `low` to `high`."""
    size = 10 ** math.floor(math.log10((high - low) / wanted))

    def inside(step: float) -> range:
        return range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)

    step = min((size * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(len(inside(step)) - wanted))
    return tuple(float(f"{n * step:.12g}") for n in inside(step))


def decimals(ticks: Sequence[float], before: str = "", after: str = "") -> Show:
    """Shows all ticks with as many digits as they need to differ."""
    step = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    if digits and abs(step * 10**digits - round(step * 10**digits)) > 1e-6:
        digits += 1  # a step of 0.25
    if step >= 1 and abs(step - round(step)) > 1e-6:
        digits = 1

    def show(value: float) -> str:
        text = f"{abs(value):,.{digits}f}"
        return f"{'−' if value < 0 and float(text.replace(',', '')) else ''}{before}{text}{after}"

    return show


def money_axis(values: Iterable[float], label: str, *, log: bool = False, zero: bool = False) -> Axis:
    """An axis of dollars."""
    made = axis(values, label, log=log, zero=zero)
    return Axis(
        label=label,
        low=made.low,
        high=made.high,
        ticks=made.ticks,
        show=_short_dollars if made.log else decimals(made.ticks, before="$"),
        log=made.log,
    )


def _short_dollars(value: float) -> str:
    return f"${value:,.0f}" if value >= 1 else f"${value:.2g}"


def _logarithmic(values: Sequence[float], label: str, show: Show, room: float) -> Axis:
    low, high = math.log10(min(values)), math.log10(max(values))
    low, high = low - (high - low) * room, high + (high - low) * room
    inside: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        inside = [f * 10.0**p for p in powers for f in factors if low <= math.log10(f * 10.0**p) <= high]
        if len(inside) >= 3:
            break
    inside = inside[:: math.ceil(len(inside) / 7)]
    return Axis(label=label, low=10**low, high=10**high, ticks=tuple(inside), show=show, log=True)
