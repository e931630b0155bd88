"""What a search is told: a base, a space, how to look through it, and when to stop. Refused where it cannot be."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from raychat.checks import require
from raychat.cli import WARMUPS, load_presets, other_warmup_cleared
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import recipe
from raychat.planning.money import price_per_hour
from raychat.search import space as spaces
from raychat.search.ranking import Objective
from raychat.search.space import Parameter, parameter
from raychat.search.spec_checks import check_base, check_continued, check_forks, check_space_name, check_value
from raychat.search.trial import Trial
from raychat.uris import HIDDEN, marked_uri

BASELINE = "base"
"""arm of the base configuration itself"""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A configuration that is compared, whatever its seed and rung."""

    name: str
    title: str
    settings: Mapping[str, Any]
    """what differs from the base"""


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """A search. `base` and `space` are flags of jobs/pretrain.py; the other fields are the search's own settings."""

    name: str
    """of the search's directory; its runs are called <name>-000 and on"""
    base: Mapping[str, Any] = field(default_factory=dict)
    """flags of the baseline: what every configuration starts from"""
    space: Mapping[str, Any] = field(default_factory=dict)
    """flag -> list of values, or {low, high, log, num}"""
    objective: Objective = field(default_factory=Objective)
    """what decides: val_bpb, val_bpb_per_dollar, or {best_under = {budget_usd = 5.0}}"""
    searcher: Literal["grid", "random", "optuna"] = "grid"
    """all combinations, so many drawn at random, or Optuna's choice from what came out"""
    scheduler: Literal["", "rungs", "none", "asha"] = ""
    """default: rungs (successive halving over complete short runs); none with optuna and with fork_at"""
    seeds: tuple[int, ...] = (42,)
    """of initial weights and data order; the first one at every rung, the others at the full horizon"""
    trials: int = -1
    """configurations to try: of random and optuna 20 unless given; of a grid all"""
    search_seed: int = 0
    """of drawing configurations"""
    concurrency: Literal["auto"] | int = "auto"
    """runs at a time; auto: as many as the cluster has workers for"""
    budget_usd: float = -1.0
    """dollars for the whole search; no run is started that would probably exceed them; -1: no limit"""
    max_hours: float = -1.0
    """hours of wall time after which no run is started; -1: no limit"""
    max_trial_hours: float = -1.0
    """hours that one run may take; -1: no limit"""
    memory_limit_gb: float = -1.0
    """memory of one worker, 10^9 bytes, beyond which a run ends as OOM; -1: what the machine has"""
    rungs: tuple[float, ...] = (0.25, 0.5, 1.0)
    """shares of the horizon: a complete run each"""
    keep: float = 0.5
    """share of the configurations of a rung that goes on to the next"""
    fork_at: float = -1.0
    """share of the run after which all configurations start from one checkpoint; -1: each from its beginning"""
    dry_run_steps: int = -1
    """steps of a rehearsal of each distinct shape before its first run; -1: off"""
    noise_repeats: int = 2
    """repeats of the baseline that the noise is measured with; 0: none"""
    confirm_seeds: int = 3
    """fresh seeds on which a winner must beat the baseline; 0: none"""

    def __post_init__(self) -> None:
        self._settle()
        self._check_settings()
        check_base(self.base)
        require(
            self.base_config.eval.eval_every != -1,
            "eval_every = -1 in [base]: runs are compared by val_bpb, which would not be measured. Leave it out, or give a "
            "number of steps: a large one evaluates at the beginning and the end alone.",
        )
        for name, values in self.space.items():
            check_space_name(name, self.base_config)
            for value in values.bounds():
                check_value(name, value, self.base_config)
        if self.searcher == "grid":
            next(spaces.grid(self.space))  # a range without points has no grid
        self._check_money()
        if self.scheduler == "asha":
            check_continued(self.base_config, self.space)
        if self.fork_at != -1:
            check_forks(self.base_config, self.space, self.fork_at)

    @cached_property
    def base_config(self) -> Config:
        """The base alone, with its presets."""
        values = {name.replace("-", "_"): value for name, value in self.base.items()}
        try:
            layer = load_presets(str(values.pop("preset", "")))
            return Config.from_flat(other_warmup_cleared(WARMUPS & values.keys()) | values, layer)
        except ConfigError as error:
            raise ConfigError(f"In [base]: {error}") from error

    @property
    def shares(self) -> tuple[float, ...]:
        """The rungs that the scheduler uses."""
        return (1.0,) if self.scheduler == "none" else self.rungs

    def arm(self, settings: Mapping[str, Any]) -> Arm:
        """The arm that `settings` make; those that are the base's are none."""
        base = self._base_flat
        own = {name: value for name, value in settings.items() if base[name] != value}
        name = ",".join(f"{key}={value}" for key, value in sorted(own.items()))
        title = ", ".join(f"{key.replace('_', '-')} {spaces.spelled(value)}" for key, value in own.items())
        return Arm(name=name or BASELINE, title=title or "baseline", settings=own)

    def arms(self) -> list[Arm]:
        """All configurations, the baseline first; with Optuna it alone: the others are chosen when their time comes."""
        points: list[dict[str, Any]] = []
        if self.searcher == "grid":
            points = list(spaces.grid(self.space))
            points = points[: self.trials] if self.trials != -1 else points
        elif self.searcher == "random":
            points = spaces.samples(self.space, self.trials, self.search_seed)
        found = {arm.name: arm for arm in (self.arm({}), *map(self.arm, points))}
        return list(found.values())

    def config(self, trial: Trial) -> Config:
        """The configuration of `trial`, as jobs/pretrain.py is given it.

        At a rung below 1 the horizon is that share of the full one, in the unit in which it was given; batch, rates, decay,
        warm-up and warmdown follow from it by the rules, as in any run of that length. A trunk is the beginning of a full run.

        Raises:
            ConfigError: where the settings cannot be together: the trial is infeasible.
        """
        values = {**trial.settings, "model_tag": trial.tag, "seed": trial.seed}
        values = other_warmup_cleared(WARMUPS & values.keys()) | values
        config = Config.from_flat(values, self.base_config)
        run, money = config.run, config.money
        if self.scheduler == "asha" and trial.rung < 1:
            run = replace(run, stop_at=max(1, round(trial.rung * recipe(config).num_iterations)))
        elif trial.rung < 1 and trial.role != "trunk":
            config = _shorter(config, trial.rung)
        if trial.role == "rehearsal":
            run = replace(run, dry_run_steps=self.dry_run_steps)
        elif trial.role == "trunk":
            run = replace(run, stop_at=trial.fork_step)
        elif trial.role == "fork":
            run = replace(run, allow_config_change=True)
        if self.max_trial_hours != -1:
            limits = [hours for hours in (money.max_hours, self.max_trial_hours) if hours > 0]
            money = replace(money, max_hours=min(limits))
        return replace(config, run=run, money=money)

    def fork_step(self) -> int:
        """The step of the trunk's checkpoint."""
        return max(1, round(self.fork_at * recipe(self.base_config).num_iterations))

    def kept(self) -> dict[str, Any]:
        """`flat` with marks where [base] holds credentials: what may be written down. See spec_checks.check_credentials."""
        base = {name: marked_uri(value) if isinstance(value, str) else value for name, value in self.base.items()}
        hidden = {name: HIDDEN for name, value in base.items() if name.replace("-", "_") == "on_event" and value}
        return self.flat() | {"base": base | hidden}

    def flat(self) -> dict[str, Any]:
        """As plain values, as a spec file has them; what is at its default is left out."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("base", "space")}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        plain = {key: value for key, value in found.items() if value != defaults[key]}
        plain |= {key: list(value) for key, value in plain.items() if isinstance(value, tuple)}
        plain.pop("objective", None)
        if self.objective != Objective():
            plain["objective"] = _plain_objective(self.objective)
        space = {name: values.plain() for name, values in self.space.items()}
        return plain | {"base": dict(self.base), "space": space}

    @cached_property
    def _base_flat(self) -> dict[str, Any]:
        return self.base_config.flat()

    def _settle(self) -> None:
        """Put what was left open, or given as TOML has it, in its final form."""
        require(
            self.searcher in ("grid", "random", "optuna"),
            f"searcher = {self.searcher!r}: use one of 'grid', 'random', 'optuna'.",
        )
        scheduler = self.scheduler or ("none" if self.searcher == "optuna" or self.fork_at != -1 else "rungs")
        trials = 20 if self.trials == -1 and self.searcher != "grid" else self.trials
        space = {name.replace("-", "_"): values for name, values in self.space.items()}
        found = {
            name: values if isinstance(values, Parameter) else self._read(name, values)
            for name, values in space.items()
        }
        settled = {"scheduler": scheduler, "trials": trials, "space": found}
        settled |= {"seeds": tuple(self.seeds), "rungs": tuple(self.rungs)}
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def _read(self, name: str, values: Any) -> Parameter:
        check_space_name(name, self.base_config)
        default = Config().flat()[name]
        return parameter(name, values, integer=isinstance(default, int) and not isinstance(default, bool))

    def _check_settings(self) -> None:
        require(
            re.fullmatch(r"[\w@+-][\w.@+-]*", self.name) is not None,
            f"name = {self.name!r} names a folder: use letters, digits, '.', '_' and '-', for example lr-search.",
        )
        require(len(self.seeds) > 0, "seeds is empty: give at least one, for example seeds = [42].")
        for seed in self.seeds:
            require(
                isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**62,
                f"seeds holds {seed!r}: a seed is a whole number of at least 0 and below 2**62.",
            )
            require(self.seeds.count(seed) == 1, f"seeds holds {seed} twice: the same run twice says nothing new.")
        require(bool(self.space), "The space is empty: give at least one setting in [space], as depth = [2, 3, 4].")
        for name in ("trials", "budget_usd", "max_hours", "max_trial_hours", "memory_limit_gb", "dry_run_steps"):
            value = getattr(self, name)
            require(0 < value < math.inf or value == -1, f"{name} must be above 0, or -1 for none, got {value}.")
        for name in ("noise_repeats", "confirm_seeds", "search_seed"):
            require(getattr(self, name) >= 0, f"{name} must be 0 or more, got {getattr(self, name)}.")
        require(
            self.concurrency == "auto" or self.concurrency > 0,
            f"concurrency is a number of runs above 0, or 'auto', got {self.concurrency!r}.",
        )
        self._check_scheduler()

    def _check_scheduler(self) -> None:
        require(
            self.scheduler in ("rungs", "none", "asha"),
            f"scheduler = {self.scheduler!r}: use one of 'rungs', 'none', 'asha'.",
        )
        rising = all(a < b for a, b in zip(self.rungs, self.rungs[1:], strict=False))
        require(
            bool(self.rungs) and rising and self.rungs[0] > 0 and self.rungs[-1] == 1,
            f"rungs = {list(self.rungs)} must rise, from above 0 to exactly 1 (the full horizon), as [0.25, 0.5, 1.0].",
        )
        require(
            0 < self.keep < 1, f"keep = {self.keep} is the share that goes on: above 0 and below 1, for example 0.5."
        )
        require(
            self.searcher != "optuna" or self.scheduler == "none",
            f"scheduler = {self.scheduler!r} needs all configurations at the beginning, and Optuna chooses each from the "
            "results of those before: use scheduler = 'none', or searcher = 'random'.",
        )
        require(self.fork_at == -1 or 0 < self.fork_at < 1, f"fork_at = {self.fork_at} must be above 0 and below 1.")
        require(
            self.fork_at == -1 or (self.scheduler == "none" and self.searcher != "optuna"),
            f"fork_at starts all configurations at the same step of a full run: it goes with scheduler = 'none' and the "
            f"searchers grid and random, not with {self.scheduler!r} and {self.searcher!r}.",
        )

    def _check_money(self) -> None:
        asked = [
            label
            for label, is_set in (
                ("budget_usd", self.budget_usd != -1),
                ("objective = 'val_bpb_per_dollar'", self.objective.kind == "val_bpb_per_dollar"),
                ("objective.best_under.budget_usd", self.objective.budget_usd is not None),
            )
            if is_set
        ]
        require(
            not asked or price_per_hour(self.base_config) is not None,
            f"{asked[:1] and asked[0]} needs a price: add price_per_hour (dollars for one machine) or machine to [base].",
        )


def _shorter(config: Config, share: float) -> Config:
    """`config` with `share` of its horizon, in the unit that decides it."""
    horizon = config.horizon
    if horizon.num_iterations > 0:
        horizon = replace(horizon, num_iterations=max(1, round(horizon.num_iterations * share)))
    elif horizon.target_flops > 0:
        horizon = replace(horizon, target_flops=horizon.target_flops * share)
    else:
        horizon = replace(horizon, target_param_data_ratio=horizon.target_param_data_ratio * share)
    return replace(config, horizon=horizon)


def _plain_objective(objective: Objective) -> Any:
    limits = {"budget_usd": objective.budget_usd, "max_hours": objective.max_hours}
    limits = {name: value for name, value in limits.items() if value is not None}
    return {"best_under": limits} if limits else objective.kind
