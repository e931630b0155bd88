"""Peak rates of the devices people train on, for MFU and forecasts. A device that is not here has no MFU, never a guess.

Dense bf16 with fp32 accumulation, without sparsity, from the vendors' data sheets; bandwidth in bytes per second.
Consumer cards run bf16 with fp32 accumulation at half their fp16-accumulate rate: the table holds the former.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class DevicePeak:
    """`flops`: dense bf16 FLOPs per second. `bandwidth`: device memory, bytes per second."""

    flops: float
    bandwidth: float


# The first entry whose name is in the device's name, as whole words, wins: longer names stand before shorter ones.
PEAKS: dict[str, DevicePeak] = {
    "gb300": DevicePeak(2.5e15, 8.0e12),
    "gb200": DevicePeak(2.5e15, 8.0e12),
    "b300": DevicePeak(2.25e15, 8.0e12),
    "b200": DevicePeak(2.25e15, 8.0e12),
    "h200": DevicePeak(989.4e12, 4.8e12),
    "gh200": DevicePeak(989.4e12, 4.0e12),
    "h100 nvl": DevicePeak(835e12, 3.9e12),
    "h100 pcie": DevicePeak(756e12, 2.0e12),
    "h100": DevicePeak(989.4e12, 3.35e12),
    "h800": DevicePeak(989.4e12, 3.35e12),
    "h20": DevicePeak(148e12, 4.0e12),
    "a100-sxm4-80gb": DevicePeak(312e12, 2.039e12),
    "a100": DevicePeak(312e12, 1.555e12),
    "a800": DevicePeak(312e12, 2.039e12),
    "a40": DevicePeak(149.7e12, 0.696e12),
    "a30": DevicePeak(165e12, 0.933e12),
    "a10g": DevicePeak(70e12, 0.6e12),
    "a10": DevicePeak(125e12, 0.6e12),
    "l40s": DevicePeak(362e12, 0.864e12),
    "l40": DevicePeak(181e12, 0.864e12),
    "l4": DevicePeak(121e12, 0.3e12),
    "rtx 6000 ada": DevicePeak(364e12, 0.96e12),
    "rtx a6000": DevicePeak(155e12, 0.768e12),
    "rtx 5090": DevicePeak(209.5e12, 1.792e12),
    "rtx 5080": DevicePeak(112.6e12, 0.96e12),
    "rtx 5070": DevicePeak(61.7e12, 0.672e12),
    "rtx 4090": DevicePeak(165.2e12, 1.008e12),
    "rtx 4080": DevicePeak(97.5e12, 0.717e12),
    "rtx 4070 ti": DevicePeak(80.2e12, 0.504e12),
    "rtx 4070": DevicePeak(58.3e12, 0.504e12),
    "rtx 3090": DevicePeak(71e12, 0.936e12),
    "rtx 3080": DevicePeak(59.5e12, 0.76e12),
    "mi300x": DevicePeak(1307.4e12, 5.3e12),
    "mi250x": DevicePeak(383e12, 3.2e12),
}


# FLOPs per second that a core sustains in training: 49e9 measured with `--preset d4-cpu` in float32 on an AMD Zen 4
# core (1,300 tokens/s of 3.8e7 FLOPs); bf16 products are about twice as fast where a CPU has them.
CPU_CORE_FLOPS = {"float32": 5e10, "bfloat16": 1e11, "float16": 5e10}


def cpu_hours(flops: float, dtype: str, cores: int) -> float:
    """Hours that `flops` of training take on so many CPU cores: an order of magnitude, to refuse what is out of reach."""
    return flops / (CPU_CORE_FLOPS[dtype] * cores) / 3600


def device_peak(name: str) -> DevicePeak | None:
    """Peak of the device with this `name` (as the driver reports it), or None when it is not known.

    A model whose name only begins like a listed one (a laptop's, a Ti, a SUPER) is another device.
    """
    lowered = name.lower()
    for key, peak in PEAKS.items():
        if re.search(rf"(?<![a-z0-9]){re.escape(key)}(?![a-z0-9])(?! (?:ti|super|laptop|max-q|mobile|d)\b)", lowered):
            return peak
    return None


def mfu_percent(flops_per_token: float, tok_per_sec: float, peak_flops: float | None, devices: int) -> float | None:
    """Model FLOPs utilisation in percent of `devices` times the bf16 peak, or None where the peak is not known."""
    if not peak_flops:
        return None
    return 100 * flops_per_token * tok_per_sec / (peak_flops * devices)
