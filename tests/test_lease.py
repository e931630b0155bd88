"""The lease of a run: one driver at a time, a dead one does not stand in the way, a silent one fences itself."""

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from s3_server import CUT, proxy, s3_server

from raychat.liveness import machine_id
from raychat.storage import Store
from raychat.training import lease as module
from raychat.training.lease import STALE_S, Lease, LeaseError, read_lease, taken_over


def write_lease(folder, **changes):
    """A lease of another driver: by default this process on this machine, seen now."""
    content = {
        "holder": "other",
        "host": socket.gethostname(),
        "machine": machine_id(),
        "pid": os.getpid(),
        "heartbeat": time.time(),
    }
    Store.of(folder).write_bytes("lease.json", json.dumps(content | changes).encode())


def dead_pid():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@contextmanager
def holding(folder):
    """A lease that is held within the block."""
    held = Lease(folder)
    held.acquire()
    try:
        yield held
    finally:
        held.release()


def take_over(folder):
    """Acquire the lease in `folder` and give it back."""
    with holding(folder) as held:
        assert read_lease(folder)["holder"] == held.holder


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fail_writes(monkeypatch, store, error):
    """The writes to `store` raise `error` from now on; the list grows with each."""
    calls = []

    def write_bytes(self, name, data):
        calls.append(name)
        raise error

    monkeypatch.setattr(type(store), "write_bytes", write_bytes)
    return calls


@pytest.fixture
def quick(monkeypatch):
    """Hearts that beat a hundred times a second."""
    monkeypatch.setattr(module, "BEAT_S", 0.01)


@pytest.fixture
def lease(tmp_path):
    with holding(tmp_path) as held:
        yield held


def test_a_second_driver_is_refused_and_told_who_holds_the_run(lease, tmp_path):
    named = (
        rf"{re.escape(str(tmp_path))}: process {os.getpid()} on {re.escape(socket.gethostname())}, last seen \ds ago"
    )
    with pytest.raises(LeaseError, match=named + r".*another --model-tag") as refused:
        Lease(tmp_path).acquire()
    assert refused.value.exit_code == 2
    assert read_lease(tmp_path)["holder"] == lease.holder


def test_a_lease_given_back_is_gone_and_free(tmp_path):
    for _ in range(2):
        take_over(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_giving_back_twice_is_no_error(tmp_path):
    with holding(tmp_path) as held:
        held.release()


@pytest.mark.parametrize("machine", [machine_id(), "another"], ids=["this machine", "another machine"])
def test_a_lease_that_is_silent_is_taken_over(tmp_path, machine):
    write_lease(tmp_path, machine=machine, heartbeat=time.time() - STALE_S - 60)
    take_over(tmp_path)


def test_a_lease_of_a_process_that_is_dead_on_this_machine_is_taken_over_at_once(tmp_path):
    write_lease(tmp_path, pid=dead_pid())
    take_over(tmp_path)


def test_a_lease_of_a_live_process_on_this_machine_stands_at_once(tmp_path):
    write_lease(tmp_path)
    told = []
    with pytest.raises(LeaseError, match="Another driver is training"):
        Lease(tmp_path).acquire(told.append)
    assert read_lease(tmp_path)["holder"] == "other"
    assert told == []


ELSEWHERE = {"machine": "another", "host": "gone", "pid": 1 << 30}


@contextmanager
def beating_elsewhere(folder, every_s):
    """A driver on another machine that is alive."""
    stop = threading.Event()

    def beat():
        while not stop.wait(every_s):
            write_lease(folder, **ELSEWHERE)

    write_lease(folder, **ELSEWHERE)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def watching(monkeypatch):
    """A minute of watching takes half a second."""
    monkeypatch.setattr(module, "WATCH_S", 0.02)
    monkeypatch.setattr(module, "STALE_S", 0.5)


def test_a_lease_from_another_machine_is_refused_when_it_is_seen_to_beat(tmp_path, watching):
    told = []
    with beating_elsewhere(tmp_path, every_s=0.1):
        with pytest.raises(LeaseError, match="Another driver is training in .* on gone"):
            Lease(tmp_path).acquire(told.append)
        assert read_lease(tmp_path)["holder"] == "other"
    [line] = told
    assert re.fullmatch(r"another driver was seen \ds ago in .* on gone: waiting to see whether it is alive", line)


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0], ids=["clocks agree", "its clock is ahead"])
def test_a_lease_from_another_machine_that_does_not_beat_is_taken_over_when_it_is_stale(tmp_path, watching, ahead_s):
    write_lease(tmp_path, **ELSEWHERE, heartbeat=time.time() + ahead_s)
    began = time.monotonic()
    take_over(tmp_path)
    assert time.monotonic() - began >= 0.5


def test_a_lease_that_is_given_back_while_it_is_watched_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WATCH_S", 0.02)
    write_lease(tmp_path, **ELSEWHERE)
    gone = threading.Timer(0.1, (tmp_path / "lease.json").unlink)
    gone.start()
    take_over(tmp_path)
    gone.join()


def test_a_driver_that_takes_the_lease_while_a_dead_one_is_watched_stands(tmp_path, watching):
    write_lease(tmp_path, **ELSEWHERE)
    taken = threading.Timer(0.1, write_lease, [tmp_path], {"holder": "third", "machine": "third"})
    taken.start()
    with pytest.raises(LeaseError, match="Another driver is training"):
        Lease(tmp_path).acquire()
    taken.join()
    assert read_lease(tmp_path)["holder"] == "third"


def test_a_lease_that_another_driver_took_is_not_given_back_by_the_old_one(lease, tmp_path):
    write_lease(tmp_path)
    lease.release()
    assert read_lease(tmp_path)["holder"] == "other"


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"holder": "x"}', "\x00"])
def test_a_damaged_lease_holds_nothing(tmp_path, content):
    (tmp_path / "lease.json").write_text(content)
    take_over(tmp_path)


def winners_of(leases):
    """Those of `leases` that are held when all of them were asked for at the same moment."""
    start, winners = threading.Barrier(len(leases)), []

    def acquire(lease):
        start.wait()
        with contextlib.suppress(LeaseError):
            lease.acquire()
            winners.append(lease)

    threads = [threading.Thread(target=acquire, args=[lease]) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners


def test_of_threads_that_start_at_once_one_gets_the_lease(tmp_path, monkeypatch):
    """By the claim alone: nobody waits for the others' writes, which come one after the other."""
    monkeypatch.setattr(module, "SETTLE_S", 0.0)
    write_lease(tmp_path, heartbeat=time.time() - STALE_S - 60)
    leases = [Lease(tmp_path) for _ in range(4)]
    delays = {lease.holder: 0.05 * (1 + place) for place, lease in enumerate(leases)}
    write = Lease._write
    monkeypatch.setattr(Lease, "_write", lambda self: (time.sleep(delays[self.holder]), write(self)))
    winners = winners_of(leases)
    assert [lease.holder for lease in winners] == [read_lease(tmp_path)["holder"]]
    winners[0].release()
    assert list(tmp_path.iterdir()) == []


CONTENDER = """
import sys, time
from pathlib import Path
from raychat.training.lease import Lease, LeaseError
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    Lease(folder).acquire()
    print("won", flush=True)
except LeaseError:
    print("refused", flush=True)
sys.stdin.readline()
"""


def test_of_processes_that_start_at_once_one_gets_the_lease(tmp_path):
    command = [sys.executable, "-c", CONTENDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    answers = []
    for order in ("ready", "answer"):
        answers = [process.stdout.readline().strip() for process in processes]
        if order == "ready":
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
    for process in processes:
        process.communicate("end\n", timeout=30)
    assert sorted(answers) == ["refused", "refused", "won"]


def test_a_claim_that_a_crash_left_behind_does_not_stand_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CLAIM_S", 0.05)
    (tmp_path / "lease.claim").touch()
    take_over(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_heart_beats_while_the_lease_is_held(tmp_path, quick):
    with holding(tmp_path):
        first = read_lease(tmp_path)["heartbeat"]
        wait_for(lambda: read_lease(tmp_path)["heartbeat"] != first)


def test_a_holder_finds_that_another_driver_has_taken_over(tmp_path, quick):
    with holding(tmp_path) as held:
        assert not held.lost
        wait_for(lambda: held.lost or write_lease(tmp_path))  # a beat on its way may write over the first one
        assert "Another driver has taken over" in held.why_lost
    assert read_lease(tmp_path)["holder"] == "other"


def test_a_late_write_of_a_driver_that_was_replaced_takes_nothing_over(tmp_path, quick):
    with holding(tmp_path) as held:
        write_lease(tmp_path, heartbeat=time.time() - STALE_S - 1)
        assert not taken_over(tmp_path, held.holder)
        wait_for(lambda: read_lease(tmp_path)["holder"] == held.holder)
        assert not held.lost


@pytest.mark.parametrize("error", [OSError(errno.EIO, "outage"), OSError(errno.ENOSPC, "no space")], ids=str)
def test_a_beat_that_fails_is_tried_again(tmp_path, quick, monkeypatch, error):
    with holding(tmp_path) as held:
        with monkeypatch.context() as broken:
            calls = fail_writes(broken, held.store, error)
            wait_for(lambda: len(calls) >= 3)
        first = read_lease(tmp_path)["heartbeat"]
        wait_for(lambda: read_lease(tmp_path)["heartbeat"] != first)
        assert not held.lost


def test_a_full_disk_does_not_stop_the_heart(tmp_path, quick, monkeypatch):
    with holding(tmp_path) as held:
        fail_writes(monkeypatch, held.store, OSError(errno.ENOSPC, "no space"))
        first = read_lease(tmp_path)["heartbeat"]
        wait_for(lambda: read_lease(tmp_path)["heartbeat"] > first + 0.05)
        assert read_lease(tmp_path)["holder"] == held.holder


def test_a_holder_that_cannot_beat_fences_itself_before_the_lease_is_stale_and_for_good(tmp_path, quick, monkeypatch):
    assert module.FENCE_S < STALE_S
    monkeypatch.setattr(module, "FENCE_S", 0.3)
    with holding(tmp_path) as held:
        with monkeypatch.context() as broken:
            fail_writes(broken, held.store, OSError(errno.EIO, "outage"))
            wait_for(lambda: held.lost)
        assert "could not be renewed" in held.why_lost
        time.sleep(0.05)
        assert held.lost


def test_a_beat_that_hangs_counts_as_none(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(module, "FENCE_S", 0.3)
    go_on = threading.Event()
    with holding(tmp_path) as held:
        with monkeypatch.context() as broken:
            broken.setattr(type(held.store), "write_bytes", lambda *args: go_on.wait(30))
            wait_for(lambda: held.lost)
        go_on.set()
        wait_for(lambda: not held._thread.is_alive())
        assert held.lost


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        running.make_bucket("runs")
        yield running


@pytest.fixture
def short_settling(monkeypatch):
    monkeypatch.setattr(module, "REMOTE_SETTLE_S", 0.5)


def test_in_a_bucket_a_second_driver_is_refused_and_told_who_holds_the_run(server, short_settling):
    run = Store.of(server.uri("runs/second"))
    with holding(run):
        with pytest.raises(
            LeaseError, match=rf"training in s3://.*runs/second.*: process {os.getpid()} on "
        ) as refused:
            Lease(run).acquire()
        assert "hidden" not in str(refused.value)
    assert run.names() == []


def test_in_a_bucket_a_stale_lease_is_taken_over_and_the_old_holder_learns_of_it(server, short_settling, quick):
    run = Store.of(server.uri("runs/stale"))
    write_lease(run, machine="another", heartbeat=time.time() - STALE_S - 1)
    with holding(run) as held:
        assert not taken_over(run, held.holder)
        assert taken_over(run, "other")


def test_in_a_bucket_of_two_that_start_at_once_one_gets_the_lease(server, short_settling):
    run = Store.of(server.uri("runs/race"))
    leases = [Lease(run) for _ in range(2)]
    (winner,) = winners_of(leases)
    assert read_lease(run)["holder"] == winner.holder
    winner.release()


def test_a_driver_that_was_slow_to_write_waits_until_one_at_work_has_answered():
    lease = Lease(Store.of("s3://bucket/run?region=us-east-1"))
    assert lease._settling_s(0.1) == module.REMOTE_SETTLE_S
    assert lease._settling_s(20.0) > 20.0 + module.BEAT_S


def test_in_a_bucket_a_holder_rides_out_a_short_outage_and_fences_itself_in_a_long_one(
    server, short_settling, quick, monkeypatch
):
    broken = threading.Event()
    with proxy(server, lambda method, path: CUT if broken.is_set() else None) as port:
        with holding(Store.of(server.uri("runs/fenced", port=port))) as held:
            for fence_s, lost in ((60.0, False), (0.5, True)):
                first = held._beaten
                wait_for(lambda first=first: held._beaten > first)
                monkeypatch.setattr(module, "FENCE_S", fence_s)
                broken.set()
                if lost:
                    wait_for(lambda: held.lost)
                else:
                    time.sleep(0.1)
                broken.clear()
                assert held.lost == lost
        assert "could not be renewed" in held.why_lost


def test_a_store_that_does_not_tell_is_not_taken_for_free(server):
    run = Store.of(server.uri("runs/outage"))
    write_lease(run)
    with proxy(server, lambda method, path: CUT) as port:
        away = Store.of(server.uri("runs/outage", port=port))
        with pytest.raises(OSError, match="outage"):
            Lease(away).acquire()
        with pytest.raises(OSError, match="outage"):
            taken_over(away, "mine")
