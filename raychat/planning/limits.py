"""Whether a run will fit the time and the money that it is given, and how much of it would."""

import math
from collections.abc import Mapping
from typing import Any

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning.hindsight import forecast_of
from raychat.planning.ranges import Range


def refuse_beyond_limits(plan: Mapping[str, Any], config: Config) -> None:
    """Raise ConfigError when the time or the money that `plan` expects is more than `config` allows.

    The message has the numbers, and the iterations that would fit. What a plan does not know refuses nothing.
    """
    forecast, money = forecast_of(plan), config.money
    time, cost = forecast["time_s"], forecast["cost_usd"]
    problems, shares = [], []
    if time and 0 < money.max_hours * 3600 < time.mid:
        problems.append(f"it takes {_shown(time.scaled(1 / 3600))} hours and --max-hours is {money.max_hours:g}")
        shares.append(money.max_hours * 3600 / time.mid)
    if cost and 0 < money.budget_usd < cost.mid:
        problems.append(f"it costs {_shown(cost)} dollars and --budget-usd is {money.budget_usd:g}")
        shares.append(money.budget_usd / cost.mid)
    if problems:
        raise ConfigError(f"This run will not fit: {', and '.join(problems)}. {_advice(plan, time, min(shares))}")


def iterations_within(time_s: float, startup_s: float, iterations: int, share: float) -> int:
    """Iterations that fit `share` of `time_s`, two digits that count.

    Of the time of so many `iterations`, all but the start-up grows with them: evaluations and saves come with steps.
    """
    room = share * time_s - startup_s
    if room <= 0:
        return 0
    fitting = math.floor(iterations * room / (time_s - startup_s))
    unit = 10 ** max(0, len(str(fitting)) - 2)
    return fitting // unit * unit


def _advice(plan: Mapping[str, Any], time: Range | None, share: float) -> str:
    startup, planned = forecast_of(plan)["startup_s"], plan["horizon"]["num_iterations"]
    fitting = 0
    if time:  # where money is known and time is not, there is nothing to count with
        fitting = iterations_within(time.mid, startup.mid if startup else 0.0, planned, share)
    if not fitting:
        return "Not one step would fit: raise the limit, or use a smaller --depth or a faster machine."
    return f"Of its {planned:,} iterations {fitting:,} would fit (--num-iterations {fitting}); or raise the limit."


def _shown(value: Range) -> str:
    low, mid, high = (f"{number:,.2f}" for number in value.as_list())
    return f"{mid} ({low} to {high})"
