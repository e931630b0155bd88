"""Peak rates and memory of the devices people train on. A device that is not here has no MFU and no forecast, never a guess.

Dense bf16 with fp32 accumulation, without sparsity, from the vendors' data sheets; bandwidth in bytes per second.
Consumer cards run bf16 with fp32 accumulation at half their fp16-accumulate rate: the table holds the former. Memory is
what the driver reports, in whole GiB: cards whose error correction takes a part of it have less than they are sold with.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from raychat.checks import did_you_mean
from raychat.errors import ConfigError

GIB = 2**30
DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class DevicePeak:
    """`flops`: dense bf16 FLOPs per second. `bandwidth`: device memory, bytes per second. `memory_bytes`: of one device."""

    flops: float
    bandwidth: float
    memory_bytes: int


# Plan name -> peak. The first entry whose words are in the device's name wins: longer names stand before shorter ones.
PEAKS: dict[str, DevicePeak] = {
    "gb300": DevicePeak(2.5e15, 8.0e12, 277 * GIB),
    "gb200": DevicePeak(2.5e15, 8.0e12, 185 * GIB),
    "b300": DevicePeak(2.25e15, 8.0e12, 268 * GIB),
    "b200": DevicePeak(2.25e15, 8.0e12, 179 * GIB),
    "h200": DevicePeak(989.4e12, 4.8e12, 140 * GIB),
    "gh200": DevicePeak(989.4e12, 4.0e12, 95 * GIB),
    "h100-nvl": DevicePeak(835e12, 3.9e12, 93 * GIB),
    "h100-pcie": DevicePeak(756e12, 2.0e12, 79 * GIB),
    "h100": DevicePeak(989.4e12, 3.35e12, 79 * GIB),
    "h800": DevicePeak(989.4e12, 3.35e12, 79 * GIB),
    "h20": DevicePeak(148e12, 4.0e12, 95 * GIB),
    "a100-80gb": DevicePeak(312e12, 2.039e12, 80 * GIB),
    "a100-40gb": DevicePeak(312e12, 1.555e12, 40 * GIB),
    "a800": DevicePeak(312e12, 2.039e12, 80 * GIB),
    "a40": DevicePeak(149.7e12, 0.696e12, 45 * GIB),
    "a30": DevicePeak(165e12, 0.933e12, 24 * GIB),
    "a10g": DevicePeak(70e12, 0.6e12, 22 * GIB),
    "a10": DevicePeak(125e12, 0.6e12, 22 * GIB),
    "l40s": DevicePeak(362e12, 0.864e12, 45 * GIB),
    "l40": DevicePeak(181e12, 0.864e12, 45 * GIB),
    "l4": DevicePeak(121e12, 0.3e12, 22 * GIB),
    "rtx-6000-ada": DevicePeak(364e12, 0.96e12, 48 * GIB),
    "rtx-a6000": DevicePeak(155e12, 0.768e12, 48 * GIB),
    "rtx-5090": DevicePeak(209.5e12, 1.792e12, 32 * GIB),
    "rtx-5080": DevicePeak(112.6e12, 0.96e12, 16 * GIB),
    "rtx-5070": DevicePeak(61.7e12, 0.672e12, 12 * GIB),
    "rtx-4090": DevicePeak(165.2e12, 1.008e12, 24 * GIB),
    "rtx-4080": DevicePeak(97.5e12, 0.717e12, 16 * GIB),
    "rtx-4070-ti": DevicePeak(80.2e12, 0.504e12, 12 * GIB),
    "rtx-4070": DevicePeak(58.3e12, 0.504e12, 12 * GIB),
    "rtx-3090": DevicePeak(71e12, 0.936e12, 24 * GIB),
    "rtx-3080": DevicePeak(59.5e12, 0.76e12, 10 * GIB),
    "mi300x": DevicePeak(1307.4e12, 5.3e12, 192 * GIB),
    "mi250x": DevicePeak(383e12, 3.2e12, 64 * GIB),
}
# Other words under which a driver or a person knows one, tried before the plan names.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "a100-80gb": ("a100 sxm4 80gb", "a100 sxm 80gb", "a100 pcie 80gb"),
    "a100-40gb": ("a100 sxm4 40gb", "a100 sxm 40gb", "a100 pcie 40gb"),
    "a800": ("a800 sxm4 80gb",),
}
# Devices without 8-bit floats: compute capability below 8.9, CDNA 2.
NO_FP8 = {"a100-80gb", "a100-40gb", "a800", "a40", "a30", "a10g", "a10", "rtx-a6000", "rtx-3090", "rtx-3080", "mi250x"}
SHORT = {"a100": "a100-40gb"}  # the smaller of two: a plan for it fits the larger one too
# What follows a model's name and makes it another model.
OTHER_MODEL = r"(?! (?:ti|super|laptop|max q|mobile|d)\b)"


# FLOPs per second that a core sustains in training: 49e9 measured with `--preset d4-cpu` in float32 on an AMD Zen 4
# core (1,300 tokens/s of 3.8e7 FLOPs); bf16 products are about twice as fast where a CPU has them.
CPU_CORE_FLOPS = {"float32": 5e10, "bfloat16": 1e11, "float16": 5e10}


# Compiling takes some 10 to 30 s once and makes training on a CPU about a fifth faster (docs/speed.md): it has paid after
# three minutes, and each restart on another machine takes some of that again.
COMPILE_PAYS_HOURS = 10 / 60


def cpu_hours(flops: float, dtype: str, cores: int) -> float:
    """Hours that `flops` of training take on so many CPU cores: an order of magnitude, to refuse what is out of reach."""
    return flops / (CPU_CORE_FLOPS[dtype] * cores) / 3600


def chosen_compile(asked: str, device: str, flops: float, dtype: str, cores: int) -> tuple[bool, str]:
    """Whether a run of so many FLOPs compiles its model, and why, for `--compile` as `asked`. `cores` are those of a CPU."""
    if asked != "auto":
        return asked == "on", "asked for"
    if device != "cpu":
        return device == "cuda", f"the default on {device}"
    hours = cpu_hours(flops, dtype, max(1, cores))
    long = hours >= COMPILE_PAYS_HOURS
    why = "more than it takes to pay" if long else "too short for it to pay"
    return long, f"about {60 * hours:.0f} minutes of training, {why}"


def plan_name(name: str) -> str | None:
    """The name in PEAKS of the device with this `name`, as the driver reports it or a person writes it; None: not known.

    A model whose name only begins like a listed one (a laptop's, a Ti, a SUPER) is another device.
    """
    spoken = _words(name)
    spellings = [(words, plan) for plan, several in SPELLINGS.items() for words in several]
    spellings += [(_words(plan), plan) for plan in PEAKS] + list(SHORT.items())
    for words, plan in spellings:
        if re.search(rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9]){OTHER_MODEL}", spoken):
            return plan
    return None


def find_gpu(name: str) -> str:
    """The plan name that a person means: any case, with or without dashes, "4070" for "rtx-4070".

    Raises:
        ConfigError: when it is not known, with near names.
    """
    spoken = _words(name)
    for attempt in (spoken, f"rtx {spoken}"):
        if found := plan_name(attempt):
            return found
    for plan in PEAKS:
        if spoken.replace(" ", "") in (plan.replace("-", ""), plan.replace("rtx-", "").replace("-", "")):
            return plan
    raise ConfigError(
        f"--gpu {name!r} is not in the table of devices, which knows cpu, {', '.join(PEAKS)}"
        + (did_you_mean("-".join(spoken.split()), PEAKS) or ".")
    )


def device_peak(name: str) -> DevicePeak | None:
    """Peak of the device with this `name` (the driver's, or a plan name), or None when it is not known."""
    plan = plan_name(name)
    return PEAKS[plan] if plan else None


def local_gpu() -> tuple[str, int] | None:
    """Name, as the driver reports it, and number of this machine's NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves; or None."""
    names = []
    for file in sorted(DRIVER.glob("*/information")):
        try:
            found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(), re.MULTILINE)
        except OSError:
            continue
        names += [found[1]] if found else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = names[: len([part for part in visible.split(",") if part.strip() not in ("", "-1")])]
    return (names[0], len(names)) if names else None


def mfu_percent(flops_per_token: float, tok_per_sec: float, peak_flops: float | None, devices: int) -> float | None:
    """Model FLOPs utilisation in percent of `devices` times the bf16 peak, or None where the peak is not known."""
    if not peak_flops:
        return None
    return 100 * flops_per_token * tok_per_sec / (peak_flops * devices)


def _words(name: str) -> str:
    """Lower case, words apart by one space, `a100 40 gb` as `a100 40gb`."""
    spaced = re.sub(r"[\s_-]+", " ", name.lower()).strip()
    return re.sub(r"(\d) (gb)\b", r"\1\2", spaced)
