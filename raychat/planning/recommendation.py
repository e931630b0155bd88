"""A proposal as a person reads it, and as the preset that it becomes."""

import dataclasses
import json
import math
import shlex
import textwrap
from collections.abc import Sequence, Set
from typing import Any

from raychat.config import Config, MoneySettings, RunSettings
from raychat.planning.layout import (
    LABEL,
    WIDTH,
    columns,
    count,
    dollars,
    duration,
    gibibytes,
    plural,
    section,
    target_name,
)
from raychat.planning.outlook import memory_of, rank_memory
from raychat.planning.plan import optimal_iterations
from raychat.planning.proposal import HORIZON, Candidate, Proposal
from raychat.planning.scaling import model_shape
from raychat.uris import public_uri

# What a preset does not hold: places, names, limits and prices of one person's run.
NOT_IN_A_PRESET = {"address", "machine", "prices", "mfu", "preemptions_per_hour"}.union(
    leaf.name for group in (RunSettings, MoneySettings) for leaf in dataclasses.fields(group)
)
# What the command that trains does not hold: limits, which are what the proposal was made from, and what stops before training.
NOT_IN_A_COMMAND = {"preset", "budget_usd", "max_hours", "dry_run", "dry_run_steps", "gpu", "num_workers"}


def format_proposal(proposal: Proposal, budget: str) -> str:
    """What is proposed, what it takes of `budget` (in words), and its neighbours."""
    chosen = proposal.chosen
    near = sorted([chosen, *proposal.neighbours], key=lambda candidate: candidate.depth)
    rows = [["", "depth", "a pass", "iterations", "tokens", "per param", "hours", "why"]]
    rows += [_row(candidate, chosen) for candidate in near]
    lines = [
        f"{summary(chosen)}",
        f"on {target_name(proposal.target)}: {cost(chosen)}",
        f"budget: {budget}",
    ]
    blocks = [section("proposal", lines), section("", _with_reasons(rows))]
    if proposal.pins:
        blocks.append(section("pinned", [_pins(proposal)]))
    return "\n\n".join(blocks)


def summary(candidate: Candidate) -> str:
    """Depth, batch and horizon in words."""
    config, recipe = _known(candidate)
    return (
        f"depth {candidate.depth}, {plural(config.batch.sequences, 'sequence', 'sequences')} a pass, "
        f"{plural(recipe.num_iterations, 'iteration', 'iterations')} of "
        f"{recipe.total_batch_size:,} tokens"
    )


def cost(candidate: Candidate) -> str:
    """Time and, where a price is known, dollars."""
    outlook = candidate.outlook
    if outlook is None or outlook.time is None:
        return "time not known"
    time = duration(outlook.time.total.as_list())
    money = outlook.money.on_demand if outlook.money else None
    return f"{dollars(money.as_list())}, {time}" if money else time


def preset_text(proposal: Proposal, command: str, budget: str, given: Sequence[str]) -> str:
    """A preset of the proposal: what was decided and what was `given` (names of settings), with command and reasons."""
    config, recipe = _known(proposal.chosen)
    shape = model_shape(config.model)
    optimal = optimal_iterations(shape, recipe.total_batch_size)
    memory = rank_memory(proposal.target)
    there = f" of {gibibytes(memory)}" if memory else ""
    words = [
        f"Depth {proposal.chosen.depth} on {proposal.target.workers} x {proposal.target.gpu}, {cost(proposal.chosen)}.",
        "Reproduced by",
        f"    {command}",
        f"Depth: {proposal.chosen.why}. Budget: {budget}. Neighbours within it:",
        *[f"    depth {other.depth}{_reached(other)}: {other.why}" for other in proposal.neighbours],
        f"Device batch: {config.batch.device_batch_size} sequences need "
        f"{gibibytes(memory_of(config, proposal.target).total)}{there}.",
        f"Horizon: {recipe.num_iterations / optimal:.2f} times the {optimal:,} iterations that are compute-optimal.",
    ]
    if proposal.pins:
        words.append(_pins(proposal))
    comment = [line for text in words for line in _wrapped(text)]
    kept = set(given) - NOT_IN_A_PRESET - {"gpu", "num_workers"}
    values = _settings(config, _decided(proposal) | kept) | _devices(proposal)
    return (
        "\n".join([*[f"# {line}" for line in comment], *[f"{k} = {json.dumps(v)}" for k, v in values.items()]]) + "\n"
    )


def training_command(proposal: Proposal, given: Sequence[str]) -> str:
    """What starts the run that is proposed, with the settings that were `given`, places and prices among them.

    No limits: a run that a forecast was a little too bold for would stop short of its horizon.
    """
    config, _ = _known(proposal.chosen)
    values = {"preset": config.run.preset} if config.run.preset else {}
    values |= _settings(config, _decided(proposal)) | _devices(proposal)
    values |= _settings(config, set(given) - NOT_IN_A_COMMAND)
    if config.plan.machine:  # which has the GPU
        values.pop("gpu")
    return shlex.join(
        ["python", "jobs/pretrain.py", *[part for name, value in values.items() for part in _flag(name, value)]]
    )


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


def _wrapped(text: str) -> list[str]:
    return [text] if text.startswith(" ") else textwrap.wrap(text, 110)


def _decided(proposal: Proposal) -> set[str]:
    """Settings that the proposal decides."""
    return {"depth", "device_batch_size"} | (set() if proposal.pins & HORIZON else {"num_iterations"})


def _settings(config: Config, names: Set[str]) -> dict[str, Any]:
    """These settings in the order of the configuration, without credentials."""
    return {
        name: public_uri(value) if isinstance(value, str) else value
        for name, value in config.flat().items()
        if name in names
    }


def _devices(proposal: Proposal) -> dict[str, Any]:
    workers = proposal.target.workers
    return {"gpu": proposal.target.gpu} | ({"num_workers": workers} if workers > 1 else {})


def _pins(proposal: Proposal) -> str:
    pins = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(proposal.pins))
    free = proposal.without_pins
    other = "the rule takes nothing" if free is None or free.config is None else summary(free)
    return f"Pinned: {pins}. Without pins: {other}."


def _reached(candidate: Candidate) -> str:
    return f", {candidate.ratio:.1f} tokens per parameter" if candidate.ratio else ""


def _with_reasons(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the last of which is text that goes on below itself."""
    table = columns([row[:-1] for row in rows])
    width = max(map(len, table))
    lines = []
    for figures, row in zip(table, rows, strict=True):
        reasons = textwrap.wrap(row[-1], max(24, WIDTH - LABEL - width - 2))
        lines += [
            f"{text:<{width}}  {reason}"
            for text, reason in zip([figures, *[""] * (len(reasons) - 1)], reasons, strict=True)
        ]
    return lines


def _row(candidate: Candidate, chosen: Candidate) -> list[str]:
    mark = ">" if candidate is chosen else ""
    decimals = max(0, 2 - math.floor(math.log10(chosen.hours)))
    if candidate.config is None or candidate.outlook is None:
        return [mark, str(candidate.depth), "", "", "", "", "", candidate.why]
    recipe = candidate.outlook.recipe
    return [
        mark,
        str(candidate.depth),
        str(candidate.config.batch.device_batch_size),
        f"{recipe.num_iterations:,}",
        count(recipe.tokens),
        f"{candidate.ratio:,.1f}",
        f"{candidate.hours:,.{decimals}f}",
        candidate.why,
    ]


def _known(candidate: Candidate) -> tuple[Config, Any]:
    if candidate.config is None or candidate.outlook is None:
        raise ValueError(f"depth {candidate.depth} cannot be: {candidate.why}")
    return candidate.config, candidate.outlook.recipe
