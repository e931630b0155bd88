"""Successive halving over complete short runs; with one rung, every configuration at the full horizon.

A rung is a share of the horizon. Each of its runs has its own whole schedule, because the loss in the middle of a decaying run
says little about its end (see docs/search.md). The first seed runs on every rung, the others only at the full horizon.
"""

import math
from collections.abc import Sequence

from raychat.search.drafts import add_confirmation, add_rehearsals, draft
from raychat.search.noise_first import begin, measure
from raychat.search.ranking import baseline_noise
from raychat.search.roll import Roll
from raychat.search.spec import BASELINE, Arm, SearchSpec
from raychat.search.trial import Trial

TIES = 0.25
"""more that go on because they lie within the noise of the last one that does, as a share of those that do"""


def plot_rungs(spec: SearchSpec, roll: Roll) -> bool:
    """All trials that follow from the outcomes; True when none can follow any more."""
    arms = spec.arms()
    if not add_rehearsals(spec, roll, arms):
        return False
    begun = begin(spec, roll)
    rung = [begun[0], *roll.add([draft(arm, spec.seeds[0], spec.shares[0]) for arm in arms[1:]])]
    noise = measure(spec, roll, begun)
    if noise is None or not roll.settled([*rung, *noise]):
        return False
    full = {trial.arm: trial for trial in noise if trial.role == "trial"}
    kept = len(rung)
    for share in spec.shares[1:]:
        able = [trial for trial in rung if _score(spec, roll, trial) is not None]
        kept = math.ceil(spec.keep * min(kept, len(able)))
        promoted = promote(spec, roll, able, kept)
        rung = _add_rung(spec, roll, promoted, share, full if share == 1 else {})
        if not roll.settled(rung):
            return False
    return finish(spec, roll, rung)


def finish(spec: SearchSpec, roll: Roll, full: Sequence[Trial]) -> bool:
    """The other seeds of the arms of `full` (the first seed at the full horizon), then fresh seeds."""
    able = [trial for trial in full if _score(spec, roll, trial) is not None]
    others = roll.add([draft(_arm(trial), seed) for seed in spec.seeds[1:] for trial in able])
    return roll.settled(others) and add_confirmation(spec, roll)


def promote(spec: SearchSpec, roll: Roll, able: Sequence[Trial], kept: int) -> list[Trial]:
    """The best `kept` of `able`, and up to TIES more that lie within the noise of the last; in the order of their numbers."""
    scored = sorted((_score(spec, roll, trial) or 0.0, trial.number, trial) for trial in able)
    if not scored or kept >= len(scored):
        return list(able)
    noise = baseline_noise(roll.runs(), spec.objective, baseline=BASELINE)
    reach = noise.threshold() if noise.sd is not None else 0.0
    bar = scored[kept - 1][0] * (1 + reach)
    tied = [trial for score, _, trial in scored[kept:] if score <= bar][: math.ceil(TIES * kept)]
    return sorted([*(trial for _, _, trial in scored[:kept]), *tied], key=lambda trial: trial.number)


def _add_rung(
    spec: SearchSpec, roll: Roll, promoted: Sequence[Trial], share: float, there: dict[str, Trial]
) -> list[Trial]:
    """Runs of the arms of `promoted` at `share`; those that are `there` already are not made again."""
    new = []
    for trial in promoted:
        if trial.arm in there:
            continue
        goes_on = spec.scheduler == "asha"
        new.append(
            draft(
                _arm(trial),
                trial.seed,
                share,
                fork_of=trial.tag if goes_on else "",
                fork_step=spec.config(trial).run.stop_at if goes_on else -1,
            )
        )
    added = roll.add(new)
    return [*(there[trial.arm] for trial in promoted if trial.arm in there), *added]


def _score(spec: SearchSpec, roll: Roll, trial: Trial) -> float | None:
    return spec.objective.score(roll.done[trial.tag])


def _arm(trial: Trial) -> Arm:
    return Arm(name=trial.arm, title=trial.title, settings=trial.settings)
