"""How much time lies between saves that are made by time."""

import math

MEAN_TIME_BETWEEN_LOSSES_S = 4 * 3600.0  # assumed; spot machines of large clouds last hours, not minutes or weeks
MAX_INTERVAL_S = 600.0
LEAST_STALL_S = 0.1  # a save of a small model costs next to nothing, and a log full of saves costs its reader


def save_interval_s(stall_s: float, mean_time_between_losses_s: float = MEAN_TIME_BETWEEN_LOSSES_S) -> float:
    """Seconds between saves that stall training for `stall_s` each: sqrt(2 stall MTBL), at most ten minutes.

    Source: J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974.
    """
    return min(MAX_INTERVAL_S, math.sqrt(2 * stall_s * mean_time_between_losses_s))
