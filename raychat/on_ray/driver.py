"""The driver of a run: prepares data, starts Ray Train attempts until the run is done, keeps the run directory.

Each attempt is one TorchTrainer of a fixed size under a fresh name. Ray's own retries and checkpoints are off: raychat
scans its storage for the newest verified checkpoint itself, and chooses the next size from what the cluster has.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raychat.config import Config
from raychat.data.prepare import prepare
from raychat.data.shards import ShardInfo, ShardTask
from raychat.errors import ConfigError, RaychatError
from raychat.on_ray import cluster as clusters
from raychat.on_ray.inbox import open_inbox
from raychat.on_ray.shards import make_on_ray
from raychat.on_ray.stream import RowsDataConfig
from raychat.on_ray.worker import train_worker
from raychat.planning import recipe
from raychat.tracking.mlflow_shipper import MLflowShipper
from raychat.tracking.shipping_state import MLFLOW_STATUS
from raychat.tracking.summary import Summary
from raychat.tracking.tracking_uri import default_tracking_uri, store_error
from raychat.training import device
from raychat.training.build import Job
from raychat.training.session import Session

Echo = Callable[[str], None]
PUMP_S = 0.2
INBOX_TIMEOUT_S = 60.0
FINISH_S = 20.0  # for MLflow to take the last points and artifacts; what is left, `jobs/runs.py --sync` sends
UPLOAD_S = 1800.0  # when a checkpoint is among them


class RunFailedError(RaychatError):
    """Training failed again and again; the last checkpoint is good."""

    exit_code = 1


def run(config: Config, *, echo: Echo) -> Summary | None:
    """Train `config` on Ray to its end; None when it had reached it before.

    Raises:
        RaychatError: what the user gave cannot work, or the run failed for good.
    """
    config, echo = with_absolute_paths(config), _unbreakable(echo)
    tracking_uri = _tracking_uri(config)
    if clusters.address_of(config) == "local":  # refuse what this machine has not before anything is prepared
        device.refuse_gpu_sized(config, device.resolve(config, local_world_size=1))
    with contextlib.ExitStack() as stack:
        cluster = LazyCluster(config, stack, echo)
        data = prepare(config, with_gpus=cluster.has_gpus(), maker=cluster.make_shards, echo=echo)
        session = Session(config, data, echo=echo)
        if session.done:
            session.abort()
            echo(session.done_line())
            return None
        try:
            live = cluster.connected()
            _check_cluster(config, live, echo)
        except BaseException:
            session.abort()
            raise
        return _run_session(session, live, tracking_uri)


def with_absolute_paths(config: Config) -> Config:
    """`config` for processes that have another current directory, home and environment than this one."""
    return Config.from_flat({"base_dir": str(config.base_dir), "storage_path": str(config.runs_dir)}, base=config)


def _run_session(session: Session, cluster: clusters.Cluster, tracking_uri: str | None) -> Summary:
    status: Literal["finished", "failed", "stopped"] = "failed"
    shipper = _shipper(session, tracking_uri, cluster)
    try:
        session.echo(f"run directory: {session.run_dir}")
        status = _attempts(session, cluster, shipper)
    finally:
        summary = session.close(status, mlflow_run_id=shipper.run_id if shipper else None)
        if shipper:
            _finish_tracking(session, shipper, summary)
        for line in session.closing_lines(summary):
            session.echo(line)
    return summary


def _attempts(
    session: Session, cluster: clusters.Cluster, shipper: MLflowShipper | None
) -> Literal["finished", "stopped"]:
    most, failures, best_step, started = session.config.cluster.max_failures, 0, -1, False
    while True:
        workers, use_gpu = choose_workers(session.config, cluster)
        job = session.begin_attempt(world_size=workers, use_gpu=use_gpu)
        if shipper and not started:  # after the journal says where the first attempt begins
            shipper.start()
            started = True
        step = session.start.step if session.start else 0
        failures = failures if step <= best_step else 0  # progress since the last failure starts the count anew
        best_step = step
        try:
            error, asked_to_stop = _attempt(session, job, workers, use_gpu)
        except (ray.exceptions.RayError, ConnectionError) as lost:
            raise RunFailedError(
                f"The Ray cluster at {cluster.address} is gone ({type(lost).__name__}). The same command goes on from the "
                "newest checkpoint."
            ) from lost
        if session.ended:
            return "finished" if session.ended.finished else "stopped"
        if session.failure:
            raise WorkerError(session.failure.message, session.failure.exit_code)
        if asked_to_stop:  # it died before it could save
            return "stopped"
        failures += 1
        if failures > most:
            raise RunFailedError(f"training failed {failures} times from step {step}: {error}")
        session.echo(f"attempt {job.attempt} failed: {error}")
        session.echo(f"restarting from the newest checkpoint (failure {failures} of {most})")


class WorkerError(RaychatError):
    """A RaychatError of a worker, told by the driver."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _attempt(session: Session, job: Job, workers: int, use_gpu: bool) -> tuple[str, bool]:
    """Run one TorchTrainer to its end: what went wrong, in one line, and whether it was asked to stop."""
    inbox = open_inbox()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": dataclasses.asdict(job), "inbox": inbox},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        # ray.train's names are those of its second version; the type checker sees the first.
        scaling_config=ScalingConfig(  # pyrefly: ignore[bad-argument-type]
            num_workers=workers, use_gpu=use_gpu, resources_per_worker=None if use_gpu else {"CPU": 1}
        ),
        run_config=RunConfig(  # pyrefly: ignore[bad-argument-type]
            name=f"attempt-{job.attempt}",
            storage_path=str(session.run_dir / "ray"),
            failure_config=FailureConfig(max_failures=0),  # pyrefly: ignore[bad-argument-type]
            logging_config=LoggingConfig(log_level="ERROR"),  # pyrefly: ignore[unexpected-keyword]
        ),
        datasets={"train": _no_dataset},
        dataset_config=RowsDataConfig(),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            failure.append(error)

    # In a thread of its own: in the main one, Ray would take Ctrl-C for itself and end the run without a save.
    thread = threading.Thread(target=fit, daemon=True, name="fit")
    with _stop_on_signals(inbox, session.echo) as asked:
        thread.start()
        while thread.is_alive():
            thread.join(PUMP_S)
            _drain(inbox, session)
        _drain(inbox, session)
    ray.kill(inbox)
    lines = str(failure[0]).strip().splitlines() if failure else []
    return lines[-1] if lines else "the workers ended without a word", asked.is_set()


def _no_dataset() -> ray.data.Dataset:
    """Ray wants a dataset to configure; RowsDataConfig gives streams of its own instead."""
    return ray.data.range(1)


def _drain(inbox: Any, session: Session) -> None:
    """Bring what workers have told from the inbox to the session."""
    try:
        events = ray.get(inbox.take.remote(), timeout=INBOX_TIMEOUT_S)
    except ray.exceptions.RayError:  # loaded, or gone together with the cluster, which `fit` will notice
        return
    for event in events:
        session.receive(event)


@contextlib.contextmanager
def _stop_on_signals(inbox: Any, echo: Echo) -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C ask the run to save and stop, and set the event; a second Ctrl-C ends at once."""
    asked = threading.Event()

    def ask(number: int, _: object) -> None:
        echo(f"{signal.Signals(number).name}: saving and stopping (Ctrl-C once more ends at once)")
        asked.set()
        inbox.ask_to_stop.remote()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # a Tune trial; its driver handles signals
        yield asked
        return
    old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def choose_workers(config: Config, cluster: clusters.Cluster) -> tuple[int, bool]:
    """How many workers the next attempt has, and whether they have GPUs.

    What is asked for, or fewer down to `--min-workers` where the cluster has no more now.
    """
    use_gpu = wants_gpus(config) or (cluster.gpus > 0 and config.precision.device_type == "")
    there = cluster.gpus if use_gpu else cluster.cpus
    wanted = config.cluster.num_workers
    if wanted == "auto":
        sequences = recipe(config).total_batch_size // config.model.max_seq_len
        return (max(1, min(there, sequences)) if use_gpu else 1), use_gpu
    fewest = wanted if config.cluster.min_workers == -1 else config.cluster.min_workers
    return max(fewest, min(wanted, there)), use_gpu


def wants_gpus(config: Config) -> bool:
    """Whether only GPUs will do, also those that an autoscaler has yet to add."""
    return config.precision.device_type == "cuda" or config.precision.fp8


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

    def connected(self) -> clusters.Cluster:
        """The cluster, connected."""
        if self._cluster is None:
            self._cluster = self._stack.enter_context(clusters.connect(self._config, echo=self._echo))
        return self._cluster

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
    workers, use_gpu = choose_workers(config, cluster)
    return MLflowShipper(
        session.run_dir,
        tracking_uri=uri,
        experiment=config.run.experiment,
        **session.tracking_facts(),
        tags={
            "raychat.git_commit": _git_commit(),
            "raychat.run_dir": str(session.run_dir),
            "raychat.world_size": workers,
            "raychat.device": ", ".join(cluster.accelerators) or "gpu" if use_gpu else "cpu",
        },
        echo=session.echo,
    )


def _finish_tracking(session: Session, shipper: MLflowShipper, summary: Summary) -> None:
    artifacts = session.artifacts()
    grace_s = FINISH_S
    if session.config.run.upload_checkpoint and summary.checkpoint:
        session.echo(f"uploading {summary.checkpoint} to MLflow")
        artifacts.append(Path(summary.checkpoint))
        grace_s = UPLOAD_S
    shipper.finish(MLFLOW_STATUS[summary.status], artifacts, grace_s)


def _check_cluster(config: Config, cluster: clusters.Cluster, echo: Echo) -> None:
    """Refuse what this cluster cannot do; say so when the run has to wait for nodes."""
    workers, use_gpu = choose_workers(config, cluster)
    if not use_gpu and not cluster.started_here:
        device.refuse_gpu_sized(config, device.resolve(config, local_world_size=1), cores=cluster.cpus)
    there, kind = (cluster.gpus, "GPUs") if use_gpu else (cluster.cpus, "CPUs")
    if workers <= there:
        return
    if cluster.started_here:
        raise ConfigError(
            f"--num-workers {workers}: this machine has {there} {kind}. Use --num-workers {max(1, there)}, or a cluster that "
            "has more (--address)."
        )
    echo(f"waiting for {workers} workers: the cluster has {there} {kind} now, and the run begins when it has {workers}")


def _git_commit() -> str:
    """The commit of the code that runs, or `unknown` where it is no checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    found = subprocess.run(
        ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"
