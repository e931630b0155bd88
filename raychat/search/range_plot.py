"""The picture of a range test as a file, for those who read no report: loss over the multiple of the rates."""

import math
import os
from pathlib import Path
from typing import Any

from raychat.search.range_test import RangeTest
from raychat.search.rate_range import RateRange

INK, SOFT, LINE, BAND, CLIMB = "#16202c", "#566273", "#2458c5", "#dfe8fb", "#b3261e"
ABOVE = 0.35
"""share of the descent that is shown above the first loss: a curve that explodes flattens all that is of interest"""


def highest_shown(test: RangeTest) -> float:
    """The loss above which a picture of `test` shows nothing; infinite where all of it can be shown."""
    first = next((loss for loss in test.smooth if math.isfinite(loss)), math.nan)
    lowest = min((loss for loss in test.smooth if math.isfinite(loss)), default=math.nan)
    return first + ABOVE * (first - lowest) if first > lowest else math.inf


def draw(test: RangeTest, path: Path, *, title: str) -> None:
    """Write the picture of `test` to `path` as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=11)
    panel.plot(test.multipliers, test.losses, color=LINE, alpha=0.28, linewidth=1, label="loss of each step")
    panel.plot(test.multipliers, test.smooth, color=LINE, linewidth=2.2, label="smoothed")
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if len(test.multipliers) > 1:
        panel.set_xlim(test.multipliers[0], test.multipliers[-1] * 1.05)
    if math.isfinite(top := highest_shown(test)):
        shown = [loss for loss in test.losses if loss <= top]
        room = 0.05 * (top - min(shown))
        panel.set_ylim(min(shown) - room, min(top, max(shown)) + room)
    if test.found:
        _mark(panel, test, test.found)
    panel.set_xlabel(
        "multiple of all rates (logarithmic); 1: " + ", ".join(f"{n} {r:g}" for n, r in test.rates.items())
    )
    panel.set_ylabel("training loss (nats per token)")
    panel.grid(color="#e8ecf1", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=SOFT, labelsize=9)
    for label in (panel.xaxis.label, panel.yaxis.label):
        label.set(color=SOFT, fontsize=9)
    panel.legend(frameon=False, fontsize=9, labelcolor=INK)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _mark(panel: Any, test: RangeTest, found: RateRange) -> None:
    """The range, and the places that it was taken from."""
    panel.axvspan(
        found.low, found.high, color=BAND, linewidth=0, label=f"to search: {found.low:.3g} to {found.high:.3g}"
    )
    lowest = test.smooth[test.multipliers.index(found.lowest)]
    words = f"lowest, at {found.lowest:.3g}"
    panel.plot([found.lowest], [lowest], "o", color=LINE, markeredgecolor="white", markersize=7, label=words)
    if found.diverges is not None:
        dashes = (0, (4, 3))
        panel.axvline(found.diverges, color=CLIMB, linewidth=1.2, linestyle=dashes, label=test.end)
