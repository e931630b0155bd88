"""The summary of a run is whole or absent, and never holds a number that is none."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from raychat.errors import DataError
from raychat.tracking.ledger import Ledger
from raychat.tracking.summary import Summary


def test_a_summary_comes_back_as_it_was_written(tmp_path):
    summary = Summary(
        status="finished", step=10, num_iterations=10, val_bpb=1.25, checkpoint="checkpoints/step_00000010"
    )
    summary.write(tmp_path / "summary.json")
    assert Summary.read(tmp_path / "summary.json") == summary


def test_what_does_not_apply_is_null_and_present(tmp_path):
    Summary(status="failed").write(tmp_path / "summary.json")
    values = json.loads((tmp_path / "summary.json").read_text())
    assert values.pop("status") == "failed"
    assert set(values.values()) == {None}


def test_every_field_of_the_contract_is_there():
    page = Path(__file__).resolve().parents[2] / "shared" / "design" / "ARCHITECTURE.md"
    if not page.exists():
        pytest.skip("the design pages are not beside this checkout")
    contract = re.search(r"`summary\.json` \(.*?\): (.*?)\. Values that", page.read_text(), re.DOTALL)
    assert contract is not None
    named = re.findall(r"`(\w+)`", contract[1])
    assert [field.name for field in dataclasses.fields(Summary)][: len(named)] == named


def test_every_account_of_the_ledger_has_its_field():
    assert set(Ledger().accounts()) <= {field.name for field in dataclasses.fields(Summary)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "summary.json"
    Summary(status="stopped", val_bpb=1.0).write(path)
    with pytest.raises(ValueError, match="JSON"):
        Summary(status="finished", val_bpb=value).write(path)
    assert Summary.read(path).status == "stopped"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"

    def full(file):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        Summary(status="finished").write(path)
    assert list(tmp_path.iterdir()) == []


def test_keys_of_a_newer_version_are_ignored(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text('{"status": "finished", "step": 3, "joules": 4}')
    assert Summary.read(path) == Summary(status="finished", step=3)


@pytest.mark.parametrize("text", ["", "[]", '{"step": 3}', '{"status": "done"}'])
def test_a_file_that_is_no_summary_is_a_data_error(tmp_path, text):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"summary\.json"):
        Summary.read(path)
