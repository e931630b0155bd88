"""Hindsight: what was forecast of a run beside what it came to. Pure: a plan and a summary in, numbers and a table out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raychat.planning.ranges import Range

WHOLE_RUN = ("time_s", "evaluation_s", "checkpoints_s", "tokens", "cost_usd")
"""what a run that stopped early, or has another horizon than was planned, cannot be held against"""


@dataclass(frozen=True, kw_only=True)
class Hindsight:
    """One quantity of a run: what was expected of it and what it was. None: not known."""

    name: str
    forecast: Range | None
    actual: float | None
    comparable: bool = True

    @property
    def off_percent(self) -> float | None:
        """By how much the actual value lies above the expected one, in percent of that; negative: below."""
        if not self.comparable or self.forecast is None or self.actual is None or not self.forecast.mid:
            return None
        return 100 * (self.actual - self.forecast.mid) / self.forecast.mid

    def values(self) -> dict[str, Any]:
        """As JSON has it."""
        low, mid, high = self.forecast.as_list() if self.forecast else (None, None, None)
        return {"low": low, "mid": mid, "high": high, "actual": self.actual, "off_percent": self.off_percent}


def forecast_of(plan: Mapping[str, Any]) -> dict[str, Range | None]:
    """The quantities of a plan that a run can be held against. One that it does not know is None."""
    time, money, memory = plan.get("time") or {}, plan.get("money") or {}, plan.get("memory") or {}
    tokens, peak = plan.get("horizon", {}).get("tokens"), memory.get("total")
    return {
        "time_s": _range(time.get("total")),
        "steps_s": _range(time.get("steps")),
        "evaluation_s": _range(time.get("evaluation")),
        "checkpoints_s": _range(time.get("checkpoints")),
        "startup_s": _range(time.get("startup")),
        "memory_bytes": _range(peak),
        "tokens": _range(tokens),
        "tok_per_sec": _range(time.get("tok_per_sec")),
        "mfu": _range(time.get("mfu")),
        "cost_usd": _range(money.get("on_demand")),
    }


def actual_of(summary: Mapping[str, Any], *, warm_up_s: float = 0.0) -> dict[str, float | None]:
    """The same quantities of a run, from its summary.

    `warm_up_s` are seconds of its first steps beyond those of any other (compilation, allocation). The ledger counts
    them as steps, and a forecast as start-up.
    """
    steps, startup = summary.get("productive_s"), summary.get("startup_s")
    return {
        "time_s": summary.get("wall_time_s"),
        "steps_s": None if steps is None else max(0.0, steps - warm_up_s),
        "evaluation_s": summary.get("evaluation_s"),
        "checkpoints_s": summary.get("checkpoint_stall_s"),
        "startup_s": None if startup is None else startup + warm_up_s,
        "memory_bytes": summary.get("peak_memory_bytes"),
        "tokens": summary.get("tokens"),
        "tok_per_sec": summary.get("tok_per_sec"),
        "mfu": summary.get("mfu"),
        "cost_usd": summary.get("cost_usd"),
    }


def warm_up_s(events: Iterable[Mapping[str, Any]], step_s: float | None) -> float:
    """Seconds by which the first steps of all attempts, and those that compiled, took longer than `step_s`, a typical one."""
    clock, found = 0.0, 0.0
    for event in events:
        if event["event"] == "start":
            clock = event.get("productive_s") or 0.0
        elif event["event"] == "first_step" and step_s is not None:
            found += max(0.0, event.get("step_time_s", clock) - clock - step_s)
        elif event["event"] == "compiled" and step_s is not None:
            found += max(0.0, event["step_s"] - step_s)
    return found


def compare(plan: Mapping[str, Any], summary: Mapping[str, Any], *, warm_up_s: float = 0.0) -> list[Hindsight]:
    """Forecast and actual of every quantity that either knows.

    When the steps done are not those that were planned, the time of steps is compared for those that were done, and what
    only a whole run has is not compared.
    """
    planned, done = plan["horizon"]["num_iterations"], summary.get("step") or 0
    forecast, actual, whole = forecast_of(plan), actual_of(summary, warm_up_s=warm_up_s), done == planned
    if (steps := forecast["steps_s"]) and not whole:
        forecast["steps_s"] = steps.scaled(done / planned)
    if not done:
        forecast = dict.fromkeys(forecast)
    return [
        Hindsight(name=name, forecast=expected, actual=actual[name], comparable=whole or name not in WHOLE_RUN)
        for name, expected in forecast.items()
        if expected is not None or actual[name] is not None
    ]


def record(plan: Mapping[str, Any], summary: Mapping[str, Any], *, warm_up_s: float = 0.0) -> dict[str, Any]:
    """What `summary.json` says of the forecast: steps planned, where its numbers come from, and each quantity."""
    rows = compare(plan, summary, warm_up_s=warm_up_s)
    return {
        "num_iterations": plan["horizon"]["num_iterations"],
        "step": summary.get("step") or 0,
        "measured": bool(plan.get("measured")),
        **{row.name: row.values() for row in rows},
    }


def metrics(forecast: Mapping[str, Any]) -> dict[str, float]:
    """`record` as metrics: `forecast/<name>` is what was expected, `forecast/<name>_off_percent` how far off it was."""
    found = {}
    for name, values in _quantities(forecast).items():
        found[f"forecast/{name}"] = values["mid"]
        found[f"forecast/{name}_off_percent"] = values["off_percent"]
    return {name: value for name, value in found.items() if value is not None}


def table(forecast: Mapping[str, Any]) -> list[str]:
    """`record` as a person reads it; no lines where nothing can be compared."""
    quantities = _quantities(forecast)
    if not any(values["mid"] is not None for values in quantities.values()):
        return []
    source = "measured by --dry-run-steps" if forecast["measured"] else "calculated"
    lines = [f"  {'forecast (' + source + ')':<42} {'actual':>12} {'off by':>8}"]
    for name, values in quantities.items():
        label, shown = LABELS[name]
        three = [values[key] for key in ("low", "mid", "high")]
        lines.append(
            f"    {label:<12} {_shown(three, shown):<27} {_shown([values['actual']], shown):>12} {_off(values):>8}".rstrip()
        )
    done, planned = forecast["step"], forecast["num_iterations"]
    if done != planned:
        lines.append(
            f"    after {done:,} steps of the {planned:,} that the forecast is for: the time of steps is compared for "
            "these, and what has no percentage is not compared"
        )
    return lines


def _quantities(forecast: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: forecast[name] for name in LABELS if name in forecast}


def _off(values: Mapping[str, Any]) -> str:
    return "" if values["off_percent"] is None else f"{values['off_percent']:+.0f}%"


def _shown(values: Sequence[float | None], scale: Callable[[float], tuple[float, str]]) -> str:
    """`mid (low to high) unit` of three values, or `value unit` of one, in a unit that suits the last; "-": not known."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    factor, unit = scale(known[len(known) // 2])
    texts = [_digits(value * factor) for value in known]
    if len(set(texts)) == 1:
        return f"{texts[0]}{unit}"
    return f"{texts[1]} ({texts[0]} to {texts[2]}){unit}"


def _digits(value: float) -> str:
    """Three digits that count, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _seconds(value: float) -> tuple[float, str]:
    if value < 120:
        return 1.0, " s"
    return (1 / 60, " min") if value < 7200 else (1 / 3600, " h")


def _bytes(value: float) -> tuple[float, str]:
    return (2**-30, " GiB") if value >= 2**30 else (2**-20, " MiB")


def _count(value: float) -> tuple[float, str]:
    return (1e-9, " G") if value >= 1e9 else (1e-6, " M") if value >= 1e6 else (1.0, "")


def _plain(unit: str) -> Callable[[float], tuple[float, str]]:
    return lambda value: (1.0, unit)


LABELS: dict[str, tuple[str, Callable[[float], tuple[float, str]]]] = {
    "time_s": ("time", _seconds),
    "steps_s": ("  steps", _seconds),
    "evaluation_s": ("  evaluation", _seconds),
    "checkpoints_s": ("  saves", _seconds),
    "startup_s": ("  start-up", _seconds),
    "memory_bytes": ("memory", _bytes),
    "tokens": ("tokens", _count),
    "tok_per_sec": ("tok/s", _plain("")),
    "mfu": ("MFU", _plain("%")),
    "cost_usd": ("dollars", _plain("")),
}


def _range(value: Any) -> Range | None:
    """A range of a plan: [low, mid, high], a number that is known exactly, or None."""
    if value is None or isinstance(value, Mapping):
        return None
    return Range(*value) if isinstance(value, list | tuple) else Range.exactly(float(value))
