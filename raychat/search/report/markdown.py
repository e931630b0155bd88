"""The report as Markdown and CSV, with the figures of the page."""

import csv
import io

from raychat.search.report import tables
from raychat.search.report.contents import ReportContents
from raychat.search.report.forecasts import forecast_sentence, forecast_table
from raychat.search.report.insight_pictures import law_words
from raychat.search.report.sections import (
    DIFFERENCES,
    FORECAST,
    HEADINGS,
    OPEN,
    RANGE,
    interruption_sentence,
    noise_sentence,
    tiles,
)
from raychat.search.report.tables import Table

FIRST_COLUMNS = ("tag", "status", "seed", "rung")


def markdown(contents: ReportContents) -> str:
    """The whole report without its pictures."""
    parts = [
        f"# {contents.name}",
        f"**{contents.sentence}**",
        "\n".join(f"- {note}" for note in contents.notes),
        "; ".join(f"{tile.name}: {tile.text}" for tile in tiles(contents)),
        _section(HEADINGS["command"][contents.kind], _code([contents.command] if contents.command else [])),
        _section("All runs" if contents.kind == "search" else "The run", _table(tables.runs_table(contents))),
        _section("Configurations", _table(tables.places_table(contents)), noise_sentence(contents)),
        _section(RANGE, _code(contents.range_test.space, "toml") if contents.range_test else ""),
        _section("Effect of each parameter", _effects(contents)),
        _section("Scaling", _scaling(contents)),
        _section("Hardware profile", _table(tables.hardware_table(contents))),
        _section("Where the time went", _table(tables.ledger_table(contents)), interruption_sentence(contents)),
        _section(FORECAST, _table(forecast_table(contents)), forecast_sentence(contents)),
        _section(DIFFERENCES[contents.kind], _table(tables.differences_table(contents))),
        _section("Prices", _table(tables.prices_table(contents))),
        _section("Open questions", _table(tables.questions_table(contents)), OPEN),
        _section("How to reproduce this", _code(contents.reproduce), _facts(contents)),
        f"Made by raychat, {contents.made}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def trials_csv(contents: ReportContents) -> str:
    """One line per run: what the table shows, unrounded, then the settings that differ."""
    table = tables.runs_table(contents)
    kept = [n for n, key in enumerate(table.keys) if key not in FIRST_COLUMNS]
    settings = sorted({name for run in contents.runs for name in run.trial.settings})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*FIRST_COLUMNS, *(table.keys[n] for n in kept), *settings])
    for run, row in zip(contents.runs, table.rows, strict=True):
        first = [run.trial.tag, run.status, run.trial.seed, run.trial.rung]
        writer.writerow([*first, *(row[n].value for n in kept), *(run.trial.settings.get(name) for name in settings)])
    return file.getvalue()


def _section(heading: str, body: str, note: str = "") -> str:
    return "\n\n".join(part for part in (f"## {heading}", body, note) if part) if body else ""


def _code(commands: "tuple[str, ...] | list[str]", language: str = "sh") -> str:
    return f"```{language}\n" + "\n".join(commands) + "\n```" if commands else ""


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    rules = ["--:" if column in table.numeric else "---" for column in table.columns]
    lines = [list(table.columns), rules]
    for n, row in enumerate(table.rows):
        texts = [_cell(cell.text) for cell in row]
        lines.append([f"**{text}**" if n in table.marked and text != "-" else text for text in texts])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _effects(contents: ReportContents) -> str:
    return _table(tables.effects_table(contents))


def _scaling(contents: ReportContents) -> str:
    if contents.fit is None:
        return ""
    said = [*law_words(contents.fit), *contents.fit.notes, contents.fit.refusal]
    return "\n".join([_table(tables.optima_table(contents.fit)), "", *(f"- {text}" for text in said if text)])


def _facts(contents: ReportContents) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in contents.facts.items())
