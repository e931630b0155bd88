"""What machines cost by the hour: a table with sources and dates, and a user's own over it. Nothing is fetched."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine type. Prices are dollars per hour of one machine; None: not known, or not on sale."""

    name: str
    provider: str
    gpu: str
    """a plan name of raychat.planning.devices"""
    gpus: int
    on_demand: float | None = None
    spot: tuple[float, float] | None = None
    """lowest and highest seen"""
    region: str = ""
    source: str = ""
    as_of: str = "unknown"
    """date of the price, or "unknown" """
