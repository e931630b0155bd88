"""`jobs/runs.py` tells from their books alone which searches go on, ended, or died, and what they found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_runs import SCRIPT, job

from raychat.liveness import machine_id
from raychat.search.book import Book, search_dir
from raychat.search.drafts import draft
from raychat.search.roll import Roll
from raychat.search.spec_file import read_spec
from raychat.search.trial import Outcome
from raychat.tracking.run_table import is_live
from raychat.tracking.search_table import format_searches, read_search_row, search_dirs

OUTCOMES = {
    2: Outcome(status="finished", val_bpb=1.5, cost_usd=1.0),
    3: Outcome(status="finished", val_bpb=1.25, cost_usd=2.0),
    4: Outcome(status="OOM", reason="out of memory", cost_usd=0.5),
    5: Outcome(status="infeasible", reason="cannot be"),
}


def open_search(base: Path, name: str = "s") -> Book:
    """A search with four outcomes, still open."""
    spec = read_spec({"name": name, "base": {"preset": "d4-cpu", "depth": 2}, "space": {"depth": [2, 3, 4, 5]}})
    book = Book.open(search_dir(base, name), spec)
    roll = Roll(name, {})
    for depth, outcome in OUTCOMES.items():
        (trial,) = roll.add([draft(spec.arm({"depth": depth}), 42)])
        book.propose(trial)
        book.end(trial.tag, outcome)
    (short,) = roll.add([draft(spec.arm({"depth": 4}), 42, rung=0.25)])
    book.propose(short)
    book.end(short.tag, Outcome(status="finished", val_bpb=1.0))  # of a quarter of the horizon: no rival
    return book


def test_a_search_is_described_by_its_book(tmp_path):
    with open_search(tmp_path) as book:
        row = read_search_row(book.folder)
        assert row.status == "running"
    assert (row.name, row.done, row.failed, row.best, row.val_bpb, row.cost_usd) == ("s", 5, 1, "depth 3", 1.25, 3.5)
    assert row.started_s is not None
    heading, line = format_searches([row], now_s=row.started_s + 3700).splitlines()
    assert heading.split() == [
        "search",
        "status",
        "done",
        "failed",
        "best",
        "val_bpb",
        "cost",
        "age",
        "updated",
        "best",
    ]
    assert line.split() == ["s", "running", "5", "1", "1.2500", "$3.50", "1h01m", "1h01m", "depth", "3"]


@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
def test_a_search_that_said_how_it_ends_is_told_from_one_that_died(tmp_path, status):
    with open_search(tmp_path) as book:
        book.say_end(status)
        assert read_search_row(book.folder).status == status
    assert read_search_row(book.folder).status == status
    Book.open(book.folder, book.spec).close()  # it went on, and died without a word
    assert read_search_row(book.folder).status == "interrupted"


def test_a_lease_of_a_process_of_this_machine_that_is_gone_is_none(tmp_path):
    book = open_search(tmp_path)
    lease = json.loads((book.folder / "lease.json").read_bytes())
    assert is_live(book.folder)
    book.close()
    for holder, live in (({"pid": 2**22 + 1}, False), ({"pid": 2**22 + 1, "machine": "another"}, True)):
        (book.folder / "lease.json").write_text(json.dumps(lease | {"machine": machine_id()} | holder))
        assert is_live(book.folder) == live


def test_a_torn_line_and_an_empty_book_are_no_obstacle(tmp_path):
    with open_search(tmp_path) as book:
        pass
    lines = book.folder / "book.jsonl"
    lines.write_bytes(lines.read_bytes() + b'{"event": "ended", "tag')
    empty = tmp_path / "searches" / "empty"
    empty.mkdir()
    (empty / "book.jsonl").touch()
    assert [read_search_row(folder).done for folder in search_dirs(tmp_path)] == [0, 5]
    assert "empty" in format_searches([read_search_row(empty)])


def test_searches_are_listed_above_runs_with_nothing_but_the_standard_library(tmp_path):
    open_search(tmp_path).close()
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", str(SCRIPT), "--base-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[:2] == ["s", "interrupted"]
    assert done.stdout.splitlines()[-1] == f"no runs yet in {tmp_path / 'runs'}"


def test_runs_elsewhere_are_listed_without_the_searches_of_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("RAYCHAT_BASE_DIR", str(tmp_path))
    open_search(tmp_path).close()
    assert job().main(["--storage-path", str(tmp_path / "elsewhere")]) == 0
    assert capsys.readouterr().out == f"no runs yet in {tmp_path / 'elsewhere'}\n"


def test_an_untracked_search_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with open_search(tmp_path):
        assert job().main(["--base-dir", str(tmp_path), "--sync"]) == 0
    assert job().main(["--base-dir", str(tmp_path), "--sync", "--reconcile"]) == 0
    assert capsys.readouterr().out.splitlines() == ["search s: still running, left alone", "search s: was not tracked"]
