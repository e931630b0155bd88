"""A cluster of several raylets on this machine: nodes come, are told to go, and vanish."""

import subprocess
import sys
import time

import pytest

from raychat.on_ray.processes import children, is_running, kill_tree
from raychat.on_ray.raylets import Raylets

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def raylets():
    with Raylets() as cluster:
        yield cluster


def test_a_node_that_vanishes_takes_its_processes_with_it_and_is_soon_known_to_be_dead(raylets):
    """Ray's defaults need 15 seconds; the head is not touched."""
    node, other = raylets.add(), raylets.add()
    assert raylets.is_alive(node)
    below = children(node.raylet_pid)
    assert below  # its agents at least
    raylets.kill(node)
    assert raylets.wait_dead(node, timeout_s=60) < 10
    assert not any(map(is_running, [node.raylet_pid, *below]))
    assert raylets.nodes == [other]
    assert raylets.is_alive(other)
    assert raylets.is_alive(raylets.head)


def test_an_idle_node_that_is_told_to_go_goes_at_once(raylets):
    """Ray waits for the deadline only while there is work on the node: nothing else keeps it."""
    node = raylets.add(labels={"zone": "spot"})
    raylets.drain(node, deadline_s=100)
    assert raylets.wait_dead(node, timeout_s=60) < 30


def test_a_process_dies_with_all_that_it_started():
    """Three generations, the last of which ignores SIGTERM."""
    deepest = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deepest!r}])"
    top = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {middle!r}])"]
    )
    deadline = time.monotonic() + 60
    while len(below := children(top.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_tree(top.pid)
    top.wait()
    while any(map(is_running, below)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
