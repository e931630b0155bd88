"""The checks of nodes on a cluster of three, of which each may see folders of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the checks said, see checked_nodes.py; in a process of its own, because it connects to a cluster of its own."""
    folder = tmp_path_factory.mktemp("checks")
    unwanted = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAYCHAT_BASE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (folder / "nodes").mkdir()
    command = [sys.executable, str(HERE / "checked_nodes.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "told.json").read_text())


def test_a_node_that_does_not_see_the_base_directory_is_an_error_before_anything_is_made(told):
    message, exit_code = told["refused"]
    assert exit_code == 2
    assert message.splitlines()[1].partition(": ")[0].count("node ") == 2
    assert "nodes/own: it does not see what the driver wrote there" in message
    assert "--base-dir" in message
    assert "--storage-path s3://" in message
    assert told["left"] == sorted(["own", *[f"machine{i}{rest}" for i in range(4) for rest in ("", "/disk")]])


def test_nodes_that_see_it_pass_in_one_line_and_nothing_is_left(told):
    assert len(told["sound"]) == 1
    assert told["sound"][0].startswith("2 other nodes checked in ")
    assert "nodes/shared seen by all, the same software, clocks within " in told["sound"][0]
    assert not told["shared_is_left"]


def test_initial_weights_that_the_driver_alone_sees_are_an_error_before_training(told):
    assert "nodes/own: it does not see config.json, which the driver sees there. Any node may be" in told["unread"]
    assert "--init-from" in told["unread"]


def test_nodes_that_join_without_the_folder_are_left_out(told):
    """Workers are not started on them, nor counted on."""
    assert (told["unfit"], told["slots"], told["avoided"]) == (2, 0, True)
    assert all(" is left out: " in line for line in told["joined"])


def test_a_node_that_dies_meanwhile_holds_nothing_up(told):
    assert told["dying_s"] < 30
    lines, unfit = told["dying"]
    assert unfit == 0
    assert not lines


def test_a_rank_reads_its_blocks_on_its_own_node(told):
    home, nodes = told["read"]
    assert nodes == [home] * 8
