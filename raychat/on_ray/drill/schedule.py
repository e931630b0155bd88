"""Which fault strikes at which step: a pure function of the kinds, the rounds and the seed."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from raychat.errors import ConfigError

KINDS = (
    "worker-kill",
    "node-drain",
    "node-kill",
    "driver-kill",
    "bit-flip",
    "torn-save",
    "disk-full",
    "tracking-hang",
)
ELASTIC = ("node-drain", "node-kill")  # the number of workers changes: equal rows, and results equal up to rounding
ON_OTHERS = ("worker-kill", "node-drain", "driver-kill", "bit-flip", "torn-save", "tracking-hang")
NOTICE_S = 15.0  # between a drain and the end of the node
HANG_S = 30.0  # for which the tracking server is frozen
AWAY_S = 5.0  # before another node takes the place of one that is gone
# Training goes on meanwhile, so that the run needs steps for it: seconds for which the fault itself lasts, and until the
# run has its full number of workers again.
LASTS_S = {"node-drain": NOTICE_S + AWAY_S + 15, "node-kill": AWAY_S + 15, "disk-full": 5.0, "tracking-hang": HANG_S}


@dataclass(frozen=True)
class Fault:
    """One fault. It strikes when the run is whole and has done `step` steps; `salt` decides what exactly it hits."""

    kind: str
    step: int
    salt: int


@dataclass(frozen=True)
class Schedule:
    """The faults of one run in order, and how many steps the run needs for them."""

    name: str
    faults: tuple[Fault, ...]
    steps: int


def schedules(kinds: Sequence[str], *, rounds: int, seed: int, step_s: float, save_every: int) -> list[Schedule]:
    """One run for the faults that leave the number of workers alone, and one for those that do not.

    Every round holds each kind once, in an order of its own.

    Args:
        kinds: names out of KINDS, without repetition.
        rounds: how often each strikes.
        seed: of the order, of the distances and of what is hit.
        step_s: seconds that a step takes, about; decides how many steps a fault needs that lasts for some time.
        save_every: steps between two saves; a fault strikes after a save, or nothing would be left of the steps before.

    Raises:
        ConfigError: an unknown kind, or no rounds.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ConfigError(f"--faults {unknown[0] if unknown else 'is empty'}: use some of {','.join(KINDS)}.")
    if rounds < 1 or step_s <= 0:
        raise ConfigError(f"--rounds {rounds} and --step-s {step_s:g} must be above 0.")
    groups = {
        "steady": sorted(set(kinds) - set(ELASTIC)),
        "elastic": sorted(set(kinds) & set(ELASTIC)),
    }
    return [
        _schedule(name, group, random.Random(f"{seed}/{name}"), rounds, step_s, save_every)
        for name, group in groups.items()
        if group
    ]


def _schedule(
    name: str, kinds: Sequence[str], rng: random.Random, rounds: int, step_s: float, save_every: int
) -> Schedule:
    faults: list[Fault] = []
    step = 2 * save_every  # two checkpoints: one may be damaged
    for _ in range(rounds):
        for kind in rng.sample(kinds, len(kinds)):
            step += rng.randrange(1, save_every + 1)
            faults.append(Fault(kind, step, rng.randrange(2**32)))
            step += 2 * save_every + math.ceil(LASTS_S.get(kind, 0.0) / step_s)
    return Schedule(name, tuple(faults), step + save_every)
