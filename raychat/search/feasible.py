"""Outcomes that are known before a run is started: what cannot be, and what a rehearsal has shown. They cost nothing."""

from collections.abc import Iterable

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import recipe
from raychat.planning.outlook import fits, look_ahead, memory_of, rank_memory
from raychat.planning.ranges import Range
from raychat.planning.target import Target, resolve_target
from raychat.search.drafts import failed, shape_of
from raychat.search.spec import SearchSpec
from raychat.search.trial import Outcome, Trial


def foreseen(
    spec: SearchSpec, trial: Trial, runs: Iterable[tuple[Trial, Outcome]], target: Target | None = None
) -> Outcome | None:
    """The outcome of `trial` if it is known without running it; ask before each start.

    `infeasible` where the settings cannot be together, do not fit the memory or the limits by the plan for `target` (default:
    what the configuration names, else this machine); what befell the rehearsal of its shape among `runs`; `too slow` where the
    measured steps add up to more than the limit.
    """
    try:
        config = spec.config(trial)
        reason = infeasible(config, target or resolve_target(config), limits=limits_of(spec, trial))
    except ConfigError as error:
        return Outcome(status="infeasible", reason=str(error))
    if reason:
        return Outcome(status="infeasible", reason=reason)
    rehearsal = None if trial.role == "rehearsal" else _rehearsed(spec, trial, runs)
    if rehearsal is None:
        return None
    if failed(rehearsal):
        return Outcome(status=rehearsal.status, reason=f"in its rehearsal: {rehearsal.reason or rehearsal.status}")
    return _too_slow(spec, trial, config, rehearsal)


def infeasible(
    config: Config, target: Target, *, limits: tuple[float | None, float | None] = (None, None)
) -> str | None:
    """Why `config` cannot run on `target`, by the plan; None if it can. `limits`: hours and dollars that one run may take.

    A forecast counts against a limit only from its lower end: what may keep it is tried.
    """
    recipe(config)
    total = memory_of(config, target).total
    if fits(total, target) is False:
        there = (rank_memory(target) or 0) / 2**30
        return (
            f"it needs {total / 2**30:.1f} GiB by the plan, and a worker on {target.gpu} has {there:.1f} GiB, of which a tenth "
            "stays free: lower device_batch_size"
        )
    if limits == (None, None):
        return None
    outlook = look_ahead(config, target)
    hours = outlook.time.total.scaled(1 / 3600) if outlook.time else None
    dollars = outlook.money.on_demand if outlook.money else None
    return _over(hours, limits[0], "h") or _over(dollars, limits[1], "$")


def limits_of(spec: SearchSpec, trial: Trial) -> tuple[float | None, float | None]:
    """Hours and dollars that `trial` may take at most, None for no limit. A rehearsal has none: it is short."""
    if trial.role == "rehearsal":
        return None, None
    hours = [limit for limit in (spec.max_trial_hours, spec.objective.max_hours) if limit is not None and limit > 0]
    dollars = [limit for limit in (spec.budget_usd, spec.objective.budget_usd) if limit is not None and limit > 0]
    return min(hours, default=None), min(dollars, default=None)


def _over(forecast: Range | None, limit: float | None, unit: str) -> str | None:
    if forecast is None or limit is None or forecast.low <= limit:
        return None
    shown = f"${forecast.low:.2f}" if unit == "$" else f"{forecast.low:.2f} h"
    return f"one run takes {shown} or more by the plan, over the limit of " + (
        f"${limit:.2f}" if unit == "$" else f"{limit:g} h"
    )


def _rehearsed(spec: SearchSpec, trial: Trial, runs: Iterable[tuple[Trial, Outcome]]) -> Outcome | None:
    shape = shape_of(spec, trial)
    return next((o for t, o in runs if t.role == "rehearsal" and shape_of(spec, t) == shape), None)


def _too_slow(spec: SearchSpec, trial: Trial, config: Config, rehearsal: Outcome) -> Outcome | None:
    limit = limits_of(spec, trial)[0]
    if limit is None or rehearsal.step_s is None:
        return None
    hours = rehearsal.step_s * recipe(config).num_iterations / 3600
    if hours <= limit:
        return None
    return Outcome(
        status="too slow",
        step_s=rehearsal.step_s,
        reason=f"its steps alone take {hours:.2f} h at {rehearsal.step_s:.3g} s each, as rehearsed, over {limit:g} h",
    )
