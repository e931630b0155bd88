"""What runs there are and how far each came, read from their directories alone."""

import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raychat.errors import DataError
from raychat.liveness import is_gone
from raychat.progress import format_duration
from raychat.tracking.journal import read_journal, records_from
from raychat.tracking.summary import Summary

JOURNAL = "metrics.jsonl"
LEASE_STALE_S = 60.0
TAIL_BYTES = 1 << 16  # of a journal: an end is among its last records
COLUMNS = ("tag", "status", "step", "val_bpb", "tok/s", "cost", "age", "updated")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    tag: str
    status: str
    """running, interrupted (its driver is gone without a word), or the status of the summary"""
    step: int | None = None
    num_iterations: int | None = None
    val_bpb: float | None = None
    tok_per_sec: float | None = None
    cost_usd: float | None = None
    started_s: float | None = None
    """unix time of the first record"""
    updated_s: float | None = None
    """unix time when the journal was last written"""


def default_base_dir() -> Path:
    """`RAYCHAT_BASE_DIR`, or `~/.cache/raychat`."""
    return Path(os.environ.get("RAYCHAT_BASE_DIR") or "~/.cache/raychat").expanduser()


def run_dirs(runs: Path) -> list[Path]:
    """The run directories in the folder `runs` in the order of their names."""
    found = (path for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else ()
    return sorted(path for path in found if any((path / name).exists() for name in ("config.json", JOURNAL)))


def is_live(run_dir: Path, now_s: float | None = None) -> bool:
    """Whether a driver holds the lease of the run: its heartbeat is less than a minute old.

    Of a driver on this machine, whether its process is there: one that was killed is dead at once.
    """
    lease = _object(run_dir / "lease.json")
    fresh = (time.time() if now_s is None else now_s) - lease.get("heartbeat", 0.0) < LEASE_STALE_S
    return fresh and not is_gone(lease)


def read_run(run_dir: Path, now_s: float | None = None) -> RunRow:
    """The state of one run.

    Raises:
        DataError: the journal is of a newer format.
    """
    live, journal = is_live(run_dir, now_s), run_dir / JOURNAL
    values = _ended(run_dir, live=live) or _from_journal(run_dir)
    first, _ = next(records_from(journal), ({}, 0)) if journal.exists() else ({}, 0)
    return RunRow(
        tag=run_dir.name,
        status=values.get("status") or ("running" if live else "interrupted"),
        started_s=first.get("time"),
        updated_s=journal.stat().st_mtime if first else None,
        **{name: values.get(name) for name in ("step", "num_iterations", "val_bpb", "tok_per_sec", "cost_usd")},
    )


def format_table(rows: Sequence[RunRow], now_s: float | None = None) -> str:
    """A plain table with a heading; what is not known is shown as `-`. Ages are from the first and the last record."""
    now_s = time.time() if now_s is None else now_s
    return aligned([COLUMNS, *(_cells(row, now_s) for row in rows)], left=(0, 1))


def aligned(cells: Sequence[Sequence[str]], *, left: Collection[int]) -> str:
    """Rows of text in columns; those whose number is in `left` begin at the left, the others end at the right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def last_records(journal: Path) -> list[dict[str, Any]]:
    """The whole records in the last TAIL_BYTES of a journal, the newest last; none when there is no journal."""
    try:
        with journal.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return parsed_lines(file.read())
    except FileNotFoundError:
        return []


def parsed_lines(content: bytes) -> list[dict[str, Any]]:
    """The JSON objects of the lines that hold a whole one."""
    return [record for line in content.split(b"\n") if (record := _parsed(line))]


def last_turn(journal: Path) -> dict[str, Any] | None:
    """The event of the last end of the run, or of the start that followed it; None when that is long ago."""
    turns = [record for record in last_records(journal) if record.get("event") in ("start", "end")]
    return turns[-1] if turns else None


def _ended(run_dir: Path, *, live: bool) -> dict[str, Any] | None:
    """What the summary says, if it is about the present: a resumed run keeps the summary of its last end."""
    turn = last_turn(run_dir / JOURNAL)
    if turn is None or turn["event"] != "end":
        return None
    if live and _object(run_dir / "lease.json").get("since", 0.0) > turn["time"]:  # resumed, and nothing journaled yet
        return None
    try:
        summary = Summary.read(run_dir / "summary.json")
    except (FileNotFoundError, DataError):
        return _from_journal(run_dir) | {"status": turn.get("status")}
    return vars(summary)


def _from_journal(run_dir: Path) -> dict[str, Any]:
    latest: dict[str, Any] = {}
    # In order of step: what other workers evaluate comes late.
    for record in sorted(read_journal(run_dir / JOURNAL), key=lambda record: record["step"]):
        latest |= {key: value for key, value in record.items() if value is not None}
    planned = (_number(_object(run_dir / name), "num_iterations") for name in ("plan.json", "config.json"))
    return {
        "step": latest.get("step"),
        "num_iterations": next(filter(None, planned), None),
        "val_bpb": latest.get("val/bpb"),
        "tok_per_sec": latest.get("train/tok_per_sec"),
        "cost_usd": latest.get("cost/usd"),
    }


def _number(values: Mapping[str, Any], name: str) -> int | None:
    """A positive setting, which may stand inside a group."""
    groups = [values, *(value for value in values.values() if isinstance(value, dict))]
    return next((group[name] for group in groups if isinstance(group.get(name), int) and group[name] > 0), None)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none (the file is absent, or of another kind than expected)."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _cells(row: RunRow, now_s: float) -> tuple[str, ...]:
    return (
        row.tag,
        row.status,
        f"{_text(row.step, ',')}/{_text(row.num_iterations, ',')}",
        _text(row.val_bpb, ".4f"),
        _text(row.tok_per_sec, ",.0f"),
        "-" if row.cost_usd is None else f"${row.cost_usd:,.2f}",
        *("-" if at is None else format_duration(now_s - at) for at in (row.started_s, row.updated_s)),
    )


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
