"""The space of a search: which values each setting may take, as a grid or drawn at random."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raychat.checks import did_you_mean, require
from raychat.errors import ConfigError

_RANGE_KEYS = ("low", "high", "log", "num")
_REDRAWS = 20
"""times that a configuration is drawn again when it was there already: a small space runs out"""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The values of a list, in its order."""

    values: tuple[Any, ...]

    def grid(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    def draw(self, rng: random.Random) -> Any:
        """One of them, each as likely."""
        return self.values[rng.randrange(len(self.values))]

    def bounds(self) -> tuple[Any, ...]:
        """What must be of the right type for all of it to be."""
        return self.values

    def plain(self) -> Any:
        """As TOML has it."""
        return list(self.values)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included; evenly spaced in their logarithm with `log`."""

    low: float
    high: float
    log: bool = False
    num: int = -1
    """points on a grid; -1: the range can only be drawn from"""
    integer: bool = False
    """whole numbers only"""

    def grid(self) -> tuple[Any, ...]:
        """`num` points from low to high; rounded ones that coincide count once."""
        return tuple(dict.fromkeys(self.at(i / (self.num - 1)) for i in range(self.num)))

    def draw(self, rng: random.Random) -> Any:
        """A number, evenly distributed (in its logarithm with `log`)."""
        return self.at(rng.random())

    def at(self, share: float) -> Any:
        """The number `share` of the way up: exactly low at 0 and high at 1, elsewhere to six digits."""
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        value = self.low if share == 0 else self.high if share == 1 else float(f"{value:.6g}")
        return round(value) if self.integer else value

    def bounds(self) -> tuple[Any, ...]:
        """What must be of the right type for all of it to be."""
        return (self.low, self.high)

    def plain(self) -> Any:
        """As TOML has it."""
        found: dict[str, Any] = {"low": self.low, "high": self.high}
        return found | ({"log": True} if self.log else {}) | ({"num": self.num} if self.num != -1 else {})


Parameter = Choices | Range
Space = Mapping[str, Parameter]
"""setting, with underscores -> its values"""


def parameter(name: str, given: Any, *, integer: bool = False) -> Parameter:
    """What a spec gives for one setting: a list of values, or `{low, high, log, num}`; `integer`: of whole numbers.

    Raises:
        ConfigError: for what is neither, an empty list, a value twice, and bounds that are none.
    """
    if isinstance(given, Mapping):
        return _range(name, given, integer)
    require(
        isinstance(given, list | tuple),
        f"space.{name} = {given!r} is neither a list of values nor a range: give {name} = [{given!r}], or "
        f"{name} = {{low = ..., high = ..., num = 3}}.",
    )
    require(len(given) > 0, f"space.{name} is empty: give at least one value, or leave it out.")
    twice = [value for i, value in enumerate(given) if any(_same(value, other) for other in given[:i])]
    require(not twice, f"space.{name} holds {twice[:1]} twice: give each value once.")
    return Choices(values=tuple(given))


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """All combinations, the last setting varying fastest.

    Raises:
        ConfigError: for a range without `num`.
    """
    for name, values in space.items():
        require(
            not isinstance(values, Range) or values.num > 0,
            f"space.{name} is a range without points: add `num` for a grid, or use searcher = 'random'.",
        )
    for values in itertools.product(*(values.grid() for values in space.values())):
        yield dict(zip(space, values, strict=True))


def sample(space: Space, rng: random.Random) -> dict[str, Any]:
    """One configuration drawn at random."""
    return {name: values.draw(rng) for name, values in space.items()}


def samples(space: Space, number: int, seed: int) -> list[dict[str, Any]]:
    """`number` different configurations, fewer where the space has no more. More of them begin with the same ones."""
    rng, found = random.Random(seed), []
    for _ in range(number):
        for _ in range(_REDRAWS):
            drawn = sample(space, rng)
            if drawn not in found:
                found.append(drawn)
                break
    return found


def spelled(value: Any) -> str:
    """`value` as it is given to a flag: 1e13, not 10000000000000.0."""
    if isinstance(value, float):
        short = f"{value:g}".replace("e+", "e")
        return short if float(short) == value else repr(value)
    return str(value)


def _range(name: str, given: Mapping[str, Any], integer: bool) -> Range:
    if unknown := sorted(set(given) - set(_RANGE_KEYS)):
        raise ConfigError(
            f"space.{name} has no {unknown[0]!r}{did_you_mean(unknown[0], _RANGE_KEYS)} A range is low, high, log, num."
        )
    low: Any = given.get("low")
    high: Any = given.get("high")
    log, num = given.get("log", False), given.get("num", -1)
    require(
        _number(low) and _number(high) and low < high,
        f"space.{name} needs numbers low < high, got low = {low!r} and high = {high!r}.",
    )
    require(isinstance(log, bool), f"space.{name}: log is true or false, got {log!r}.")
    require(not log or low > 0, f"space.{name}: a logarithmic range begins above 0, got low = {low!r}.")
    require(
        isinstance(num, int) and not isinstance(num, bool) and (num >= 2 or num == -1),
        f"space.{name}: num counts the points of a grid, both ends included: at least 2, got {num!r}.",
    )
    require(
        not integer or (isinstance(low, int) and isinstance(high, int)),
        f"space.{name} takes whole numbers, got low = {low!r} and high = {high!r}.",
    )
    low, high = (low, high) if integer else (float(low), float(high))
    return Range(low=low, high=high, log=log, num=num, integer=integer)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)
