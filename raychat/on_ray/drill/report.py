"""The table of a drill: on the console, as markdown and as CSV."""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from raychat.atomic import write_text
from raychat.on_ray.drill.measure import Row

HEAD = ("run", "fault", "at step", "detected after", "resumed after", "replayed", "equal", "goodput", "note")


def cells(row: Row) -> tuple[str, ...]:
    """A row as a person reads it."""
    return (
        row.run,
        row.fault,
        str(row.step),
        _seconds(row.detected_s),
        _seconds(row.resumed_s),
        f"{row.replayed}",
        "yes" if row.equal else "NO",
        f"{row.goodput:.0%}",
        row.note,
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, with columns as wide as they need to be on a console."""
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts)


def medians(rows: Sequence[Row]) -> list[str]:
    """For each fault, how long it took to notice it and to come back, in the middle of its rounds."""
    lines = []
    for kind in dict.fromkeys(row.fault for row in rows):
        of_kind = [row for row in rows if row.fault == kind]
        noticed = [row.detected_s for row in of_kind if row.detected_s is not None]
        back = [row.resumed_s for row in of_kind if row.resumed_s is not None]
        parts = [
            f"{name} after {statistics.median(times):.1f}s"
            for name, times in (("noticed", noticed), ("back", back))
            if times
        ]
        if parts:
            lines.append(f"{kind}: {', '.join(parts)} (median of {len(of_kind)})")
    return lines


def write(path: Path, rows: Sequence[Row], facts: Sequence[str]) -> None:
    """Write the rows to `path`: CSV when its name ends so, else markdown with what else is known below the table."""
    if path.suffix != ".csv":
        write_text(path, "\n".join([table(rows), "", *(f"- {fact}" for fact in facts)]) + "\n")
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = list(Row.__dataclass_fields__)
    writer.writerow(fields)
    writer.writerows([getattr(row, field) for field in fields] for row in rows)
    write_text(path, text.getvalue())


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}s"
