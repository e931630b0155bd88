"""The driver of a run: prepares data, has it trained, keeps the run directory.

What happens to the workers meanwhile is the supervisor's. Ray's own checkpoints are off: raychat scans its storage for
the newest verified checkpoint itself.
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import ray

from raychat.config import Config
from raychat.data.prepare import prepare
from raychat.data.shards import ShardInfo, ShardTask
from raychat.errors import ConfigError
from raychat.on_ray import cluster as clusters
from raychat.on_ray.limits import RunFailedError
from raychat.on_ray.node_checks import NodeChecks
from raychat.on_ray.shards import make_on_ray
from raychat.on_ray.sizing import uses_gpus, wants_gpus, worker_range
from raychat.on_ray.supervisor import Supervisor
from raychat.planning.money import priced
from raychat.storage import Store
from raychat.tracking.mlflow_shipper import PARENT_TAG, MLflowShipper
from raychat.tracking.shipping_state import MLFLOW_STATUS
from raychat.tracking.summary import Summary
from raychat.tracking.tracking_uri import default_tracking_uri, store_error
from raychat.training import device
from raychat.training.session import Session

Echo = Callable[[str], None]
FINISH_S = 20.0  # for MLflow to take the last points and artifacts; what is left, `jobs/runs.py --sync` sends
UPLOAD_S = 1800.0  # when a checkpoint is among them


def run(config: Config, *, echo: Echo) -> Summary | None:
    """Train `config` on Ray to its end; None when it had reached it before.

    Raises:
        RaychatError: what the user gave cannot work, or the run failed for good.
    """
    config, echo = with_absolute_paths(priced(config)), _unbreakable(echo)
    tracking_uri = _tracking_uri(config)
    if clusters.address_of(config) == "local":  # refuse what this machine has not before anything is prepared
        device.refuse_gpu_sized(config, device.resolve(config, local_world_size=1))
    with contextlib.ExitStack() as stack:
        cluster = LazyCluster(config, stack, echo)
        if clusters.address_of(config) != "local" and not config.run_dir.exists():
            cluster.connected()  # what its nodes lack is said before anything is made
        data = prepare(config, with_gpus=cluster.has_gpus(), maker=cluster.make_shards, echo=echo)
        session = Session(config, data, echo=echo, eval_workers=True)
        if session.done:
            session.abort()
            echo(session.done_line())
            return None
        try:
            live = cluster.connected()
            _check_cluster(session, live)
        except BaseException:
            session.abort()
            raise
        return _run_session(session, live, cluster.checks(), tracking_uri)


def with_absolute_paths(config: Config) -> Config:
    """`config` for processes that have another current directory, home and environment than this one."""
    storage = config.run.storage_path if "://" in config.run.storage_path else str(config.runs_dir)
    given = {"core_bundle": config.eval.core_bundle, "init_from": config.run.init_from, "prices": config.plan.prices}
    paths = {name: str(Path(at).expanduser().absolute()) for name, at in given.items() if at and "://" not in at}
    return Config.from_flat(paths | {"base_dir": str(config.base_dir), "storage_path": storage}, base=config)


def _run_session(session: Session, cluster: clusters.Cluster, checks: NodeChecks, tracking_uri: str | None) -> Summary:
    status: Literal["finished", "failed", "stopped"] = "failed"
    shipper, error = _shipper(session, tracking_uri, cluster), None
    try:
        session.echo(f"run directory: {Store.of(session.config.run_uri)}")
        status = _supervised(session, cluster, checks, shipper)
    except BaseException as failure:
        error = str(failure) or type(failure).__name__
        raise
    finally:
        summary = session.close(
            status,
            mlflow_run_id=shipper.run_id if shipper else None,
            error=error,
            finish_tracking=lambda summary: _finish_tracking(session, shipper, summary),
        )
        for line in session.closing_lines(summary):
            session.echo(line)
    return summary


def _supervised(
    session: Session, cluster: clusters.Cluster, checks: NodeChecks, shipper: MLflowShipper | None
) -> Literal["finished", "stopped"]:
    started = []

    def on_start() -> None:  # after the journal says where the first attempt begins
        if shipper and not started:
            shipper.start()
            started.append(True)

    try:
        with _stop_on_signals() as stop_asked:
            return Supervisor(session, cluster, checks, stop_asked=stop_asked, on_start=on_start).run()
    except (ray.exceptions.RayError, ConnectionError) as lost:
        raise RunFailedError(
            f"The Ray cluster at {cluster.address} is gone ({type(lost).__name__}). The same command goes on from the "
            "newest checkpoint."
        ) from lost


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], str | None]]:
    """Gives what says whether SIGTERM or Ctrl-C asked the run to save and stop, and which; a second Ctrl-C ends at once."""
    asked: list[str] = []

    def ask(number: int, _: object) -> None:  # no more than this: it may interrupt anything, a line being printed too
        asked.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def first() -> str | None:
        return asked[0] if asked else None

    if threading.current_thread() is not threading.main_thread():  # a Tune trial; its driver handles signals
        yield first
        return
    old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield first
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _unbreakable(echo: Echo) -> Echo:
    """`echo` that falls silent when nobody reads any more: a closed terminal must not end a run."""
    broken = []

    def careful(text: str) -> None:
        if broken:
            return
        try:
            echo(text)
        except OSError:
            broken.append(text)

    return careful


class LazyCluster:
    """Connects when it is first needed: a run that is done, or whose data are there, should not wait for Ray."""

    def __init__(self, config: Config, stack: contextlib.ExitStack, echo: Echo) -> None:
        self._config, self._stack, self._echo = config, stack, echo
        self._cluster: clusters.Cluster | None = None
        self._checks: NodeChecks | None = None

    def connected(self) -> clusters.Cluster:
        """The cluster, connected, and its nodes checked.

        Raises:
            ConfigError: it cannot be reached, or nodes of it cannot train.
        """
        if self._cluster is None:
            self._cluster = self._stack.enter_context(clusters.connect(self._config, echo=self._echo))
            self.checks().check_all()
        return self._cluster

    def checks(self) -> NodeChecks:
        """Those of the cluster's nodes; it must be connected."""
        if self._checks is None:
            self._checks = NodeChecks(self._config, echo=self._echo)
        return self._checks

    def has_gpus(self) -> bool:
        """Whether the run will be on GPUs; asks the cluster only where that decides something."""
        if self._config.data.corpus or self._config.precision.device_type == "cpu":
            return False
        if wants_gpus(self._config):
            return True
        if clusters.address_of(self._config) == "local":
            import torch  # slow to load, and only needed here

            return torch.cuda.is_available()
        return self.connected().gpus > 0

    def make_shards(self, tasks: list[ShardTask]) -> Iterator[ShardInfo]:
        """A maker of shards on the cluster."""
        if tasks:
            self.connected()
        return make_on_ray(tasks)


def _tracking_uri(config: Config) -> str | None:
    """Where MLflow keeps the run, or None when tracking is off."""
    if config.run.run == "dummy":
        return None
    uri = config.run.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(config.base_dir)
    if problem := store_error(uri):
        raise problem
    return uri


def _shipper(session: Session, uri: str | None, cluster: clusters.Cluster) -> MLflowShipper | None:
    if uri is None:
        return None
    config = session.config
    use_gpu = uses_gpus(config, cluster, session.starts())
    workers, _ = worker_range(config, cluster, use_gpu, session.starts())
    parent = {PARENT_TAG: config.run.mlflow_parent} if config.run.mlflow_parent else {}
    return MLflowShipper(
        session.run_dir,
        tracking_uri=uri,
        experiment=config.run.experiment,
        **session.tracking_facts(),
        tags=parent
        | {
            "raychat.git_commit": _git_commit(),
            "raychat.run_dir": str(session.run_dir),
            "raychat.world_size": workers,
            "raychat.device": ", ".join(cluster.accelerators) or "gpu" if use_gpu else "cpu",
        },
        echo=session.echo,
    )


def _finish_tracking(session: Session, shipper: MLflowShipper | None, summary: Summary) -> None:
    if shipper is None:
        return
    artifacts = session.artifacts()
    grace_s = FINISH_S
    if session.config.run.upload_checkpoint and "://" in (summary.checkpoint or ""):
        session.echo("--upload-checkpoint: the checkpoint stays in the object store; summary.json in MLflow says where")
    elif session.config.run.upload_checkpoint and summary.checkpoint:
        session.echo(f"uploading {summary.checkpoint} to MLflow")
        artifacts.append(Path(summary.checkpoint))
        grace_s = UPLOAD_S
    shipper.finish(MLFLOW_STATUS[summary.status], artifacts, grace_s)


def _check_cluster(session: Session, cluster: clusters.Cluster) -> None:
    """Refuse what this cluster cannot do."""
    config = session.config
    use_gpu = uses_gpus(config, cluster, session.starts())
    _, fewest = worker_range(config, cluster, use_gpu, session.starts())
    if not use_gpu and not cluster.started_here:
        device.refuse_gpu_sized(config, device.resolve(config, local_world_size=1), cores=cluster.cpus)
    there, kind = (cluster.gpus, "GPUs") if use_gpu else (cluster.cpus, "CPUs")
    if cluster.started_here and fewest > there:
        raise ConfigError(
            f"--num-workers {fewest}: this machine has {there} {kind}. Use --num-workers {max(1, there)}, or a cluster that "
            "has more (--address)."
        )


def _git_commit() -> str:
    """The commit of the code that runs, or `unknown` where it is no checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    found = subprocess.run(
        ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"
