"""cluster/machines.sh, with a program in place of ssh that knows three machines: what it brings there, and in which order."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAD, *WORKERS = MACHINES = ["me@10.0.0.1", "two", "three"]
# Machines are folders. What would install or start something is only written down.
SSH = """#!/bin/bash
machine=$5 command=$6
echo "$machine $command" >>{said}
[ -d {machines}/$machine ] || {{ echo no route to host >&2; exit 255; }}
case $command in raychat/cluster/node.sh*) exit ;; esac
cd {machines}/$machine && exec bash -c "$command"
"""


@pytest.fixture
def run(tmp_path):
    """Runs machines.sh; `run.said`: the commands that came to machines."""
    for name in ("bin", "home/.ray", *(f"machines/{machine}" for machine in MACHINES)):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "home" / ".ray" / "auth_token").write_text("secret")
    ssh, said = tmp_path / "bin" / "ssh", tmp_path / "said"
    ssh.write_text(SSH.format(said=said, machines=tmp_path / "machines"))
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    known = {"PATH": f"{ssh.parent}:{os.environ['PATH']}", "HOME": str(tmp_path / "home")}

    def run(*arguments, **settings):
        command = ["bash", str(ROOT / "cluster" / "machines.sh"), *arguments]
        return subprocess.run(command, env=known | settings, capture_output=True, text=True, timeout=60)

    run.said = lambda: said.read_text().splitlines()
    return run


def test_machines_get_the_commit_token_and_settings_and_then_the_head_starts_before_the_others(run, tmp_path):
    done = run("up", *MACHINES, RAYCHAT_BASE_DIR="/shared folder", OTHER="x")
    assert done.returncode == 0, done.stderr
    for machine in MACHINES:
        home = tmp_path / "machines" / machine
        assert (home / "raychat" / "cluster" / "node.sh").exists()
        assert (home / ".ray" / "auth_token").read_text() == "secret"
        assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600
        sourced = subprocess.run(["bash", "-c", ". ./raychat.env; echo $RAYCHAT_BASE_DIR $OTHER"], cwd=home, stdout=-1)
        assert sourced.stdout == b"/shared folder\n"
    *installed, head, two, three = run.said()
    assert sum(line.endswith("node.sh setup") for line in installed) == 3
    assert head.startswith(f"{HEAD} raychat/cluster/node.sh ray start --head")
    assert {two, three} == {f"{name} raychat/cluster/node.sh ray start --address=10.0.0.1:6379" for name in WORKERS}


def test_a_second_time_leaves_no_module_that_is_gone_and_settings_that_were_not_given(run, tmp_path):
    home = tmp_path / "machines" / "two"
    (home / "raychat" / "raychat").mkdir(parents=True)
    (home / "raychat" / "raychat" / "old.py").touch()
    (home / "raychat.env").write_text("RAYCHAT_BASE_DIR=/mine\n")
    assert run("up", "two").returncode == 0
    assert not (home / "raychat" / "raychat" / "old.py").exists()
    assert (home / "raychat.env").read_text() == "RAYCHAT_BASE_DIR=/mine\n"


def test_a_machine_that_is_away_is_named_and_nothing_starts(run, tmp_path):
    done = run("up", HEAD, "away", "two")
    assert (done.returncode, done.stderr) == (1, "away: no route to host\n")
    assert not any("ray start" in line for line in run.said())
    (tmp_path / "home" / ".ray" / "auth_token").unlink()
    assert "there is no token" in run("up", HEAD).stderr
    assert run("up").returncode == 2
    assert "neither up nor down" in run("pu", HEAD).stderr


def test_the_head_ends_last(run):
    assert run("down", *MACHINES).returncode == 0
    assert run.said()[-1].startswith(HEAD)
    assert len(run.said()) == 3
