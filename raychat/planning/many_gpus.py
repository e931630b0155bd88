"""What more GPUs bring: a plan for each number of them, and the points where plain data parallelism stops paying.

The batch stays that of the recipe, so that any number of GPUs trains the same model; more of them share its sequences.
Nothing of this was measured on GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning.comparison import Row
from raychat.planning.layout import columns, count, duration, spread, usd
from raychat.planning.outlook import look_ahead
from raychat.planning.proposal import fit_batch, with_values
from raychat.planning.ranges import Range
from raychat.planning.scaling import model_shape, param_counts, recipe
from raychat.planning.target import resolve_target

PAYS = 1.4  # times as fast that twice the GPUs must make a step
DEARER = 1.25  # times the GPU hours that a run may take for it
COLUMNS = ("GPUs", "machines", "a pass", "a step", "exchange", "tokens/s", "speed-up", "ideal", "MB/s", "hours", "cost")
LOSS_SPREAD = 2.0  # the critical batch lies within this factor: its law and the loss's are of other models and text


@dataclass(frozen=True, kw_only=True)
class Doubling:
    """What twice as many GPUs as `gpus` bring: steps so many times as `fast`, a run of so many times the GPU `hours`."""

    gpus: int
    fast: float
    hours: float


def doublings(config: Config) -> list[Doubling]:
    """From one GPU on, as long as each has a sequence of the batch. Those whose memory is too small are left out.

    Raises:
        ConfigError: nothing is known of how fast the GPU is.
    """
    found: list[Doubling] = []
    before: _Pace | None = None
    gpus, rows = 1, _rows(config)
    while gpus <= rows:
        now = _pace(config, gpus)
        if before and now:
            found.append(
                Doubling(gpus=gpus // 2, fast=before.step_s / now.step_s, hours=now.gpu_hours / before.gpu_hours)
            )
        before, gpus = now, 2 * gpus
    return found


def likely_loss(parameters: int, tokens: float) -> float:
    """Nats per token of a model after so many tokens: 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28 (arXiv:2203.15556)."""
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28


def critical_batch(loss: float) -> float:
    """Tokens of a batch that needs twice the tokens to a loss (nats) that small batches need: 2e8 / loss^(1 / 0.21).

    Source: arXiv:2001.08361, section 5.1.
    """
    return 2e8 / loss ** (1 / 0.21)


def extra_tokens(batch: float, before: float, critical: float) -> float:
    """Share of tokens that a larger `batch` needs more than one of `before`, for the same loss.

    Tokens go as 1 + batch / critical: arXiv:1812.06162, equation 2.11.
    """
    return (1 + batch / critical) / (1 + before / critical) - 1


def format_gpus(config: Config, rows: Sequence[Row]) -> str:
    """The table of `rows`, one for each number of GPUs, and under it where more of them stop paying.

    Raises:
        ConfigError: as `doublings`.
    """
    alone = _alone(config, rows)
    cells = [COLUMNS, *[_cells(row, alone) for row in rows if row.plan]]
    kept = [i for i in range(len(COLUMNS)) if len(cells) == 1 or any(line[i] for line in cells[1:])]
    lines = columns([[line[i] for i in kept] for line in cells]) if len(cells) > 1 else []
    lines += [f"{row.machine}: {row.problem}" for row in rows if row.problem]
    return "\n".join([*lines, "", *_where_it_stops(config), *_of_the_batch(config), NOT_MEASURED])


NOT_MEASURED = "No step of this was measured on several machines: see docs/planning.md for what it rests on."


@dataclass(frozen=True, kw_only=True)
class _Pace:
    step_s: float
    gpu_hours: float
    tok_per_sec: float


def _pace(config: Config, gpus: int) -> _Pace | None:
    """Of the run on so many GPUs, with the device batch that suits them; None where they have not the memory."""
    several = with_values(config, num_workers=gpus, device_batch_size=1)
    target = resolve_target(several)
    try:
        sized = fit_batch(several, target)
    except ConfigError:
        return None
    time = look_ahead(sized, target).time
    if time is None:
        raise ConfigError(
            f"Nothing is known of how fast {target.gpu!r} computes: give --mfu, or a --gpu with a known name."
        )
    return _Pace(step_s=time.step_s.mid, gpu_hours=time.total.mid / 3600 * gpus, tok_per_sec=time.tok_per_sec.mid)


def _alone(config: Config, rows: Sequence[Row]) -> float:
    """Tokens per second of one GPU; where the model does not fit one, of each of those that the first plan has."""
    if pace := _pace(config, 1):
        return pace.tok_per_sec
    plans = [row.plan for row in rows if row.plan]
    return plans[0]["time"]["tok_per_sec"][1] / plans[0]["target"]["workers"] if plans else 1.0


def _rows(config: Config) -> int:
    """Sequences of a batch."""
    return recipe(with_values(config, num_workers="auto")).total_batch_size // config.model.max_seq_len


def _cells(row: Row, alone: float) -> list[str]:
    plan = row.plan or {}
    time, exchange, target = plan["time"], plan["exchange"], plan["target"]
    money = (plan["money"] or {}).get("on_demand")
    workers, times = target["workers"], time["tok_per_sec"][1] / alone
    seconds = duration([exchange["seconds"][1]] * 3) if exchange else ""
    read = exchange["read_bytes_per_s"][1] / 1e6 if exchange else 2e-6 * time["tok_per_sec"][1]
    return [
        f"{workers:,}",
        f"{target['machines']:,}",
        str(plan["batch"]["device_batch_size"]),
        duration([time["step_s"][1]] * 3),
        f"{seconds}, {exchange['share']:.0%}" if exchange else "none",
        count(time["tok_per_sec"][1]),
        f"{times:,.3g}",
        f"{times / workers:.0%}",
        f"{read:.2g}",
        spread([seconds / 3600 for seconds in time["total"]]),
        usd(money[1], cents=money[1] < 100) if money else "",
    ]


def _where_it_stops(config: Config) -> list[str]:
    """The first doublings that bring too little."""
    steps = doublings(config)
    slow = next((step for step in steps if step.fast < PAYS), None)
    dear = next((step for step in steps if step.hours > DEARER), None)
    lines = []
    if dear:
        lines.append(
            f"from {dear.gpus:,} to {2 * dear.gpus:,} GPUs the run takes {dear.hours - 1:.0%} more GPU hours (the mark is "
            f"{DEARER - 1:.0%})"
        )
    if slow:
        lines.append(
            f"from {slow.gpus:,} to {2 * slow.gpus:,} GPUs a step gets {slow.fast:.2f} times as fast (the mark is {PAYS:g}): "
            f"beyond {slow.gpus:,}, plain data parallelism pays no more"
        )
    return lines or ["every doubling pays, as far as the batch goes"]


def _of_the_batch(config: Config) -> list[str]:
    """How many GPUs a batch has sequences for, and what a larger one costs."""
    made = recipe(with_values(config, num_workers="auto"))
    critical = critical_batch(likely_loss(param_counts(model_shape(config.model)).scaling, made.tokens))
    lost = [
        extra_tokens(2 * made.total_batch_size, made.total_batch_size, size)
        for size in Range(critical / LOSS_SPREAD, critical, critical * LOSS_SPREAD).as_list()
    ]
    return [
        f"a batch has {_rows(config):,} sequences, one for each of as many GPUs at most; twice the batch needs "
        f"{lost[1]:.0%} ({lost[2]:.0%} to {lost[0]:.0%}) more tokens for the same loss"
    ]
