"""What a range test of the rates recorded and found: `lr_range.json` in its run directory, and the lines to search with."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from raychat.atomic import write_json
from raychat.errors import DataError
from raychat.search.rate_range import NoRange, RateRange, smoothed, suggest_range

RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")
"""what rises together, in one proportion"""
FILE = "lr_range.json"
POINTS = 4
"""of the range that a search tries"""


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """The curve of a range test, and the range that it suggests."""

    rates: Mapping[str, float]
    """those given: what the multipliers multiply"""
    multipliers: tuple[float, ...]
    """of all rates, one for each step, rising"""
    losses: tuple[float, ...]
    """training loss at each, in nats per token; NaN at the step that ended the run"""
    smooth: tuple[float, ...]
    """the same, smoothed"""
    command: str
    """that makes it again"""
    found: RateRange | None
    refusal: str
    """why there is no range; empty where there is one"""

    @classmethod
    def of(
        cls, rates: Mapping[str, float], multipliers: Sequence[float], losses: Sequence[float], *, command: str = ""
    ) -> "RangeTest":
        """Judge a curve. One that suggests nothing is a record too."""
        smooth, found, refusal = smoothed(losses), None, ""
        try:
            found = suggest_range(multipliers, smooth)
        except NoRange as error:
            refusal = str(error)
        return cls(
            rates=dict(rates),
            multipliers=tuple(multipliers),
            losses=tuple(losses),
            smooth=tuple(smooth),
            command=command,
            found=found,
            refusal=refusal,
        )

    @classmethod
    def read(cls, path: Path) -> "RangeTest | None":
        """The record at `path`; None where there is none.

        Raises:
            DataError: the file is no record of a range test.
        """
        try:
            values = json.loads(path.read_bytes())
            losses = [_number(loss) for loss in values["losses"]]
            return cls.of(values["rates"], values["multipliers"], losses, command=values["command"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not the record of a range test ({error!r}): move it away, and give the command of the test again"
            ) from error

    def write(self, path: Path) -> None:
        """Keep it at `path`, whole or not at all."""
        write_json(
            path,
            {
                "command": self.command,
                "rates": dict(self.rates),
                "range": asdict(self.found) if self.found else None,
                "refusal": self.refusal,
                "multipliers": self.multipliers,
                "losses": [_finite(loss) for loss in self.losses],
                "smoothed": [_finite(loss) for loss in self.smooth],
            },
        )

    @property
    def sentence(self) -> str:
        """What it comes to."""
        if self.found is None:
            return f"The range test suggests no range: {self.refusal}"
        note = f" ({self.found.note})" if self.found.note else ""
        return f"Search between {self.found.low:.3g} and {self.found.high:.3g} times the rates given{note}."

    @property
    def end(self) -> str:
        """Where the range must end, and why; empty where the test ended before."""
        if self.found is None or self.found.diverges is None:
            return ""
        climbs = math.isfinite(self.smooth[self.multipliers.index(self.found.diverges)])
        return f"{'climbs' if climbs else 'no number'} at {self.found.diverges:.3g}"

    @property
    def space(self) -> list[str]:
        """Lines of a search file. One rate at a time: a grid of all of them would be a search of hundreds of runs."""
        if self.found is None:
            return []
        lines = [f"{name} = {self.values_of(name)}" for name in RATES]
        rest = f"# the others in the same proportion; all four on a grid are {POINTS ** len(RATES)} configurations"
        return ["[space]", lines[0], rest, *(f"# {line}" for line in lines[1:])]

    def values_of(self, name: str) -> str:
        """The range of a rate as a search file has it."""
        if self.found is None:
            raise ValueError("a range test that found no range has no values to search")
        low, high = (self.rates[name] * bound for bound in (self.found.low, self.found.high))
        return f"{{low = {low:.3g}, high = {high:.3g}, log = true, num = {POINTS}}}"


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _number(loss: float | None) -> float:
    return math.nan if loss is None else float(loss)
