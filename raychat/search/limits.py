"""What a search may spend, and what the runs that wait would cost."""

from collections.abc import Mapping, Sequence

from raychat.errors import ConfigError
from raychat.planning import recipe
from raychat.search.spec import SearchSpec
from raychat.search.trial import Outcome, Trial


def spent_usd(done: Mapping[str, Outcome]) -> float:
    """Dollars of all runs that have an outcome; those whose cost is not known count nothing."""
    return sum(outcome.cost_usd or 0.0 for outcome in done.values())


def limit_reached(spec: SearchSpec, done: Mapping[str, Outcome], *, hours: float = 0.0) -> str:
    """Why no run may be started any more, for a person; empty while one may. `hours`: wall time of the search so far."""
    spent = spent_usd(done)
    if spec.budget_usd != -1 and spent >= spec.budget_usd:
        return f"${spent:.2f} of ${spec.budget_usd:.2f} are spent"
    if spec.max_hours != -1 and hours >= spec.max_hours:
        return f"{hours:.2f} of {spec.max_hours:g} hours are over"
    return ""


def affordable(
    spec: SearchSpec,
    waiting: Sequence[Trial],
    running: Sequence[Trial],
    known: Sequence[Trial],
    done: Mapping[str, Outcome],
) -> list[Trial]:
    """The first of `waiting` that the budget pays for beside `running`, by the dollars per FLOP of the runs among `known`.

    All of them where there is no budget, or nothing is known of the costs. It stops at the first that is too dear: a cheaper
    one behind it must not be preferred for its price.
    """
    rate = _usd_per_flop(spec, known, done) if spec.budget_usd != -1 else None
    if rate is None:
        return list(waiting)
    left = spec.budget_usd - spent_usd(done) - sum(rate * trial_flops(spec, trial) for trial in running)
    found: list[Trial] = []
    for trial in waiting:
        left -= rate * trial_flops(spec, trial)
        if left < 0:
            break
        found.append(trial)
    return found


def trial_flops(spec: SearchSpec, trial: Trial) -> float:
    """FLOPs that `trial` itself spends; 0 where it cannot be made."""
    try:
        config = spec.config(trial)
        run = recipe(config)
    except ConfigError:
        return 0.0
    end = run.num_iterations if config.run.stop_at == -1 else min(config.run.stop_at, run.num_iterations)
    begin = max(0, trial.fork_step) if trial.fork_of else 0
    if trial.role == "rehearsal":
        begin, end = 0, config.run.dry_run_steps
    return run.flops / run.num_iterations * (end - begin)


def _usd_per_flop(spec: SearchSpec, known: Sequence[Trial], done: Mapping[str, Outcome]) -> float | None:
    paid = [
        (outcome.cost_usd, trial_flops(spec, trial))
        for trial in known
        if trial.role != "rehearsal"
        and (outcome := done.get(trial.tag))
        and outcome.status == "finished"
        and outcome.cost_usd
    ]
    flops = sum(flops for _, flops in paid)
    return sum(dollars for dollars, _ in paid) / flops if flops else None
