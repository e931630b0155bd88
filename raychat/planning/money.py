"""What a run will cost: node hours times a price, on demand and spot. Without a price there is no cost, never a guess."""

from dataclasses import dataclass

from raychat.planning.ranges import Range
from raychat.planning.target import Target

__all__ = ["MoneyForecast", "Target"]


@dataclass(frozen=True, kw_only=True)
class MoneyForecast:
    """Dollars and node hours of a whole run; None without a price."""

    node_hours: Range
    on_demand: Range | None
    spot: Range | None
    """expected replay at the preemption rate included"""
    replay_s: Range
    """expected from preemptions, seconds of wall time; part of `spot` alone"""
    price: float | None
    """dollars per machine and hour, on demand"""
    spot_price: tuple[float, float] | None
    price_source: str
    price_as_of: str
