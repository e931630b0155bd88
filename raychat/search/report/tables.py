"""The tables of a report: the same cells for HTML, Markdown and CSV."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from raychat.search.fits import ScalingFit
from raychat.search.ranking import FAULTS
from raychat.search.report import words
from raychat.search.report.contents import ReportContents, ReportRun
from raychat.search.trial import Outcome

Value = str | int | float | None

ACCOUNTS = {
    "productive_s": "productive steps",
    "replayed_s": "replayed steps",
    "startup_s": "start-up",
    "checkpoint_stall_s": "checkpoints",
    "evaluation_s": "evaluation",
    "waiting_s": "waiting for machines",
    "other_s": "other",
}
LISTED = 4
"""configurations that are named one by one where many have the same value"""
UNHARMED = ("stopped early", "preempted", "over budget")
"""ends that do not speak against the hardware"""
ROLES = {
    "noise": "noise repeat",
    "confirmation": "confirmation",
    "trunk": "trunk",
    "fork": "fork",
    "rehearsal": "dry run",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value and how it reads."""

    text: str
    value: Value = None
    """what is sorted by and written to CSV; None: nothing"""
    tone: str = ""
    """good, warn, bad or quiet"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns."""

    columns: tuple[str, ...]
    numeric: frozenset[str]
    """columns that are set to the right"""
    rows: tuple[tuple[Cell, ...], ...]
    keys: tuple[str, ...] = ()
    """names of the columns in CSV, with units, of a table that is written as such"""
    marked: frozenset[int] = frozenset()
    """rows of the final baseline"""


@dataclass(frozen=True)
class _Column:
    title: str
    key: str
    value: Callable[[Outcome], Value]
    show: Callable[[float | None], str]


_MEASURED = (
    _Column("val_bpb", "val_bpb", lambda o: o.val_bpb, words.bpb),
    _Column("CORE", "core_metric", lambda o: o.core_metric, lambda v: words.UNKNOWN if v is None else f"{v:.4f}"),
    _Column("Wall", "wall_s", lambda o: o.wall_s, words.duration),
    _Column("Cost", "cost_usd", lambda o: o.cost_usd, words.dollars),
    _Column("MFU", "mfu_percent", lambda o: o.mfu, words.percent),
    _Column("Tok/s", "tok_per_sec", lambda o: o.tok_per_sec, words.count),
    _Column("Memory", "peak_memory_bytes", lambda o: o.peak_memory_bytes, words.memory),
)


@dataclass(frozen=True)
class _Extra:
    title: str
    key: str
    of: Callable[[ReportRun], float]


_EXTRA = (
    _Extra("Seed", "seed", lambda run: run.trial.seed),
    _Extra("Rung", "rung", lambda run: run.trial.rung),
)
"""shown where they are not the same for all runs"""
_ALWAYS = ("val_bpb", "Wall", "Cost", "MFU", "Memory")
"""the documents' form; other columns only where some run has a value"""


def runs_table(contents: ReportContents) -> Table:
    """All runs, in the documents' form."""
    outcomes = [run.outcome for run in contents.runs if run.outcome]
    known = {column.title for column in _MEASURED if any(column.value(o) is not None for o in outcomes)}
    known -= {"Tok/s"} if "MFU" in known else set()  # two figures of one thing
    measured = [column for column in _MEASURED if column.title in known or column.title in _ALWAYS]
    extra = [column for column in _EXTRA if len({column.of(run) for run in contents.runs}) > 1]
    rows = tuple(tuple(_run_cells(run, contents, measured, extra)) for run in contents.runs)
    heads = [("#", "number"), ("Title", "title"), *((column.title, column.key) for column in measured)]
    heads += [*((column.title, column.key) for column in extra), ("Result", "result")]
    columns = tuple(title for title, _ in heads)
    return Table(
        columns=columns,
        keys=tuple(key for _, key in heads),
        numeric=frozenset(columns) - {"Title", "Result"},
        rows=rows,
        marked=frozenset(
            n for n, run in enumerate(contents.runs) if contents.kind == "search" and is_final(run, contents)
        ),
    )


def is_final(run: ReportRun, contents: ReportContents) -> bool:
    """Whether it is a full run of the final baseline."""
    return run.trial.arm == contents.winner and run.trial.rung == 1 and run.status == "finished"


def _run_cells(
    run: ReportRun, contents: ReportContents, measured: Sequence[_Column], extra: Sequence["_Extra"]
) -> Iterator[Cell]:
    trial = run.trial
    yield Cell(text=str(trial.number), value=trial.number)
    role = f" [{ROLES[trial.role]}]" if trial.role in ROLES else ""
    title = (trial.title or "baseline") + role
    yield Cell(text=title, value=title)
    for column in measured:
        value = column.value(run.outcome) if run.outcome else None
        tone = "" if run.status == "finished" else "quiet"  # what a run had when it ended early is no result
        yield Cell(text=column.show(value if isinstance(value, int | float) else None), value=value, tone=tone)
    for column in extra:
        yield Cell(text=f"{column.of(run):g}", value=column.of(run))
    yield result_cell(run, contents)


def result_cell(run: ReportRun, contents: ReportContents) -> Cell:
    """How the run ended, in words."""
    outcome = run.outcome
    if outcome is None:
        return Cell(text=run.status, value=run.status, tone="quiet")
    if outcome.status == "finished":
        text = "finished"
        if contents.kind == "search" and is_final(run, contents):
            text = "final baseline"
        if outcome.reason:
            text += f": {outcome.reason}"
        if outcome.preemptions:
            text += f" ({words.plural(outcome.preemptions, 'preemption')} survived)"
        return Cell(text=text, value=text, tone="good")
    text = f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status
    tone = "quiet" if outcome.status == "infeasible" else "bad" if outcome.status in FAULTS else "warn"
    return Cell(text=text, value=text, tone=tone)


def places_table(contents: ReportContents) -> Table:
    """Configurations, best first, against the baseline."""
    rows, marked = [], set()
    several = len({place.rung for place in contents.places}) > 1
    for n, place in enumerate(contents.places):
        against = place.against_baseline
        marked |= {n} if place.arm == contents.winner else set()
        relation = "is the baseline" if place.arm == contents.baseline else against.relation if against else ""
        number = words.UNKNOWN if place.place is None else f"{place.place}{' (tied)' if place.tied else ''}"
        difference = against.difference if against else None
        rows.append(
            (
                Cell(text=number, value=place.place),
                Cell(text=place.title, value=place.title),
                Cell(text=words.bpb(place.score), value=place.score),
                Cell(text=words.share(difference), value=difference),
                Cell(text=relation or place.reason, value=relation or place.reason, tone=_tone(relation)),
                *([Cell(text=f"{place.rung:g}", value=place.rung)] if several else []),
                Cell(text=str(len(place.seeds)) if place.seeds else words.UNKNOWN, value=len(place.seeds)),
            )
        )
    rung = ("Rung",) if several else ()
    columns = ("Place", "Configuration", "Score", "Against base", "Finding", *rung, "Seeds")
    return Table(
        columns=columns,
        numeric=frozenset(columns) - {"Configuration", "Finding"},
        rows=tuple(rows),
        marked=frozenset(marked),
    )


def _tone(relation: str) -> str:
    return {"better": "good", "worse": "bad"}.get(relation, "quiet")


def hardware_table(contents: ReportContents) -> Table:
    """Shape by shape: batch, MFU, step time, memory, status; the best run of a shape stands for it."""
    rows = tuple(
        (
            Cell(text=shape.title, value=shape.title),
            Cell(text=words.percent(shape.mfu), value=shape.mfu),
            Cell(text=words.milliseconds(shape.step_s), value=shape.step_s),
            Cell(text=words.count(shape.tok_per_sec), value=shape.tok_per_sec),
            Cell(text=words.memory(shape.memory), value=shape.memory),
            Cell(text=shape.status, value=shape.status, tone=_shape_tone(shape.status)),
        )
        for shape in hardware_shapes(contents)
    )
    columns = ("Shape", "MFU", "Step", "Tok/s", "Memory", "Status")
    return Table(
        columns=columns,
        numeric=frozenset(columns) - {"Shape", "Status"},
        rows=rows,
    )


def _shape_tone(status: str) -> str:
    return "good" if status == "works" else "warn" if status in UNHARMED else "bad"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one depth and device batch made of the hardware."""

    depth: int | None
    batch: int | None
    mfu: float | None
    step_s: float | None
    tok_per_sec: float | None
    memory: int | None
    status: str

    @property
    def title(self) -> str:
        """`d10 batch 32`."""
        depth = "" if self.depth is None else f"d{self.depth}"
        return f"{depth} batch {self.batch}".strip() if self.batch is not None else depth or "as given"


def hardware_shapes(contents: ReportContents) -> list[Shape]:
    """Of all runs that a machine was tried with, by depth and device batch."""
    groups: dict[tuple[int | None, int | None], list[ReportRun]] = {}
    for run in contents.runs:
        if run.outcome and run.outcome.status != "infeasible":
            groups.setdefault((_whole(run, "depth"), _whole(run, "device_batch_size")), []).append(run)
    return [
        _shape(depth, batch, [run.outcome for run in runs if run.outcome])
        for (depth, batch), runs in sorted(groups.items(), key=lambda item: [-1 if v is None else v for v in item[0]])
    ]


def _whole(run: ReportRun, name: str) -> int | None:
    known = {**(run.outcome.facts if run.outcome else {}), **run.trial.settings}
    value = known.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _shape(depth: int | None, batch: int | None, outcomes: Sequence[Outcome]) -> Shape:
    able = [o for o in outcomes if o.tok_per_sec] or list(outcomes)
    best = max(able, key=lambda o: o.tok_per_sec or 0.0)
    works = any(o.status == "finished" or (o.status in UNHARMED and o.tok_per_sec) for o in outcomes)
    return Shape(
        depth=depth,
        batch=batch,
        mfu=best.mfu,
        step_s=best.step_s,
        tok_per_sec=best.tok_per_sec,
        memory=max((o.peak_memory_bytes for o in outcomes if o.peak_memory_bytes), default=None),
        status="works" if works else outcomes[0].status,
    )


def ledger_table(contents: ReportContents) -> Table:
    """Where the time of all runs went, and the money if it has a price."""
    whole = sum(contents.ledger.values())
    cost = contents.cost_usd
    rows = []
    for account, seconds in contents.ledger.items():
        part = seconds / whole if whole else 0.0
        paid = None if cost is None else cost * part
        rows.append(
            (
                Cell(text=ACCOUNTS.get(account, account), value=account),
                Cell(text=words.duration(seconds), value=seconds),
                Cell(text=words.percent(part * 100), value=part * 100),
                Cell(text=words.dollars(paid), value=paid),
            )
        )
    total = (
        Cell(text="total", value="total"),
        Cell(text=words.duration(whole), value=whole),
        Cell(text="100%", value=100.0),
        Cell(text=words.dollars(cost), value=cost),
    )
    return Table(
        columns=("Account", "Time", "Share", "Cost"),
        numeric=frozenset({"Time", "Share", "Cost"}),
        rows=(*rows, total) if rows else (),
    )


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[str] = ()) -> Table:
    """A table of words."""
    return Table(
        columns=tuple(columns),
        numeric=frozenset(numeric),
        rows=tuple(tuple(Cell(text=text, value=text) for text in row) for row in rows),
    )


def prices_table(contents: ReportContents) -> Table:
    """Prices with their dates."""
    rows = [
        (p.machine, words.dollars(p.usd_per_hour), p.as_of or "not known", p.source or "not known")
        for p in contents.prices
    ]
    return plain_table(("Machine", "Per hour", "As of", "Source"), rows, ["Per hour"])


def questions_table(contents: ReportContents) -> Table:
    """Open questions with what an answer takes."""
    rows = [
        (
            q.text,
            str(q.runs),
            words.duration(None if q.hours is None else q.hours * 3600),
            words.dollars(q.cost_usd),
        )
        for q in contents.questions
    ]
    return plain_table(("Question", "Runs", "Time", "Cost"), rows, ["Runs", "Time", "Cost"])


def differences_table(contents: ReportContents) -> Table:
    """Settings that are not those of the base: one row per setting and value."""
    rows = []
    for difference in contents.differences:
        by_value: dict[str, list[str]] = {}
        for title, value in difference.values.items():
            by_value.setdefault(value, []).append(title)
        for value, titles in by_value.items():
            rows.append((difference.setting, difference.base, value, _listed(titles)))
    if contents.kind == "run":
        return plain_table(("Setting", "Default", "Here"), [row[:3] for row in rows])
    return plain_table(("Setting", "Base", "Value", "In"), rows)


def effects_table(contents: ReportContents) -> Table:
    """What each value of each parameter does."""
    rows = [
        (
            Cell(text=f"{e.parameter.replace('_', '-')} {e.value}", value=e.value),
            Cell(text=e.against, value=e.against),
            Cell(text=words.share(e.difference), value=e.difference),
            Cell(text="-" if e.standard_error is None else f"{e.standard_error:.2%}", value=e.standard_error),
            Cell(text=words.plural(e.runs, "pair" if e.paired else "run"), value=e.runs),
        )
        for e in contents.effects
    ]
    columns = ("Value", "Against", "Effect", "Standard error", "From")
    return Table(columns=columns, numeric=frozenset({"Effect", "Standard error"}), rows=tuple(rows))


def optima_table(fit: ScalingFit) -> Table:
    """The lowest point of each FLOPs budget, or why there is none."""
    rows = [
        (
            f"{o.budget:.2e}",
            str(len(o.points)),
            words.count(o.parameters),
            words.count(o.tokens),
            words.bpb(o.loss),
            f"{o.tokens / o.parameters:.1f}" if o.tokens and o.parameters else words.UNKNOWN,
            o.refusal,
        )
        for o in fit.optima
    ]
    columns = ("FLOPs", "Runs", "Parameters", "Tokens", "val_bpb", "Tokens per parameter", "Remark")
    return plain_table(columns, rows, columns[:-1])


def _listed(titles: Sequence[str]) -> str:
    rest = len(titles) - LISTED
    return "; ".join(titles[:LISTED]) + (f"; and {rest} more" if rest > 0 else "")
