"""What the optimizer is told at each step: learning rate, momentum and weight decay as functions of the step alone."""

import math


def lr_multiplier(
    step: int,
    num_iterations: int,
    warmup_steps: int,
    warmdown_ratio: float,
    final_lr_frac: float,
    warmup_from: float = 0.0,
) -> float:
    """Factor on every `initial_lr`: up over `warmup_steps`, flat, then linearly down to `final_lr_frac` at the end.

    Up is a straight line from 1 / warmup_steps, or exponential from `warmup_from` where that is above 0; the last step of
    the warmup has 1 either way. The warmdown takes the last round(warmdown_ratio * num_iterations) steps. Where both
    overlap the warmup counts.
    """
    if step < warmup_steps:
        if warmup_from > 0:
            return warmup_from ** (1 - step / (warmup_steps - 1)) if warmup_steps > 1 else 1.0
        return (step + 1) / warmup_steps
    done = _warmdown_done(step, num_iterations, warmdown_ratio)
    return 1.0 - done + done * final_lr_frac


def muon_momentum(
    step: int,
    num_iterations: int,
    warmdown_ratio: float,
    *,
    start: float = 0.85,
    peak: float = 0.97,
    ramp_steps: int = 400,
    final: float | None = 0.90,
) -> float:
    """Momentum of Muon: from `start` to `peak` over `ramp_steps`, then flat, then to `final` over the warmdown.

    The ramp counts even inside the warmdown, so a short run jumps where the ramp ends. `final` None: no warmdown.
    """
    if step < ramp_steps:
        return start + (peak - start) * step / ramp_steps
    if final is None:
        return peak
    return peak + (final - peak) * _warmdown_done(step, num_iterations, warmdown_ratio)


def weight_decay_at(step: int, num_iterations: int, weight_decay: float) -> float:
    """Weight decay of Muon: half a cosine from `weight_decay` to 0."""
    return weight_decay * 0.5 * (1 + math.cos(math.pi * step / num_iterations))


def _warmdown_done(step: int, num_iterations: int, warmdown_ratio: float) -> float:
    """Share of the warmdown that lies behind: 0 before and at its start, 1 at the end of the run."""
    length = round(warmdown_ratio * num_iterations)
    return max(0.0, (step - (num_iterations - length)) / length) if length else 0.0
