"""What a run will be, as pure functions of its configuration."""

from raychat.planning.layout import format_plan
from raychat.planning.plan import keep_plan, make_plan
from raychat.planning.scaling import (
    ModelShape,
    ParamCounts,
    Recipe,
    flops_per_token,
    model_shape,
    optimal_batch,
    param_counts,
    recipe,
    warmup_steps,
    window_sizes,
)

__all__ = [
    "ModelShape",
    "ParamCounts",
    "Recipe",
    "flops_per_token",
    "format_plan",
    "keep_plan",
    "make_plan",
    "model_shape",
    "optimal_batch",
    "param_counts",
    "recipe",
    "warmup_steps",
    "window_sizes",
]
