"""One local Ray cluster for all the tests here, never one that happens to run on the machine."""

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray

from raychat.on_ray import cluster as clusters
from raychat.on_ray.cluster import ENVIRONMENT, Cluster

CPUS = 4
ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """A cluster of `CPUS` CPUs, more than the machine may have, with a dashboard. Other processes can join it.

    They find its address in `cluster.address`, and in the environment that it asks for a token.
    """
    patch = pytest.MonkeyPatch()
    patch.delenv("RAY_ADDRESS", raising=False)
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    # Ray turns authentication on for itself, in the environment, where clients that are given an address find it.
    patch.setenv("RAY_AUTH_MODE", "")
    patch.delenv("RAY_AUTH_MODE")
    context = ray.init(
        address="local",
        num_cpus=CPUS,
        num_gpus=0,
        object_store_memory=2**28,
        include_dashboard=True,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    yield Cluster(ray.get_runtime_context().gcs_address, f"http://{context.dashboard_url}", started_here=True)
    ray.shutdown()
    patch.undo()


@pytest.fixture(scope="package")
def environment(cluster) -> dict[str, str]:
    """For processes that are to find raychat by themselves, and the token of the cluster, but nothing of the user's."""
    unwanted = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAYCHAT_BASE_DIR", "RAYCHAT_STORAGE_PATH", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def connected(cluster):
    """Drivers and searches in this process find themselves connected to the cluster of the tests."""

    @contextlib.contextmanager
    def connect(config, *, echo):
        yield cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "connect", connect)
        yield


@pytest.fixture(scope="package")
def job_server(environment) -> Iterator[str]:
    """Address of the job server of a head of `CPUS` CPUs that `ray start` made in the checkout; it asks for a token.

    Ports are its own: of the clusters that `ray.init` starts on a machine, only the first one takes jobs.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets lie there: the names of pytest's folders are too long
    gcs, dashboard, agent = free_ports(3)
    options = {
        "port": gcs,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "node-ip-address": "127.0.0.1",
        "temp-dir": folder,
        "num-cpus": CPUS,
        "num-gpus": 0,
        "object-store-memory": 2**28,
    }
    with (folder / "output").open("w") as output:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--include-dashboard=true", *as_arguments(options)],
            cwd=ROOT,
            env=environment | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 120
    while not (listens(dashboard) and listens(agent)):
        assert head.poll() is None, (folder / "output").read_text()
        assert time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.2)
    yield f"http://127.0.0.1:{dashboard}"
    head.terminate()  # with --block, it takes with it what it started
    head.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def listens(port: int) -> bool:
    """Whether something listens on a port of the loopback interface."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Settings as they are typed."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
