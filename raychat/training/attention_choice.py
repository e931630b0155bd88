"""Which attention back-end a run trains with on its GPU: those that work there are timed on the run's own shapes.

The times are kept under the base directory, by device, torch, kernels and shapes, so that the same run on the same
machine chooses the same. On a CPU there is no choice to make: `device.resolve` says what it gets, by a rule.
"""

import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raychat.atomic import write_json
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.model import attention, attention_kernels
from raychat.planning import model_shape
from raychat.training.device import DTYPES, Resolved

Echo = Callable[[str], None]

FOLDER = "attention"  # below the base directory
MOST_TOKENS = 2**15  # of a timed pass: enough to fill a GPU, little beside the model's own memory
SERIES_S = 0.005  # of calls that are timed together, after the pass that compiles
MIXED_GAIN = 0.03  # two kernels must save this share over one: they take two compilations and twice the code
TOLERANCE = 0.01  # of the norm of output and gradients: bfloat16 makes 0.005, a key too many among 1,024 0.012


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The attention of one pass: `rows` sequences of `T` tokens through layers with these left windows (None: none)."""

    rows: int
    T: int
    n_head: int
    n_kv_head: int
    head_dim: int
    windows: tuple[int | None, ...]
    dtype: str

    @staticmethod
    def of(config: Config, dtype: str) -> "Workload":
        """That of a run, with fewer rows where they are many."""
        shape, T = model_shape(config.model), config.model.max_seq_len
        most, asked = max(1, MOST_TOKENS // T), config.batch.device_batch_size
        return Workload(
            rows=most if asked == "auto" else min(asked, most),
            T=T,
            n_head=shape.n_head,
            n_kv_head=shape.n_kv_head,
            head_dim=shape.head_dim,
            windows=tuple(None if window >= T else window for window in shape.windows),
            dtype=dtype,
        )


@dataclass(frozen=True)
class Timings:
    """Seconds of forward and backward by window and back-end, and why others have none."""

    seconds: dict[int | None, dict[str, float]]
    left_out: dict[str, str]


Clock = Callable[[str, Workload, int | None], float]
"""Seconds of one forward and backward with a back-end and window. It raises where they do not work."""


def with_attention(
    resolved: Resolved, config: Config, device: torch.device, echo: Echo, clock: Clock | None = None
) -> Resolved:
    """`resolved` with the fastest back-end of those that `--attention` admits, when `device` is a GPU.

    Raises:
        ConfigError: none of them works here.
    """
    asked = config.precision.attention
    if device.type != "cuda" or asked == "sdpa":
        return resolved
    refused = attention.refusals(attention.admitted(asked), device, DTYPES[resolved.dtype])
    names = [name for name in attention.admitted(asked) if name not in refused]
    work = Workload.of(config, resolved.dtype)
    known = {name: attention_kernels.version(name) for name in names if name != "sdpa"}
    key = {"device": resolved.device_name, "torch": torch.__version__, "kernels": known, **asdict(work)}
    measure = partial(measured, names, work, clock or partial(seconds, device=device))
    timings = remembered(config.base_dir / FOLDER, key, measure, echo)
    timings.left_out.update(refused)
    return chosen(resolved, work, timings, asked=asked)


def chosen(resolved: Resolved, work: Workload, timings: Timings, *, asked: str) -> Resolved:
    """`resolved` with what is fastest by `timings`: one back-end, or one for full context and one for windows."""
    for window, times in timings.seconds.items():
        if not times:
            raise ConfigError(
                f"--attention {asked}: no such back-end computes {_named(window)} here "
                f"({attention.in_words(timings.left_out)}). Use --attention auto."
            )
    backend = _fastest(work.windows, timings.seconds)
    return replace(
        resolved,
        attention=backend,
        attention_reason=_reason(backend, timings),
        attention_warning=_warning(timings.seconds),
    )


def _fastest(windows: Sequence[int | None], seconds: dict[int | None, dict[str, float]]) -> str:
    counts = Counter(windows)

    def total(backend: str) -> float:
        full, windowed = attention.parts(backend)
        return sum(
            n * seconds[window].get(full if window is None else windowed, float("inf")) for window, n in counts.items()
        )

    names = sorted({name for times in seconds.values() for name in times})
    one = min(names, key=total)
    two = min((f"{a}+{b}" for a in names for b in names), key=total)
    return two if len(counts) > 1 and total(two) < (1 - MIXED_GAIN) * total(one) else one


def _reason(backend: str, timings: Timings) -> str:
    """Times of all that was tried, the chosen one first: `full context 1.2 ms; varlen 1.4, sdpa 3.0`."""
    full, windowed = attention.parts(backend)
    said = []
    for window, times in timings.seconds.items():
        first = full if window is None else windowed
        others = ", ".join(
            f"{name} {1000 * value:.3g}"
            for name, value in sorted(times.items(), key=lambda item: item[1])
            if name != first
        )
        said.append(f"{_named(window)} {1000 * times[first]:.3g} ms" + (f"; {others}" if others else ""))
    if timings.left_out:
        said.append(f"without {attention.in_words(timings.left_out)}")
    return " | ".join(said)


def _warning(seconds: dict[int | None, dict[str, float]]) -> str:
    """What to do about windows that take longer than full context, where that is so."""
    full = min(seconds.get(None, {}).values(), default=float("inf"))
    slow = {window: min(times.values()) for window, times in seconds.items() if window and min(times.values()) > full}
    if not slow:
        return ""
    window, took = max(slow.items(), key=lambda item: item[1])
    return (
        f"{_named(window)} take {1000 * took:.3g} ms a layer here, full context {1000 * full:.3g} ms: "
        "install raychat[gpu], or use --window-pattern L"
    )


def _named(window: int | None) -> str:
    return "full context" if window is None else f"windows of {window:,}"


def measured(names: Sequence[str], work: Workload, clock: Clock) -> Timings:
    """Time each of the back-ends `names` on each window of `work`; what raises is left out, with its reason."""
    windows = sorted(set(work.windows), key=lambda window: -1 if window is None else window)
    timings = Timings({window: {} for window in windows}, {})
    for name in names:
        for window in windows:
            try:
                timings.seconds[window][name] = clock(name, work, window)
            except Exception as error:  # noqa: BLE001 - kernels fail in their own ways, and others are there
                timings.left_out.setdefault(name, f"{_named(window)}: {_first_line(error)}")
    return timings


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:120]


def remembered(folder: Path, key: dict[str, Any], measure: Callable[[], Timings], echo: Echo) -> Timings:
    """The timings that the file of `key` in `folder` holds; else `measure()`, which is then written there."""
    plain = json.loads(json.dumps(key))
    path = folder / f"{hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == plain:
            return _read(found)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        echo(f"warning: {path} cannot be read, so attention is timed again: {error!r}")
    timings = measure()
    full = any("out of memory" in reason for reason in timings.left_out.values())  # of others: it may be free next time
    if full or not all(timings.seconds.values()):
        return timings
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": plain, **_plain(timings)})
    except OSError as error:
        echo(f"warning: {path} cannot be written, so attention is timed again next time: {error}")
    return timings


def _plain(timings: Timings) -> dict[str, Any]:
    """Pairs, because the keys of JSON are strings."""
    return {"seconds": [[window, times] for window, times in timings.seconds.items()], "left_out": timings.left_out}


def _read(found: dict[str, Any]) -> Timings:
    seconds = {window: {name: float(value) for name, value in times.items()} for window, times in found["seconds"]}
    return Timings(seconds, {name: str(reason) for name, reason in found["left_out"].items()})


def seconds(name: str, work: Workload, window: int | None, *, device: torch.device) -> float:
    """Seconds of one forward and backward of the back-end `name`.

    Raises:
        RuntimeError: output or gradients are not those of SDPA in float32.
        Exception: whatever the kernel raises.
    """
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(work.rows, work.T, heads, work.head_dim) for heads in (work.n_head, work.n_kv_head, work.n_kv_head)]
    q, k, v = (torch.randn(size, generator=generator, device=device).to(DTYPES[work.dtype]) for size in sizes)
    weights = torch.randn(q.shape, generator=generator, device=device).to(q.dtype)

    def once(name: str, inputs: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
        q, k, v = (t.detach().requires_grad_() for t in inputs)
        y = attention.attend(q, k, v, window, name)
        return [y, *torch.autograd.grad(y, (q, k, v), weights)]

    attention.prepare(name, device, T=work.T, windows={window})
    try:
        _compare(once(name, (q, k, v), weights), once("sdpa", [t[:1].float() for t in (q, k, v)], weights[:1].float()))
        return _seconds_per_call(partial(once, name, (q, k, v), weights), device)
    finally:
        if device.type == "cuda":  # what was tried is not the run's
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def _compare(result: list[Tensor], reference: list[Tensor]) -> None:
    """Output and gradients of the first row with those of `reference`."""
    for ours, theirs in zip(result, reference, strict=True):
        error = (torch.linalg.vector_norm(ours[:1].float() - theirs) / torch.linalg.vector_norm(theirs)).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"its numbers differ from those of SDPA by {error:.2g}")


def _seconds_per_call(call: Callable[[], object], device: torch.device) -> float:
    """Median of five series, in each of which the calls follow each other without waiting for the device."""

    def series(calls: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        return (time.perf_counter() - start) / calls

    calls = max(1, min(10, round(SERIES_S / series(1))))
    return statistics.median(series(calls) for _ in range(5))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
