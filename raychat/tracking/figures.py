"""Pictures of a run, drawn from its journal."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SMOOTHING = 0.9  # beta of the lineage's console loss
TRAIN_COLOR, VAL_COLOR, INK, GRID = "#2563a8", "#c2521c", "#2b2b2b", "#dddddd"


def loss_curve(records: Iterable[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw `train/loss` (nats per token) and, if there is any, `val/bpb` (bits per byte) over the step as a PNG.

    `records` are the journal's (`read_journal`). The loss is shown raw and as the debiased moving average (beta 0.9)
    that the console prints. Values that are null or absent are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(records)
    loss, bpb = _series(records, "train/loss"), _series(records, "val/bpb")
    # A Figure with its own canvas: pyplot would choose a backend for the whole process.
    figure = Figure(figsize=(8, 6.4) if bpb else (8, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if bpb else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if bpb else [1])[:, 0]
    panels[0].set_title(title, loc="left", color=INK, fontweight="bold")
    _draw_loss(panels[0], loss)
    if bpb:
        _draw_bpb(panels[1], bpb)
    for panel in panels:
        panel.grid(color=GRID, linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            figure.savefig(file, format="png")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def moving_average(values: Sequence[float], beta: float = SMOOTHING) -> list[float]:
    """The exponential moving average of `values`, divided by 1 - beta^n so that the zero it starts from has no weight."""
    averages, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = beta * average + (1 - beta) * value
        averages.append(average / (1 - beta**count))
    return averages


def _series(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) in order of step."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return sorted(point for point in points if math.isfinite(point[1]))


def _draw_loss(panel: Any, points: Sequence[tuple[int, float]]) -> None:
    panel.set_ylabel("train/loss (nats per token)")
    if not points:
        panel.text(0.5, 0.5, "no training loss recorded", transform=panel.transAxes, ha="center", color=INK)
        panel.set_yticks([])
        return
    steps, values = zip(*points, strict=True)
    smooth = moving_average(values)
    marker = "." if len(points) <= 30 else ""  # one point alone makes no line
    panel.plot(steps, values, color=TRAIN_COLOR, alpha=0.45, linewidth=0.8, marker=marker, label="as logged")
    panel.plot(steps, smooth, color=TRAIN_COLOR, linewidth=2, label=f"moving average: {smooth[-1]:.4f} at the end")
    panel.legend(frameon=False, loc="upper right")
    panel.margins(x=0.02)


def _draw_bpb(panel: Any, points: Sequence[tuple[int, float]]) -> None:
    panel.set_ylabel("val/bpb (bits per byte)")
    steps, values = zip(*points, strict=True)
    best = min(range(len(points)), key=values.__getitem__)
    panel.plot(steps, values, color=VAL_COLOR, linewidth=1.6, marker="o", markersize=3.5, label="validation")
    best_label = f"best: {values[best]:.4f} at step {steps[best]:,}"
    panel.plot(
        steps[best], values[best], linestyle="", marker="o", markersize=9, label=best_label,
        markerfacecolor="none", markeredgecolor=VAL_COLOR, markeredgewidth=1.6,
    )  # fmt: skip
    panel.legend(frameon=False, loc="upper right")
