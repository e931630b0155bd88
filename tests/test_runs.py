"""`jobs/runs.py` tells from the run directories alone which runs live, ended, or died."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from s3_server import CUT, proxy

from raychat.storage import Store
from raychat.tracking.journal import Journal
from raychat.tracking.run_table import format_table, is_live, read_run, run_dirs
from raychat.tracking.summary import Summary

SCRIPT = Path(__file__).resolve().parents[1] / "jobs" / "runs.py"


def make_run(base, tag="d2", steps=3):
    run = base / "runs" / tag
    journal = Journal(run / "metrics.jsonl")
    for step in range(steps):
        journal.log(
            step, {"train/loss": 2.0, "train/tok_per_sec": 1000.0 + step, "cost/usd": 0.5}, time_s=1000.0 + step
        )
    journal.log(steps - 1, {"val/bpb": 1.5}, time_s=1000.0 + steps)
    journal.close()
    (run / "config.json").write_text(json.dumps({"train": {"num_iterations": -1}}))
    (run / "plan.json").write_text(json.dumps({"num_iterations": 40}))
    return run


def end(run, status="finished", **summary):
    """The run ends as a session ends it."""
    journal = Journal(run / "metrics.jsonl")
    journal.event("end", status=status)
    journal.close()
    Summary(status=status, **summary).write(run / "summary.json")


def resume(run):
    journal = Journal(run / "metrics.jsonl")
    journal.event("start", attempt=2)
    journal.close()


def lease(run, seconds_ago, held_s=1000.0):
    beat = time.time() - seconds_ago
    (run / "lease.json").write_text(json.dumps({"since": beat - held_s, "heartbeat": beat}))


def test_a_run_that_goes_on_is_described_by_its_journal(tmp_path):
    run = make_run(tmp_path)
    lease(run, seconds_ago=5)
    row = read_run(run)
    assert (row.tag, row.status, row.step, row.num_iterations) == ("d2", "running", 2, 40)
    assert (row.val_bpb, row.tok_per_sec, row.cost_usd) == (1.5, 1002.0, 0.5)


@pytest.mark.parametrize("beat", [None, 90], ids=["no lease", "stale lease"])
def test_a_run_without_a_heartbeat_and_without_an_end_was_interrupted(tmp_path, beat):
    run = make_run(tmp_path)
    if beat is not None:
        lease(run, seconds_ago=beat)
    assert read_run(run).status == "interrupted"


@pytest.mark.parametrize("beat", [1, 90], ids=["lease still warm", "lease stale"])
def test_an_ended_run_is_described_by_its_summary(tmp_path, beat):
    run = make_run(tmp_path)
    lease(run, seconds_ago=beat)
    end(run, step=40, num_iterations=40, val_bpb=1.25)
    row = read_run(run)
    assert (row.status, row.step, row.val_bpb, row.cost_usd) == ("finished", 40, 1.25, None)


@pytest.mark.parametrize(("beat", "status"), [(1, "running"), (90, "interrupted")])
def test_the_summary_of_an_earlier_end_does_not_describe_a_resumed_run(tmp_path, beat, status):
    run = make_run(tmp_path)
    end(run, "failed", step=1)
    resume(run)
    lease(run, seconds_ago=beat)
    assert (read_run(run).status, read_run(run).step) == (status, 2)


def test_a_run_that_has_just_been_resumed_is_running_before_its_first_record(tmp_path):
    run = make_run(tmp_path)
    end(run, "stopped", step=3)
    lease(run, seconds_ago=-1, held_s=0)
    assert read_run(run).status == "running"


def test_an_end_without_a_summary_still_says_how_the_run_ended(tmp_path):
    run = make_run(tmp_path)
    end(run, "stopped", step=3)
    (run / "summary.json").unlink()
    assert (read_run(run).status, read_run(run).step) == ("stopped", 2)


def test_a_superseded_branch_does_not_count(tmp_path):
    run = make_run(tmp_path, steps=10)
    journal = Journal(run / "metrics.jsonl")
    journal.event("branch", from_step=4)
    journal.close()
    row = read_run(run)
    assert (row.step, row.val_bpb) == (3, None)


def test_a_directory_in_which_nothing_started_is_no_run(tmp_path):
    make_run(tmp_path)
    (tmp_path / "runs" / "planned").mkdir()
    (tmp_path / "runs" / "planned" / "plan.json").write_text("{}")
    assert [run.name for run in run_dirs(tmp_path / "runs")] == ["d2"]
    assert run_dirs(tmp_path / "nowhere") == []


def test_what_is_not_known_is_a_dash(tmp_path):
    run = tmp_path / "runs" / "d4"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    heading, line = format_table([read_run(run)]).splitlines()
    assert heading.split() == ["tag", "status", "step", "val_bpb", "tok/s", "cost", "age", "updated"]
    assert line.split() == ["d4", "interrupted", "-/-", "-", "-", "-", "-", "-"]


def test_a_damaged_lease_is_no_lease(tmp_path):
    (tmp_path / "lease.json").write_text("{")
    assert not is_live(tmp_path)


def job():
    spec = importlib.util.spec_from_file_location("runs_job", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("action", ["--sync", "--reconcile"])
def test_untracked_runs_and_live_runs_are_left_alone(tmp_path, monkeypatch, capsys, action):
    monkeypatch.setattr(sys, "path", list(sys.path))
    make_run(tmp_path, "ended")
    lease(make_run(tmp_path, "live"), seconds_ago=1)
    assert job().main(["--base-dir", str(tmp_path), action]) == 0
    if action == "--sync":
        assert capsys.readouterr().out.splitlines() == ["ended: was not tracked", "live: still running, left alone"]


def test_the_job_runs_outside_the_checkout_without_an_installed_package(tmp_path):
    make_run(tmp_path, "d2")
    # -S: no site-packages, so nothing but the standard library and the checkout can be imported
    command = [sys.executable, "-S", str(SCRIPT), "--base-dir", str(tmp_path)]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "interrupted" in done.stdout


def test_a_journal_of_a_newer_format_is_one_message_and_exit_code_2(tmp_path):
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text('{"event": "journal", "time": 0, "version": 99}\n')
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--base-dir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def send(run, store, segment_bytes):
    """Put a run into an object store, its journal in segments of about so many bytes."""
    content = (run / "metrics.jsonl").read_bytes()
    first = 0
    while first < len(content):
        behind = content.find(b"\n", first + segment_bytes) + 1 or len(content)
        store.child(run.name, "journal").write_bytes(f"segment-{first:012d}.jsonl", content[first:behind])
        first = behind
    for path in run.glob("*.json"):
        store.child(run.name).upload(path.name, path)


def make_runs(base):
    """One run that has ended, one that goes on, one that was interrupted, and a folder that is no run."""
    end(make_run(base, "ended", steps=30), step=30, num_iterations=30, val_bpb=1.25, cost_usd=2.0)
    lease(make_run(base, "live", steps=20), seconds_ago=1)
    make_run(base, "gone", steps=10)
    os.utime(base / "runs" / "gone" / "metrics.jsonl", (1010.0, 1010.0))


def test_runs_in_an_object_store_are_listed_like_runs_in_a_folder(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    make_runs(tmp_path)
    uri = server.uri("runs/listed")
    for run in run_dirs(tmp_path / "runs"):
        send(run, Store.of(uri), segment_bytes=300)
    Store.of(uri).child("planned").write_bytes("plan.json", b"{}")
    assert job().main(["--base-dir", str(tmp_path)]) == 0
    here = capsys.readouterr().out.splitlines()
    assert job().main(["--storage-path", uri]) == 0
    there = capsys.readouterr().out.splitlines()
    assert [line.split()[:6] for line in there] == [line.split()[:6] for line in here]
    assert [line.split()[1] for line in there] == ["status", "finished", "interrupted", "running"]


def test_the_journal_of_an_ended_run_is_not_read_whole(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    make_runs(tmp_path)
    send(tmp_path / "runs" / "ended", Store.of(server.uri("runs/short")), segment_bytes=100)
    read = []

    def watch(method, path):
        if method == "GET" and "segment-" in path and "list-type" not in path:
            read.append(path)

    with proxy(server, watch) as port:
        assert job().main(["--storage-path", server.uri("runs/short", port=port)]) == 0
    assert "finished" in capsys.readouterr().out
    assert len(Store.of(server.uri("runs/short")).child("ended", "journal").names()) > 10
    assert len(set(read)) == 2


def test_what_mlflow_was_sent_is_noted_in_the_object_store(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    make_runs(tmp_path)
    store = Store.of(server.uri("runs/synced"))
    for tag in ("ended", "live"):
        send(tmp_path / "runs" / tag, store, segment_bytes=300)
    module, journals = job(), []

    def sync(run, *, tracking_uri, echo):
        journals.append((run / "metrics.jsonl").read_bytes())
        (run / "mlflow.json").write_text('{"run_id": "7"}')
        return "7"

    monkeypatch.setattr(module, "sync", sync)
    assert module.main(["--storage-path", server.uri("runs/synced"), "--sync"]) == 0
    assert journals == [(tmp_path / "runs" / "ended" / "metrics.jsonl").read_bytes()]
    assert store.child("ended").read_bytes("mlflow.json") == b'{"run_id": "7"}'
    assert capsys.readouterr().out.splitlines()[1] == "live: still running, left alone"


def test_an_object_store_that_is_out_is_one_message_without_the_password(server, tmp_path):
    with proxy(server, lambda method, path: CUT) as port:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--storage-path", server.uri("runs/listed", port=port)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: The runs in s3://")
    assert "hidden" not in done.stderr
    assert done.stderr.count("\n") == 1
