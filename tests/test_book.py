"""A search's book: what a death leaves, what a second process may do, and which specification it goes on with."""

import json
import math

import pytest

from raychat.errors import CheckpointError, ConfigError
from raychat.search import book as books
from raychat.search.book import LINES, SPEC, Book, read_book, search_dir
from raychat.search.drafts import draft
from raychat.search.roll import Roll
from raychat.search.spec_file import read_spec
from raychat.search.strategy import make_strategy
from raychat.search.trial import Outcome
from raychat.training.lease import LeaseError

BASE = {"preset": "d4-cpu", "num_iterations": 100, "warmup_ratio": 0.1}


def spec(**fields):
    return read_spec({"name": "s", "base": BASE, "space": {"depth": [2, 3, 4]}} | fields)


def trial_of(found, settings=None, **fields):
    return Roll(found.name, {}).add([draft(found.arm(settings or {}), 42, **fields)])[0]


def lines(folder):
    return [json.loads(line) for line in (folder / LINES).read_text().splitlines()]


def search(folder, found, stop_after=99):
    """Run `found` with an outcome from nothing but the trial, and die without a word after so many outcomes."""
    strategy, tags = make_strategy(found), []
    with Book.open(folder, found) as book:
        while not strategy.finished(book.done) and len(tags) < stop_after:
            trial = strategy.propose(book.done, ())[0]
            book.propose(trial)
            book.start(trial.tag)
            bpb = 1 + 0.1 * abs(book.spec.config(trial).model.depth - 3) - 0.1 * trial.rung + 1e-3 * (trial.seed - 42)
            book.end(trial.tag, Outcome(status="finished", val_bpb=bpb, cost_usd=0.25, facts={"rung": trial.rung}))
            tags.append(trial.tag)
    return tags


def test_a_book_reads_as_it_was_written(tmp_path):
    found = spec()
    trial = trial_of(found, {"depth": 2}, role="fork", fork_of="s-007", fork_step=12)
    outcome = Outcome(status="OOM", reason="too 'large'\n", cost_usd=0.5, facts={"peak": 3, "name": "é"})
    with Book.open(tmp_path / "s", found) as book:
        book.propose(trial)
        book.start(trial.tag)
        book.start(trial.tag)
        book.end(trial.tag, outcome)
    again, contents = read_book(tmp_path / "s")
    assert again == found
    assert contents.runs() == [(trial, outcome)]
    assert contents.started == {trial.tag: 2}
    assert contents.spent_usd == 0.5
    assert contents.base["depth"] == 4


@pytest.mark.parametrize("first", [1, 4, 7])
def test_a_search_that_died_goes_on_to_the_same_trials(tmp_path, first):
    whole = search(tmp_path / "whole", spec())
    half = search(tmp_path / "half", spec(), stop_after=first)
    half += search(tmp_path / "half", spec())
    assert half == whole
    (_, a), (_, b) = read_book(tmp_path / "whole"), read_book(tmp_path / "half")
    assert a.runs() == b.runs()
    assert (len(a.sessions), len(b.sessions)) == (1, 2)


@pytest.mark.parametrize("cut", [1, 20])
def test_a_last_line_that_was_cut_short_is_removed(tmp_path, cut):
    search(tmp_path, spec(), stop_after=2)
    whole = (tmp_path / LINES).read_bytes()
    (tmp_path / LINES).write_bytes(whole[:-cut])
    _, seen = read_book(tmp_path)
    assert len(seen.done) == 1
    with Book.open(tmp_path, spec()) as book:
        assert len(book.done) == 1
        book.end("s-001", Outcome(status="finished"))
    assert [line["event"] for line in lines(tmp_path)][-3:] == ["started", "session", "ended"]


def test_damage_before_the_last_line_is_named(tmp_path):
    search(tmp_path, spec(), stop_after=2)
    content = (tmp_path / LINES).read_text().splitlines(keepends=True)
    (tmp_path / LINES).write_text("".join([content[0], "{no\n", *content[2:]]))
    with pytest.raises(CheckpointError, match="Line 2"):
        read_book(tmp_path)


def test_a_changed_spec_is_refused_with_the_differences(tmp_path):
    search(tmp_path, spec(), stop_after=1)
    before = (tmp_path / LINES).read_bytes()
    with pytest.raises(ConfigError, match=r"space\.depth: \[2, 3, 4\] -> \[2, 3\]") as caught:
        Book.open(tmp_path, spec(space={"depth": [2, 3]}, keep=0.4, budget_usd=5, base=BASE | {"price_per_hour": 1.0}))
    assert "keep: default -> 0.4" in str(caught.value)
    assert "budget_usd:" not in str(caught.value)
    assert (tmp_path / LINES).read_bytes() == before
    Book.open(tmp_path, spec()).close()  # the refused one holds nothing


def test_limits_may_change_on_the_way(tmp_path):
    search(tmp_path, spec(max_hours=1), stop_after=1)
    Book.open(tmp_path, spec(max_hours=3, concurrency=2)).close()
    assert read_book(tmp_path)[0].max_hours == 3


def test_a_preset_that_says_something_else_now_is_a_change(tmp_path):
    preset = tmp_path / "own.toml"
    own = {"base": {"preset": f"d4-cpu,{preset}", "num_iterations": 100}}
    preset.write_text("matrix_lr = 0.03\neval_every = 10\n")
    search(tmp_path / "s", spec(**own), stop_after=1)
    preset.write_text("matrix_lr = 0.03\neval_every = 20\n")
    search(tmp_path / "s", spec(**own), stop_after=1)
    preset.write_text("matrix_lr = 0.04\neval_every = 20\n")
    with pytest.raises(ConfigError, match=r"matrix_lr of the presets: 0\.03 -> 0\.04"):
        search(tmp_path / "s", spec(**own), stop_after=1)


def test_one_process_at_a_time_writes(tmp_path):
    with Book.open(tmp_path, spec()) as book:
        with pytest.raises(LeaseError):
            Book.open(tmp_path, spec())
        assert not book.lost
        read_book(tmp_path)


def test_a_tag_that_meant_another_trial_is_refused(tmp_path):
    found = spec()
    with Book.open(tmp_path, found) as book:
        book.propose(trial_of(found))
        book.propose(trial_of(found))
        with pytest.raises(CheckpointError, match="another version"):
            book.propose(trial_of(found, {"depth": 2}))
    assert [line["event"] for line in lines(tmp_path)] == ["session", "proposed"]


def test_an_outcome_is_written_once_and_without_figures_that_are_none(tmp_path):
    found = spec()
    with Book.open(tmp_path, found) as book:
        book.propose(trial_of(found))
        book.end("s-000", Outcome(status="diverged", val_bpb=math.nan, facts={"loss": [1.0, math.inf]}))
        with pytest.raises(ValueError, match="already"):
            book.end("s-000", Outcome(status="finished"))
    _, contents = read_book(tmp_path)
    assert contents.done["s-000"] == Outcome(status="diverged", facts={"loss": [1.0, None]})


def test_hours_are_those_of_all_processes_up_to_their_last_line(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(books.time, "time", lambda: now)
    for _ in range(2):
        book = Book.open(tmp_path, spec())
        now += 3600
        book.start("s-000")
        now += 1800
        hours = book.hours
        book.close()
        now += 36000
    assert hours == pytest.approx(2.5)
    assert read_book(tmp_path)[1].hours == pytest.approx(2.0)


def test_where_there_is_no_search_those_beside_it_are_named(tmp_path):
    Book.open(search_dir(tmp_path, "there"), spec()).close()
    assert (tmp_path / "searches" / "there" / SPEC).is_file()
    with pytest.raises(ConfigError, match="searches beside it: there"):
        read_book(search_dir(tmp_path, "their"))
