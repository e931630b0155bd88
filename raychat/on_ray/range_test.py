"""A range test of the rates: one short run in which all of them rise, and between which to search.

The rates rise in a straight line from near zero to a multiple of what was given, by a warm-up that lasts for the whole
run: so it is a run like any other, on any cluster, and its journal holds the curve.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raychat.atomic import write_json
from raychat.checks import require
from raychat.config import Config
from raychat.on_ray import driver
from raychat.on_ray.limits import WorkerError
from raychat.on_ray.trial_outcome import DIVERGED
from raychat.search.rate_range import MIN_POINTS, RateRange, smoothed, suggest_range
from raychat.tracking.journal import read_journal

RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")
PICTURE, FOUND = "lr_range.png", "lr_range.json"
INK, LINE, BAND = "#2b2b2b", "#2563a8", "#dbe7f5"


def range_config(config: Config, *, steps: int, most: float) -> Config:
    """The run of the test: `steps` steps in which the rates rise to `most` times those of `config`.

    Raises:
        ConfigError: too few steps, or rates that would not rise.
    """
    require(steps >= MIN_POINTS, f"--range-steps {steps}: a range test needs at least {MIN_POINTS}, 200 as a rule.")
    require(most > 0, f"--range-most must be above 0, got {most:g}: 10 ends at ten times the rates given.")
    values: dict[str, Any] = {name: getattr(config.optim, name) * most for name in RATES}
    values |= {
        "model_tag": f"{config.model_tag}-lr-range",
        "run": "dummy",
        "fresh": True,
        "num_iterations": steps,
        "warmup_steps": -1,
        "warmup_ratio": 1.0,
        "warmdown_ratio": 0.0,
        "final_lr_frac": 1.0,
        "on_bad_step": "stop",
        "eval_every": -1,
        "core_metric_every": -1,
        "sample_every": -1,
        "save_every": -1,
        "log_every": 1,
    }
    return Config.from_flat(values, config)


def run(config: Config, *, steps: int, most: float, echo: Callable[[str], None]) -> RateRange:
    """Make the test of `config`, and say, keep and draw what it found.

    Raises:
        RaychatError: it cannot be made, or finds no range.
    """
    test = range_config(config, steps=steps, most=most)
    try:
        driver.run(test, echo=lambda line: None if line.startswith("step ") else echo(line))  # a point of each step
    except WorkerError as error:
        if DIVERGED not in str(error):
            raise
        echo(f"the test is over: {error}")
    records = [record for record in read_journal(test.run_dir / "metrics.jsonl") if "train/loss" in record]
    multipliers = [most * record["train/lrm"] for record in records]
    losses = smoothed([float("nan") if (loss := record["train/loss"]) is None else loss for record in records])
    found = suggest_range(multipliers, losses)
    write_json(test.run_dir / FOUND, vars(found))
    draw(multipliers, losses, found, test.run_dir / PICTURE, title=f"{config.model_tag}: loss under rising rates")
    for line in lines(config, found):
        echo(line)
    echo(f"  picture    {test.run_dir / PICTURE}")
    return found


def lines(config: Config, found: RateRange) -> list[str]:
    """What was found, with the lines of a search file."""
    told = [
        f"rates between {found.low:.3g} and {found.high:.3g} times those given"
        + (f" ({found.note})" if found.note else "")
    ]
    told += ["[space]"]
    for name in RATES:
        rate = getattr(config.optim, name)
        told.append(f"{name} = {{low = {rate * found.low:.3g}, high = {rate * found.high:.3g}, log = true, num = 3}}")
    return told


def draw(multipliers: Sequence[float], losses: Sequence[float], found: RateRange, path: Path, *, title: str) -> None:
    """Loss (smoothed, nats per token) over the multiple of the rates, and the range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.set_title(title, loc="left", color=INK, fontweight="bold")
    panel.axvspan(found.low, found.high, color=BAND, label=f"{found.low:.3g} to {found.high:.3g}")
    panel.plot(multipliers, losses, color=LINE)
    panel.set_xscale("log")
    panel.set_xlabel("multiple of all rates")
    panel.set_ylabel("training loss (nats per token, smoothed)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
