"""What a run finds on its machine, decided once: device, precision, threads, loss, compilation, with the reasons.

Rules, not timings, decide on a CPU, so that the same machine decides the same way every time.
"""

import os
import shutil
from dataclasses import dataclass

import torch

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.model import attention, fp8
from raychat.planning import recipe
from raychat.planning.devices import DevicePeak, chosen_compile, cpu_hours, device_peak
from raychat.planning.target import local_cores

MAX_CPU_HOURS = 24.0
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Choices of a run on its machine, as plain values that a checkpoint can hold. `hardware` identifies the machine."""

    device_type: str
    device_name: str
    hardware: str
    dtype: str
    dtype_reason: str
    attention: str
    attention_reason: str
    loss: str
    compile: bool
    threads: int
    attention_warning: str = ""
    compile_reason: str = ""
    device_batch_size: int = 0
    device_batch_reason: str = ""
    device_batch_key: str = ""
    """of what an `auto` device batch was found for; empty for one that was asked for"""

    @property
    def peak(self) -> DevicePeak | None:
        """Peak rates of the device, where they are known."""
        return device_peak(self.device_name)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype."""
        return DTYPES[self.dtype]


def device_type(requested: str) -> str:
    """The device to train on. Raises ConfigError when `requested` is not there."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device-type cuda: torch sees no CUDA device here. Use --device-type cpu, or check the driver with nvidia-smi."
        )
    if requested == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device-type mps: torch has no MPS device here. Use --device-type cpu.")
    return requested or ("cuda" if torch.cuda.is_available() else "cpu")


def resolve(config: Config, *, local_world_size: int) -> Resolved:
    """Decide what `config` leaves open, on this machine with this many ranks.

    Attention is chosen by a rule; `attention_choice.with_attention` puts what is fastest on a GPU in its place.

    Raises:
        ConfigError: for a device or precision that this machine does not have.
    """
    precision = config.precision
    kind = device_type(precision.device_type)
    name = torch.cuda.get_device_name() if kind == "cuda" else kind
    dtype, reason = _dtype(precision.dtype, kind)
    if precision.fp8 and (problem := fp8.fp8_capable(torch.device(kind))):
        raise ConfigError(f"--fp8: {problem}. Leave --fp8 out.")
    backend, backend_reason = _attention(precision.attention, torch.device(kind), DTYPES[dtype])
    asked = config.cluster.threads
    threads = asked if asked != -1 else max(1, local_cores() // local_world_size)
    compiled, compile_reason = _compile(config, kind, dtype)
    return Resolved(
        device_type=kind,
        device_name=name,
        hardware=f"{name}, {threads} threads, torch {torch.__version__}",
        dtype=dtype,
        dtype_reason=reason,
        attention=backend,
        attention_reason=backend_reason,
        loss=precision.loss if precision.loss != "auto" else ("chunked" if kind == "cpu" else "full"),
        compile=compiled,
        compile_reason=compile_reason,
        threads=threads,
    )


def refuse_gpu_sized(config: Config, resolved: Resolved, *, cores: int | None = None) -> None:
    """Refuse a run that would take days on `cores` CPU cores (this machine's), with the hours, unless `--force`."""
    if resolved.device_type != "cpu" or config.run.force:
        return
    cores = cores or local_cores()
    hours = cpu_hours(recipe(config).flops, resolved.dtype, cores)
    if hours > MAX_CPU_HOURS:
        raise ConfigError(
            f"This run takes {recipe(config).flops:.2g} FLOPs, about {hours:,.0f} hours on the {cores} CPU cores here. "
            "Use a machine or cluster with GPUs (--device-type cuda waits for those that an autoscaler adds), a smaller "
            "--depth or --num-iterations (--preset d4-cpu takes minutes), or --force."
        )


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory of this process so far: of the device where it counts, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system, and only asked at the end

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _attention(asked: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if asked == "auto":
        return attention.choose_backend(device, dtype)
    names = attention.admitted(asked)
    refused = attention.refusals(names, device, dtype)
    for name in names:
        if name not in refused:
            return name, "asked for"
    raise ConfigError(f"--attention {asked}: {attention.in_words(refused)}. Use --attention auto.")


def _compile(config: Config, kind: str, dtype: str) -> tuple[bool, str]:
    asked = config.precision.compile
    if asked != "off" and shutil.which(os.environ.get("CXX", "g++")) is None:  # both Triton and inductor write C or C++
        if asked == "on":
            raise ConfigError(
                "--compile on needs a C++ compiler, and there is no g++ here. Install one, or use --compile off."
            )
        return False, "there is no C++ compiler (g++) here"
    return chosen_compile(asked, kind, recipe(config).flops, dtype, local_cores())


def _dtype(requested: str, kind: str) -> tuple[str, str]:
    if requested != "auto":
        return requested, "asked for"
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major >= 8:
            return "bfloat16", f"compute capability {major}.{minor} multiplies bf16"
        return "float32", f"compute capability {major}.{minor} has no bf16; --dtype float16 is faster"
    if kind == "cpu":
        for probe, feature in (("_is_avx512_bf16_supported", "avx512_bf16"), ("_is_amx_tile_supported", "AMX")):
            if getattr(torch.cpu, probe, lambda: False)():
                return "bfloat16", f"this CPU has {feature}"
        return "float32", "this CPU has neither avx512_bf16 nor AMX"
    return "float32", f"the default on {kind}"
