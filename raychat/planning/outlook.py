"""The forecasts of one configuration on one target, put together: what the plan prints and the proposal searches with."""

from dataclasses import dataclass
from typing import Any, Literal

from raychat.config import Config
from raychat.planning import scaling
from raychat.planning.data import DataForecast, forecast_data
from raychat.planning.duration import Measured, TimeForecast, forecast_time
from raychat.planning.memory import SHARE, MemoryForecast, forecast_memory, largest_batch
from raychat.planning.money import MoneyForecast, forecast_money
from raychat.planning.target import Target, plan_compiled, plan_dtype, plan_loss, refuse_fp8

# Resident memory of a run on a CPU that a process with torch alone has not: pyarrow, tiktoken, on Ray its worker. Seen
# in runs of 0.5 to 1 GB: 40 to 110 MB without Ray, 160 to 190 MB on it (docs/memory.md).
LIBRARIES = 140_000_000
# Sequences of a pass that `auto` takes on a CPU at most: docs/memory.md has the speeds.
CPU_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What follows from the dial, and what is forecast. Time and money are None where the device is not known."""

    recipe: scaling.Recipe
    data: DataForecast
    time: TimeForecast | None
    money: MoneyForecast | None


def look_ahead(
    config: Config, target: Target, measured: Measured | None = None, *, data: DataForecast | None = None
) -> Outlook:
    """The forecasts of `config` on `target`. `data` is a forecast that is known already, for the same tokens."""
    refuse_fp8(config, target)
    config = settled(config, target)
    recipe = scaling.recipe(config)
    data = data or forecast_data(config, recipe, with_gpus=target.device == "cuda")
    time = forecast_time(
        config,
        recipe,
        scaling.model_shape(config.model),
        target,
        tokens_ready=data.tokens_ready,
        tokenizer_ready=data.tokenizer_ready,
        corpus_chars=data.corpus_chars,
        measured=measured,
    )
    return Outlook(recipe=recipe, data=data, time=time, money=forecast_money(config, target, time))


def memory_of(config: Config, target: Target, *, loss: Literal["full", "chunked"] | None = None) -> MemoryForecast:
    """Memory of one rank; `loss` instead of the one that the run would choose."""
    return forecast_memory(
        scaling.model_shape(config.model),
        device_batch_size=settled(config, target).batch.sequences,
        **_memory_settings(config, target, loss),
    )


def largest_that_fits(config: Config, target: Target, *, loss: Literal["full", "chunked"] | None = None) -> int | None:
    """The largest device batch size that divides the batch and fits the device; None: none does, or memory not known."""
    memory = rank_memory(target)
    if memory is None:
        return None
    rows = scaling.recipe(config).total_batch_size // config.model.max_seq_len
    settings = _memory_settings(config, target, loss)
    return largest_batch(scaling.model_shape(config.model), rows=rows, memory_bytes=memory, **settings)


def settled(config: Config, target: Target) -> Config:
    """`config` with a number in the place of `--device-batch-size auto`, by the forecast of memory; 1 where none is known.

    A run on a CPU takes this number; one on a GPU begins with it to try what fits.
    """
    if config.batch.device_batch_size != "auto":
        return config
    most = largest_that_fits(config, target) or 1
    size = min(most, CPU_BATCH) if target.device == "cpu" else most
    return Config.from_flat({"device_batch_size": size}, base=config)


def batch_sizes(config: Config, target: Target) -> list[int]:
    """The powers of two that divide the batch and of which a rank has a pass, ascending."""
    rows = scaling.recipe(config).total_batch_size // config.model.max_seq_len
    rank_rows = -(-rows // target.workers)
    return [2**k for k in range(rank_rows.bit_length()) if rows % 2**k == 0]


def rank_memory(target: Target) -> int | None:
    """Bytes that one rank may use: its GPU's, or its part of the machine's."""
    if target.memory_bytes is None or target.device == "cuda":
        return target.memory_bytes
    return target.memory_bytes // -(-target.workers // target.machines)


def fits(total: int, target: Target) -> bool | None:
    """Whether `total` bytes leave a rank of `target` the room that an allocator needs; None: its memory is not known."""
    memory = rank_memory(target)
    return None if memory is None else total <= SHARE * memory


def _memory_settings(config: Config, target: Target, loss: Literal["full", "chunked"] | None) -> dict[str, Any]:
    rows = scaling.recipe(config).total_batch_size // config.model.max_seq_len
    return {
        "rows_per_rank": -(-rows // target.workers),
        "workers": target.workers,
        "device": target.device,
        "dtype": plan_dtype(config, target),
        "loss": loss or plan_loss(config, target),
        "grad_checkpoint": config.precision.grad_checkpoint,
        "compiled": plan_compiled(config, target),
        "fp8": config.precision.fp8,
        "host_copy": config.save.save_mode == "async" and config.save.save_every != -1,
        "libraries": LIBRARIES,
    }
