"""cluster/node.sh on this machine, with programs in place of Ray and Python: what it starts, restarts, stops and refuses."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

NODE_SH = Path(__file__).resolve().parents[1] / "cluster" / "node.sh"


@pytest.fixture
def machine(tmp_path):
    """Runs node.sh in a home of its own, with programs in place of Ray and Python that write down how they were called."""
    home, programs = tmp_path / "home", tmp_path / "bin"
    for folder in (home / ".ray", programs):
        folder.mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("secret")
    said = tmp_path / "said"

    def program(name, body):
        path = programs / name
        path.write_text(f'#!/bin/bash\necho {name} $$ $RAY_AUTH_MODE $RAYCHAT_STORAGE_PATH "$@" >>{said}\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    program("ray", 'trap "exit 0" TERM\necho Ray runtime started.\nwhile true; do sleep 0.05; done')
    program("python", f'trap "echo term $$ >>{said}; exit 0" TERM\nwhile true; do sleep 0.05; done')
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "RAYCHAT_BIN": str(programs)}

    def run(*args):
        return subprocess.run(
            ["bash", str(NODE_SH), *args], env=environment, capture_output=True, text=True, timeout=60
        )

    run.home, run.programs, run.program = home, programs, program
    run.lines = lambda: said.read_text().splitlines() if said.exists() else []
    yield run
    run("stop")


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_node_runs_ray_with_the_token_and_a_watcher_that_comes_back(machine):
    (machine.home / "raychat.env").write_text("RAYCHAT_STORAGE_PATH=s3://bucket/runs\n")
    done = machine("ray", "start", "--address=10.0.0.1:6380")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: len(machine.lines()) == 2)
    ray, watcher = (line.split() for line in machine.lines())
    assert ray[2:] == ["token", "s3://bucket/runs", "start", "--address=10.0.0.1:6380", "--block"]
    assert watcher[4:] == ["-m", "raychat.on_ray.node_watcher", "--address", "10.0.0.1:6380"]
    os.kill(int(watcher[1]), signal.SIGKILL)
    wait_for(lambda: len(machine.lines()) == 3)
    again = machine.lines()[2].split()
    assert again[2:] == watcher[2:]
    # A shutdown of the machine sends SIGTERM to all; the watcher is to hear it.
    os.kill(int((machine.home / ".raychat-node" / "watcher.pid").read_text()), signal.SIGTERM)
    wait_for(lambda: f"term {again[1]}" in machine.lines())
    assert machine("stop").returncode == 0
    wait_for(lambda: not any(alive(int(words[1])) for words in (ray, again)))
    assert machine("stop").returncode == 0, "nothing is left to stop, which is no error"


def test_a_job_on_the_node_finds_python_the_checkout_and_time_to_save(machine):
    machine.program(
        "ray", 'command -v python; pwd; echo "$RAY_JOB_STOP_WAIT_TIME_S"; echo Ray runtime started.; sleep 60'
    )
    assert machine("ray", "start", "--head").returncode == 0
    seen = (machine.home / ".raychat-node" / "ray.log").read_text().splitlines()
    assert seen[:3] == [str(machine.programs / "python"), str(NODE_SH.parents[1]), "120"]


def test_the_head_has_an_autoscaler_of_raychats_own_in_place_of_rays(machine):
    assert machine("ray", "start", "--head", "--port", "6390", "--autoscaling-config=~/file.yaml").returncode == 0
    wait_for(lambda: len(machine.lines()) == 3)
    ray, *beside = (line.split()[2:] for line in machine.lines())
    assert ray[-2:] == ["--no-monitor", "--block"]
    at = ["--address", "127.0.0.1:6390"]
    assert sorted(words[words.index("-m") :] for words in beside) == [
        ["-m", "raychat.on_ray.autoscaler", *at, "--autoscaling-config", "~/file.yaml"],
        ["-m", "raychat.on_ray.node_watcher", *at],
    ]
    pids = [int(line.split()[1]) for line in machine.lines()]
    assert machine("stop").returncode == 0
    wait_for(lambda: not any(map(alive, pids)))


def test_a_rented_machine_whose_ray_has_gone_powers_itself_off(machine):
    machine.program("sudo", "")
    (machine.home / "raychat.env").write_text("RAYCHAT_POWER_OFF_S=1\n")
    assert machine("ray", "start", "--address", "10.0.0.1:6380").returncode == 0
    wait_for(lambda: len(machine.lines()) == 2)
    ray, watcher = machine.lines()
    assert watcher.endswith("--address 10.0.0.1:6380"), "written with a space"
    time.sleep(1.5)
    assert not any(line.startswith("sudo") for line in machine.lines())
    os.kill(int(ray.split()[1]), signal.SIGKILL)
    wait_for(lambda: machine.lines()[-1].startswith("sudo") and machine.lines()[-1].endswith("poweroff"))


def test_stopping_a_node_leaves_other_processes_alone(machine):
    other = subprocess.Popen(["bash", "-c", "exec -a ray-of-others sleep 60"], start_new_session=True)
    try:
        assert machine("ray", "start", "--head", "--port=6390").returncode == 0
        wait_for(lambda: len(machine.lines()) == 2)
        assert machine.lines()[1].endswith("--address 127.0.0.1:6390")
        first = int(machine.lines()[0].split()[1])
        assert machine("ray", "start", "--head").returncode == 0  # once more, as `ray up` does: in place of the first
        assert not alive(first)
        machine("stop")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_node_that_cannot_start_says_why(machine):
    machine.program("ray", "echo the port is taken; exit 1")
    done = machine("ray", "start", "--head")
    assert done.returncode == 1
    assert "the port is taken" in done.stderr
    (machine.home / ".ray" / "auth_token").write_text("")
    assert "there is no token" in machine("ray", "start", "--head").stderr
    assert machine("sart").returncode == 2
