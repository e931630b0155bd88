"""What a plan is made for: a machine of the price table, a GPU by its name, or this machine."""

from dataclasses import dataclass
from typing import Literal

from raychat.planning.devices import DevicePeak
from raychat.planning.prices import Machine


@dataclass(frozen=True, kw_only=True)
class Target:
    """`workers` ranks on `machines` machines, one rank per device.

    `gpu` is a plan name ("a100-40gb"), or "cpu"; `peak` and `memory_bytes` (of one device, or of the machine for "cpu")
    are None where they are not known. `cores` counts a machine's CPU cores, and is 0 where it is not known.
    """

    device: Literal["cuda", "cpu"]
    gpu: str
    peak: DevicePeak | None
    memory_bytes: int | None
    workers: int
    machines: int
    machine: Machine | None
    cores: int
