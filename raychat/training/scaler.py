"""Dynamic loss scaling for float16, whose gradients would otherwise vanish; does nothing for the other dtypes."""

import math

GROWTH_STEPS = 2000
FIRST_SCALE = 2.0**16


class LossScaler:
    """The loss is multiplied by `scale`; a step whose gradient overflows is skipped and halves it."""

    def __init__(self, active: bool, scale: float = FIRST_SCALE, good_steps: int = 0) -> None:
        self.active, self.good_steps = active, good_steps
        self.scale = scale if active else 1.0

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller scale is left to try after an overflow: else a gradient that is no number is a bad step."""
        return self.active and self.scale > 1.0

    @staticmethod
    def restore(dtype: str, scale: float | None, good_steps: int) -> "LossScaler":
        """The scaler for this compute dtype, as it was saved, or a new one."""
        return LossScaler(dtype == "float16", FIRST_SCALE if scale is None else scale, good_steps)

    def accepts(self, grad_norm: float) -> bool:
        """Whether the update may be made; adapts the scale for the next step."""
        if not self.active:
            return True
        if not math.isfinite(grad_norm):
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
            return False
        self.good_steps += 1
        if self.good_steps == GROWTH_STEPS:
            self.scale, self.good_steps = self.scale * 2, 0
        return True
