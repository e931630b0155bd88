"""How fast GPUs talk to each other, inside a machine and between machines: a table with sources, links.toml."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raychat.planning.ranges import Range

TABLE = Path(__file__).with_name("links.toml")
ZERO = Range.exactly(0.0)


@dataclass(frozen=True, kw_only=True)
class Links:
    """What a ring of all GPUs runs over. `bus`: bytes per second of one GPU in reduce_scatter and all_gather."""

    bus: Range
    start_s: Range
    """of one collective"""
    inside_s: Range
    """of one step of the ring inside a machine"""
    between_s: Range
    """of one step of the ring between machines"""
    source: str


def find_links(gpu: str, *, workers: int, machines: int, machine: str = "") -> Links:
    """Links of `workers` GPUs of that plan name on so many machines, whose type is `machine` where one was named.

    A ring over several machines crosses the network of each as often as it has rings, which share its cards, so that
    bus bandwidth is at most what the cards of one machine carry together.
    """
    table = _table()
    inside = _entry(table["inside"], "gpus", gpu)
    several = workers > machines
    step = ZERO
    if several:
        step = _range(table["latency"]["nvlink" if _is_fast(inside) else "pcie"])
    bus, words = (
        (_range(inside["bus"]).scaled(1e9), [f"{inside['kind']}: {inside['source']}"]) if several else (None, [])
    )
    if machines > 1:
        found = _named(table["network"], machine) or _entry(table["network"], "gpus", gpu)
        network = _range(found["gigabits"]).scaled(1e9 / 8).times(_range(table["reached"]["share"]))
        bus = network if bus is None else Range(*map(min, bus.as_list(), network.as_list()))
        words.append(f"{found['gigabits'][1]:,} Gb/s a machine: {found['source']}")
    return Links(
        bus=bus or _range(inside["bus"]).scaled(1e9),
        start_s=_range(table["latency"]["start"]),
        inside_s=step,
        between_s=_range(table["latency"]["network"]) if machines > 1 else ZERO,
        source="; ".join(words),
    )


def _named(entries: list[dict[str, Any]], machine: str) -> dict[str, Any] | None:
    return next((entry for entry in entries if machine and machine in entry.get("machines", ())), None)


def _entry(entries: list[dict[str, Any]], key: str, name: str) -> dict[str, Any]:
    """The first entry with `name`, else the one for all others."""
    return next(entry for entry in entries if key in entry and (name in entry[key] or not entry[key]))


def _is_fast(entry: dict[str, Any]) -> bool:
    return not entry["kind"].startswith("PCIe")


def _range(values: list[float]) -> Range:
    low, mid, high = map(float, values)
    return Range(low, mid, high)


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
