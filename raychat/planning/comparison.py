"""Plans side by side: depths and machines, one row each, as a table, CSV and JSON."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning.layout import columns, count, spread, target_name, usd
from raychat.planning.plan import make_plan
from raychat.planning.prices import Machine
from raychat.planning.proposal import fit_batch, with_values
from raychat.planning.target import resolve_target

COLUMNS = ("depth", "machine", "params", "tokens", "FLOPs", "a pass", "hours", "on demand", "spot", "epochs")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One depth on one machine; without a plan where it cannot be, and `problem` says why."""

    depth: int
    machine: str
    plan: dict[str, Any] | None
    problem: str = ""


def compare(
    config: Config, depths: Sequence[int], machines: Sequence[dict[str, Any]], *, keep_batch: bool
) -> list[Row]:
    """The plan of each depth on each machine. `machines` are settings that name one (`machine`, or `gpu` and `num_workers`).

    `keep_batch`: the device batch of `config` stays; else each row has the largest that suits it.
    """
    rows = []
    for settings in machines:
        named = with_values(config, **settings)
        target = resolve_target(named)
        words = target_name(target)
        for depth in depths:
            try:
                sized = with_values(
                    named, device_batch_size=named.batch.device_batch_size if keep_batch else 1, depth=depth
                )
                sized = sized if keep_batch else fit_batch(sized, target)
                rows.append(Row(depth=depth, machine=words, plan=make_plan(sized, target=target)))
            except ConfigError as error:
                rows.append(Row(depth=depth, machine=words, plan=None, problem=str(error)))
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """The table, of what is expected, and under it the reasons of rows that cannot be."""
    cells = [COLUMNS, *[_cells(row) for row in rows]]
    kept = [i for i in range(len(COLUMNS)) if any(line[i] for line in cells[1:])]
    table = columns([[line[i] for i in kept] for line in cells], left={kept.index(1)})
    return "\n".join([*table, *[f"depth {row.depth} on {row.machine}: {row.problem}" for row in rows if row.problem]])


def format_prices(table: dict[str, Machine]) -> str:
    """The machine types of a price table, and under it where and when their prices were read."""
    rows = [["machine", "devices", "provider", "on demand", "spot"]]
    sources: dict[str, list[str]] = {}
    for machine in table.values():
        low, high = machine.spot or (0.0, 0.0)
        spot = "" if machine.spot is None else usd(low) if low == high else f"{usd(low)} to {usd(high)}"
        price = usd(machine.on_demand) if machine.on_demand else ""
        rows.append([machine.name, machine.devices, machine.provider, price, spot])
        sources.setdefault(machine.dated, []).append(machine.name)
    return "\n".join(
        [*columns(rows, left={0, 1, 2}), "", *[f"{', '.join(names)}: {dated}" for dated, names in sources.items()]]
    )


def as_csv(rows: Sequence[Row]) -> str:
    """The figures of the table, ranges by their three values, empty where not known."""
    values = [facts(row) for row in rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(values[0]))
    writer.writeheader()
    writer.writerows(values)
    return file.getvalue()


def facts(row: Row) -> dict[str, Any]:
    """One row as flat values: hours and dollars as low, mid, high."""
    plan = row.plan or {}
    model, batch, horizon = (plan.get(name) or {} for name in ("model", "batch", "horizon"))
    time, money, data = (plan.get(name) or {} for name in ("time", "money", "data"))
    hours = [value / 3600 for value in time["total"]] if time else None
    return {
        "depth": row.depth,
        "machine": row.machine,
        "parameters": model.get("parameters", {}).get("total"),
        "num_iterations": horizon.get("num_iterations"),
        "tokens": horizon.get("tokens"),
        "flops": horizon.get("flops"),
        "device_batch_size": batch.get("device_batch_size"),
        **_three("hours", hours),
        **_three("usd_on_demand", money.get("on_demand")),
        **_three("usd_spot", money.get("spot")),
        **_three("epochs", data.get("epochs")),
        "problem": row.problem,
    }


def _three(name: str, values: list[float] | None) -> dict[str, float | None]:
    return dict(zip((f"{name}_{end}" for end in ("low", "mid", "high")), values or [None] * 3, strict=True))


def _cells(row: Row) -> list[str]:
    if row.plan is None:
        return [str(row.depth), row.machine, *[""] * (len(COLUMNS) - 2)]
    plan, money = row.plan, row.plan["money"] or {}
    hours = [seconds / 3600 for seconds in plan["time"]["total"]] if plan["time"] else None
    epochs = plan["data"]["epochs"]
    return [
        str(row.depth),
        row.machine,
        count(plan["model"]["parameters"]["total"]),
        count(plan["horizon"]["tokens"]),
        f"{plan['horizon']['flops']:.2g}",
        str(plan["batch"]["device_batch_size"]),
        spread(hours, digits=1 if hours[1] < 0.1 else 2) if hours else "",
        usd(money["on_demand"][1]) if money.get("on_demand") else "",
        usd(money["spot"][1]) if money.get("spot") else "",
        f"{epochs[1]:.2f}" if epochs else "",
    ]
