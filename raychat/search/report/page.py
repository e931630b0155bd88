"""The report as one HTML page that needs nothing else: no network, no other file."""

import re
from collections.abc import Sequence
from html import escape

from raychat.search.report import tables, words
from raychat.search.report.contents import ReportContents
from raychat.search.report.forecasts import forecast_sentence, forecast_table
from raychat.search.report.insight_pictures import effect_pictures, hardware_pictures, scaling_pictures
from raychat.search.report.palette import Figure, Key
from raychat.search.report.pictures import curve_pictures, spending_picture
from raychat.search.report.range_picture import range_pictures
from raychat.search.report.sections import (
    DIFFERENCES,
    FORECAST,
    FOUND,
    HEADINGS,
    OPEN,
    RANGE,
    interruption_sentence,
    noise_sentence,
    state_tone,
    tiles,
)
from raychat.search.report.style import CSS, SCRIPT
from raychat.search.report.tables import Table

LONG = 24
"""rows beyond which a table scrolls in a window of its own, so that what follows is not far away"""


def html_page(contents: ReportContents) -> str:
    """The whole page."""
    parts = [
        _head(contents),
        _commands(HEADINGS["command"][contents.kind], [contents.command] if contents.command else []),
        _runs(contents),
        _range(contents),
        _pictures(FOUND[contents.kind], [*spending_picture(contents), *curve_pictures(contents)]),
        _pictures("What it depends on", [*effect_pictures(contents), *scaling_pictures(contents)]),
        _hardware(contents),
        _ledger(contents),
        _section(FORECAST, _table(forecast_table(contents)), note=forecast_sentence(contents)),
        _section(DIFFERENCES[contents.kind], _table(tables.differences_table(contents), style="stack")),
        _section("Prices", _table(tables.prices_table(contents), style="stack")),
        _section("Open questions", _table(tables.questions_table(contents), style="stack"), note=OPEN),
        _reproduce(contents),
    ]
    refresh = '<meta http-equiv="refresh" content="60">' if contents.going_on else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{refresh}'
        f"<title>{escape(contents.name)} · raychat</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>Made by raychat, {escape(contents.made)}. The same figures: report.md, trials.csv.</footer>\n"
        f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _head(contents: ReportContents) -> str:
    shown = "".join(
        f"<div><dt>{escape(tile.name)}</dt><dd>{escape(tile.text)}"
        + (f"<small>{escape(tile.more)}</small>" if tile.more else "")
        + "</dd></div>"
        for tile in tiles(contents)
    )
    state = f'<span class="state {state_tone(contents)}">{escape(contents.state)}</span>' if contents.state else ""
    kind = "Baseline search" if contents.kind == "search" else "Run"
    notes = "".join(f"<li>{escape(note)}</li>" for note in contents.notes)
    return (
        f'<header><div class="kind">{kind} <strong>{escape(contents.name)}</strong>{state}</div>'
        f"<h1>{_unbroken(contents.sentence)}</h1>"
        + (f'<ul class="notes note">{notes}</ul>' if notes else "")
        + f'<dl class="tiles">{shown}</dl></header>'
    )


def _unbroken(sentence: str) -> str:
    """Comparisons and quantities stay on one line."""
    return escape(re.sub(r"(?<= p) | (?=[<=] )|(?<=[<=]) ", "\N{NO-BREAK SPACE}", sentence))


def _commands(heading: str, commands: Sequence[str]) -> str:
    return _section(heading, "".join(map(_command, commands)))


def _command(text: str) -> str:
    lines = "\n".join(" ".join(f"<span>{escape(word)}</span>" for word in line.split(" ")) for line in text.split("\n"))
    button = '<button class="copy" type="button">Copy</button>'
    return f'<div class="command">{button}<pre><code>{lines}</code></pre></div>'


def _runs(contents: ReportContents) -> str:
    body = _table(tables.runs_table(contents), style="runs", sortable=len(contents.runs) > 1)
    if contents.places:
        places = _table(tables.places_table(contents), style="places", sortable=len(contents.places) > 1)
        noise = f'<p class="note">{escape(noise_sentence(contents))}</p>'
        body += f"<h2>Configurations</h2>{places}{noise}"
    return _section("All runs" if contents.kind == "search" else "The run", body)


def _range(contents: ReportContents) -> str:
    space = contents.range_test.space if contents.range_test else []
    return _section(RANGE, _figures(range_pictures(contents)) + (_command("\n".join(space)) if space else ""))


def _hardware(contents: ReportContents) -> str:
    table = tables.hardware_table(contents)
    pictures = _figures(hardware_pictures(contents))
    return _section(
        "Hardware profile", pictures + ('<div style="height:16px"></div>' if pictures else "") + _table(table)
    )


def _ledger(contents: ReportContents) -> str:
    table = tables.ledger_table(contents)
    if not table.rows:
        return ""
    whole = sum(contents.ledger.values()) or 1.0
    parts = [
        (f"c-{n % 7}", tables.ACCOUNTS.get(account, account), seconds / whole)
        for n, (account, seconds) in enumerate(contents.ledger.items())
        if seconds > 0
    ]
    spans = "".join(
        f'<span class="{style}" style="flex-grow:{share:.4f}" title="{escape(name)}: {share:.1%}"></span>'
        for style, name, share in parts
    )
    keys = _keys([Key(style, f"{name} {words.percent(share * 100)}") for style, name, share in parts])
    said = interruption_sentence(contents)
    spent = "and the money" if contents.cost_usd is not None else ""
    body = (
        f'<div class="two"><div><div class="accounts" role="img" aria-label="shares of the wall time">{spans}</div>{keys}'
        f"<p>{escape(said)}</p></div>{_table(table)}</div>"
    )
    return _section(f"Where the time {spent} went".replace("  ", " "), body)


def _reproduce(contents: ReportContents) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in contents.facts.items())
    spec = ""
    if contents.spec:
        lines = "\n".join(f"{key} = {value!r}" for key, value in contents.spec.items())
        block = f'<div class="command"><pre><code>{escape(lines)}</code></pre></div>'
        spec = f"<details><summary>All settings</summary>{block}</details>"
    commands = _command("\n".join(contents.reproduce)) if contents.reproduce else ""
    return _section("How to reproduce this", commands + (f'<dl class="facts">{facts}</dl>' if facts else "") + spec)


def _pictures(heading: str, figures: Sequence[Figure]) -> str:
    return _section(heading, _figures(figures))


def _figures(figures: Sequence[Figure]) -> str:
    thirds = " thirds" if figures and all(figure.third for figure in figures) else ""
    return f'<div class="pictures{thirds}">{"".join(map(_figure, figures))}</div>' if figures else ""


def _figure(figure: Figure) -> str:
    style = ' class="wide"' if figure.wide else ""
    svg = figure.svg
    if figure.narrow:
        svg = f'<div class="broad">{figure.svg}</div><div class="narrow">{figure.narrow}</div>'
    note = f'<p class="note">{escape(figure.note)}</p>' if figure.note else ""
    return f"<figure{style}><figcaption>{escape(figure.title)}</figcaption>{svg}{_keys(figure.keys)}{note}</figure>"


def _keys(keys: Sequence[Key]) -> str:
    items = "".join(f'<li><span class="key {key.mark} {key.style}"></span>{escape(key.text)}</li>' for key in keys)
    return f'<ul class="keys">{items}</ul>' if items else ""


def _section(heading: str, body: str, note: str = "") -> str:
    said = f'<p class="note">{escape(note)}</p>' if note and body else ""
    return f"<section><h2>{escape(heading)}</h2>{said}{body}</section>" if body else ""


def _table(table: Table, style: str = "", *, sortable: bool = False) -> str:
    if not table.rows:
        return ""
    heads = "".join(f'<th scope="col"{_numeric(column, table)}>{escape(column)}</th>' for column in table.columns)
    rows = []
    for n, row in enumerate(table.rows):
        cells = "".join(_cell(cell, column, table) for cell, column in zip(row, table.columns, strict=True))
        rows.append(f"<tr{' class=mark' if n in table.marked else ''}>{cells}</tr>")
    kind = " ".join(filter(None, (style, "sortable" if sortable else "")))
    attribute = f' class="{kind}"' if kind else ""
    long = " long" if len(table.rows) > LONG else ""
    return (
        f'<div class="scroll{long}" tabindex="0" role="region" aria-label="table"><table{attribute}>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _numeric(column: str, table: Table) -> str:
    return ' class="num"' if column in table.numeric else ""


def _cell(cell: tables.Cell, column: str, table: Table) -> str:
    value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
    style = ' class="num"' if column in table.numeric else ' class="text"'
    text = escape(cell.text)
    text = f"<code>{text}</code>" if text.startswith("--") and " " not in text else text
    shown = f'<span class="{cell.tone}">{text}</span>' if cell.tone else text
    return f'<td{style}{value} data-label="{escape(column)}"><span>{shown}</span></td>'
