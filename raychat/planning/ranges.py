"""A quantity of which a plan knows what to expect and between what: time, money, tokens."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """`mid` is expected; from `low` to `high` it would surprise nobody. Sums and products are those of the bounds."""

    low: float
    mid: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.mid <= self.high:
            raise ValueError(f"a range needs low <= mid <= high, got {self.low}, {self.mid}, {self.high}")

    @staticmethod
    def exactly(x: float) -> "Range":
        """What is known: all three are `x`."""
        return Range(x, x, x)

    @staticmethod
    def around(mid: float, share: float) -> "Range":
        """`mid` (0 or more), and `share` of it (0 to 1) to both sides."""
        return Range(mid * (1 - share), mid, mid * (1 + share))

    @staticmethod
    def total(parts: "Iterable[Range]") -> "Range":
        """The sum of `parts`."""
        return sum(parts, Range.exactly(0.0))

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def scaled(self, factor: float) -> "Range":
        """Times a number, 0 or more."""
        return Range(self.low * factor, self.mid * factor, self.high * factor)

    def times(self, other: "Range") -> "Range":
        """Times another range; both are 0 or more."""
        return Range(self.low * other.low, self.mid * other.mid, self.high * other.high)

    def under(self, dividend: float) -> "Range":
        """`dividend` (0 or more) divided by this range, which lies above 0."""
        return Range(dividend / self.high, dividend / self.mid, dividend / self.low)

    def includes(self, x: float) -> bool:
        """Whether `x` lies in it."""
        return self.low <= x <= self.high

    def as_list(self) -> list[float]:
        """[low, mid, high], as JSON has it."""
        return [self.low, self.mid, self.high]
