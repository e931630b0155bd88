"""What a plan is made for: a machine of the price table, a GPU by its name, or this machine. No torch, only /proc."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raychat.checks import require
from raychat.config import Config
from raychat.planning.devices import NO_FP8, DevicePeak, chosen_compile, device_peak, find_gpu, local_gpu, plan_name
from raychat.planning.prices import Machine, find_machine, load_prices
from raychat.planning.scaling import recipe

GPUS_A_MACHINE = 8  # assumed for a GPU that was named without a machine
MEMORY = Path("/proc/meminfo")
CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
BF16_FEATURES = {"avx512_bf16", "amx_tile"}  # for which the run's own `--dtype auto` chooses bfloat16 on a CPU


@dataclass(frozen=True, kw_only=True)
class Target:
    """`workers` ranks on `machines` machines, one rank per device.

    `gpu` is a plan name ("a100-40gb"), the driver's name of a GPU that is in no table, or "cpu"; `peak` and
    `memory_bytes` (of one device, or of the machine for "cpu") are None where they are not known. `cores` counts one
    machine's CPU cores, 0 where it is not known. `machine` is the one that was named, never one that would do.
    """

    device: Literal["cuda", "cpu"]
    gpu: str
    peak: DevicePeak | None
    memory_bytes: int | None
    workers: int
    machines: int
    machine: Machine | None
    cores: int


def resolve_target(config: Config) -> Target:
    """The target of `config`: `--machine`, else `--device-type cpu`, else `--gpu`, else what this machine has.

    A preset names the GPU that it was made for, so `--machine` and `--device-type cpu` stand over `--gpu`.

    Raises:
        ConfigError: for a machine or GPU that no table knows, and for flags that contradict each other.
    """
    plan, asked = config.plan, config.precision.device_type
    if plan.machine:
        return _of_machine(config)
    if plan.gpu and plan.gpu.strip().lower() != "cpu" and asked != "cpu":
        return _gpus(find_gpu(plan.gpu), _workers(config, 1), a_machine=GPUS_A_MACHINE)
    require(
        not plan.gpu or asked in ("", "cpu"),
        f"--gpu cpu and --device-type {asked} contradict each other: leave one of them out.",
    )
    if not plan.gpu and asked != "cpu" and (found := local_gpu()):
        name, count = found
        return _gpus(plan_name(name) or name, _workers(config, count), a_machine=count, cores=local_cores())
    require(
        asked != "cuda" or bool(plan.gpu),
        "--device-type cuda: this machine shows no GPU to plan for. Name one, as --gpu a100-40gb or --machine p4d.24xlarge.",
    )
    return _cpus(_workers(config, 1), None, local_cores(), local_memory())


def plan_dtype(config: Config, target: Target) -> str:
    """The compute dtype that the run will choose on `target`: `--dtype`, else as `auto` does there."""
    if config.precision.dtype != "auto":
        return config.precision.dtype
    return "bfloat16" if target.device == "cuda" or _has_bf16() else "float32"


def refuse_fp8(config: Config, target: Target) -> None:
    """Refuse `--fp8` on a GPU that has no 8-bit floats, as the run would once the machine is rented."""
    require(
        not config.precision.fp8 or target.gpu not in NO_FP8,
        f"--fp8 cannot be used on {target.gpu}, which has no 8-bit floats (Ada, Hopper and later have): leave --fp8 out, or "
        "name another --gpu or --machine.",
    )


def plan_loss(config: Config, target: Target) -> Literal["full", "chunked"]:
    """The loss that the run will choose on `target`."""
    if config.precision.loss != "auto":
        return config.precision.loss
    return "chunked" if target.device == "cpu" else "full"


def plan_compiled(config: Config, target: Target) -> bool:
    """Whether the run will compile its model on `target`."""
    asked, cores = config.precision.compile, target.cores * target.machines
    return chosen_compile(asked, target.device, recipe(config).flops, plan_dtype(config, target), cores)[0]


def local_cores() -> int:
    """CPU cores that this process may use: those it is bound to, or fewer where a container's quota is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or `max`: no quota
        return cores


def local_memory() -> int | None:
    """Memory of this machine, or a container's limit where that is smaller, in bytes; None where neither is told."""
    limits = []
    try:
        found = [line.split() for line in MEMORY.read_text().splitlines() if line.startswith("MemTotal:")]
        limits += [int(words[1]) * 1024 for words in found]
    except (OSError, ValueError, IndexError):
        pass
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int((CGROUP / name).read_text()))
        except (OSError, ValueError):  # no such file, or `max`: no limit
            continue
    return min(limits, default=None)


def _of_machine(config: Config) -> Target:
    plan = config.plan
    machine = find_machine(plan.machine, load_prices(plan.prices))
    if machine.gpu == "cpu":
        require(
            config.precision.device_type in ("", "cpu"),
            f"--device-type {config.precision.device_type}: --machine {plan.machine} has no GPU.",
        )
        return _cpus(_workers(config, 1), machine, machine.cores, None)
    require(
        config.precision.device_type != "cpu",
        f"--machine {plan.machine} and --device-type cpu contradict each other: leave one of them out.",
    )
    return _gpus(machine.gpu, _workers(config, machine.gpus), a_machine=machine.gpus, machine=machine)


def _gpus(gpu: str, workers: int, *, a_machine: int, machine: Machine | None = None, cores: int = 0) -> Target:
    peak = device_peak(gpu)
    return Target(
        device="cuda",
        gpu=gpu,
        peak=peak,
        memory_bytes=peak.memory_bytes if peak else None,
        workers=workers,
        machines=-(-workers // a_machine),
        machine=machine,
        cores=machine.cores if machine else cores,
    )


def _cpus(workers: int, machine: Machine | None, cores: int, memory: int | None) -> Target:
    return Target(
        device="cpu",
        gpu="cpu",
        peak=None,
        memory_bytes=memory,
        workers=workers,
        machines=1,
        machine=machine,
        cores=cores,
    )


def _workers(config: Config, default: int) -> int:
    asked = config.cluster.num_workers
    return default if asked == "auto" else asked


def _has_bf16() -> bool:
    try:
        text = CPUINFO.read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not BF16_FEATURES.isdisjoint(flags.split())
