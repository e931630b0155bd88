"""One short round of the drill: a process is killed, a checkpoint is damaged, and the run ends as if nothing had been."""

import csv
import os
import subprocess
import sys

import pytest
import ray

from on_ray.conftest import ROOT
from raychat.on_ray.drill.site import UserSite

pytestmark = pytest.mark.ray


def test_a_short_drill_loses_nothing(corpus_dir, tmp_path):
    table = tmp_path / "table.csv"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(ROOT / "jobs" / "drill.py"), "--faults=worker-kill,bit-flip", "--seed=3"]
    command += [f"--corpus={corpus_dir}", f"--work-dir={tmp_path / 'work'}", f"--out={table}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["fault"] for row in rows} == {"worker-kill", "bit-flip"}
    assert all(row["equal"] == "True" and float(row["resumed_s"]) > 0 for row in rows)
    assert "largest difference of a weight 0, of val_bpb 0" in done.stdout


def test_a_process_on_a_node_of_a_users_cluster_is_found_and_killed(cluster):
    site = UserSite(cluster.address)
    node_id = ray.get_runtime_context().get_node_id()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        assert site.is_running(node_id, child.pid)
        site.kill_process(node_id, child.pid)
        assert child.wait(timeout=60) == -9
        assert not site.is_running(node_id, child.pid)
    assert not site.is_running("a" * 56, os.getpid())  # a node that is not there
