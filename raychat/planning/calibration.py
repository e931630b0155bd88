"""`jobs/plan.py --calibrate`: what finished runs say of this base directory's machines, and how far forecasts were off.

A run gives the model FLOPs utilisation of its typical step (on a CPU: FLOPs per core), for its GPU, depth and precision.
"""

import contextlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raychat.atomic import write_json
from raychat.errors import ConfigError
from raychat.planning.devices import plan_name
from raychat.planning.efficiency import CALIBRATION
from raychat.planning.hindsight import LABELS

LEAST_STEPS = 20  # of a run that says something: the first ten warm caches up
CHECKED = ("time_s", "steps_s", "evaluation_s", "startup_s", "memory_bytes", "tok_per_sec", "cost_usd")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`entries` as `calibration.json` has them; `off` maps a quantity to what forecasts of it were off by, in percent."""

    entries: list[dict[str, Any]]
    off: dict[str, list[float]]
    left_out: dict[str, str]
    """run -> why it says nothing"""


def calibrate(runs: Iterable[Mapping[str, Any]], *, as_of: str) -> Calibration:
    """Fit `runs`, each the `name`, `summary` and `config` (content of `config.json`) of a run, and its `plan` or None.

    `as_of` is the date that entries carry.
    """
    rates: dict[tuple[str, int, bool, str], list[float]] = defaultdict(list)
    off: dict[str, list[float]] = defaultdict(list)
    left_out = {}
    for run in runs:
        try:
            found, errors = _rate(run), _off(run["summary"])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # files that somebody has edited
            found, errors = "its config.json, summary.json or plan.json is damaged", {}
        if isinstance(found, str):
            left_out[run["name"]] = found
            continue
        key, rate = found
        rates[key].append(rate)
        for name, value in errors.items():
            off[name].append(value)
    entries = [_entry(key, sorted(values), as_of) for key, values in sorted(rates.items())]
    return Calibration(entries=entries, off=dict(off), left_out=left_out)


def calibrate_runs(base_dir: Path, runs_dir: Path, echo: Callable[[str], None]) -> Calibration:
    """Fit the runs in `runs_dir`, write `calibration.json` to `base_dir` if there are any, and tell what was found.

    Raises:
        ConfigError: there is no such folder.
    """
    if not runs_dir.is_dir():
        raise ConfigError(
            f"There are no runs in {runs_dir} to calibrate with: give the --base-dir (or --storage-path) that they were "
            f"trained with, or train one of {LEAST_STEPS} steps or more first."
        )
    runs = [run for folder in sorted(runs_dir.glob("*")) if (run := _read(folder))]
    found = calibrate(runs, as_of=time.strftime("%Y-%m-%d", time.gmtime()))
    for name, why in found.left_out.items():
        echo(f"{name}: left out, {why}")
    if not found.entries:
        echo(f"no run in {runs_dir} says how fast its machine is: nothing is written")
        return found
    write_json(base_dir / CALIBRATION, {"entries": found.entries})
    for entry in found.entries:
        echo(_told(entry))
    for name, values in found.off.items():
        echo(
            f"forecast of {LABELS[name][0].strip()}: off by {statistics.median(values):+.0f}% "
            f"({min(values):+.0f}% to {max(values):+.0f}%, {_runs(len(values))})"
        )
    echo(f"written to {base_dir / CALIBRATION}: forecasts of this base directory use it from now on")
    return found


def _rate(run: Mapping[str, Any]) -> tuple[tuple[str, int, bool, str], float] | str:
    """(gpu, depth, fp8, dtype) and the rate of a run, or why there is none."""
    summary, settings = run["summary"], run["config"]["config"]
    resolved, speed = run["config"].get("resolved"), summary.get("tok_per_sec")
    if not resolved or not speed or (summary.get("step") or 0) < LEAST_STEPS:
        return f"fewer than {LEAST_STEPS} steps were done"
    if settings.get("grad_checkpoint"):
        return "it computed activations twice, and the table is for runs that do not"
    key = (settings["depth"], bool(settings["fp8"]), resolved["dtype"])
    if resolved["device_type"] == "cpu":
        cores = _cores(run)
        if not cores:
            return "how many cores it had is not known"
        return ("cpu", *key), float(run["config"]["recipe"]["flops_per_token"]) * speed / cores
    gpu = plan_name(resolved["device_name"])
    if gpu is None or not summary.get("mfu"):
        return f"the peak of {resolved['device_name']} is not known"
    return (gpu, *key), float(summary["mfu"])


def _cores(run: Mapping[str, Any]) -> int | None:
    """Cores of all machines, from the plan that the run made for the machine it found."""
    target = (run.get("plan") or {}).get("target") or {}
    return (target.get("cores") or 0) * (target.get("machines") or 0) or None


def _off(summary: Mapping[str, Any]) -> dict[str, float]:
    forecast = summary.get("forecast") or {}
    known = {name: (forecast.get(name) or {}).get("off_percent") for name in CHECKED}
    return {name: value for name, value in known.items() if value is not None}


def _entry(key: tuple[str, int, bool, str], values: list[float], as_of: str) -> dict[str, Any]:
    gpu, depth, fp8, dtype = key
    value = "flops_per_core" if gpu == "cpu" else "percent"
    return {
        "gpu": gpu,
        "depth": depth,
        "fp8": fp8,
        "dtype": dtype,
        value: statistics.median(values),
        "n": len(values),
        "low": values[0],
        "high": values[-1],
        "as_of": as_of,
    }


def _told(entry: Mapping[str, Any]) -> str:
    scale, unit = (1e-9, " GFLOP/s a core") if entry["gpu"] == "cpu" else (1.0, "% MFU")
    mid, low, high = (entry[name] * scale for name in (_value(entry), "low", "high"))
    fp8 = ", fp8" if entry["fp8"] else ""
    return (
        f"{entry['gpu']} d{entry['depth']} {entry['dtype']}{fp8}: {mid:.3g} ({low:.3g} to {high:.3g}){unit}, "
        f"{_runs(entry['n'])}"
    )


def _value(entry: Mapping[str, Any]) -> str:
    return "flops_per_core" if entry["gpu"] == "cpu" else "percent"


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _read(folder: Path) -> dict[str, Any] | None:
    """What a run directory says; None for a run that has not ended, and for what is no run."""
    found: dict[str, Any] = {"name": folder.name, "plan": None}
    for name in ("summary", "config", "plan"):
        with contextlib.suppress(OSError, ValueError):
            found[name] = json.loads((folder / f"{name}.json").read_bytes())
    usable = all(isinstance(found.get(name), dict) for name in ("summary", "config"))
    return found if usable and "recipe" in found["config"] else None
