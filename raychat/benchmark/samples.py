"""From the steps that were run to the figures that are printed. Plain arithmetic."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raychat.planning.devices import mfu_percent

WARM_UP_SHARE = 4  # the first steps, one in so many and one at least, are left out: they compile, and warm caches up


@dataclass(frozen=True)
class Sample:
    """One step: loss, seconds of wall clock, CPU seconds of this process, and when it ended, from process start if known."""

    loss: float
    wall_s: float
    cpu_s: float
    ended_at_s: float | None


def timed(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The steps that count for speed; of a single one, that one."""
    return samples[min(len(samples) - 1, max(1, len(samples) // WARM_UP_SHARE)) :]


def figures(
    samples: Sequence[Sample],
    *,
    tokens: int,
    world_size: int,
    flops_per_token: float,
    causal_flops_per_token: float,
    peak_flops: float | None,
) -> dict[str, Any]:
    """Speeds over all ranks, from the samples of rank 0; `tokens` are those of a step. `mfu` is in percent."""
    counted = timed(samples)
    walls = [sample.wall_s for sample in counted]
    median, cpu = tokens / statistics.median(walls), statistics.median(sample.cpu_s for sample in counted)
    return {
        "tok_s_median": median,
        "tok_s_best": tokens / min(walls),
        "step_ms_median": 1000 * statistics.median(walls),
        "step_ms_worst": 1000 * max(walls),
        "tok_per_cpu_s": tokens / world_size / cpu if cpu else None,
        "cpu_ms_per_step": 1000 * cpu,
        "first_step_at_s": samples[0].ended_at_s,
        "mfu": mfu_percent(flops_per_token, median, peak_flops, world_size),
        "mfu_causal": mfu_percent(causal_flops_per_token, median, peak_flops, world_size),
        "loss_first": samples[0].loss,
        "loss_last": samples[-1].loss,
        "steps": len(samples),
        "steps_timed": len(counted),
    }
