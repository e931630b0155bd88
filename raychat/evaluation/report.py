"""An evaluation as files and as a table: CSV and JSON for programs, the GPT-2 family beside it for people."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raychat.atomic import write_json, write_text
from raychat.evaluation.core import CoreResult
from raychat.evaluation.core.reference import CORE_METRIC, GPT2, MODELS

COLUMNS = ("task", "kind", "shots", "items", "accuracy", "baseline", "centered")


def write_core(folder: Path, result: CoreResult) -> list[Path]:
    """`core.json` with every item and `core.csv` with every task into `folder`; where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "core.json", folder / "core.csv"]
    write_text(paths[0], result.to_json())
    write_text(paths[1], core_csv(result))
    return paths


def write_bpb(folder: Path, bpb: float, facts: dict[str, Any]) -> Path:
    """`bpb.json` into `folder`: `val_bpb` (null where it was no number) and `facts`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bpb.json", {"val_bpb": bpb if abs(bpb) < float("inf") else None} | facts)
    return folder / "bpb.json"


def write_samples(folder: Path, samples: Sequence[tuple[str, str]]) -> Path:
    """`samples.json` into `folder`: a list of `prompt` and `text`, which begins with the prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "samples.json", [{"prompt": prompt, "text": text} for prompt, text in samples])
    return folder / "samples.json"


def core_csv(result: CoreResult) -> str:
    """A row for each task, and CORE in the last one, as its `centered`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for task in result.tasks.values():
        facts = (task.label, task.kind, task.shots, len(task.items))
        writer.writerow([*facts, f"{task.accuracy:.6f}", f"{task.baseline:g}", f"{task.centered:.6f}"])
    items = sum(len(task.items) for task in result.tasks.values())
    writer.writerow(["CORE", "", "", items, "", "", f"{result.core_metric:.6f}"])
    return text.getvalue()


def core_table(result: CoreResult) -> str:
    """Centred accuracies of the tasks, and their mean, beside the published ones of the GPT-2 family; `-`: not known."""
    rows: list[Sequence[str]] = [("task (centred accuracy)", "items", "here", *MODELS)]
    for label, task in result.tasks.items():
        known = [f"{value:.4f}" for value in GPT2[label].centered] if label in GPT2 else ["-"] * len(MODELS)
        rows.append((label, f"{len(task.items):,}", f"{task.centered:.4f}", *known))
    items = sum(len(task.items) for task in result.tasks.values())
    published = [f"{CORE_METRIC[model]:.4f}" for model in MODELS]
    rows.append(("CORE", f"{items:,}", f"{result.core_metric:.4f}", *published))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        name, *numbers = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([name.strip().ljust(widths[0]), *numbers])

    lines = [line(row) for row in rows]
    return "\n".join([lines[0], *lines[1:-1], "-" * len(lines[0]), lines[-1]])
