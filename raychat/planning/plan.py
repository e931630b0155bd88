"""The plan of a run: what `--dry-run` prints and every run writes to `plan.json`. No torch, no cluster, no reading of text.

What follows from the configuration alone (model, batch, rates, horizon) is exact. Memory, data, time and money are
forecasts for a target: a machine of the price table, a GPU by its name, or this machine. Unknown is None, all the way.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from raychat.atomic import write_json
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import scaling
from raychat.planning.communication import ring_bytes
from raychat.planning.duration import Measured
from raychat.planning.memory import explain_difference
from raychat.planning.outlook import (
    Outlook,
    batch_sizes,
    fits,
    largest_that_fits,
    look_ahead,
    memory_of,
    rank_memory,
    settled,
)
from raychat.planning.ranges import Range
from raychat.planning.target import Target, plan_compiled, plan_dtype, plan_loss, resolve_target

MADE = "made_for"  # key of a plan that a run made for the machine it found
ROW_BYTES = (2, 4)  # of a token in a shard: 4 where the vocabulary exceeds 65,536
OPTIMAL_RATIO = 10.5  # tokens per scaling parameter where the lineage's fits find the compute best spent


def make_plan(config: Config, *, target: Target | None = None, measured: Measured | None = None) -> dict[str, Any]:
    """Everything that can be said of `config` before it runs, as plain values: bytes, seconds, dollars, percent.

    A range is [low, mid, high]. `target` is what the plan is made for (default: what the configuration names, else this
    machine); `measured` takes the place of the forecasts that it measured. Raises ConfigError for what cannot be.
    """
    target = target or resolve_target(config)
    by_forecast = config.batch.device_batch_size == "auto"
    config = settled(config, target)
    shape = scaling.model_shape(config.model)
    outlook = look_ahead(config, target, measured)
    return {
        "model": _model(config, shape, outlook.recipe),
        "batch": _batch(config, shape, outlook, target) | {"by_forecast": by_forecast},
        "rates": _rates(config, shape, outlook.recipe),
        "horizon": _horizon(shape, outlook.recipe),
        "target": plain(target),
        "memory": _memory(config, shape, target, measured),
        "data": outlook.data.as_dict(),
        "time": _time(config, outlook, target),
        "exchange": _exchange(outlook, shape, target),
        "money": plain(outlook.money),
        "limits": limits(config, outlook),
        "measured": plain(measured),
    }


def keep_plan(plan: dict[str, Any], run_dir: Path) -> str:
    """Write `plan` to `plan.json` of the run directory; says what became of it.

    The forecast that a run began with stays: it is held against what the run comes to.

    Raises:
        ConfigError: the directory cannot be written to.
    """
    path = run_dir / "plan.json"
    with contextlib.suppress(OSError, ValueError):
        if MADE in json.loads(path.read_bytes()):
            return f"not written: {path} is the forecast that this run began with"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, plan)
    except OSError as error:
        raise ConfigError(
            f"The plan cannot be written to {path} ({error.strerror or error}): give a --base-dir or --storage-path that can "
            "be written to."
        ) from error
    return f"written to {path}"


def plain(value: Any) -> Any:
    """`value` without its types: a range as [low, mid, high], a dataclass as a dict."""
    if isinstance(value, Range):
        return value.as_list()
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def optimal_iterations(shape: scaling.ModelShape, total_batch_size: int) -> int:
    """Iterations that make a model of this shape compute-optimal, by the lineage's ratio."""
    return max(1, int(OPTIMAL_RATIO * scaling.param_counts(shape).scaling) // total_batch_size)


def limits(config: Config, outlook: Outlook) -> list[dict[str, Any]]:
    """Each limit that `config` sets, and whether the forecast keeps it: exceeded `surely`, `probably`, `possibly` or not."""
    hours = outlook.time.total.scaled(1 / 3600) if outlook.time else None
    dollars = outlook.money.on_demand if outlook.money else None
    found = []
    for flag, limit, forecast in (
        ("--max-hours", config.money.max_hours, hours),
        ("--budget-usd", config.money.budget_usd, dollars),
    ):
        if limit > 0:
            found.append(
                {"flag": flag, "limit": limit, "forecast": plain(forecast), "exceeded": _exceeded(forecast, limit)}
            )
    return found


def _exceeded(forecast: Range | None, limit: float) -> str | None:
    if forecast is None:
        return None
    passed = [
        name
        for name, value in zip(("surely", "probably", "possibly"), forecast.as_list(), strict=True)
        if value > limit
    ]
    return passed[0] if passed else "no"


def _model(config: Config, shape: scaling.ModelShape, recipe: scaling.Recipe) -> dict[str, Any]:
    counts = scaling.param_counts(shape)
    return {
        "depth": shape.n_layer,
        "model_dim": shape.n_embd,
        "heads": shape.n_head,
        "kv_heads": shape.n_kv_head,
        "head_dim": shape.head_dim,
        "max_seq_len": shape.sequence_len,
        "vocab_size": shape.vocab_size,
        "padded_vocab": shape.padded_vocab,
        "window_pattern": config.model.window_pattern,
        "windows": list(shape.windows),
        "parameters": plain(counts) | {"total": counts.total, "scaling": counts.scaling},
        "flops_per_token": recipe.flops_per_token,
    }


def _batch(config: Config, shape: scaling.ModelShape, outlook: Outlook, target: Target) -> dict[str, Any]:
    T, chosen, recipe = shape.sequence_len, config.batch.sequences, outlook.recipe
    rows = recipe.total_batch_size // T
    rank_rows = -(-rows // target.workers)
    dividing = [2**k for k in range(rows.bit_length()) if rows % 2**k == 0]
    sizes = sorted({*batch_sizes(config, target), chosen})
    pace = _pace(config, outlook, target)
    return {
        "total_batch_size": recipe.total_batch_size,
        "rows": rows,
        "rows_per_rank": rank_rows,
        "device_batch_size": chosen,
        "tokens_per_pass": chosen * T,
        "passes": -(-rank_rows // chosen),
        "passes_on_one_device": rows // chosen,
        "device_batch_sizes_that_divide": dividing,
        "impossible": _impossible(recipe.total_batch_size, T, chosen),
        "sizes": [_size(config, size, outlook, target, pace) for size in sizes],
    }


def _impossible(total: int, T: int, chosen: int) -> str | None:
    """The size half-way to the next power of two, where it does not divide the batch: people try it first."""
    size = chosen * 3 // 2
    passes = total / (size * T)
    if chosen == 1 or passes < 1 or passes.is_integer():
        return None
    return f"{size} is impossible: {total:,} / ({size} x {T:,}) = {passes:.2f} passes"


def _pace(config: Config, outlook: Outlook, target: Target) -> float | None:
    """Step time of `outlook`, measured or forecast, over its forecast; None: there is none to compare with."""
    forecast = look_ahead(config, target, data=outlook.data).time
    return outlook.time.step_s.mid / forecast.step_s.mid if outlook.time and forecast else None


def _size(config: Config, size: int, outlook: Outlook, target: Target, pace: float | None) -> dict[str, Any]:
    """One device batch size: passes of each rank, memory, and the time of a step.

    A step that was measured says what it says of the other sizes too: their forecasts are scaled by `pace`.
    """
    sized = dataclasses.replace(config, batch=dataclasses.replace(config.batch, device_batch_size=size))
    rank_rows = -(-outlook.recipe.total_batch_size // config.model.max_seq_len // target.workers)
    total = memory_of(sized, target).total
    if size == config.batch.device_batch_size:
        step_s = outlook.time.step_s if outlook.time else None
    else:
        time = look_ahead(sized, target, data=outlook.data).time
        step_s = time.step_s.scaled(pace) if time and pace else None
    return {
        "device_batch_size": size,
        "passes": -(-rank_rows // size),
        "memory_bytes": total,
        "fits": fits(total, target),
        "step_s": step_s.as_list() if step_s else None,
    }


def _rates(config: Config, shape: scaling.ModelShape, recipe: scaling.Recipe) -> dict[str, Any]:
    scale, width_scale, optim = recipe.lr_scale, (shape.n_embd / 768) ** -0.5, config.optim
    return {
        "lr_scale": scale,
        "matrix_lr": optim.matrix_lr * scale,
        "embedding_lr": optim.embedding_lr * scale * width_scale,
        "unembedding_lr": optim.unembedding_lr * scale * width_scale,
        "scalar_lr": optim.scalar_lr * scale,
        "weight_decay": recipe.weight_decay,
        "warmup_steps": scaling.warmup_steps(config, recipe.num_iterations),
        "warmup_from": config.optim.warmup_from,
        "warmdown_steps": round(config.optim.warmdown_ratio * recipe.num_iterations),
        "final_lr_frac": config.optim.final_lr_frac,
    }


def _horizon(shape: scaling.ModelShape, recipe: scaling.Recipe) -> dict[str, Any]:
    optimal = optimal_iterations(shape, recipe.total_batch_size)
    return {
        "num_iterations": recipe.num_iterations,
        "tokens": recipe.tokens,
        "tokens_per_scaling_param": recipe.tokens / scaling.param_counts(shape).scaling,
        "flops": recipe.flops,
        "optimal_ratio": OPTIMAL_RATIO,
        "optimal_iterations": optimal,
        "of_optimal": recipe.num_iterations / optimal,
    }


def _memory(config: Config, shape: scaling.ModelShape, target: Target, measured: Measured | None) -> dict[str, Any]:
    forecast, loss = memory_of(config, target), plan_loss(config, target)
    peak = measured.peak_memory_bytes if measured else None
    found = {
        "total": peak or forecast.total,
        "measured": peak is not None,
        "calculated": forecast.total,
        "parts": plain(forecast),
        "there": rank_memory(target),
        "fits": fits(peak or forecast.total, target),
        "largest_batch": largest_that_fits(config, target),
        "loss": loss,
        "dtype": plan_dtype(config, target),
        "compiled": plan_compiled(config, target),
        "grad_checkpoint": config.precision.grad_checkpoint,
    }
    found["with_full_loss"] = None
    if loss != "full":
        full = memory_of(config, target, loss="full")
        found["with_full_loss"] = {
            "total": full.total,
            "largest_batch": largest_that_fits(config, target, loss="full"),
            "why": explain_difference(full, forecast),
        }
    return found


def _exchange(outlook: Outlook, shape: scaling.ModelShape, target: Target) -> dict[str, Any] | None:
    """What several GPUs send each other in a step, and what a machine reads of the tokens; None for one, and for CPUs."""
    parts = outlook.time.parts if outlook.time else None
    if parts is None or outlook.time is None or target.workers == 1:
        return None
    least = 2 * ring_bytes(parts.parameter_bytes, target.workers)
    read = ROW_BYTES[shape.vocab_size > 2**16] * (1 + 1 / shape.sequence_len) / target.machines
    return {
        "sent_bytes": parts.sent_bytes,
        "padding": parts.sent_bytes / least,
        "seconds": parts.exchange.as_list(),
        "share": parts.exchange.mid / outlook.time.step_s.mid,
        "hidden": 0.0,
        "read_bytes_per_s": outlook.time.tok_per_sec.scaled(read).as_list(),
    }


def _time(config: Config, outlook: Outlook, target: Target) -> dict[str, Any] | None:
    if outlook.time is None:
        return None
    tokens_per_pass = config.batch.sequences * config.model.max_seq_len
    passes = config.eval.eval_tokens / tokens_per_pass / target.workers
    return plain(outlook.time) | {"total": outlook.time.total.as_list(), "eval_passes": max(1, round(passes))}
