"""The lease of a run directory: one driver at a time, and a dead one does not stand in the way."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from raychat.training import lease as module
from raychat.training.lease import STALE_S, Lease, LeaseError, read_lease


def write_lease(folder, **changes):
    """A lease of another driver: by default this process on this host, seen now."""
    content = {"holder": "other", "host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()}
    (folder / "lease.json").write_text(json.dumps(content | changes))


def dead_pid():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def take_over(folder):
    """Acquire the lease in `folder` and give it back."""
    held = Lease(folder)
    held.acquire()
    assert read_lease(held.path)["pid"] == os.getpid()
    held.release()


@pytest.fixture
def lease(tmp_path):
    held = Lease(tmp_path)
    held.acquire()
    yield held
    held.release()


def test_a_second_driver_is_refused_and_told_who_holds_the_run(lease, tmp_path):
    named = (
        rf"{re.escape(str(tmp_path))}: process {os.getpid()} on {re.escape(socket.gethostname())}, last seen \ds ago"
    )
    with pytest.raises(LeaseError, match=named + r".*another --model-tag") as refused:
        Lease(tmp_path).acquire()
    assert refused.value.exit_code == 2
    assert read_lease(lease.path)["holder"] == lease._mine["holder"]


def test_a_lease_given_back_is_gone_and_free(tmp_path):
    for _ in range(2):
        held = Lease(tmp_path)
        held.acquire()
        held.release()
        assert list(tmp_path.iterdir()) == []


def test_giving_back_twice_is_no_error(tmp_path):
    held = Lease(tmp_path)
    held.acquire()
    held.release()
    held.release()


@pytest.mark.parametrize("host", [socket.gethostname(), "another-host"], ids=["this host", "another host"])
def test_a_lease_that_is_silent_is_taken_over(tmp_path, host):
    write_lease(tmp_path, host=host, heartbeat=time.time() - STALE_S - 60)
    take_over(tmp_path)


def test_a_lease_of_a_process_that_is_dead_on_this_host_is_taken_over_at_once(tmp_path):
    write_lease(tmp_path, pid=dead_pid())
    take_over(tmp_path)


@pytest.mark.parametrize("state", [{}, {"host": "another-host", "pid": 1}], ids=["this host", "another host"])
def test_a_lease_of_a_live_driver_stands(tmp_path, state):
    """On another host its process cannot be asked: its heartbeat decides."""
    write_lease(tmp_path, **state)
    with pytest.raises(LeaseError, match="Another driver is training"):
        Lease(tmp_path).acquire()
    assert read_lease(tmp_path / "lease.json")["holder"] == "other"


def test_a_lease_that_another_driver_took_is_not_given_back_by_the_old_one(lease, tmp_path):
    write_lease(tmp_path)
    lease.release()
    assert read_lease(lease.path)["holder"] == "other"


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"holder": "x"}', "\x00"])
def test_a_damaged_lease_holds_nothing(tmp_path, content):
    (tmp_path / "lease.json").write_text(content)
    take_over(tmp_path)


def test_the_heart_beats_while_the_lease_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    held = Lease(tmp_path)
    held.acquire()
    first = read_lease(held.path)["heartbeat"]
    deadline = time.monotonic() + 10
    while read_lease(held.path)["heartbeat"] == first:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    held.release()


def test_a_full_disk_does_not_stop_the_heart(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    held = Lease(tmp_path)
    held.acquire()
    calls = []

    def full(*args):
        calls.append(args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    deadline = time.monotonic() + 10
    while len(calls) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert held._thread.is_alive()
    held.release()
