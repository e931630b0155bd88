"""Notices become drains: on nodes added to the cluster for it, which stay busy as long as the watchers look at them."""

import logging
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._raylet import GcsClient
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from on_ray.conftest import ROOT
from raychat.on_ray import node_watcher
from raychat.on_ray.node_watcher import Watch, start_watchers

pytestmark = pytest.mark.ray

STANDALONE = [sys.executable, "-m", "raychat.on_ray.node_watcher"]


@pytest.fixture
def node(cluster):
    """Id of one more node of the cluster."""
    params = RayParams(
        gcs_address=cluster.address,
        num_cpus=0,
        num_gpus=0,
        object_store_memory=80 * 2**20,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
        include_log_monitor=False,
    )
    handle = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
    wait_until(lambda: handle.node_id in living())
    yield handle.node_id
    handle.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
    wait_until(lambda: handle.node_id not in living())


@pytest.fixture
def gcp():
    """A metadata server of Google; call it with whether the machine is preempted. Its URL is `url`."""
    state = {"preempted": "FALSE"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            self.send_response(200 if "computeMetadata" in self.path else 404)
            self.send_header("Metadata-Flavor", "Google")
            self.end_headers()
            self.wfile.write({"id": "1", "preempted": state["preempted"]}.get(name, "NONE").encode())

        def log_message(self, *_):
            pass

    def preempt():
        state["preempted"] = "TRUE"

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        preempt.url = f"http://127.0.0.1:{server.server_port}"
        yield preempt
        server.shutdown()


def hold(node):
    """An actor on the node: one that has nothing to do ends by itself as soon as it is drained."""

    class Busy:
        def where(self):
            return ray.get_runtime_context().get_node_id()

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    actor = ray.remote(Busy).options(num_cpus=0, scheduling_strategy=there).remote()
    assert ray.get(actor.where.remote()) == node
    return actor


def living():
    return {entry["NodeID"] for entry in ray.nodes() if entry["Alive"]}


def draining(cluster):
    """Node id -> deadline in unix seconds."""
    found = GcsClient(address=cluster.address).get_draining_nodes(timeout=10)
    return {node.hex() if isinstance(node, bytes) else str(node): ms / 1000 for node, ms in found.items()}


def wait_until(happened, timeout_s=30):
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_notice_drains_the_node_until_its_deadline(cluster, node, gcp, monkeypatch):
    """The driver's watchers find a new node by themselves, and drop one that is gone."""
    monkeypatch.setenv("RAYCHAT_METADATA_URL", gcp.url)
    known = dict.fromkeys(living() - {node}) | {"gone": None}
    begun = time.monotonic()
    start_watchers(known)
    assert time.monotonic() - begun < 1
    assert known.keys() == living()
    watcher = known[node]
    start_watchers(known)
    assert known[node] is watcher
    gcp()
    before = time.time()
    wait_until(lambda: node in draining(cluster))
    assert before + 24 <= draining(cluster)[node] <= time.time() + 25
    assert draining(cluster).keys() == {node}
    start_watchers(known, living() - {node})  # its run is not on this node any more, which may idle now
    assert known.keys() == living() - {node}
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(watcher.__ray_ready__.remote(), timeout=30)


def test_a_shutdown_of_the_machine_drains_the_node(cluster, node, environment):
    """SIGTERM to a watcher that runs beside the node, with the cluster's token from its environment."""
    holder = hold(node)
    command = [*STANDALONE, "--address", cluster.address, "--node-id", node, "--grace-s", "60", "--poll-s", "0.1"]
    watcher = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert node in watcher.stderr.readline()  # it watches now
    before = time.time()
    watcher.send_signal(signal.SIGTERM)
    _, told = watcher.communicate(timeout=30)
    assert watcher.returncode == 0, told
    assert draining(cluster).keys() == {node}
    assert before + 59.9 <= draining(cluster)[node] <= time.time() + 60
    ray.kill(holder)


def test_without_an_id_the_nodes_of_this_machine_are_meant(cluster, node):
    assert set(Watch(cluster.address).nodes()) == living()


def test_the_token_of_the_cluster_is_wanted_before_there_is_a_notice(cluster, environment):
    without = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [*STANDALONE, "--address", cluster.address], cwd=ROOT, env=without, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr


def test_a_drain_is_tried_again_until_it_is_accepted(monkeypatch):
    """Without a cluster: the calls go to a stand-in that is away at first, and then refuses once."""
    calls = []

    class Gcs:
        def drain_node(self, node_id, reason, text, deadline_ms, timeout):
            calls.append((node_id, deadline_ms / 1000))
            if len(calls) == 1:
                raise ConnectionError("no head")
            return len(calls) > 2, "not now"

    monkeypatch.setattr(node_watcher, "RETRY_S", 0.01)
    watch = Watch("127.0.0.1:1", node_id="n", poll_s=0.01)
    monkeypatch.setattr(watch, "_gcs", Gcs)
    deadline = time.time() + 60
    watch.shut_down(60)
    watch.run()
    assert watch.drained
    assert [node_id for node_id, _ in calls] == ["n"] * 3
    assert {round(when - deadline) for _, when in calls} == {0}


def test_trying_ends_with_the_deadline(monkeypatch):
    monkeypatch.setattr(node_watcher, "RETRY_S", 0.01)
    watch = Watch("127.0.0.1:1", node_id="n", poll_s=0.01)
    watch.shut_down(0.1)
    watch.run()
    assert not watch.drained


def test_outside_of_the_clouds_a_watcher_says_one_line(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "raychat")
    monkeypatch.setattr(node_watcher, "DETECT_AGAIN_S", 0.0)
    looked = threading.Semaphore(0)
    monkeypatch.setattr(node_watcher, "detect", lambda _: looked.release())
    watch = Watch("127.0.0.1:1", node_id="n", poll_s=0.001)
    monkeypatch.setattr(watch, "_drain", lambda _: True)
    thread = threading.Thread(target=watch.run)
    thread.start()
    for _ in range(5):
        assert looked.acquire(timeout=10)
    assert [record.message for record in caplog.records] == ["this machine is in no cloud that gives notice"]
    watch.shut_down(1)
    thread.join()
