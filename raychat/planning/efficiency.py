"""What share of its peak a device reaches in training, by depth: from what was measured, published or calibrated.

Three sources, the first that says anything: the user's `--mfu`, a calibration file fitted from finished runs, and
`efficiency.toml`. A device that none of them knows has no MFU, and a plan for it no time and no money.
"""

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raychat.errors import ConfigError
from raychat.planning.ranges import Range

TABLE = Path(__file__).with_name("efficiency.toml")
CALIBRATION = "calibration.json"
"""below the base directory"""
GIVEN_SPREAD = 0.10  # of a user's --mfu
CPU_SPREAD = 0.40
COMPILED_GAIN = {"bfloat16": 1.2, "float32": 1.06}  # on a CPU, of what is measured uncompiled (docs/speed.md)
BEYOND = 0.02  # a layer beyond the depths that were measured widens the range by so much, of it
# Tokens at which a pass spends as long on launches as on products: the documents' step times at device batches of 16 and
# 32 (1.82 and 1.77 s, d10 on an A100) fit t = a (1 + LAUNCH_TOKENS / tokens).
LAUNCH_TOKENS = 1_900
# What is not bf16 against the bf16 rate: products in float32 run at a half at best (TF32), and at a sixteenth without it.
OTHER_DTYPES = {"float32": Range(0.06, 0.2, 0.5)}
FP8_GAIN = Range(0.9, 1.1, 1.25)  # where no fp8 entry is known; the H100's are 0.97 (d12) to 1.22 (d26)
MOST = 100.0  # percent


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """`percent` of the bf16 peak. `devices`: how many ran where this was measured, 0: whatever the user means."""

    percent: Range
    source: str
    devices: int = 0


@dataclass(frozen=True, kw_only=True)
class CoreRate:
    """FLOPs per second that one CPU core sustains in training."""

    flops: Range
    source: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """MFU of a device at one depth."""

    depth: int
    percent: Range
    sure: str
    source: str
    devices: int = 1
    pass_tokens: int = 0
    """tokens of one forward pass; 0: as in the runs it is for"""


def mfu_range(
    gpu: str,
    depth: int,
    *,
    fp8: bool = False,
    device_batch_size: int = 32,
    sequence_len: int = 2048,
    dtype: str = "bfloat16",
    user_mfu: float = -1.0,
    calibration: Path | None = None,
) -> Efficiency | None:
    """MFU of training on `gpu` (a plan name), where a pass has `device_batch_size` sequences; None: nothing is known.

    Raises:
        ConfigError: for a calibration file that cannot be read.
    """
    if user_mfu > 0:
        spread = Range.around(user_mfu, GIVEN_SPREAD)
        return Efficiency(percent=_at_most(spread), source=f"--mfu {user_mfu:g}, give or take a tenth")
    pass_tokens = device_batch_size * sequence_len
    fitted = _calibrated(calibration, gpu, fp8=fp8, dtype=dtype)
    if fitted:
        return _read(fitted, depth, pass_tokens)
    found = _published(gpu, depth, pass_tokens, fp8=fp8)
    if found and dtype in OTHER_DTYPES:
        source = f"{found.source}; {dtype} is slower, by an estimate"
        return Efficiency(percent=found.percent.times(OTHER_DTYPES[dtype]), source=source, devices=found.devices)
    return found


def core_rate(
    dtype: str, *, depth: int, width: int = 256, compiled: bool = False, calibration: Path | None = None
) -> CoreRate:
    """What a CPU core sustains in this compute dtype, on a model of so many blocks and channels.

    What was calibrated stands whether the run compiles or not: long runs do, and short ones teach little.

    Raises:
        ConfigError: for a calibration file that cannot be read.
    """
    entries = _entries_of(calibration, "cpu", fp8=False, dtype=dtype)
    if entries:
        nearest = min(entries, key=lambda entry: abs(entry["depth"] - depth))
        mid, away = float(nearest["flops_per_core"]), abs(nearest["depth"] - depth)
        low, high = float(nearest.get("low", mid)), float(nearest.get("high", mid))
        rate = _wider(Range(min(low, mid), mid, max(high, mid)), away)
        return CoreRate(flops=rate, source=_fitted_source(nearest))
    measured = _table().cores.get(dtype) or _table().cores["float32"]
    rate = _between(width, [at for at, _ in measured], [flops for _, flops in measured])
    if compiled:
        rate *= COMPILED_GAIN.get(dtype, 1.0)
    return CoreRate(
        flops=Range.around(rate, CPU_SPREAD),
        source=f"{rate / 1e9:.0f} GFLOP/s a core, give or take 40% (measured on AMD Zen 4, {dtype}"
        f"{', compiled' if compiled else ''}, by width)",
    )


def pass_factor(tokens: int, reference: int) -> float:
    """How efficient passes of `tokens` are against those of `reference`."""
    return (1 + LAUNCH_TOKENS / reference) / (1 + LAUNCH_TOKENS / tokens)


def _published(gpu: str, depth: int, pass_tokens: int, *, fp8: bool) -> Efficiency | None:
    table = _table()
    for wanted, gain, note in ((fp8, None, ""), (False, FP8_GAIN, "; what fp8 adds is an estimate")):
        if entries := table.entries.get((gpu, wanted)):
            return _with(_read(entries, depth, pass_tokens), gain, note)
        of, factor = table.neighbours.get(gpu, ("", Range.exactly(1.0)))
        if entries := table.entries.get((of, wanted)):
            near = _with(_read(entries, depth, pass_tokens), factor, "")
            said = Efficiency(
                percent=near.percent,
                source=f"no run on {gpu} is known: taken from {of}: {near.source}",
                devices=near.devices,
            )
            return _with(said, gain, note)
    return None


def _with(found: Efficiency, factor: Range | None, note: str) -> Efficiency:
    percent = _at_most(found.percent.times(factor)) if factor else found.percent
    return Efficiency(percent=percent, source=found.source + note, devices=found.devices)


def _read(entries: Iterable[Entry], depth: int, pass_tokens: int) -> Efficiency:
    """The entries at `depth`: between two of them linearly, beyond them as MFU grows with depth elsewhere."""
    ordered = sorted(entries, key=lambda entry: entry.depth)
    scaled = [(e.depth, e.percent.scaled(pass_factor(pass_tokens, e.pass_tokens or pass_tokens)), e) for e in ordered]
    below = [item for item in scaled if item[0] <= depth]
    above = [item for item in scaled if item[0] >= depth]
    if below and above:
        (d0, p0, e0), (d1, p1, e1) = below[-1], above[0]
        share = (depth - d0) / (d1 - d0) if d1 > d0 else 0.0
        percent = p0.scaled(1 - share) + p1.scaled(share)
        nearest = e0 if share <= 0.5 else e1
        where = (
            f"d{d0}: {e0.source}" if d0 == d1 else f"between d{d0} ({e0.sure}) and d{d1} ({e1.sure}); {nearest.source}"
        )
    else:
        d0, p0, nearest = (below or above[:1])[-1]
        percent = _wider(p0.scaled(_by_depth(depth) / _by_depth(d0)), abs(depth - d0))
        where = f"carried on from d{d0}: {nearest.source}"
    return Efficiency(percent=_at_most(percent), source=where, devices=nearest.devices)


def _wider(percent: Range, layers: int) -> Range:
    more = 1 + BEYOND * layers
    return Range(percent.low / more, percent.mid, percent.high * more)


def _at_most(percent: Range) -> Range:
    return Range(*(min(MOST, value) for value in percent.as_list()))


def _by_depth(depth: int) -> float:
    """Growth of MFU with depth."""
    return _between(depth, _table().depths, _table().ratios)


def _between(x: float, xs: list[float], ys: list[float]) -> float:
    """Linear between the points of a table, constant beyond them."""
    if x <= xs[0]:
        return ys[0]
    for i in range(1, len(xs)):
        if x <= xs[i]:
            return ys[i - 1] + (x - xs[i - 1]) / (xs[i] - xs[i - 1]) * (ys[i] - ys[i - 1])
    return ys[-1]


@dataclass(frozen=True)
class _Table:
    entries: dict[tuple[str, bool], list[Entry]]
    neighbours: dict[str, tuple[str, Range]]
    depths: list[float]
    ratios: list[float]
    cores: dict[str, list[tuple[float, float]]]
    """compute dtype -> (width, FLOPs per second), narrow to wide"""


@cache
def _table() -> _Table:
    content = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    entries: dict[tuple[str, bool], list[Entry]] = {}
    for raw in content["entry"]:
        entry = Entry(
            depth=raw["depth"],
            percent=Range(raw["low"], raw["percent"], raw["high"]),
            sure=raw["sure"],
            source=f"{raw['source']} ({raw['sure']})",
            devices=raw["devices"],
            pass_tokens=raw["pass_tokens"],
        )
        for gpu in raw["gpus"]:
            entries.setdefault((gpu, raw.get("fp8", False)), []).append(entry)
    neighbours = {gpu: (raw["of"], Range(*raw["factor"])) for raw in content["neighbour"] for gpu in raw["gpus"]}
    cores: dict[str, list[tuple[float, float]]] = {}
    for raw in content["core"]:
        cores.setdefault(raw["dtype"], []).append((raw["width"], raw["flops"]))
    return _Table(
        entries,
        neighbours,
        content["by_depth"]["depth"],
        content["by_depth"]["ratio"],
        {dtype: sorted(points) for dtype, points in cores.items()},
    )


def _calibrated(path: Path | None, gpu: str, *, fp8: bool, dtype: str) -> list[Entry]:
    fitted = []
    for raw in _entries_of(path, gpu, fp8=fp8, dtype=dtype):
        mid = float(raw["percent"])
        low, high = min(mid, float(raw.get("low", mid))), max(mid, float(raw.get("high", mid)))
        percent, source = Range(low, mid, high), _fitted_source(raw)
        fitted.append(Entry(depth=raw["depth"], percent=percent, sure="calibrated", source=source, devices=0))
    return fitted


def _fitted_source(raw: Mapping[str, Any]) -> str:
    runs = raw.get("n", 1)
    return f"{runs} finished run{'s' if runs != 1 else ''} (calibrated {raw.get('as_of', 'without a date')})"


def _entries_of(path: Path | None, gpu: str, *, fp8: bool, dtype: str) -> list[Mapping[str, Any]]:
    """Entries of a calibration file that hold for this device and precision; none without a file."""
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"The calibration {path} cannot be read: {error.strerror or error}.") from None
    value = "flops_per_core" if gpu == "cpu" else "percent"
    try:
        return [
            raw
            for raw in json.loads(text)["entries"]
            if raw["gpu"] == gpu
            and bool(raw.get("fp8")) == fp8
            and raw.get("dtype", dtype) == dtype
            and isinstance(raw["depth"], int)
            and 0 < float(raw[value]) < math.inf
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"The calibration {path} is damaged ({type(error).__name__}: {error}): delete it, or make it again with "
            "jobs/plan.py --calibrate."
        ) from None
