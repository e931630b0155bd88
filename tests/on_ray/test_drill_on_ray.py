"""One short round of the drill: a process is killed, a checkpoint is damaged, and the run ends as if nothing had been."""

import csv
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import ray

from on_ray.conftest import ROOT
from raychat.on_ray.drill import drill
from raychat.on_ray.drill.site import UserSite

pytestmark = pytest.mark.ray


@pytest.fixture
def job(monkeypatch) -> Callable[[list[str]], int]:
    """jobs/drill.py with one worker, and saves twice as often: its runs are half as long. Leaves this process as it was."""
    monkeypatch.setattr(drill, "WORKERS", 1)
    monkeypatch.setattr(drill, "SAVE_EVERY", 5)
    monkeypatch.setattr(drill, "TRAINING", drill.TRAINING | {"num_workers": 1, "save_every": 5})
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # put back what its cluster sets for those that are to join
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return runpy.run_path(str(ROOT / "jobs" / "drill.py"))["main"]


def test_a_short_drill_loses_nothing(job, corpus_dir, tmp_path, capsys):
    table = tmp_path / "table.csv"
    flags = ["--faults=worker-kill,bit-flip", "--seed=3", f"--corpus={corpus_dir}"]
    code = job([*flags, f"--work-dir={tmp_path / 'work'}", f"--out={table}"])
    said = capsys.readouterr().out
    assert code == 0, said
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["fault"] for row in rows} == {"worker-kill", "bit-flip"}
    assert all(row["equal"] == "True" and float(row["resumed_s"]) > 0 for row in rows)
    assert "largest difference of a weight 0, of val_bpb 0" in said


def test_a_process_on_a_node_of_a_users_cluster_is_found_and_killed(cluster):
    site = UserSite(cluster.address)
    node_id = ray.get_runtime_context().get_node_id()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        assert site.is_running(node_id, child.pid)
        site.kill_process(node_id, child.pid)
        assert child.wait(timeout=60) == -9
        assert not site.is_running(node_id, child.pid)
    assert not site.is_running("a" * 56, os.getpid())  # a node that is not there
