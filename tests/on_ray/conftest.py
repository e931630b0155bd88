"""One local Ray cluster for all the tests here, never one that happens to run on the machine."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from on_ray.heads import Place, place, started_head
from raychat.on_ray import cluster as clusters
from raychat.on_ray.cluster import ENVIRONMENT, Cluster

CPUS = 4
EXPORT_S = 2.0  # between two reports of a process's metrics; of 10 s, as Ray has it
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """A cluster of `CPUS` CPUs, more than the machine may have. Other processes can join it.

    They find its address in `cluster.address`, and in the environment that it asks for a token.
    """
    patch = pytest.MonkeyPatch()
    patch.delenv("RAY_ADDRESS", raising=False)
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    patch.setenv("RAY_metrics_report_interval_ms", f"{1000 * EXPORT_S:.0f}")
    # Ray turns authentication on for itself, in the environment, where clients that are given an address find it.
    patch.setenv("RAY_AUTH_MODE", "")
    patch.delenv("RAY_AUTH_MODE")
    context = ray.init(
        address="local",
        num_cpus=CPUS,
        num_gpus=0,
        object_store_memory=2**28,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    yield Cluster(ray.get_runtime_context().gcs_address, context.dashboard_url or "", started_here=True)
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
def head(environment) -> Iterator[Place]:
    """A head of `CPUS` CPUs that `ray start` made in the checkout; it asks for a token.

    Ports are its own: of the clusters that `ray.init` starts on a machine, only the first one takes jobs.
    """
    with place() as at, started_head(at, environment, cwd=ROOT, num_cpus=CPUS, object_store_memory=2**28):
        yield at


@pytest.fixture(scope="package")
def job_server(head) -> str:
    """Address of the job server of that head."""
    return head.dashboard
