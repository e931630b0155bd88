"""cluster/node.sh with a real Ray: a machine joins a cluster, takes a job as it is typed, and leaves."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ray._raylet import GcsClient  # pyrefly: ignore[missing-module-attribute]

from on_ray.conftest import ROOT
from on_ray.heads import RAY, Place, as_arguments, free_ports
from raychat.on_ray.processes import children, is_running
from raychat.on_ray.raylets import ALIVE

pytestmark = pytest.mark.ray

# What a job finds, as the README has users type it: a `python` that has raychat, and the checkout around it.
FINDS = "import os, pathlib, raychat; print('found', raychat.__file__, os.getcwd(), os.environ['RAYCHAT_STORAGE_PATH'])"


@pytest.fixture
def node_sh(environment, tmp_path):
    """Runs node.sh on a machine, which is a home directory that has the token; gives what it said."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    token = os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray" / "auth_token").read_text()
    (home / ".ray" / "auth_token").write_text(token)
    (home / "raychat.env").write_text("RAYCHAT_STORAGE_PATH=/shared/runs\n")
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != str(RAY.parent))
    known = environment | {"HOME": str(home), "RAYCHAT_BIN": str(RAY.parent), "PATH": path}
    known = {name: value for name, value in known.items() if name not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}

    def run(*arguments: str, fails: bool = False) -> str:
        command = ["bash", str(ROOT / "cluster" / "node.sh"), *arguments]
        done = subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True, timeout=150)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.state = home / ".raychat-node"
    yield run
    run("stop")


def machines(at: Place) -> int:
    """Nodes that joined by node.sh."""
    nodes = GcsClient(address=at.gcs).get_all_node_info(timeout=10).values()
    return sum(node.state == ALIVE and "machine" in node.resources_total for node in nodes)


def test_a_machine_joins_takes_a_job_and_leaves(head: Place, environment, node_sh: Callable[..., str]):
    (port,) = free_ports(1)
    options = {"dashboard_agent_listen_port": port, "node_ip_address": "127.0.0.1", "num_cpus": 1, "num_gpus": 0}
    options |= {"object_store_memory": 2**27, "resources": '{"machine": 1}'}
    node_sh("ray", "start", f"--address={head.gcs}", *as_arguments(options))
    pids = [int((node_sh.state / f"{name}.pid").read_text()) for name in ("ray", "watcher")]
    pids += [below for pid in pids for below in children(pid)]
    assert machines(head) == 1

    submit = [RAY, "job", "submit", "--address", head.dashboard, "--entrypoint-resources", json.dumps({"machine": 1})]
    done = subprocess.run(
        [*submit, "--", "python", "-c", FINDS], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"found {ROOT / 'raychat' / '__init__.py'} {ROOT} /shared/runs" in done.stdout
    assert "watching over" in (node_sh.state / "watcher.log").read_text()

    node_sh("stop")
    assert not any(map(is_running, pids))
    assert machines(head) == 0
