"""What searches there are and how far each came, read from their books alone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raychat.progress import format_duration
from raychat.tracking.run_table import aligned, is_live, parsed_lines

BOOK = "book.jsonl"
COLUMNS = ("search", "status", "done", "failed", "best val_bpb", "cost", "age", "updated", "best")
FAILED = frozenset({"failed", "OOM", "diverged", "preempted"})


@dataclass(frozen=True, kw_only=True)
class SearchRow:
    """A search. What is not known is None."""

    name: str
    status: str
    """running, finished, stopped, failed, or interrupted: its process is gone without a word"""
    tags: tuple[str, ...] = ()
    """of its runs"""
    done: int = 0
    """trials that have an outcome"""
    failed: int = 0
    """of these, those that came to no end of their own: failed, OOM, diverged, preempted"""
    best: str = ""
    """what the best finished run has other than the baseline; among those at the full horizon where there are any"""
    val_bpb: float | None = None
    """of the best"""
    cost_usd: float | None = None
    started_s: float | None = None
    """unix time of the first line of the book"""
    updated_s: float | None = None
    """unix time of the last line"""


def search_dirs(base_dir: Path) -> list[Path]:
    """The directories of searches in a base directory, in the order of their names."""
    return sorted(path.parent for path in (base_dir / "searches").glob(f"*/{BOOK}"))


def read_search_row(folder: Path, now_s: float | None = None) -> SearchRow:
    """The state of one search. Lines that are no whole ones are left out: its own process may be writing."""
    lines = parsed_lines((folder / BOOK).read_bytes())
    trials = {line["trial"]["tag"]: line["trial"] for line in lines if line.get("event") == "proposed"}
    ended = {line["tag"]: line["outcome"] for line in lines if line.get("event") == "ended"}
    costs = [found["cost_usd"] for found in ended.values() if found.get("cost_usd") is not None]
    best = _best(trials, ended)
    return SearchRow(
        name=folder.name,
        status=_end(lines) or ("running" if is_live(folder, now_s) else "interrupted"),
        tags=tuple(trials),
        done=len(ended),
        failed=sum(found["status"] in FAILED for found in ended.values()),
        best=trials[best]["title"] if best else "",
        val_bpb=ended[best]["val_bpb"] if best else None,
        cost_usd=sum(costs) if costs else None,
        started_s=lines[0]["time"] if lines else None,
        updated_s=lines[-1]["time"] if lines else None,
    )


def format_searches(rows: Sequence[SearchRow], now_s: float | None = None) -> str:
    """A plain table with a heading; what is not known is shown as `-`."""
    now_s = time.time() if now_s is None else now_s
    return aligned([COLUMNS, *(_cells(row, now_s) for row in rows)], left=(0, 1, 8))


def _end(lines: Sequence[dict[str, Any]]) -> str:
    """How the last process said that it ended; empty where it did not."""
    last = lines[-1] if lines else {}
    return str(last["status"]) if last.get("event") == "closed" else ""


def _best(trials: dict[str, Any], ended: dict[str, Any]) -> str | None:
    """The tag of the finished run with the lowest val_bpb, at the highest rung that any reached."""
    able = [
        tag for tag, found in ended.items() if found["status"] == "finished" and found.get("val_bpb") and tag in trials
    ]
    return min(able, key=lambda tag: (-trials[tag].get("rung", 1.0), ended[tag]["val_bpb"]), default=None)


def _cells(row: SearchRow, now_s: float) -> tuple[str, ...]:
    return (
        row.name,
        row.status,
        str(row.done),
        str(row.failed),
        "-" if row.val_bpb is None else f"{row.val_bpb:.4f}",
        "-" if row.cost_usd is None else f"${row.cost_usd:,.2f}",
        *("-" if at is None else format_duration(now_s - at) for at in (row.started_s, row.updated_s)),
        row.best or "-",
    )
