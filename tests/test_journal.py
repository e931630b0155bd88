"""Laws of the journal: no step twice in one branch, nothing torn, nothing that stops the training."""

import errno
import json
import os

import pytest

from raychat.errors import DataError
from raychat.tracking.journal import Journal, read_events, read_journal, records_from


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "d2" / "metrics.jsonl"


def log_steps(path, steps, loss=lambda step: 10.0 - step):
    journal = Journal(path)
    for step in steps:
        journal.log(step, {"train/loss": loss(step)}, time_s=1000.0 + step)
    journal.close()
    return journal


def steps_of(path):
    return [record["step"] for record in read_journal(path)]


def test_what_is_logged_is_read_back_in_order(path):
    log_steps(path, [0, 1, 2])
    assert read_journal(path) == [{"step": s, "time": 1000.0 + s, "train/loss": 10.0 - s} for s in range(3)]


def test_a_replayed_step_keeps_its_first_value(path):
    log_steps(path, range(6))
    journal = log_steps(path, range(3, 9), loss=lambda step: -1.0)
    assert steps_of(path) == list(range(9))
    assert [record["train/loss"] for record in read_journal(path)] == [10, 9, 8, 7, 6, 5, -1, -1, -1]
    assert (journal.replayed, journal.high_water) == (3, 8)


def test_two_kinds_of_record_share_a_step(path):
    journal = Journal(path)
    assert journal.log(5, {"val/bpb": 1.0})
    assert journal.log(5, {"train/loss": 3.0, "val/bpb": 99.0})
    assert not journal.log(5, {"train/loss": 4.0})
    journal.close()
    assert [{k: v for k, v in r.items() if k != "time"} for r in read_journal(path)] == [
        {"step": 5, "val/bpb": 1.0},
        {"step": 5, "train/loss": 3.0},
    ]


@pytest.mark.parametrize("reopened", [False, True], ids=["same process", "after a restart"])
def test_a_branch_supersedes_its_step_and_all_later_ones(path, reopened):
    log_steps(path, range(8))
    journal = Journal(path)
    journal.event("branch", from_step=4)
    assert journal.high_water == 3
    if reopened:
        journal.close()
        journal = Journal(path)
    assert [journal.log(step, {"train/loss": -1.0}) for step in range(2, 6)] == [False, False, True, True]
    journal.close()
    assert [(r["step"], r["train/loss"]) for r in read_journal(path)] == [
        (0, 10.0), (1, 9.0), (2, 8.0), (3, 7.0), (4, -1.0), (5, -1.0),
    ]  # fmt: skip


def test_a_torn_last_line_is_cut_off_and_its_step_can_be_logged_again(path):
    log_steps(path, range(4))
    whole = path.read_bytes()
    for torn_at in range(1, len(whole) - whole.rindex(b"\n", 0, -1) - 1):
        path.write_bytes(whole[:-torn_at])
        journal = log_steps(path, [3])
        assert path.read_bytes() == whole
        assert journal.offset == len(whole)


def test_a_torn_line_longer_than_the_search_window_is_cut_off(path):
    log_steps(path, [0])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 1, "x": "' + b"y" * 200_000)
    Journal(path).close()
    assert path.read_bytes() == whole


def test_every_line_is_strict_json_even_when_values_are_not_finite(path):
    journal = Journal(path)
    journal.log(0, {"a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 1.5, "e": None})
    journal.close()

    def refuse(constant):
        raise AssertionError(constant)

    record = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()][-1]
    assert [record[key] for key in "abcde"] == [None, None, None, 1.5, None]


def test_a_full_disk_loses_metrics_and_says_so_once_but_never_raises(path, monkeypatch, caplog):
    journal = Journal(path)
    journal.log(0, {"train/loss": 1.0})

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert not journal.log(1, {"train/loss": 1.0})
        assert not journal.log(2, {"train/loss": 1.0})
        with pytest.raises(OSError, match="branch"):
            journal.event("branch", from_step=1)
    assert journal.lost == 3
    assert len(caplog.records) == 1
    assert journal.log(1, {"train/loss": 5.0})  # a replay fills the gap
    journal.close()
    assert steps_of(path) == [0, 1]


def test_a_line_that_fits_only_in_part_leaves_no_trace(path, monkeypatch):
    journal = Journal(path)
    before = path.read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:7]))
        assert not journal.log(0, {"train/loss": 1.0})
    assert path.read_bytes() == before
    assert journal.log(0, {"train/loss": 1.0})
    journal.close()
    assert steps_of(path) == [0]


def test_events_are_kept_apart_from_metrics(path):
    journal = Journal(path)
    journal.event("start", attempt=1, workers=2)
    journal.log(0, {"train/loss": 1.0})
    journal.event("preemption", step=0)
    journal.close()
    assert [(event["event"], event.get("attempt")) for event in read_events(path)] == [
        ("start", 1),
        ("preemption", None),
    ]
    assert steps_of(path) == [0]
    assert Journal(path).log(0, {"preemption": 1.0})  # an event with a step is no metric of that step


def test_events_are_signed_by_the_driver_that_writes_them(path):
    for driver in ("a", None, "b"):
        journal = Journal(path, driver=driver)
        journal.event("start", attempt=1)
        journal.log(0, {f"of {driver}": 1.0})
        journal.close()
    assert [event.get("driver") for event in read_events(path)] == ["a", None, "b"]
    assert not any("driver" in record for record in read_journal(path))


def test_reading_from_an_offset_gives_the_rest(path):
    log_steps(path, range(5))
    everything = list(records_from(path))
    assert everything[-1][1] == path.stat().st_size
    for index, (_, offset) in enumerate(everything):
        assert list(records_from(path, offset)) == everything[index + 1 :]


def test_a_damaged_line_costs_only_itself(path, caplog):
    log_steps(path, range(3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\0" * 40 + b"\n", *lines[2:]]))
    assert steps_of(path) == [0, 1, 2]
    assert "damaged" in caplog.text


def test_a_newer_format_is_refused(path):
    path.parent.mkdir(parents=True)
    path.write_text('{"event": "journal", "time": 0, "version": 99}\n')
    with pytest.raises(DataError, match="99"):
        Journal(path)
    with pytest.raises(DataError, match="99"):
        read_journal(path)


def test_reserved_names_and_negative_steps_are_defects(path):
    journal = Journal(path)
    for step, metrics in [(0, {"time": 1.0}), (-1, {"train/loss": 1.0})]:
        with pytest.raises(ValueError, match="cannot journal"):
            journal.log(step, metrics)
    journal.close()


def test_an_absent_journal_is_empty(path):
    assert read_journal(path) == read_events(path) == []


def test_a_reader_is_given_what_the_file_holds_in_its_order(path):
    for _ in range(2):
        found = []
        journal = Journal(path, driver="d", reader=found.append)
        for step in (0, 1, 1, 2):
            journal.log(step, {"train/loss": float("nan") if step == 1 else 2, "val/bpb": 1.0})
        journal.event("branch", from_step=1)
        assert (journal.last_step("train/loss"), journal.last_step("absent")) == (0, -1)
        journal.log(1, {"train/loss": 5.0})
        journal.event("checkpoint", step=2, path="x")
        journal.close()
        assert found == [record for record, _ in records_from(path)]
        assert journal.last_step("train/loss") == max(steps_of(path))


def test_a_reader_learns_of_events_for_which_there_was_no_space(path, monkeypatch):
    """Or failures on a full disk would be retried for ever."""
    found = []
    journal = Journal(path, reader=found.append)
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
        journal.log(0, {"train/loss": 1.0})
        journal.event("failure", cause="crash")
    journal.close()
    assert [record["event"] for record in found] == ["journal", "failure"]
