"""How long one step takes: from the share of its peak that a device reaches, or from what was measured, with its parts."""

from dataclasses import dataclass

from raychat.config import Config
from raychat.planning.communication import StepParts, step_parts
from raychat.planning.efficiency import CALIBRATION, core_rate, mfu_range
from raychat.planning.ranges import Range
from raychat.planning.scaling import ModelShape, Recipe, param_counts
from raychat.planning.target import Target, plan_compiled, plan_dtype


@dataclass(frozen=True, kw_only=True)
class Pace:
    """`step_s`: seconds of a step. `rate`: training's FLOPs per second of all devices together, but for their exchange."""

    step_s: Range
    rate: Range
    parts: StepParts | None
    """of a step; None where the peak of the device is not known"""


def find_pace(
    config: Config, recipe: Recipe, shape: ModelShape, target: Target, measured: Range | None, sources: dict[str, str]
) -> Pace | None:
    """The pace of `config` on `target`; None when nothing is known of it. The reasons go to `sources`.

    `measured`: seconds of a step, in the place of a forecast.
    """
    work = float(recipe.flops_per_token) * recipe.total_batch_size
    found, devices = (None, 0) if measured else _rate(config, recipe, shape, target, sources) or (None, 0)
    if measured:
        sources["steps"] = f"measured: {measured.mid:.4g} s a step"
    step_s = measured or (found.under(work) if found else None)
    if step_s is None:
        return None
    if target.peak is None:
        return Pace(step_s=step_s, rate=step_s.under(work), parts=None)
    parts = step_parts(step_s, devices, shape, plan_dtype(config, target), target)
    sources |= {"exchange": parts.source} if parts.source else {}
    whole = parts.total if devices else step_s
    return Pace(step_s=whole, rate=(parts.compute + parts.muon).under(work), parts=parts)


def _rate(
    config: Config, recipe: Recipe, shape: ModelShape, target: Target, sources: dict[str, str]
) -> tuple[Range, int] | None:
    """FLOPs per second of training, counted without recomputation; the reasons go to `sources`.

    Also how many devices reached it, per device, with what they lost to their exchange; 0: it is the target's own.
    """
    calibration = config.base_dir / CALIBRATION
    again = recomputation(config, recipe, shape)
    dtype = plan_dtype(config, target)
    rows = recipe.total_batch_size // shape.sequence_len
    most = -(-rows // target.workers)  # rows of the rank that has the most of them, for which the others wait
    if target.device == "cpu":
        if not target.cores:
            return None
        compiled = plan_compiled(config, target)
        found = core_rate(dtype, depth=shape.n_layer, width=shape.n_embd, compiled=compiled, calibration=calibration)
        sources["steps"] = f"{target.cores} cores x {found.source}"
        cores = _busy_cores(target, rows / most, config.cluster.threads)
        return found.flops.scaled(cores * target.machines / again), 0
    efficiency = mfu_range(
        target.gpu,
        shape.n_layer,
        fp8=config.precision.fp8,
        device_batch_size=min(config.batch.sequences, most),
        sequence_len=shape.sequence_len,
        dtype=dtype,
        user_mfu=config.plan.mfu,
        calibration=calibration,
    )
    if efficiency is None or target.peak is None:
        return None
    sources["steps"] = f"MFU {efficiency.source}"
    return efficiency.percent.scaled(target.peak.flops / 100 * rows / most / again), efficiency.devices


def _busy_cores(target: Target, ranks: float, threads: int) -> float:
    """Cores of a machine that compute: each rank has as many threads, and all have work for so many `ranks`.

    With more ranks than cores none idles: those that wait leave their core to the others.
    """
    if threads != -1:
        return min(target.cores, threads * ranks)
    return target.cores if target.workers >= target.cores else target.cores // target.workers * ranks


def recomputation(config: Config, recipe: Recipe, shape: ModelShape) -> float:
    """How much longer a pass is for computing the blocks' activations twice: their forward part is done again."""
    if not config.precision.grad_checkpoint:
        return 1.0
    return 1 + body_flops(recipe, shape) / 3 / recipe.flops_per_token


def body_flops(recipe: Recipe, shape: ModelShape) -> float:
    """Training FLOPs per token without the head."""
    return recipe.flops_per_token - 6 * param_counts(shape).lm_head
