"""What the directory of a run says: its end, its settings, its curves, its time and money."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raychat.errors import DataError
from raychat.search.report.contents import Curve, Forecast, Interruption, Point, Price
from raychat.search.trial import Outcome, Status, outcome_of_summary
from raychat.tracking.figures import moving_average
from raychat.tracking.journal import is_metrics, records_from
from raychat.tracking.ledger import Ledger, ledger
from raychat.tracking.run_table import JOURNAL, is_live
from raychat.tracking.summary import DIVERGED, Summary

OUT_OF_MEMORY = ("out of memory", "outofmemory", "oom")


@dataclass(frozen=True)
class RunFiles:
    """The files of one run, read when they are asked for. What is absent is empty or None."""

    directory: Path

    @cached_property
    def journal(self) -> list[dict[str, Any]]:
        """All records, those of abandoned branches too."""
        path = self.directory / JOURNAL
        return [record for record, _ in records_from(path)] if path.exists() else []

    @cached_property
    def summary(self) -> Summary | None:
        """How it ended, if it has."""
        try:
            return Summary.read(self.directory / "summary.json")
        except FileNotFoundError:
            return None

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`: config, recipe, resolved, fingerprints."""
        return _object(self.directory / "config.json")

    @cached_property
    def plan(self) -> dict[str, Any]:
        """`plan.json`."""
        return _object(self.directory / "plan.json")

    @property
    def settings(self) -> dict[str, Any]:
        """Flag names with underscores -> values."""
        return self.config.get("config") or {}

    @property
    def live(self) -> bool:
        """Whether a driver is at work on it."""
        return is_live(self.directory)

    @cached_property
    def price_per_hour(self) -> float | None:
        """Dollars per machine and hour that the ledger goes by."""
        given = self.settings.get("price_per_hour") or -1
        if given > 0:
            return given
        return (self.plan.get("money") or {}).get("price") if self.settings.get("machine") else None

    @cached_property
    def ledger(self) -> Ledger:
        """Where its time went."""
        return ledger(self.journal, price_per_hour=self.price_per_hour)

    @property
    def dollars_per_second(self) -> float | None:
        """Of the time that a driver was at work; None without a price."""
        cost = self.summary.cost_usd if self.summary else self.ledger.cost_usd
        return None if cost is None or not self.ledger.wall_s else cost / self.ledger.wall_s


def outcome_of(files: RunFiles) -> Outcome | None:
    """What the run came to; None while it has not ended."""
    summary = files.summary
    if summary is None or (files.live and not _ended(files.journal)):
        return None
    status, reason = _status(summary)
    tokens_per_second = summary.tok_per_sec
    batch = (files.config.get("recipe") or {}).get("total_batch_size")
    return outcome_of_summary(
        summary,
        status,
        reason,
        step_s=batch / tokens_per_second if batch and tokens_per_second else None,
        num_iterations=summary.num_iterations,
        parameters=((files.plan.get("model") or {}).get("parameters") or {}).get("scaling"),
        facts={name: files.settings.get(name) for name in ("depth", "device_batch_size")},
    )


def curve_of(files: RunFiles, *, title: str, arm: str) -> Curve | None:
    """Loss and val_bpb over tokens, time and money; None when nothing was recorded."""
    batch = (files.config.get("recipe") or {}).get("total_batch_size") or 0
    rate = files.dollars_per_second
    current: list[tuple[dict[str, Any], float]] = []
    for record, seconds in at_work(files.journal):
        if record.get("event") == "branch":
            current = [kept for kept in current if kept[0]["step"] < record["from_step"]]
        elif is_metrics(record):
            current.append((record, seconds))
    current.sort(key=lambda kept: kept[0]["step"])

    def points(key: str, after: int) -> list[Point]:
        return [
            Point(
                tokens=(record["step"] + after) * batch,
                hours=seconds / 3600,
                dollars=None if rate is None else rate * seconds,
                value=record[key],
            )
            for record, seconds in current
            if record.get(key) is not None
        ]

    loss, val_bpb = points("train/loss", 1), points("val/bpb", 0)
    smooth = moving_average([point.value for point in loss])
    loss = [Point(p.tokens, p.hours, p.dollars, v) for p, v in zip(loss, smooth, strict=True)]
    if not loss and not val_bpb:
        return None
    return Curve(tag=files.directory.name, title=title, arm=arm, loss=tuple(loss), val_bpb=tuple(val_bpb))


def at_work(journal: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Any, float]]:
    """Each record with the seconds of work before it: time between two drivers, in which nobody was at work, is left out."""
    driver: str | None = None
    seconds, last = 0.0, None
    for record in journal:
        author, now = record.get("driver", driver), float(record["time"])
        if last is not None and author == driver:
            seconds += max(0.0, now - last)
        driver, last = author, now
        yield record, seconds


def interruption_of(runs: Sequence[RunFiles]) -> Interruption | None:
    """What restarts cost in all `runs`; None when none has a journal."""
    runs = [files for files in runs if files.journal]
    if not runs:
        return None
    starting = [_starting_again(files.journal) for files in runs]
    replayed = [files.ledger.replayed_s for files in runs]
    rates = [files.dollars_per_second for files in runs]
    costs = [r * (s + p) for r, s, p in zip(rates, starting, replayed, strict=True) if r is not None]
    events = [record for files in runs for record in files.journal]
    starts = sum(record.get("event") == "start" for record in events)
    begun = sum(any(record.get("event") == "start" for record in files.journal) for files in runs)
    return Interruption(
        preemptions=sum(r.get("event") == "failure" and r.get("cause") == "preempted" for r in events),
        restarts=starts - begun,
        replayed_s=sum(replayed),
        starting_s=sum(starting),
        cost_usd=sum(costs) if costs else None,
    )


def forecast_of(files: RunFiles, *, number: int, title: str) -> Forecast | None:
    """What was forecast of a run that ended; None where nothing was."""
    values = files.summary.forecast if files.summary else None
    return Forecast(number=number, title=title, values=values) if values else None


def price_of(files: RunFiles) -> Price | None:
    """What the run was charged at, with source and date; None for a run without a plan."""
    money = files.plan.get("money")
    if not money:
        return None
    where = (files.config.get("resolved") or {}).get("hardware") or ""
    source = money.get("price_source") or ""
    as_of = money.get("price_as_of") or ""
    return Price(machine=money.get("machine") or where, usd_per_hour=files.price_per_hour, source=source, as_of=as_of)


def _starting_again(journal: Iterable[Mapping[str, Any]]) -> float:
    """Seconds from the end of each attempt to the first step of the next."""
    since: float | None = None
    seconds, begun = 0.0, False
    for record, now in at_work(journal):
        kind = record.get("event")
        if kind in ("failure", "end") or (kind in ("start", "waiting") and begun and since is None):
            since = now
        elif kind == "first_step" or (kind is None and "train/loss" in record):
            seconds += now - since if since is not None and begun else 0.0
            since, begun = None, True
    return seconds


def _status(summary: Summary) -> tuple[Status, str]:
    error = (summary.error or "").strip()
    said = error.splitlines()[-1][:160] if error else ""
    if summary.status == "finished":
        return "finished", ""
    if summary.status == "stopped":
        return (
            "stopped early",
            f"at step {summary.step:,} of {summary.num_iterations:,}" if summary.num_iterations else "",
        )
    if any(mark in error.lower() for mark in OUT_OF_MEMORY):
        return "OOM", said
    if DIVERGED in error:
        return "diverged", said
    return "failed", said


def _ended(journal: Sequence[Mapping[str, Any]]) -> bool:
    turns = [record["event"] for record in journal if record.get("event") in ("start", "end")]
    return bool(turns) and turns[-1] == "end"


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(
            f"{path} is no JSON ({error}): the report cannot be made from a damaged file; mend or move it"
        ) from error
    return values if isinstance(values, dict) else {}
