"""What was forecast of runs when they began, beside what came: of one run every quantity, of a search a line per run."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from raychat.search.report import words
from raychat.search.report.contents import Forecast, ReportContents
from raychat.search.report.tables import Cell, Table

Show = Callable[[float | None], str]
Values = Mapping[str, float | None]


def _seconds(value: float | None) -> str:
    """With a digit after the point where seconds alone would say too little."""
    return f"{value:.1f}s" if value is not None and value < 20 else words.duration(value)


QUANTITIES: dict[str, tuple[str, Show]] = {
    "time_s": ("wall time", _seconds),
    "steps_s": ("steps", _seconds),
    "evaluation_s": ("evaluation", _seconds),
    "checkpoints_s": ("saves", _seconds),
    "startup_s": ("start-up", _seconds),
    "memory_bytes": ("memory", words.memory),
    "tokens": ("tokens", words.count),
    "tok_per_sec": ("tokens per second", words.count),
    "mfu": ("MFU", words.percent),
    "cost_usd": ("cost", words.dollars),
}
COMPARED = ("time_s", "memory_bytes", "cost_usd")
"""of the runs of a search"""


def forecast_table(contents: ReportContents) -> Table:
    """Of a run: every quantity that was forecast. Of a search: time, memory and cost of every run."""
    return _of_search(contents.forecasts) if contents.kind == "search" else _of_run(contents.forecasts)


def forecast_sentence(contents: ReportContents) -> str:
    """Where the forecasts come from, and by how much they were off."""
    known = contents.forecasts
    if not known:
        return ""
    if contents.kind == "run":
        values = known[0].values
        source = "measured by --dry-run-steps" if values.get("measured") else "calculated"
        done, planned = values.get("step") or 0, values.get("num_iterations") or 0
        short = (
            f" It is for {planned:,} steps, of which {done:,} were done: the time of steps is compared for these."
            if done != planned
            else ""
        )
        return f"The forecast was {source} when the run began, with the range that it may lie in.{short}"
    said = []
    for name in COMPARED:
        off = [percent for one in known if (percent := _quantity(one, name).get("off_percent")) is not None]
        if off:
            label = QUANTITIES[name][0]
            said.append(f"{label} {median(map(abs, off)):.0f}% ({min(off):+.0f}% to {max(off):+.0f}%)")
    return f"By how much forecasts were off, without sign, median (and range): {', '.join(said)}." if said else ""


def _of_run(known: Sequence[Forecast]) -> Table:
    columns = ("Quantity", "Forecast", "From", "To", "Actual", "Off by")
    rows = []
    for name, (label, show) in QUANTITIES.items():
        values = _quantity(known[0], name) if known else {}
        if values.get("mid") is not None and (values["mid"] or values.get("actual")):  # no line for what a run has not
            bounds = (Cell(text=show(values[key]), value=values[key]) for key in ("mid", "low", "high"))
            actual = values.get("actual")
            rows.append((Cell(text=label, value=label), *bounds, Cell(text=show(actual), value=actual), _off(values)))
    return Table(columns=columns, numeric=frozenset(columns) - {"Quantity"}, rows=tuple(rows))


def _of_search(known: Sequence[Forecast]) -> Table:
    shown = [name for name in COMPARED if any(_quantity(one, name).get("mid") is not None for one in known)]
    heads = [column for name in shown for column in (QUANTITIES[name][0].capitalize(), "came", "off by")]
    rows = []
    for one in known if shown else ():
        cells = [Cell(text=str(one.number), value=one.number), Cell(text=one.title, value=one.title)]
        for name in shown:
            values, show = _quantity(one, name), QUANTITIES[name][1]
            cells += [Cell(text=show(values.get(key)), value=values.get(key)) for key in ("mid", "actual")]
            cells.append(_off(values))
        rows.append(tuple(cells))
    columns = ("#", "Title", *heads)
    return Table(columns=columns, numeric=frozenset(columns) - {"Title"}, rows=tuple(rows))


def _quantity(forecast: Forecast, name: str) -> Values:
    values: Any = forecast.values.get(name)
    return values if isinstance(values, Mapping) else {}


def _off(values: Values) -> Cell:
    """By how much; green within the range that was forecast."""
    off, low, high, actual = (values.get(key) for key in ("off_percent", "low", "high", "actual"))
    if off is None or low is None or high is None or actual is None:
        return Cell(text=words.UNKNOWN)
    return Cell(text=f"{off:+.0f}%", value=off, tone="good" if low <= actual <= high else "warn")
