"""What is said to MLflow, and in which order, so that every step of it may be repeated. The only file that imports it.

The imports stand inside the functions, because they take seconds; the driver's shipping thread pays for them.
"""

import dataclasses
import fcntl
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raychat.errors import RaychatError
from raychat.tracking.journal import RESERVED, is_metrics, records_from
from raychat.tracking.shipping_state import End, ShippingState, StateFile
from raychat.tracking.tracking_uri import sqlite_path, store_error
from raychat.uris import public_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

HEARTBEAT_S = 30.0
STALE_S = 300.0  # without a heartbeat: the process of the run is gone
BURIAL_S = 5.0  # for ending such runs in one go; what is left is for the next time
BATCH_METRICS, BATCH_PARAMS = 1000, 100  # MLflow's limits for one log_batch call
DIGEST_CHARS, PARAM_CHARS, TAG_CHARS = 36, 6000, 5000  # MLflow's limits
HEARTBEAT_TAG, ATTEMPT_TAG, KEY_TAG = "raychat.heartbeat", "raychat.attempt", "raychat.run_key"
JOURNAL_NAME = "metrics.jsonl"

logger = logging.getLogger(__name__)


class Delivery:
    """Brings MLflow up to the journal, in the calling thread. Its methods raise whatever MLflow and the network raise.

    After an exception, `disconnect` and `deliver` again: everything in here may be repeated.
    """

    def __init__(self, uri: str, file: StateFile, echo: Callable[[str], None]) -> None:
        self.uri, self.file, self.echo = uri, file, echo
        self.journal = file.run_dir / JOURNAL_NAME
        self._client: MlflowClient | None = None
        self._described: str | None = None
        self._last_beat = -float("inf")
        self._announced = self._buried = False

    @property
    def state(self) -> ShippingState:
        return self.file.state

    def deliver(self) -> None:
        """Send all there is: the run itself, points, a heartbeat when one is due, and the end when there is one."""
        client = self._client or self._connect()
        self._ship(client)
        if self._described != self.state.run_id:  # after shipping: a branch may have led to another run
            self._describe(client, client.get_run(str(self.state.run_id)))
            self._described = self.state.run_id
        end = self.state.end
        if end is None and time.monotonic() - self._last_beat >= HEARTBEAT_S:
            self._beat(client)
        if end is None and not self._buried:
            self._buried = True
            self._bury_the_dead(client)
        if end is not None and not end.delivered:
            self._end(client, end)
        self._client = client

    def disconnect(self) -> None:
        """Look everything up anew next time: the run may have been deleted, the server may be another one."""
        self._client = self._described = None

    def _connect(self) -> "MlflowClient":
        client = open_client(self.uri)
        experiment_id = _experiment_id(client, self.uri, self.state.experiment)
        if experiment_id != self.state.experiment_id:
            self.file.update(experiment_id=experiment_id)
        run = _living_run(client, self.state.run_id)
        if run is None and self.state.run_id is not None:
            begin = self.state.from_beginning()
            self.file.update(key=begin.key, run_id=None, offset=0)
        if run is None:
            run = self._find_or_create(client, self.state.key, self.state.run_name, {}, _first_time_ms(self.journal))
            self.file.update(run_id=run.info.run_id)
        if not self._announced:
            self._announced = True
            where = self.state.run_url or public_uri(self.uri)
            self.echo(f"MLflow run {self.state.run_name} in experiment {self.state.experiment}: {where}")
        return client

    def _find_or_create(
        self, client: "MlflowClient", key: str, name: str, tags: Mapping[str, str], start_ms: int
    ) -> "Run":
        """The run tagged with `key`; a new one if there is none. The answer to an earlier creation may have been lost."""
        experiment_id = str(self.state.experiment_id)
        if found := client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1):
            return found[0]
        tags = {**tags, KEY_TAG: key, HEARTBEAT_TAG: f"{time.time():.0f}"}
        return client.create_run(experiment_id, start_time=start_ms, tags=tags, run_name=name)

    def _describe(self, client: "MlflowClient", run: "Run") -> None:
        """Params once, since MLflow refuses other values later; what changed, and everything else, becomes tags."""
        from mlflow.entities import Param, RunTag

        run_id, params = run.info.run_id, {key: str(value)[:PARAM_CHARS] for key, value in self.state.params.items()}
        known = run.data.params
        missing = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(missing), BATCH_PARAMS):
            client.log_batch(run_id, params=missing[start : start + BATCH_PARAMS], synchronous=True)
        tags = {**self.state.tags, ATTEMPT_TAG: self.state.attempt}
        if changed := [f"{key}={value}" for key, value in params.items() if known.get(key, value) != value]:
            tags["raychat.changed_params"] = " ".join(changed)
        run_tags = [RunTag(key, str(value)[:TAG_CHARS]) for key, value in tags.items()]
        client.log_batch(run_id, tags=run_tags, synchronous=True)
        if self.state.dataset and not (run.inputs and run.inputs.dataset_inputs):
            client.log_inputs(run_id, [_dataset_input(self.state.dataset)])

    def _ship(self, client: "MlflowClient") -> None:
        if not self.journal.exists():
            return
        if self.journal.stat().st_size < self.state.offset:  # another journal was put in its place
            self.file.update(offset=0)
        points: list[Metric] = []
        behind = self.state.offset
        for record, end in records_from(self.journal, behind):
            fresh = _points(record)
            if points and (len(points) + len(fresh) > BATCH_METRICS or record.get("event") == "branch"):
                self._flush(client, points, behind)
                points = []
            if record.get("event") == "branch":
                self._branch(client, record, end)
            points += fresh
            behind = end
        if behind > self.state.offset:
            self._flush(client, points, behind)

    def _flush(self, client: "MlflowClient", points: Sequence["Metric"], behind: int) -> None:
        for start in range(0, len(points), BATCH_METRICS):
            batch = points[start : start + BATCH_METRICS]
            client.log_batch(str(self.state.run_id), metrics=batch, synchronous=True)
        self.file.update(offset=behind)

    def _branch(self, client: "MlflowClient", event: Mapping[str, Any], behind: int) -> None:
        """Go on in a new run: MLflow cannot delete points, and a curve that goes back in steps is drawn as a sawtooth."""
        old, step = str(self.state.run_id), event["from_step"]
        tags = {"raychat.branched_from": old, "raychat.branch_step": str(step)}
        # The offset makes the key the same when this is tried again.
        key, name = f"{self.state.key}-{behind}", f"{self.state.run_name}-from-{step}"
        run = self._find_or_create(client, key, name, tags, _milliseconds(event))
        if client.get_run(old).info.status == "RUNNING":
            client.set_terminated(old, "KILLED", end_time=_milliseconds(event))
        self.file.update(run_id=run.info.run_id, key=key, offset=behind)
        self._last_beat = -float("inf")
        self.echo(f"MLflow: training went back to step {step} and goes on in the run {name}")

    def _beat(self, client: "MlflowClient") -> None:
        run_id = str(self.state.run_id)
        client.set_tag(run_id, HEARTBEAT_TAG, f"{time.time():.0f}")
        if client.get_run(run_id).info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        self._last_beat = time.monotonic()

    def _bury_the_dead(self, client: "MlflowClient") -> None:
        """Once, when this run's own points have arrived: what fails here concerns other runs, and is tried by others."""
        try:
            end_dead_runs(client, str(self.state.experiment_id), but=str(self.state.run_id))
        except Exception as error:  # noqa: BLE001 - whatever MLflow, its database or the network raise
            logger.info("runs without a heartbeat in MLflow are left as they are: %s", error)

    def _end(self, client: "MlflowClient", end: End) -> None:
        client.set_terminated(str(self.state.run_id), end.status, end_time=end.time_ms)
        for path in filter(os.path.exists, end.artifacts):
            client.log_artifact(str(self.state.run_id), path)
        self.file.update(end=dataclasses.replace(end, delivered=True))


def open_client(uri: str) -> "MlflowClient":
    """A client for the store; its calls are short and not retried, unless the user's environment says otherwise."""
    _prepare_process(uri)
    from mlflow import MlflowClient

    with _first_alone(uri):
        return MlflowClient(tracking_uri=uri)


@contextmanager
def _first_alone(uri: str) -> Iterator[None]:
    """One process at a time: the first one makes the tables of a new database, and two at once fail in each other's."""
    if (database := sqlite_path(uri)) is None:
        yield
        return
    with Path(f"{database}.lock").open("ab") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def add_to_run(
    uri: str,
    run_id: str,
    values: Mapping[str, float],
    *,
    step: int,
    time_ms: int,
    files: Sequence[Path],
    folder: str,
) -> None:
    """Add points of one step to a run, and `files` to its artifacts in `folder`. Raises whatever MLflow raises."""
    client = open_client(uri)
    from mlflow.entities import Metric

    points = [Metric(_named(key), value, time_ms, step) for key, value in values.items() if math.isfinite(value)]
    client.log_batch(run_id, metrics=points, synchronous=True)
    for file in files:
        client.log_artifact(run_id, str(file), folder)


def end_dead_runs(
    client: "MlflowClient", experiment_id: str, *, but: str | None = None, dead: Collection[str] = ()
) -> list[str]:
    """End as KILLED the RUNNING runs of raychat in an experiment whose heartbeat is stale, and those of `dead`; their ids.

    Ends after BURIAL_S and one more call, done or not. A process that is killed cannot say so, and no server notices. A
    run that does go on sets itself to RUNNING again.
    """
    ended: list[str] = []
    until = time.monotonic() + BURIAL_S
    query = f"attributes.status = 'RUNNING' and tags.`{HEARTBEAT_TAG}` LIKE '%'"
    for run in client.search_runs([experiment_id], query, max_results=1000):
        beat_s = float(run.data.tags[HEARTBEAT_TAG])
        gone = time.time() - beat_s > STALE_S or run.info.run_id in dead
        if gone and run.info.run_id != but and time.monotonic() < until:
            client.set_terminated(run.info.run_id, "KILLED", end_time=round(beat_s * 1000))
            ended.append(run.info.run_id)
    return ended


@contextmanager
def failures_of(uri: str) -> Iterator[None]:
    """Turns what MLflow and the network raise into a RaychatError that names the store and the remedy."""
    if error := store_error(uri):
        raise error
    _prepare_process(uri)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        problem = str(error).replace(uri.rstrip("/"), public_uri(uri.rstrip("/")))  # with it, a password
        raise RaychatError(
            f"MLflow at {public_uri(uri)} cannot be used: {problem}. "
            f"Start that server, or name another store with MLFLOW_TRACKING_URI"
        ) from error


def _prepare_process(uri: str) -> None:
    """Before MLflow is first imported: short calls, no telemetry, no banners. The user's own settings stand."""
    quiet = ("DISABLE_TELEMETRY", "DISABLE_AGENT_HINT", "SUPPRESS_PRINTING_URL_TO_STDOUT")
    settings = {"HTTP_REQUEST_TIMEOUT": "5", "HTTP_REQUEST_MAX_RETRIES": "0", **dict.fromkeys(quiet, "true")}
    for name, value in settings.items():
        os.environ.setdefault(f"MLFLOW_{name}", value)
    for name in ("alembic", "mlflow.store.db.utils"):  # the migrations of a new database are no news
        logging.getLogger(name).setLevel(logging.WARNING)
    if database := sqlite_path(uri):
        database.parent.mkdir(parents=True, exist_ok=True)


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    """The experiment of this name, which is made where there is none."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    location = None  # a server has its own
    if database := sqlite_path(uri):
        location = (database.parent / "mlartifacts" / re.sub(r"[^\w.-]", "_", name)).as_uri()
    # With this tag the pages of the experiment open on its training runs.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    try:
        return client.create_experiment(name, artifact_location=location, tags=tags)
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # another run was quicker
            return found.experiment_id
        raise


def _living_run(client: "MlflowClient", run_id: str | None) -> "Run | None":
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _dataset_input(dataset: Mapping[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = dataset["source"]
    kind = next((scheme for scheme in ("http", "s3", "gs") if source.startswith(scheme)), "local")
    described = json.dumps({"url" if kind == "http" else "uri": source})
    entity = Dataset(dataset["name"], dataset["digest"][:DIGEST_CHARS], source_type=kind, source=described)
    return DatasetInput(entity, [InputTag("mlflow.data.context", "train")])


def _points(record: Mapping[str, Any]) -> list["Metric"]:
    """The points of a record; events have none, and neither have values that were not finite."""
    from mlflow.entities import Metric

    if not is_metrics(record):
        return []
    return [
        Metric(_named(key), float(value), _milliseconds(record), record["step"])
        for key, value in record.items()
        if key not in RESERVED and value is not None
    ]


def _named(metric: str) -> str:
    """The name of a metric as MLflow takes it."""
    return re.sub(r"[^\w\-. :/]", "_", metric)


def _milliseconds(record: Mapping[str, Any]) -> int:
    return round(record["time"] * 1000)


def _first_time_ms(journal: Path) -> int:
    first = next(records_from(journal), None) if journal.exists() else None
    return _milliseconds(first[0]) if first else round(time.time() * 1000)
