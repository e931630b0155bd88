"""How many sequences a pass of a run has where `--device-batch-size auto` leaves that open.

On a GPU the largest number that fits is tried out once, from half of what the plan forecasts, and kept under the base
directory by all that decides it. A CPU takes the plan's number, by a rule. All ranks take the smallest of any rank.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from raychat.atomic import write_json
from raychat.config import Config
from raychat.planning import model_shape
from raychat.planning.outlook import CPU_BATCH, batch_sizes, settled
from raychat.planning.scaling import recipe
from raychat.planning.target import Target, local_memory
from raychat.training.device import Resolved
from raychat.training.memory import OutOfMemoryError
from raychat.training.world import World

FOLDER = "device_batch"  # below the base directory
NO_MORE = "the largest power of two that passes of this batch can have"

Attempt = Callable[[int], str]
"""Why a step in passes of so many sequences does not fit: `ran out of memory`; empty where it does."""


@dataclass(frozen=True)
class Fit:
    """`size` sequences fit (0: not even one), and `why` no more; `lasting`: also when nobody else is on the device."""

    size: int
    why: str
    lasting: bool = True


Measure = Callable[[Sequence[int], int], Fit]
"""What fits of these sizes, ascending, of which the second argument is forecast to."""

Echo = Callable[[str], None]


def with_device_batch(resolved: Resolved, config: Config, world: World, measure: Measure, echo: Echo) -> Resolved:
    """`resolved` with the sequences of a pass: those of the flag, of the checkpoint, of an earlier run, or found now.

    Every rank calls this with the same `resolved`. `measure` is called on all ranks or on none.

    Raises:
        OutOfMemoryError: on every rank, when not even one sequence fits.
    """
    asked = config.batch.device_batch_size
    if asked != "auto":
        return replace(resolved, device_batch_size=asked, device_batch_reason="", device_batch_key="")
    memory = memory_bytes(resolved, world)
    target = _target(resolved, world, memory)
    guess = settled(_known(config, resolved), target).batch.sequences
    if resolved.device_type != "cuda":
        size = min(world.gather(guess))
        return replace(resolved, device_batch_size=size, device_batch_reason=f"by a rule, on a CPU {CPU_BATCH} at most")
    key = _key(resolved, config, world, sorted(set(world.gather(f"{resolved.device_name}, {memory} bytes"))))
    name = _digest(key)
    if resolved.device_batch_key == name:
        return replace(resolved, device_batch_reason="as before")
    path = config.base_dir / FOLDER / f"{name}.json"
    fit = world.broadcast(remembered(path, key, echo) if world.rank == 0 else None)
    if fit is None:
        if world.rank == 0:
            echo(f"device batch: what fits is tried out ({guess} sequences by the forecast)")
        fit = _agreed(world.gather(measure(batch_sizes(config, target), guess)))
        if not fit.size:
            raise OutOfMemoryError(
                f"Out of memory: not even one sequence of --max-seq-len {config.model.max_seq_len} tokens fits ({fit.why}). "
                "Use --grad-checkpoint, --loss chunked, more workers, which share the state of the optimizer, or a smaller "
                "--depth."
            )
        if world.rank == 0 and fit.lasting:
            remember(path, key, fit, echo)
    return replace(resolved, device_batch_size=fit.size, device_batch_reason=fit.why, device_batch_key=name)


def largest(sizes: Sequence[int], guess: int, attempt: Attempt) -> Fit:
    """The largest of `sizes` (ascending) that fits, tried upwards from half of `guess`, else downwards."""
    start = max((i for i, size in enumerate(sizes) if 2 * size <= guess), default=0)
    fitting = 0
    for size in sizes[start:]:
        if why := attempt(size):
            if fitting:
                return Fit(fitting, f"{size} {why}")
            break
        fitting = size
    else:
        return Fit(fitting, NO_MORE)
    refused = f"{sizes[start]} {why}"
    for size in reversed(sizes[:start]):
        if not (why := attempt(size)):
            return Fit(size, refused)
        refused = f"{size} {why}"
    return Fit(0, refused)


def memory_bytes(resolved: Resolved, world: World) -> int | None:
    """Memory of this rank's GPU, or of its machine; None where it is not told."""
    if resolved.device_type == "cuda":
        return torch.cuda.get_device_properties(world.device_index).total_memory
    return local_memory()


def remembered(path: Path, key: dict[str, Any], echo: Echo) -> Fit | None:
    """What an earlier run found for `key`; None when there was none, or its file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        size, why = found["size"], found["why"]
        if found["key"] == _plain(key) and isinstance(size, int) and size > 0 and isinstance(why, str):
            return Fit(size, why)
        echo(f"warning: {path} is of something else, so what fits is tried again")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        echo(f"warning: {path} cannot be read, so what fits is tried again: {error!r}")
    return None


def remember(path: Path, key: dict[str, Any], fit: Fit, echo: Echo) -> None:
    """Keep `fit` for the next run of its kind."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": _plain(key), "size": fit.size, "why": fit.why})
    except OSError as error:
        echo(f"warning: {path} cannot be written, so what fits is tried again next time: {error}")


def _agreed(fits: Sequence[Fit]) -> Fit:
    """The smallest of all ranks; it lasts when all do."""
    return replace(min(fits, key=lambda fit: fit.size), lasting=all(fit.lasting for fit in fits))


def _known(config: Config, resolved: Resolved) -> Config:
    """`config` with what the machine has decided of what memory depends on."""
    chosen = {"dtype": resolved.dtype, "loss": resolved.loss, "compile": "on" if resolved.compile else "off"}
    return Config.from_flat(chosen, base=config)


def _target(resolved: Resolved, world: World, memory: int | None) -> Target:
    """This run's devices, as plans name them."""
    on_gpu = resolved.device_type == "cuda"
    return Target(
        device="cuda" if on_gpu else "cpu",
        gpu=resolved.device_name if on_gpu else "cpu",
        peak=None,
        memory_bytes=memory,
        workers=world.world_size,
        machines=-(-world.world_size // world.local_world_size),
        machine=None,
        cores=resolved.threads * world.local_world_size,
    )


def _key(resolved: Resolved, config: Config, world: World, devices: list[str]) -> dict[str, Any]:
    """All that decides how much memory a step needs and how much there is."""
    precision = config.precision
    return {
        "devices": devices,
        "torch": torch.__version__,
        "ranks": world.world_size,
        "rows": recipe(config).total_batch_size // config.model.max_seq_len,
        "model": asdict(model_shape(config.model)),
        "dtype": resolved.dtype,
        "loss": resolved.loss,
        "attention": resolved.attention,
        "compile": resolved.compile,
        "grad_checkpoint": precision.grad_checkpoint,
        "fp8": precision.fp8_recipe if precision.fp8 else "",
    }


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    """`key` as a JSON file gives it back."""
    return json.loads(json.dumps(key))


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()[:16]
