"""The process of a trial: how it ends, what follows, and that nothing of it is left when its parent dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raychat.on_ray import leash, trial_process
from raychat.on_ray.processes import children, is_running
from raychat.on_ray.trial_process import TrialEnd, TrialOrder, TrialProcess, peak_bytes

SAVES = """
import signal, sys, time
def save(*_):
    print("stopped: step 3 of 9", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""
DIES_ONCE = """
import os, pathlib
died = pathlib.Path("died")
if died.exists():
    print("well")
else:
    died.touch()
    os.kill(os.getpid(), 9)
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"


def start(code: str, folder: Path, *, workers_bytes=lambda pid: 0, **fields) -> TrialProcess:
    order = TrialOrder(
        tag="t-000", command=(sys.executable, "-c", code), place=str(folder / "run"), log=folder / "t.log", folder=folder,
        **fields,
    )  # fmt: skip
    return TrialProcess(order, environment=dict(os.environ), workers_bytes=workers_bytes, again_s=0.0)


def wait(condition, what, seconds=20.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, what
        time.sleep(0.01)
    return found


def end_of(process: TrialProcess) -> TrialEnd:
    return wait(process.poll, "the trial does not end")


def ready(process: TrialProcess) -> TrialProcess:
    wait(lambda: "ready" in process.order.log.read_text(), "the process does not start")
    return process


def test_what_a_trial_says_is_in_its_log_and_its_end(tmp_path):
    end = end_of(start("print('hello'); import sys; sys.exit(0)", tmp_path))
    assert end == TrialEnd(exit_code=0, text="hello\n")
    assert (tmp_path / "t.log").read_text() == "hello\n"


def test_refused_input_is_not_tried_again(tmp_path):
    end = end_of(start("print('error: no such thing'); import sys; sys.exit(2)", tmp_path))
    assert (end.exit_code, end.error) == (2, "no such thing")
    assert (tmp_path / "t.log").read_text().count("error") == 1


def test_a_driver_that_dies_without_a_word_is_started_again(tmp_path):
    end = end_of(start(DIES_ONCE, tmp_path))
    assert (end.exit_code, end.text) == (0, "well\n")


def test_a_driver_that_dies_at_one_step_again_and_again_is_given_up(tmp_path):
    end = end_of(start("print('try'); import os; os.kill(os.getpid(), 9)", tmp_path))
    assert end.exit_code == -signal.SIGKILL
    assert not end.told


def test_a_trial_that_is_told_to_stop_saves_and_is_not_started_again(tmp_path):
    process = ready(start(SAVES, tmp_path))
    process.stop()
    end = end_of(process)
    assert (end.exit_code, end.told) == (0, True)
    assert "stopped: step 3" in end.text


def test_a_trial_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_process, "KILL_AFTER_S", 0.2)
    process = ready(start(DEAF, tmp_path))
    process.stop()
    assert end_of(process).exit_code == -signal.SIGKILL


def test_ending_a_trial_leaves_no_process(tmp_path):
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {DEAF!r}]); {DEAF}"
    process = ready(start(code, tmp_path))
    pid = process.pid
    wait(lambda: children(pid), "no child")
    below = [pid, *children(pid)]
    process.end(0.2)
    wait(lambda: not any(is_running(one) for one in below), "a process is left")


def test_a_worker_beyond_its_memory_ends_the_trial(tmp_path):
    process = ready(start(SAVES, tmp_path, workers_bytes=lambda pid: 2_000, memory_limit_bytes=1_000))
    end = end_of(process)
    assert (end.over_memory_bytes, end.told) == (2_000, False)
    assert "stopped" in end.text


def test_a_worker_within_its_memory_goes_on(tmp_path):
    process = ready(start(SAVES, tmp_path, workers_bytes=lambda pid: 1_000, memory_limit_bytes=1_000))
    time.sleep(0.05)
    assert process.poll() is None
    process.stop()
    assert end_of(process).told


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_process_on_the_leash_dies_with_its_parent(tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        f"command = [sys.executable, '-I', {leash.__file__!r}, str(os.getpid()), sys.executable, '-c', {DEAF!r}]\n"
        "child = subprocess.Popen(command)\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as said:
        pid = int(said.readline())
        assert said.readline() == "ready\n"
        assert is_running(pid)
        parent.kill()
        parent.wait()
        wait(lambda: not is_running(pid), "the child outlives its parent")


def test_a_leash_whose_holder_is_gone_starts_nothing(tmp_path):
    command = [sys.executable, "-I", leash.__file__, "1234567", sys.executable, "-c", "print('started')"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


def test_peak_memory_is_the_largest_of_those_that_are_there():
    assert peak_bytes([os.getpid(), 1 << 30]) >= peak_bytes([os.getpid()]) > 1_000_000
    assert peak_bytes([1 << 30]) == 0
