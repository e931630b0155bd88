"""The noise of a search, measured at its start: the baseline again with the same seed."""

from dataclasses import replace

from raychat.search.drafts import draft
from raychat.search.roll import Roll
from raychat.search.spec import SearchSpec
from raychat.search.trial import Trial


def begin(spec: SearchSpec, roll: Roll) -> list[Trial]:
    """Add the baseline at the lowest rung and, where noise is measured, an exact repeat of it beside it."""
    first = draft(spec.arm({}), spec.seeds[0], spec.shares[0])
    return roll.add([first, replace(first, role="noise")] if spec.noise_repeats else [first])


def measure(spec: SearchSpec, roll: Roll, begun: list[Trial]) -> list[Trial] | None:
    """Add the baseline at the full horizon with its repeats; None until it is known of which kind they must be.

    Where the exact repeat of `begin` came out as the baseline did to the last digit, the hardware is deterministic: then the
    repeats differ in the last bits of some initial weights. The noise is measured at the full horizon, because a difference in
    the last bits grows with the steps.
    """
    base = spec.arm({})
    full = [] if spec.shares[0] == 1 else [draft(base, spec.seeds[0])]
    if not spec.noise_repeats:
        return roll.add(full)
    if not roll.settled(begun):
        return None
    first, again = (roll.done[trial.tag].val_bpb for trial in begun)
    if first is None or again is None:  # a baseline without a result has no noise
        return []
    there = 0 if full or first == again else 1
    return roll.add(full + repeats(spec, deterministic=first == again)[there:])


def repeats(spec: SearchSpec, *, deterministic: bool) -> list[Trial]:
    """Repeats of the baseline at the full horizon."""
    base = spec.arm({})
    settings = [{"perturbation": i + 1} if deterministic else {} for i in range(spec.noise_repeats)]
    return [draft(replace(base, settings=own), spec.seeds[0], role="noise") for own in settings]
