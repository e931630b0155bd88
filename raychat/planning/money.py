"""What a run will cost: node hours times a price, on demand and spot. Without a price there is no cost, never a guess."""

from dataclasses import dataclass, replace

from raychat.checks import require
from raychat.config import Config
from raychat.planning.duration import TimeForecast
from raychat.planning.prices import Machine, find_machine, load_prices, machines_with
from raychat.planning.ranges import Range
from raychat.planning.target import Target, resolve_target

__all__ = ["MachineCost", "MoneyForecast", "Target", "forecast_money", "price_per_hour", "priced", "resolve_target"]


@dataclass(frozen=True, kw_only=True)
class MachineCost:
    """What the run costs on one machine type, in dollars; `machines` of it are held for `node_hours` together."""

    machine: Machine
    machines: int
    node_hours: Range
    on_demand: Range | None
    spot: Range | None


@dataclass(frozen=True, kw_only=True)
class MoneyForecast:
    """Dollars and node hours of a whole run; None where no price is known."""

    node_hours: Range
    """of an undisturbed run"""
    on_demand: Range | None
    spot: Range | None
    """expected replay at the preemption rate included"""
    replay_s: Range
    """expected from preemptions, seconds of wall time; part of `spot` alone"""
    price: float | None
    """dollars per machine and hour, on demand"""
    spot_price: tuple[float, float] | None
    price_source: str
    """in words, with the date or that it is not known; why there is none, when there is none"""
    price_as_of: str
    """date of the price, or unknown"""
    machine: str
    """machine type the price is of; "" when --price-per-hour gave it, or there is none"""
    options: tuple[MachineCost, ...]
    """the machine types of the table that hold these workers, cheapest first"""


def price_per_hour(config: Config) -> float | None:
    """Dollars per machine and hour that the user's flags settle, for the ledger; None: they settle none.

    `--price-per-hour` before the on-demand price of `--machine`. A machine that merely has the right GPU gives none.

    Raises:
        ConfigError: for a machine that no table knows.
    """
    if config.money.price_per_hour > 0:
        return config.money.price_per_hour
    if not config.plan.machine:
        return None
    return find_machine(config.plan.machine, load_prices(config.plan.prices)).on_demand


def priced(config: Config) -> Config:
    """`config` with the price of its `--machine` as `--price-per-hour`, where that was not given.

    Raises:
        ConfigError: for a machine that no table knows, and for a budget without a price.
    """
    price = price_per_hour(config)
    require(
        config.money.budget_usd == -1 or price is not None,
        f"--budget-usd needs a price, and none is known for --machine {config.plan.machine}: give --price-per-hour, in "
        "dollars for one machine."
        if config.plan.machine
        else "--budget-usd needs a price: give --price-per-hour, in dollars for one machine, or --machine.",
    )
    if price is None or price == config.money.price_per_hour:
        return config
    return replace(config, money=replace(config.money, price_per_hour=price))


def forecast_money(config: Config, target: Target, time: TimeForecast | None) -> MoneyForecast | None:
    """What the run costs on `target`; None when its time is not known.

    Where no machine was named, the price is that of the cheapest of the table with this GPU, and `price_source` says so.
    """
    if time is None:
        return None
    options = _options(config, target, time)
    given = _price_given(config, target)
    named, known = target.machine, [option.machine for option in options if option.on_demand]
    machine = named or (None if given or not known else known[0])
    machines = target.machines if named or machine is None else _machines(target, machine)
    price = config.money.price_per_hour if given else (machine.on_demand if machine else None)
    spot_price = machine.spot if machine and not given else None
    hours = time.undisturbed.scaled(machines / 3600)
    return MoneyForecast(
        node_hours=hours,
        on_demand=None if price is None else hours.scaled(price),
        spot=_spot(time, machines, spot_price),
        replay_s=time.replay,
        price=price,
        spot_price=spot_price,
        price_source=_source(config, target, machine, price),
        price_as_of="as given" if given else (machine.as_of if machine and price is not None else "unknown"),
        machine="" if given or machine is None else machine.name,
        options=options,
    )


def _options(config: Config, target: Target, time: TimeForecast) -> tuple[MachineCost, ...]:
    """Each with as many machines as hold the workers, no more than `time` was made for: a network would slow them."""
    if target.device == "cpu":
        return ()
    costs = []
    for machine in machines_with(target.gpu, target.workers, load_prices(config.plan.prices)):
        count = _machines(target, machine)
        if count > target.machines:
            continue
        hours = time.undisturbed.scaled(count / 3600)
        costs.append(
            MachineCost(
                machine=machine,
                machines=count,
                node_hours=hours,
                on_demand=None if machine.on_demand is None else hours.scaled(machine.on_demand),
                spot=_spot(time, count, machine.spot),
            )
        )
    return tuple(costs)


def _machines(target: Target, machine: Machine) -> int:
    return -(-target.workers // machine.gpus)


def _spot(time: TimeForecast, machines: int, price: tuple[float, float] | None) -> Range | None:
    if price is None:
        return None
    low, high = price
    return time.total.scaled(machines / 3600).times(Range(low, (low + high) / 2, high))


def _price_given(config: Config, target: Target) -> bool:
    """Whether --price-per-hour says another price than the table has for the named machine, as `priced` would fill in."""
    price = config.money.price_per_hour
    return price > 0 and not (target.machine and target.machine.on_demand == price)


def _source(config: Config, target: Target, machine: Machine | None, price: float | None) -> str:
    if _price_given(config, target):
        return "--price-per-hour"
    if machine is None or price is None:
        known = target.machine.name if target.machine else "this machine" if target.device == "cpu" else target.gpu
        return f"no price is known for {known}: give --price-per-hour"
    assumed = "" if target.machine else f", the cheapest of the table with {machine.devices}"
    return f"{machine.name}{assumed}: price {machine.dated}"
