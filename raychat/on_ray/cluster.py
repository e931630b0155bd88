"""Getting at a Ray cluster: always an explicit one, and only what was started here is stopped."""

import contextlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray.job_config import JobConfig

import raychat
from raychat.checks import check_reachable
from raychat.config import Config
from raychat.errors import ConfigError, RaychatError

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the machine unasked
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line of a worker twice
    "RAY_worker_niceness": "0",  # of 15, as Ray has it, threads that wait for each other stall behind anything else
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the supervisor watches the nodes itself, and more often
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # of 2 s: how soon a dead worker is noticed
}
NO_TOKEN = "InvalidAuthToken"  # what Ray's messages call a token that is missing or wrong
SLOW_START = "timed out during startup"  # in what Ray says, as a bare Exception, when its processes do not come up
OBJECT_STORE_BYTES = 2**30  # of a cluster on this machine: a few blocks of rows are all that passes through


class ClusterStartError(RaychatError):
    """No cluster could be started on this machine: another try may."""

    exit_code = 1


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to. `started_here`: it ends with the job."""

    address: str
    dashboard_url: str
    started_here: bool

    @property
    def gpus(self) -> int:
        """GPUs of the nodes that are alive."""
        return int(ray.cluster_resources().get("GPU", 0))

    @property
    def accelerators(self) -> list[str]:
        """Kinds of GPU of the nodes that are alive, as Ray names them."""
        prefix = "accelerator_type:"
        return sorted(name.removeprefix(prefix) for name in ray.cluster_resources() if name.startswith(prefix))

    @property
    def cpus(self) -> int:
        """CPUs of the nodes that are alive."""
        return int(ray.cluster_resources().get("CPU", 0))

    @property
    def machines(self) -> int:
        """Nodes that are alive and have CPUs for workers."""
        return sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1)


def address_of(config: Config) -> str:
    """The cluster that `config` or the environment names, else `local`."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or "local"


def local_cpus(config: Config) -> int:
    """CPUs of a cluster on this machine. Workers are processes that share its cores: their number is the user's to choose."""
    workers = 1 if config.cluster.num_workers == "auto" else config.cluster.num_workers
    return max(os.cpu_count() or 1, workers + max(1, config.eval.eval_workers))


def code_path() -> list[str]:
    """Where workers find raychat as this process did: the checkout, unless raychat is installed where Ray is.

    Ray itself passes on the folder of the script and the current one, and neither need be the checkout.
    """
    here, installed = Path(raychat.__file__).parents[1], Path(ray.__file__).parents[1]
    return [] if here == installed else [str(here)]


@contextlib.contextmanager
def connect(config: Config, *, echo: Callable[[str], None]) -> Iterator[Cluster]:
    """Connect to the cluster of `config`, or start one on this machine for as long as the block runs.

    Raises:
        ConfigError: when there is no cluster at the address, or it wants a token that this process has not.
        ClusterStartError: when this machine is too busy to start one.
    """
    address = address_of(config)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it says that the safe default holds
    check_reachable(address)
    local = address == "local"
    echo("starting Ray on this machine" if local else f"connecting to Ray at {address}")
    context = _init(config, address)
    # The cluster's own complaints about workers and nodes that died; the driver says what it means for the run.
    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    dashboard = context.dashboard_url or ""
    cluster = Cluster(address, f"http://{dashboard}" if dashboard else "not running", local)
    echo(
        f"Ray {importlib.metadata.version('ray')}: {cluster.cpus} CPUs, {cluster.gpus} GPUs; dashboard: {cluster.dashboard_url}"
    )
    try:
        yield cluster
    finally:
        ray.shutdown()


def _init(config: Config, address: str) -> Any:
    """Connect this process to the cluster at `address`; `local` starts one."""
    local = address == "local"
    try:
        with _out_of_this_group():
            return ray.init(
                address=address,
                num_cpus=local_cpus(config) if local else None,
                object_store_memory=OBJECT_STORE_BYTES if local else None,
                logging_level=logging.WARNING,
                log_to_driver=False,  # what a worker has to say comes through the inbox, once and whole
                job_config=JobConfig(_py_driver_sys_path=code_path()),
            )
    except (ray.exceptions.AuthenticationError, ConnectionError, ValueError) as error:
        if _is_about_a_token(error):
            raise ConfigError(
                f"The Ray cluster at {address!r} asks for a token, and this process gave none, or another one: export "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or copy the cluster's ~/.ray/auth_token to the same place here)."
            ) from error
        raise ConfigError(
            f"There is no Ray cluster at {address!r} ({error}). Start one with `ray start --head`, correct --address or "
            "RAY_ADDRESS, or leave both out to start one here."
        ) from error
    except Exception as error:
        if not (local and SLOW_START in str(error)):
            raise
        raise ClusterStartError(
            f"Ray did not start on this machine: {error} Is it out of memory or busy with other work? Try again, or connect to "
            "a cluster that is there (--address)."
        ) from error


@contextlib.contextmanager
def _out_of_this_group() -> Iterator[None]:
    """Processes that Ray starts in the block are in a session of their own. On Linux; elsewhere Ray needs them in this one.

    SIGTERM to the group of this process, as `timeout` and shells give it, is for this process alone: it saves, with a
    cluster that is still there, and ends that itself. Where it dies without a word the kernel ends them.
    """
    popen = services.ConsolePopen
    if sys.platform == "linux":
        services.ConsolePopen = _Apart
    try:
        yield
    finally:
        services.ConsolePopen = popen


class _Apart(services.ConsolePopen):
    """A process in a session of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, start_new_session=True, **options)


def _is_about_a_token(error: BaseException | None) -> bool:
    """Whether a cluster refused who did not show its token; Ray says it in what the error was raised from."""
    if error is None or isinstance(error, ray.exceptions.AuthenticationError):
        return error is not None
    return NO_TOKEN in str(error) or _is_about_a_token(error.__cause__)
