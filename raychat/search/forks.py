"""Late forks: one trunk for each seed, and every configuration from its checkpoint on.

Only for settings that act after the fork (raychat/search/spec_checks.py refuses others), so that a fork trains exactly as a
whole run of the same settings would have.
"""

from dataclasses import replace

from raychat.search.drafts import add_confirmation, add_rehearsals, draft
from raychat.search.noise_first import repeats
from raychat.search.roll import Roll
from raychat.search.spec import SearchSpec
from raychat.search.trial import Trial


def plot_forks(spec: SearchSpec, roll: Roll) -> bool:
    """All trials that follow from the outcomes; True when none can follow any more."""
    arms, step = spec.arms(), spec.fork_step()
    if not add_rehearsals(spec, roll, arms):
        return False
    trunks = roll.add([draft(arms[0], seed, spec.fork_at, "trunk", fork_step=step) for seed in spec.seeds])
    if not roll.settled(trunks):
        return False
    sound = [trunk for trunk in trunks if roll.done[trunk.tag].status == "finished"]
    forks = [draft(arm, trunk.seed, role="fork", fork_of=trunk.tag, fork_step=step) for trunk in sound for arm in arms]
    again = [replace(forks[0], role="noise")] if spec.noise_repeats and sound and sound[0] is trunks[0] else []
    added = roll.add([*forks[:1], *again, *forks[1:]])
    noise = _noise(spec, roll, added[:2]) if again else []
    if noise is None or not roll.settled([*added, *noise]):
        return False
    return add_confirmation(spec, roll)


def _noise(spec: SearchSpec, roll: Roll, pair: list[Trial]) -> list[Trial] | None:
    """More repeats of the baseline's fork; on deterministic hardware whole runs with perturbed initial weights."""
    if not roll.settled(pair):
        return None
    first, again = (roll.done[trial.tag].val_bpb for trial in pair)
    if first is None or again is None:
        return []
    if first == again:
        return roll.add(repeats(spec, deterministic=True))
    return roll.add([pair[1]] * spec.noise_repeats)
