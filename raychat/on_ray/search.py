"""A search on Ray Tune: its strategy proposes, each trial is a full run in a process of its own, the book keeps what came out.

Tune starts, watches and ends the trials. It keeps nothing that a search would go on from: that is the book and the run
directories, and a search that was killed asks its strategy again. Trials take no CPU from their workers: their actors
stand on the machine of the search with no more than a process to mind.
"""

import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune
from ray.tune.search import Searcher

from raychat.config import Config
from raychat.errors import ConfigError, RaychatError
from raychat.on_ray import cluster as clusters
from raychat.on_ray.cluster import Cluster
from raychat.on_ray.orders import Orders
from raychat.on_ray.search_data import SharedData
from raychat.on_ray.search_tracking import SearchTracking
from raychat.on_ray.sizing import wants_gpus
from raychat.on_ray.steering import Clock, Echo, Steering
from raychat.on_ray.trial_actor import STOP, TrialActor, end_of, leave_order, orders_in_memory
from raychat.planning import recipe
from raychat.planning.devices import plan_name
from raychat.planning.target import Target, resolve_target
from raychat.search.book import Book, search_dir
from raychat.search.drafts import draft
from raychat.search.limits import limit_reached
from raychat.search.report import write_report
from raychat.search.report.of_search import search_contents
from raychat.search.spec import SearchSpec
from raychat.search.strategy import Strategy, make_strategy
from raychat.tracking.shipping_state import MLFLOW_STATUS
from raychat.tracking.tracking_uri import default_tracking_uri, store_error

REPORT_EVERY_S = 30.0
RUNNING = ".running"
ACTOR_FAILURES = 2
"""times that the actor of a trial may die before the trial is given up"""
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # results go into the book
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class SearchLostError(RaychatError):
    """Another process goes on with this search."""

    exit_code = 1


def run(spec: SearchSpec, *, script: Path, echo: Echo, strategy: Strategy | None = None) -> bool:
    """Make the search to its end, or until it is told to stop. False: it is over, and none of its runs has a result.

    A search of this name that was begun before goes on. `script` is jobs/pretrain.py.

    Raises:
        RaychatError: what the user gave cannot work.
    """
    base = spec.base_config
    with contextlib.ExitStack() as stack:
        book = stack.enter_context(Book.open(search_dir(base.base_dir, spec.name), spec, echo))
        echo(f"search {spec.name}: {book.folder}")
        cluster = stack.enter_context(clusters.connect(_with_room(spec), echo=echo))
        folder = stack.enter_context(_private_folder(book.folder / RUNNING))
        stopped = stack.enter_context(_stop_on_signals(folder / STOP))
        tracking = _tracking(spec, book, echo)
        reporting = _Reporting(book, tracking, echo)
        steering = Steering(
            strategy=strategy or make_strategy(spec),
            book=book,
            orders=_orders(spec, book, cluster, script, tracking, echo),
            stop_asked=lambda: bool(stopped),
            concurrency=concurrency(spec, cluster),
            echo=echo,
            target=lambda config: target_on(config, cluster),
            changed=reporting.changed,
        )
        try:
            _on_tune(steering, folder)
        except KeyboardInterrupt:  # the second one
            reporting.leave()
            raise
        except BaseException:
            reporting.end("failed")
            raise
        reporting.end("stopped" if stopped else "finished")
        if book.lost:
            raise SearchLostError(
                f"Another process goes on with the search in {book.folder}; this one writes nothing more."
            )
        _say_end(steering, bool(stopped), echo)
        return bool(stopped) or any(outcome.status == "finished" for outcome in book.done.values())


def workers_of(config: Config, cluster: Cluster) -> int:
    """Workers of one trial, those that evaluate included."""
    wanted = config.cluster.num_workers
    if wanted == "auto":
        wanted = max(1, cluster.gpus) if on_gpus(config, cluster) else 1
    return wanted + config.eval.eval_workers


def on_gpus(config: Config, cluster: Cluster) -> bool:
    """Whether the trials run on GPUs."""
    return wants_gpus(config) or (config.precision.device_type == "" and cluster.gpus > 0)


def concurrency(spec: SearchSpec, cluster: Cluster) -> int:
    """Trials at a time: what the user says, or as many as the cluster has GPUs or CPU cores for now."""
    if spec.concurrency != "auto":
        return spec.concurrency
    base = spec.base_config
    workers = max(workers_of(config, cluster) for config in full_configs(spec))
    if on_gpus(base, cluster):
        return max(1, cluster.gpus // workers)
    if base.cluster.threads == -1:  # a worker takes all cores of its machine: a second run would only wait
        return max(1, cluster.machines // workers)
    return max(1, cluster.cpus // (workers * base.cluster.threads))


def full_configs(spec: SearchSpec) -> list[Config]:
    """The configuration of every arm that can be, at the full horizon; the base at least."""
    found = [spec.base_config]
    for arm in spec.arms():
        with contextlib.suppress(ConfigError):
            config = spec.config(draft(arm, spec.seeds[0]))
            recipe(config)
            found.append(config)
    return found


def target_on(config: Config, cluster: Cluster) -> Target | None:
    """The machine to plan for where the search's own is not it: the GPUs of the cluster. None: leave it to planning."""
    named = config.plan.machine or config.plan.gpu
    if named or cluster.started_here or not on_gpus(config, cluster):
        return None
    kind = next(iter(cluster.accelerators), "")
    with contextlib.suppress(ConfigError):
        return resolve_target(Config.from_flat({"gpu": plan_name(kind) or kind}, config))
    return Target(
        device="cuda", gpu=kind or "GPU", peak=None, memory_bytes=None, workers=workers_of(config, cluster), machines=1,
        machine=None, cores=0,
    )  # fmt: skip


class StrategySearcher(Searcher):
    """What Tune asks for the next trial and tells of the end of each."""

    def __init__(self, steering: Steering, folder: Path) -> None:
        super().__init__()
        self._steering, self._folder = steering, folder
        self._tags: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | Any | None:
        """The next trial, None to be asked again, or that there will be none."""
        order = self._steering.next()
        if order is None:
            return None if self._steering.open else Searcher.FINISHED
        leave_order(self._folder, order)
        self._tags[trial_id] = order.tag
        return {"tag": order.tag, "folder": str(self._folder)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Enter the outcome."""
        tag, end = self._tags.pop(trial_id), end_of(result)
        if end is not None and not error:
            self._steering.ended(tag, end)
        else:
            self._steering.crashed(tag, "what ran its process ended without a word, again and again")

    def __deepcopy__(self, memo: dict[int, Any]) -> "StrategySearcher":
        """Tune copies what it is given; there is one search."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes what it is given to a file, and goes on from none."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the book is kept."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


def _on_tune(steering: Steering, folder: Path) -> None:
    """Run all trials, and be through when they are."""
    environment = dict(os.environ)
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what comes out is said here
    here = f"node:{ray.util.get_node_ip_address()}"
    tuner = tune.Tuner(
        tune.with_resources(TrialActor, tune.PlacementGroupFactory([{"CPU": 0, here: 0.0001}])),
        tune_config=tune.TuneConfig(
            search_alg=StrategySearcher(steering, folder),
            num_samples=-1,
            max_concurrent_trials=steering.concurrency,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=ACTOR_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    with orders_in_memory(folder, environment):
        tuner.fit()


@contextlib.contextmanager
def _private_folder(folder: Path) -> Iterator[Path]:
    """An empty folder for as long as the block runs. Nobody else reads it, since what runs say passes through it."""
    shutil.rmtree(folder, ignore_errors=True)  # of a search that was killed
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _stop_on_signals(stop_file: Path) -> Iterator[list[int]]:
    """A list that is no longer empty after SIGTERM or Ctrl-C; trials see `stop_file`. A second Ctrl-C ends at once."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        os.close(os.open(stop_file, os.O_CREAT))
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _with_room(spec: SearchSpec) -> Config:
    """The configuration whose cluster to start, where there is none: with room for all trials that are wanted at a time."""
    base = spec.base_config
    wanted = base.cluster.num_workers
    if spec.concurrency == "auto" or wanted == "auto":
        return base
    workers = spec.concurrency * (wanted + base.eval.eval_workers)
    return Config.from_flat({"num_workers": workers, "eval_workers": 0}, base)


def _orders(
    spec: SearchSpec, book: Book, cluster: Cluster, script: Path, tracking: "SearchTracking | None", echo: Echo
) -> Orders:
    base = spec.base_config
    place: dict[str, Any] = {"address": ray.get_runtime_context().gcs_address}
    if tracking is not None:
        place |= {"tracking_uri": tracking_uri(base), "mlflow_parent": tracking.run_id()}
    return Orders(
        spec=spec,
        script=script,
        logs=book.folder / "logs",
        data=SharedData(full_configs(spec), with_gpus=on_gpus(base, cluster), echo=echo),
        place=place,
        trials=book.contents.trials,
        echo=echo,
    )


def tracking_uri(base: Config) -> str:
    """Where MLflow keeps the search and its trials."""
    return base.run.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(base.base_dir)


def _tracking(spec: SearchSpec, book: Book, echo: Echo) -> SearchTracking | None:
    if spec.base_config.run.run == "dummy":
        return None
    uri = tracking_uri(spec.base_config)
    if problem := store_error(uri):
        raise problem
    return SearchTracking(book.folder, spec, tracking_uri=uri, echo=echo)


class _Reporting:
    """Keeps the report and MLflow up to date."""

    def __init__(self, book: Book, tracking: SearchTracking | None, echo: Echo) -> None:
        self._book, self._tracking, self._echo = book, tracking, echo
        self._clock = Clock(REPORT_EVERY_S)

    def changed(self) -> None:
        """There is another outcome."""
        if self._tracking is not None:
            self._tracking.log(self._book.contents)
        if self._clock.due():
            self._write(going_on=True)

    def leave(self) -> None:
        """The search ends at once: nothing is waited for."""
        if not self._book.lost:
            self._book.say_end("stopped")

    def end(self, status: Literal["finished", "stopped", "failed"]) -> None:
        """The search ends, for now or for good."""
        files: Sequence[Path] = ()
        if not self._book.lost:
            self._book.say_end(status)
            files = self._write(going_on=status != "finished")
        if self._tracking is not None:
            self._tracking.finish(MLFLOW_STATUS[status], files)
        for path in files:
            self._echo(f"  report     {path}")

    def _write(self, *, going_on: bool) -> Sequence[Path]:
        try:
            return report(self._book, going_on=going_on)
        except Exception as error:  # noqa: BLE001 - a picture that fails must not end a search that has cost days
            self._echo(f"warning: the report cannot be written ({type(error).__name__}: {error})")
            return []


def report(book: Book, *, going_on: bool) -> Sequence[Path]:
    """Write the report of a search into its directory."""
    trials = [(trial, book.done.get(tag)) for tag, trial in book.contents.trials.items()]
    contents = search_contents(book.spec, trials, book.spec.base_config.runs_dir, going_on=going_on)
    return write_report(contents, book.folder)


def _say_end(steering: Steering, stopped: bool, echo: Callable[[str], None]) -> None:
    book = steering.book
    if stopped:
        echo(f"stopped: {steering.standing()}. jobs/search.py --resume {book.spec.name} goes on")
        return
    why = steering.strategy.why_finished(book.done)
    if not why and not steering.strategy.finished(book.done):
        why = limit_reached(book.spec, book.done, hours=book.hours)
    echo(f"finished: {steering.standing()}" + (f" ({why})" if why else ""))
