"""What a budget buys best: depth, device batch and horizon, with the neighbours that were not chosen and why.

The rule: the deepest model whose compute-optimal horizon (10.5 tokens per scaling parameter) the budget pays at the
expected time, start-up, data, evaluation and checkpoints included; of even depths, unless the depth is pinned. The
largest device batch that divides the batch and fits the memory, not above 32 unless a step is 5% faster so. The horizon then
spends what is left, rounded down to two digits of iterations. What is pinned stays as it is.
"""

import dataclasses
import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from raychat.checks import require
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import scaling
from raychat.planning.memory import SHARE
from raychat.planning.outlook import Outlook, batch_sizes, largest_that_fits, look_ahead, memory_of, rank_memory
from raychat.planning.plan import OPTIMAL_RATIO, optimal_iterations
from raychat.planning.target import Target, refuse_fp8

USUAL_BATCH = 32  # sequences a pass beyond which GPUs gain nothing: 53% of the peak at 16, 55% at 32 (document 004)
FASTER = 0.95  # of the time of a step: what a larger batch has to reach to be taken
MAX_DEPTH = 128
MOST_HOURS = 24 * 365 * 100
HORIZON = frozenset({"num_iterations", "target_flops", "target_param_data_ratio"})
DECIDED = frozenset({"depth", "window_pattern", "total_batch_size", "device_batch_size"}) | HORIZON


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One depth within the budget. `outlook` is None, and `why` says the reason, where it cannot be."""

    depth: int
    config: Config | None
    outlook: Outlook | None
    why: str

    @property
    def ratio(self) -> float:
        """Tokens per scaling parameter that the budget pays for; 0 where nothing can be."""
        if self.outlook is None or self.config is None:
            return 0.0
        return self.outlook.recipe.tokens / scaling.param_counts(scaling.model_shape(self.config.model)).scaling

    @property
    def hours(self) -> float:
        """Expected wall time; 0 where nothing can be."""
        return self.outlook.time.total.mid / 3600 if self.outlook and self.outlook.time else 0.0


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """`chosen`, its `neighbours` by depth, and what the rule takes `without_pins` where something is pinned."""

    target: Target
    hours: float
    chosen: Candidate
    neighbours: list[Candidate]
    pins: frozenset[str]
    without_pins: Candidate | None


def propose(config: Config, *, target: Target, hours: float, pins: Set[str] = frozenset()) -> Proposal:
    """The best use of `hours` of wall time on `target`. `pins` are settings of `config` (by flag name) that stay.

    Raises:
        ConfigError: nothing is known of the device's speed, or not even the smallest model can be had.
    """
    refuse_fp8(config, target)
    pinned = frozenset(pins) & DECIDED
    if config.batch.device_batch_size == "auto":
        pinned -= {"device_batch_size"}
    budget = _Budget(target=target, hours=hours, pins=pinned)
    depth = config.model.depth if "depth" in pinned else budget.deepest(config)
    chosen = budget.candidate(config, depth)
    require(chosen.outlook is not None, f"Depth {depth} cannot be proposed: {chosen.why}.")
    near = [budget.candidate(config, depth + step) for step in (-2, -1, 1, 2) if depth + step >= 1]
    return Proposal(
        target=target,
        hours=hours,
        chosen=dataclasses.replace(chosen, why=_why_chosen(chosen, pinned, hours)),
        neighbours=[dataclasses.replace(other, why=other.why or _why_not(other, chosen, hours)) for other in near],
        pins=pinned,
        without_pins=_without_pins(config, budget) if pinned else None,
    )


def hours_of(config: Config, target: Target, *, budget_usd: float | None, max_hours: float | None) -> tuple[float, str]:
    """Wall time that a budget pays for on `target`, and the budget in words. One of the two is given, or both.

    Raises:
        ConfigError: no price is known, or a limit is not above 0.
    """
    for flag, value in (("--budget-usd", budget_usd), ("--max-hours", max_hours)):
        require(value is None or 0 < value < math.inf, f"{flag} must be above 0, got {value}.")
    require(max_hours is None or max_hours <= MOST_HOURS, f"--max-hours {max_hours or 0:g} is more than a century.")
    hours, words = max_hours or math.inf, [] if max_hours is None else [f"{max_hours:g} hours"]
    if budget_usd:
        outlook = look_ahead(with_values(config, device_batch_size=1), target)
        money, time = outlook.money, outlook.time
        if money is None or time is None or money.on_demand is None:
            raise ConfigError(
                f"--budget-usd {budget_usd:g} needs a price, and none is known for {target.gpu}: give --price-per-hour, in "
                "dollars for one machine, or --max-hours instead."
            )
        paid = budget_usd * time.undisturbed.mid / money.on_demand.mid / 3600
        require(paid <= MOST_HOURS, f"--budget-usd {budget_usd:g} pays for more than a century on {target.gpu}.")
        hours = min(hours, paid)
        machines = round(3600 * money.node_hours.mid / time.undisturbed.mid)
        of = f" of {machines} x {money.machine}" if money.machine else ""
        words.insert(0, f"${budget_usd:,.2f} at ${budget_usd / paid:,.2f} an hour{of} = {paid:,.2f} hours")
    return hours, " and ".join(words)


def fit_batch(config: Config, target: Target) -> Config:
    """`config` with the largest device batch that divides and fits, at most 32 unless a step is 5% faster with more.

    Raises:
        ConfigError: not even one sequence a pass fits.
    """
    one = with_values(config, device_batch_size=1)
    most = largest_that_fits(one, target)
    if most is None:
        there = rank_memory(target)
        require(
            there is None,
            f"one sequence a pass needs {memory_of(one, target).total / 2**30:.1f} GiB, "
            f"of {(there or 0) / 2**30:.1f} GiB {SHARE:.0%} can be used",
        )
    sizes = [size for size in batch_sizes(one, target) if size <= (most or USUAL_BATCH)]
    best = max(size for size in sizes if size <= USUAL_BATCH)
    step = _step_s(with_values(one, device_batch_size=best), target)
    for size in (size for size in sizes if size > USUAL_BATCH):
        larger = with_values(one, device_batch_size=size)
        if (time := _step_s(larger, target)) and step and time < FASTER * step:
            best, step = size, time
    return with_values(one, device_batch_size=best)


def with_values(config: Config, **values: Any) -> Config:
    """`config` with other values of these settings."""
    return Config.from_flat(values, config)


@dataclass(frozen=True, kw_only=True)
class _Budget:
    target: Target
    hours: float
    pins: frozenset[str]

    def deepest(self, config: Config) -> int:
        """The deepest even depth whose compute-optimal (or pinned) horizon is paid for and whose memory is there.

        Pinned iterations or FLOPs have to make it compute-optimal; a pinned ratio says itself what is enough.
        """
        best, needed = None, ""
        for depth in range(2, MAX_DEPTH + 1, 2):
            try:
                least = self._least(self._at(config, depth))
            except ConfigError as error:
                needed = needed or f"depth {depth}: {str(error).rstrip('.')}"
                continue
            hours = self._hours(least)
            if hours > self.hours:
                needed = needed or f"depth {depth} takes {hours:.2g} hours to be compute-optimal"
                break
            if _undertrained(least):
                needed = needed or f"the pinned horizon is not enough for depth {depth} to be compute-optimal"
                break
            best = depth
        if best is None:
            raise ConfigError(
                f"The budget, {self.hours:.2g} hours, pays for no model: {needed}. Raise it, or pin --depth and "
                "--num-iterations to train one for less."
            )
        return best

    def candidate(self, config: Config, depth: int) -> Candidate:
        """What the budget pays for at this depth."""
        try:
            sized = self._at(config, depth)
            if not self.pins & HORIZON:
                sized = with_values(sized, num_iterations=self._iterations(sized))
            outlook = self._outlook(sized)
        except ConfigError as error:
            return Candidate(depth=depth, config=None, outlook=None, why=str(error).rstrip("."))
        return Candidate(depth=depth, config=sized, outlook=outlook, why="")

    def _at(self, config: Config, depth: int) -> Config:
        """`config` at this depth, with the device batch that suits it."""
        sized = with_values(config, depth=depth) if depth != config.model.depth else config
        return sized if "device_batch_size" in self.pins else fit_batch(sized, self.target)

    def _least(self, config: Config) -> Config:
        """`config` with the shortest horizon that may be proposed for it."""
        if self.pins & HORIZON:
            return config
        return with_values(config, num_iterations=_optimal(config))

    def _iterations(self, config: Config) -> int:
        """The most iterations that the budget pays for: a round number, unless compute-optimal is above it."""
        optimal = _optimal(config)

        def paid(n: int) -> bool:
            return self._hours(with_values(config, num_iterations=n)) <= self.hours

        low, high = 0, max(1, optimal)
        while paid(high):
            low, high = high, 2 * high
        while high - low > max(1, low // 1000):
            middle = (low + high) // 2
            low, high = (middle, high) if paid(middle) else (low, middle)
        require(low > 0, f"the budget of {self.hours:.2g} hours does not pay for one step of it")
        following = round_down(low) + _grain(low)  # the search stops within a thousandth of the end
        rounded = following if paid(following) else round_down(low)
        return optimal if rounded < optimal and paid(optimal) else rounded

    def _hours(self, config: Config) -> float:
        time = self._outlook(config).time
        return time.total.mid / 3600 if time else math.inf

    def _outlook(self, config: Config) -> Outlook:
        outlook = look_ahead(config, self.target)
        require(
            outlook.time is not None,
            f"nothing is known of how fast {self.target.gpu!r} computes; give --mfu, or a --gpu with a known name",
        )
        return outlook


def round_down(n: int) -> int:
    """`n` with two digits and zeros."""
    return n // _grain(n) * _grain(n)


def _grain(n: int) -> int:
    return 10 ** max(0, len(str(n)) - 2)


def _optimal(config: Config) -> int:
    return optimal_iterations(scaling.model_shape(config.model), scaling.recipe(config).total_batch_size)


def _undertrained(config: Config) -> bool:
    """Whether the iterations or FLOPs that `config` names leave the model short of compute-optimal."""
    named = config.horizon.num_iterations > 0 or config.horizon.target_flops > 0
    return named and scaling.recipe(config).num_iterations < _optimal(config)


def _step_s(config: Config, target: Target) -> float | None:
    time = look_ahead(config, target).time
    return time.step_s.mid if time else None


def _without_pins(config: Config, budget: _Budget) -> Candidate | None:
    """What the rule takes when nothing is pinned; None where it takes nothing."""
    defaults = Config().flat()
    free = with_values(config, **{name: defaults[name] for name in budget.pins})
    unpinned = dataclasses.replace(budget, pins=frozenset())
    try:
        return unpinned.candidate(free, unpinned.deepest(free))
    except ConfigError:
        return None


def _why_chosen(chosen: Candidate, pins: frozenset[str], hours: float) -> str:
    over = "" if chosen.hours <= hours else ", and more than the budget pays for"
    if "depth" in pins:
        return f"pinned{over}"
    goal = "with this horizon" if pins & HORIZON else f"that reaches {OPTIMAL_RATIO:g}"
    return f"the deepest {goal}"


def _why_not(other: Candidate, chosen: Candidate, hours: float) -> str:
    if other.hours > hours:
        return "more than the budget pays for"
    if other.depth > chosen.depth and other.ratio < OPTIMAL_RATIO:
        return f"undertrained (optimal: {OPTIMAL_RATIO:g})"
    if other.depth > chosen.depth and other.depth % 2 == 0:
        return f"depth {chosen.depth} is pinned"
    if other.depth % 2:
        return f"odd: only with --depth {other.depth}"
    return f"depth {chosen.depth} makes more of it"
