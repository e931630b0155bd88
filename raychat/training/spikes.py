"""Names losses that stand out from those before them."""

from collections import deque

import numpy as np

WINDOW_STEPS = 100
DEVIATIONS = 6.0


class LossSpikes:
    """The losses of the last 100 steps; a spike lies more than 6 standard deviations above their mean."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)

    def observe(self, loss: float) -> float | None:
        """Take in a finite loss; the mean before it when it is a spike. Says nothing until 100 steps are known."""
        mean = None
        if len(self._losses) == WINDOW_STEPS:
            before = np.array(self._losses)
            mean = float(before.mean()) if loss > before.mean() + DEVIATIONS * before.std() else None
        self._losses.append(loss)
        return mean
