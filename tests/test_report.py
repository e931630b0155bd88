"""The report of a search: its three files say the same, and nothing that was not measured."""

import csv
import io
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raychat.search.fits import fit_scaling
from raychat.search.iso_flops import IsoFlops
from raychat.search.range_test import RangeTest
from raychat.search.report import ReportContents, words, write_report
from raychat.search.report.axes import axis, linear_ticks
from raychat.search.report.contents import Curve, Forecast, Interruption, Point, Price
from raychat.search.report.forecasts import forecast_sentence, forecast_table
from raychat.search.report.markdown import markdown, trials_csv
from raychat.search.report.of_search import search_contents
from raychat.search.report.page import html_page
from raychat.search.report.pictures import pareto_front, spending_picture, thinned
from raychat.search.report.range_picture import range_pictures
from raychat.search.report.tables import hardware_table, runs_table
from raychat.search.spec import SearchSpec
from raychat.search.trial import Outcome, Trial

EVIL = '<script>alert("x")</script> & "quotes"'
RATES = {"matrix_lr": 0.02, "embedding_lr": 0.3, "unembedding_lr": 0.008, "scalar_lr": 0.5}


def spec(**settings) -> SearchSpec:
    base = {"preset": "a100_d10", "price_per_hour": 4.31}
    return SearchSpec(
        name="demo", base=base, space={"depth": [8, 10, 12], "matrix_lr": [0.02, 0.04]}, scheduler="none", **settings
    )


def finished(val_bpb: float, wall_s: float = 3600.0, **values) -> Outcome:
    facts = {"depth": 10, "device_batch_size": 32}
    known = {"mfu": 55.0, "tok_per_sec": 3e5, "step_s": 1.77, "peak_memory_bytes": 21_200_000_000, "facts": facts}
    return Outcome(status="finished", val_bpb=val_bpb, wall_s=wall_s, cost_usd=wall_s / 3600 * 4.31, **(known | values))


def search(made: SearchSpec | None = None) -> list[tuple[Trial, Outcome | None]]:
    """A search with every kind of end: repeats, a better depth, an infeasible batch, OOM, a preempted and a running run."""
    made = made or spec()
    ends = [
        ({}, 42, "trial", finished(0.9000)),
        ({}, 42, "noise", finished(0.9001)),
        ({}, 42, "noise", finished(0.8999)),
        ({}, 42, "noise", finished(0.9000)),
        ({"depth": 12}, 42, "trial", finished(0.8800, 5400, preemptions=1)),
        ({"depth": 8}, 42, "trial", finished(0.9300, 2000)),
        ({"depth": 12, "matrix_lr": 0.04}, 42, "trial", Outcome(status="OOM", reason=EVIL, wall_s=95, cost_usd=0.11)),
        ({"device_batch_size": 48}, 42, "trial", Outcome(status="infeasible", reason="does | not\ndivide")),
        ({"matrix_lr": 0.04}, 42, "trial", Outcome(status="preempted", reason="no machine", wall_s=600, cost_usd=0.7)),
        ({"depth": 8, "matrix_lr": 0.04}, 42, "trial", None),
        *(({}, seed, "confirmation", finished(0.9 + seed / 1e6)) for seed in (101, 102, 103)),
        *(({"depth": 12}, seed, "confirmation", finished(0.88 + seed / 1e6, 5400)) for seed in (101, 102, 103)),
    ]
    trials: list[tuple[Trial, Outcome | None]] = []
    for number, (settings, seed, role, outcome) in enumerate(ends):
        arm = made.arm(settings)
        trial = Trial(
            number=number,
            tag=f"demo-{number:03d}",
            title=arm.title,
            settings=settings,
            arm=arm.name,
            seed=seed,
            role=role,
        )
        trials.append((trial, outcome))
    return trials


def rising() -> tuple[list[float], list[float]]:
    """Multiples of rates, and a loss that falls, and climbs in the end."""
    rates = [0.01 * 1000 ** (n / 99) for n in range(100)]
    return rates, [9 - 4 / (1 + (0.2 / rate) ** 3) + 30 * max(0.0, math.log(rate / 4)) for rate in rates]


def forecasts() -> tuple[Forecast, ...]:
    """Of two runs, the second of which ended early."""

    def values(low: float, mid: float, high: float, actual: float, off: float | None) -> dict:
        return {"low": low, "mid": mid, "high": high, "actual": actual, "off_percent": off}

    one = {
        "num_iterations": 100,
        "step": 100,
        "measured": True,
        "time_s": values(90.0, 100.0, 110.0, 105.0, 5.0),
        "startup_s": values(0.5, 0.6, 0.7, 1.2, 100.0),
        "memory_bytes": values(1e9, 2e9, 3e9, 4e9, 100.0),
    }
    two = {"num_iterations": 100, "step": 50, "measured": False, "time_s": values(90.0, 100.0, 110.0, 50.0, None)}
    return Forecast(number=0, title="baseline", values=one), Forecast(number=4, title=EVIL, values=two)


@pytest.fixture(scope="module")
def contents() -> ReportContents:
    """A report with everything in it, pictures of curves and a scaling fit too."""
    points = [Point(k * 1000, k / 100, k / 50, 3 + 4 / (1 + k)) for k in range(400)]
    val = [Point(k * 1e5, k / 4, k / 2, 0.9 + 0.3 / (1 + k)) for k in range(5)]
    curves = tuple(
        Curve(tag=tag, title=title, arm=arm, loss=tuple(points), val_bpb=tuple(val))
        for tag, title, arm in (("demo-000", "baseline", "base"), ("demo-004", "depth 12", "depth=12"))
    )
    sweep = [
        IsoFlops(budget=b, parameters=n, tokens=b / 6 / n, loss=(1 + 0.02 * math.log(n / 3e7) ** 2) * b**-0.05)
        for b in (1e17, 3e17, 1e18, 3e18, 1e19)
        for n in (1e7, 3e7, 9e7)
    ]
    return replace(
        search_contents(spec(), search(), Path("/nowhere")),
        curves=curves,
        fit=fit_scaling(sweep),
        ledger={"productive_s": 3000.0, "replayed_s": 300.0, "waiting_s": 100.0},
        interruption=Interruption(preemptions=1, restarts=2, replayed_s=300, starting_s=60, cost_usd=0.43),
        range_test=RangeTest.of(RATES, *rising()),
        forecasts=forecasts(),
        prices=(Price(machine="a100-rented", usd_per_hour=4.31, source="document 004", as_of="2026-01-05"),),
    )


class Page(HTMLParser):
    """Tags with their attributes, the text, and the cells of each table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text.append(data)
        if self.cell:
            self.tables[-1][-1][-1] += data


def test_markdown_table_of_runs_has_the_cells_of_the_page(contents):
    page = Page(html_page(contents)).tables[0]
    rows = markdown(contents).split("## All runs\n\n")[1].split("\n\n")[0].splitlines()
    cells = [[c.replace("\\|", "|").strip("* ") for c in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    del cells[1]  # the rule
    assert [[" ".join(cell.split()) for cell in row] for row in page] == cells


def test_csv_holds_unrounded_what_the_markdown_rounds(contents):
    rows = list(csv.DictReader(io.StringIO(trials_csv(contents))))
    table = runs_table(contents)
    shown = dict(zip(table.columns, zip(*table.rows, strict=True), strict=True))
    shapes = {
        "val_bpb": words.bpb,
        "Cost": words.dollars,
        "Wall": words.duration,
        "MFU": words.percent,
        "Memory": words.memory,
    }
    keys = dict(zip(table.columns, table.keys, strict=True))
    for column, show in shapes.items():
        assert [show(float(row[keys[column]]) if row[keys[column]] else None) for row in rows] == [
            cell.text for cell in shown[column]
        ]
    assert [row["tag"] for row in rows] == [run.trial.tag for run in contents.runs]
    assert [row["depth"] for row in rows if row["status"] == "finished"][4:6] == ["12", "8"]


def test_every_run_is_in_the_table_whatever_it_came_to(contents):
    results = {row[1].text: row[-1].text for row in runs_table(contents).rows}
    assert results["depth 12"] == "final baseline (1 preemption survived)"
    assert results["depth 12, matrix-lr 0.04"].startswith("OOM: ")
    assert results["device-batch-size 48"].startswith("infeasible: ")
    assert results["matrix-lr 0.04"] == "preempted: no machine"
    assert results["depth 8, matrix-lr 0.04"] == "waiting"


def test_page_needs_nothing_but_itself(contents):
    page = html_page(contents)
    for tag, attributes in Page(page).tags:
        assert tag not in ("img", "iframe", "object", "embed", "link", "base")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_text_from_outside_stays_text(contents):
    hostile = replace(contents, name=EVIL, sentence=EVIL, command=EVIL, facts={EVIL: EVIL}, notes=(EVIL,))
    page = Page(html_page(hostile))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "".join(page.text).count('alert("x")') >= 6


def test_pictures_are_well_formed_with_names_and_distinct_ids(contents):
    pictures = re.findall(r"<svg.*?</svg>", html_page(contents), re.DOTALL)
    ids = []
    assert len(pictures) >= 10
    for picture in pictures:
        root = ET.fromstring(picture)
        assert "viewBox" in root.attrib
        assert root.attrib["role"] == "img"
        named = [element.attrib["id"] for element in root if element.tag in ("title", "desc")]
        assert root.attrib["aria-labelledby"].split() == named
        assert all(element.text for element in root if element.tag in ("title", "desc"))
        ids += named
        assert "nan" not in picture
        assert "inf" not in re.sub("<title>.*?</title>", "", picture)
    assert len(ids) == len(set(ids))


def test_words_of_a_picture_do_not_lie_on_each_other(contents):
    """Tick labels of one axis and labels of marks; a character is taken as 6.2 wide (7.2 where it is bold) and 9 high."""
    for picture in re.findall(r"<svg.*?</svg>", html_page(contents), re.DOTALL):
        boxes = []
        for text in ET.fromstring(picture).iter("text"):
            if "transform" in text.attrib:
                continue
            x, y = float(text.attrib["x"]), float(text.attrib["y"])
            wide = (7.2 if text.attrib.get("class") == "mark-label" else 6.2) * len(text.text or "")
            x -= {"start": 0, "middle": wide / 2, "end": wide}[text.attrib["text-anchor"]]
            boxes.append((x, y - 9, x + wide, y, text.text))
        for n, (a0, b0, a1, b1, text) in enumerate(boxes):
            for c0, d0, c1, d1, other in boxes[n + 1 :]:
                assert a1 <= c0 or c1 <= a0 or b1 <= d0 or d1 <= b0, (text, other)


def test_verdict_comes_first_and_its_command_is_a_command_of_pretrain(contents):
    page = "".join(Page(html_page(contents)).text)
    assert contents.state == "confirmed"
    assert contents.sentence.startswith("Depth 12 beats the baseline by 2.2%")
    order = [
        "Depth 12 beats",
        "python jobs/pretrain.py",
        "All runs",
        "Configurations",
        "What was found",
        "What it depends on",
    ]
    order += [
        "Hardware profile",
        "Where the time",
        "Differences from the base",
        "Prices",
        "Open questions",
        "How to reproduce",
    ]
    body = page[page.index("Baseline search") :].replace("\N{NO-BREAK SPACE}", " ")
    places = [body.index(text) for text in order]
    assert places == sorted(places)
    assert contents.command.split()[:3] == ["python", "jobs/pretrain.py", "--preset=a100_d10"]
    assert "--depth=12" in contents.command


def test_key_figures_are_means_over_all_seeds_not_the_luckiest(contents):
    mean = (0.88 + 3 * 0.88 + (101 + 102 + 103) / 1e6) / 4
    assert f"val_bpb: {mean:.4f}" in markdown(contents)


def test_what_has_no_price_is_shown_over_time(contents):
    runs = tuple(
        replace(run, outcome=replace(run.outcome, cost_usd=None) if run.outcome else None) for run in contents.runs
    )
    free = replace(contents, runs=runs)
    assert spending_picture(contents)[0].title == "Cost against val_bpb"
    assert spending_picture(free)[0].title == "Time against val_bpb"
    assert "wall time (hours)" in spending_picture(free)[0].svg
    assert "$" not in spending_picture(free)[0].svg


def test_hardware_profile_shows_the_largest_memory_and_what_did_not_work():
    trials = [
        ({}, finished(0.9)),
        ({"device_batch_size": 16}, finished(0.9, facts={"depth": 10, "device_batch_size": 16}, mfu=53.0)),
        ({"device_batch_size": 64}, Outcome(status="OOM", facts={"depth": 10}, peak_memory_bytes=39_000_000_000)),
        ({"device_batch_size": 48}, Outcome(status="infeasible")),
    ]
    made = spec()
    found = [
        (Trial(number=n, tag=f"t{n}", title=str(n), settings=s, arm=made.arm(s).name, seed=42), o)
        for n, (s, o) in enumerate(trials)
    ]
    rows = [[cell.text for cell in row] for row in hardware_table(search_contents(made, found, Path("/nowhere"))).rows]
    assert rows == [
        ["d10 batch 16", "53%", "1,770 ms", "300K", "21.2 GB", "works"],
        ["d10 batch 32", "55%", "1,770 ms", "300K", "21.2 GB", "works"],
        ["d10 batch 64", "-", "-", "-", "39.0 GB", "OOM"],
    ]


def test_a_forecast_stands_beside_what_came_for_each_run_of_a_search_and_each_quantity_of_a_run(contents):
    table = forecast_table(contents)
    assert table.columns == ("#", "Title", "Wall time", "came", "off by", "Memory", "came", "off by")
    texts = [[cell.text for cell in row] for row in table.rows]
    assert texts[0] == ["0", "baseline", "1m40s", "1m45s", "+5%", "2.0 GB", "4.0 GB", "+100%"]
    assert texts[1][2:] == ["1m40s", "50s", "-", "-", "-", "-"]
    assert [table.rows[0][n].tone for n in (4, 7)] == ["good", "warn"]  # within what was forecast, and not
    assert "median (and range): wall time 5% (+5% to +5%), memory 100%" in forecast_sentence(contents)
    for number, said in enumerate(("measured by --dry-run-steps", "for 100 steps, of which 50 were done")):
        run = replace(contents, kind="run", forecasts=contents.forecasts[number : number + 1])
        assert said in forecast_sentence(run)
        assert said in html_page(run)
    rows = forecast_table(replace(contents, kind="run")).rows
    assert [cell.text for cell in rows[1]] == ["start-up", "0.6s", "0.5s", "0.7s", "1.2s", "+100%"]
    assert "Forecast and what came" not in html_page(replace(contents, forecasts=()))


def test_the_picture_of_a_range_test_shows_the_range_and_not_the_explosion(contents):
    test = contents.range_test
    picture = range_pictures(contents)[0]
    root = ET.fromstring(picture.svg)
    assert "to search: " in "".join(key.text for key in picture.keys)
    assert {f"lowest at {test.found.lowest:.3g}", test.end} <= {text.text for text in root.iter("text")}
    ticks = [float(text.text) for text in root.iter("text") if re.fullmatch(r"[\d.]+", text.text or "")]
    assert max(ticks) < 12 < max(test.losses)
    assert "matrix_lr = {low = " in "".join(Page(html_page(contents)).text)
    assert "matrix_lr = {low = " in markdown(contents)
    unknown = RangeTest.of(RATES, test.multipliers, [9.0] * 100)
    assert len(range_pictures(replace(contents, range_test=unknown))) == 1


def test_questions_cost_what_such_runs_cost(contents):
    asked = {question.text: question for question in contents.questions}
    beyond = asked["--depth 12 is the highest value tried: is a higher one better?"]
    assert beyond.cost_usd == pytest.approx(5400 / 3600 * 4.31)
    lost = asked["What does matrix-lr 0.04 reach? (preempted)"]
    assert lost.runs == 1


def test_a_sweep_begins_with_its_law_and_asks_for_what_it_lacks():
    """Parameters ~ C^0.5 by construction; the smallest budget has its lowest loss below its smallest model."""
    budgets, sizes = [1e13, 3e13, 1e14, 3e14, 1e15, 3e15], {2: 1e6, 3: 3e6, 4: 1e7, 6: 3e7}
    base = {"preset": "d4-cpu", "target_flops": budgets[0], "num_iterations": -1, "depth": 2}
    made = SearchSpec(
        name="sweep",
        base=base,
        space={"target_flops": budgets, "depth": list(sizes)},
        scheduler="none",
        noise_repeats=0,
    )
    trials = []
    for budget in budgets:
        best = 2e6 * math.sqrt(budget / 3e13)
        best = 3e5 if budget == budgets[0] else best
        for depth, size in sizes.items():
            arm = made.arm({"target_flops": budget, "depth": depth})
            number = len(trials)
            trial = Trial(
                number=number, tag=f"s-{number}", title=arm.title, settings=arm.settings, arm=arm.name, seed=42
            )
            loss = (2 + 0.03 * math.log(size / best) ** 2) * (budget / 1e13) ** -0.05
            outcome = finished(loss, parameters=int(size), tokens=int(budget / 6 / size), facts={})
            trials.append((trial, outcome))
    contents = search_contents(made, trials, Path("/nowhere"))
    assert "parameters grow as C^0.50 and tokens as C^0.50" in contents.sentence
    assert not contents.places
    assert [q.text.split("?")[0] for q in contents.questions] == ["Which size is best for 1e13 FLOPs"]
    assert "--target-flops=3e15" in contents.command
    page = html_page(contents)
    assert "Compute-optimal parameters and tokens" in page
    assert "the baseline" not in "".join(Page(page).text)


def test_a_search_without_results_has_a_report(tmp_path):
    for trials in ([], [(search()[0][0], None)], [(search()[0][0], Outcome(status="failed", reason="no disk"))]):
        made = search_contents(spec(), trials, tmp_path, going_on=True)
        page = html_page(made)
        assert "<figure" not in page
        assert "So far: No configuration has a result" in page
        assert 'http-equiv="refresh"' in page


def test_files_are_whole_and_replace_the_old_ones(contents, tmp_path):
    for _ in range(2):
        paths = write_report(contents, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["report.html", "report.md", "trials.csv"]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)
    assert paths[0].read_text(encoding="utf-8").endswith("</html>\n")


def test_pareto_front_holds_exactly_what_nothing_undercuts():
    points = [(1, 5), (2, 4), (2, 3), (3, 3.5), (4, 3), (5, 1), (0.5, 6)]
    beaten = {(a, b) for a, b in points for c, d in points if c <= a and d <= b and (c, d) != (a, b)}
    assert pareto_front(points) == sorted(set(points) - beaten)


def test_curves_keep_both_ends_when_they_are_thinned():
    points = [(float(n), 0.0) for n in range(10_001)]
    kept = thinned(points)
    assert len(kept) <= 170
    assert (kept[0], kept[-1]) == (points[0], points[-1])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.88, 0.9003), (-3e-6, 2e-6), (12.0, 98765.0), (0.0031, 0.0058)])
def test_ticks_are_round_inside_and_all_different(low, high):
    ticks = linear_ticks(low, high)
    made = axis([low, high], "", room=0)
    assert 3 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert len({made.show(tick) for tick in made.ticks}) == len(made.ticks)


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 0.0], [2.0, 2.0], [1e-9, 1e9], [-1.0, 5.0]])
def test_an_axis_holds_its_values_whatever_they_are(values):
    for log in (False, True):
        made = axis(values, "", log=log)
        assert all(-1e-9 <= made.place(value) <= 1 + 1e-9 for value in values)
        assert all(-1e-9 <= made.place(tick) <= 1 + 1e-9 for tick in made.ticks)
        assert made.ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [(999.4, "999"), (999.7, "1K"), (1234, "1.23K"), (999_900, "1M"), (0.5, "0.5"), (None, words.UNKNOWN)],
)
def test_a_count_takes_the_unit_of_what_it_is_rounded_to(value, text):
    assert words.count(value) == text
