"""What a disturbed run has in common with the undisturbed one, and what each fault cost."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from raychat.on_ray.drill.faults import Injected
from raychat.training import checkpoint

BPB_TOLERANCE = 1e-3
# With another number of workers, sums are taken in another order. The losses then follow those of the undisturbed run
# far closer than its own losses follow each other from one step, with other rows, to the next.
ROWS_TOLERANCE = 0.25


@dataclass(frozen=True)
class Row:
    """One line of the table. Seconds; None where it does not apply."""

    run: str
    fault: str
    step: int
    detected_s: float | None
    resumed_s: float | None
    replayed: int
    equal: bool
    goodput: float
    note: str


def losses(records: Sequence[Mapping[str, Any]], key: str = "train/loss") -> dict[int, float]:
    """Value of a metric for each step; the first one counts, as in the journal."""
    found: dict[int, float] = {}
    for record in records:
        if key in record:
            found.setdefault(record["step"], record[key])
    return found


def rows(
    name: str, injected: Sequence[Injected], records: Sequence[Mapping[str, Any]], plain: dict[int, float]
) -> list[Row]:
    """A line for each fault; each counts until the next one strikes, or until the end."""
    ends = [*(one.at for one in injected[1:]), max((record["time"] for record in records), default=0.0)]
    return [
        _row(name, one, [record for record in records if one.at < record["time"] <= end], end - one.at, plain, records)
        for one, end in zip(injected, ends, strict=True)
    ]


def _row(
    name: str,
    one: Injected,
    window: Sequence[Mapping[str, Any]],
    wall_s: float,
    plain: dict[int, float],
    records: Sequence[Mapping[str, Any]],
) -> Row:
    note = one.note
    if one.fault.kind == "tracking-hang":
        note = f"slowest step {slowdown(one, records):.2f} x the median"
    productive_s = sum(record.get("train/dt", 0.0) for record in window)
    return Row(
        run=name,
        fault=one.fault.kind,
        step=one.fault.step,
        detected_s=None if one.detected is None else one.detected - one.at,
        resumed_s=None if one.resumed is None else one.resumed - one.since,
        replayed=sum(record["replayed"] for record in window if record.get("event") == "start"),
        equal=not one.problem and alike(losses(window), plain, exact=name != "elastic"),
        goodput=min(1.0, productive_s / wall_s) if wall_s > 0 else 0.0,
        note="; ".join(filter(None, [note, one.problem])),
    )


def slowdown(one: Injected, records: Sequence[Mapping[str, Any]], lasted_s: float = 30.0) -> float:
    """The slowest step while the fault lasted, as a multiple of the run's median."""
    timed = [(record["time"], record["train/dt"]) for record in records if "train/dt" in record]
    during = [dt for at, dt in timed if one.at < at <= one.at + lasted_s]
    return max(during, default=0.0) / statistics.median(dt for _, dt in timed) if timed else 0.0


def alike(some: Mapping[int, float], plain: Mapping[int, float], *, exact: bool) -> bool:
    """Whether losses are those of the same rows: bit for bit, or as far as another order of sums allows."""
    if any(step not in plain for step in some):
        return False
    if exact:
        return all(plain[step] == loss for step, loss in some.items())
    ordered = sorted(plain)
    between = [plain[b] - plain[a] for a, b in itertools.pairwise(ordered)]
    return _rms([loss - plain[step] for step, loss in some.items()]) <= ROWS_TOLERANCE * _rms(between)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0


def weights_distance(run_dir: Path, plain_dir: Path, step: int) -> float:
    """The largest difference of any weight between two runs at `step`; 0 when all are equal, bit for bit."""
    ours, theirs = (
        load_file(folder / "checkpoints" / checkpoint.folder_name(step) / checkpoint.MODEL)
        for folder in (run_dir, plain_dir)
    )
    if ours.keys() != theirs.keys():
        return math.inf
    return max(
        0.0 if torch.equal(ours[name], theirs[name]) else _largest_difference(ours[name], theirs[name]) for name in ours
    )


def _largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    difference = float((one.double() - other.double()).abs().max())
    return difference if difference > 0 else math.inf  # not equal and no difference: there is no number


def rows_in_order(checkpoints: Path, rows_per_step: int) -> str | None:
    """What is wrong with the rows that the checkpoints say were consumed; None when each step took its own."""
    for step in checkpoint.steps(checkpoints):
        consumed = checkpoint.read_meta(checkpoints / checkpoint.folder_name(step))["state"]["rows_consumed"]
        if consumed != step * rows_per_step:
            return f"at step {step}, {consumed} rows were consumed instead of {step * rows_per_step}"
    return None
