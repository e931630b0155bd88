"""Feeds MLflow from the journal, in a thread of the driver that training never waits for.

The journal is the truth and MLflow a copy. Points are sent with the times of the journal, at least once; identical
points collapse in MLflow, so sending again is harmless. A server that is dead, slow or hangs costs nothing but
freshness: what it missed is sent when it is back, by a later attempt, or by `python jobs/runs.py --sync`.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from raychat.errors import DataError
from raychat.tracking.mlflow_delivery import JOURNAL_NAME, Delivery, end_dead_runs, failures_of, open_client
from raychat.tracking.shipping_state import End, ShippingState, StateFile
from raychat.tracking.tracking_uri import default_tracking_uri as default_tracking_uri  # part of this file's interface
from raychat.tracking.tracking_uri import openable
from raychat.tracking.tracking_uri import store_error as store_error
from raychat.uris import public_uri

PERIOD_S = 2.0
MAX_BACKOFF_S = 60.0
PARENT_TAG = "mlflow.parentRunId"

EndStatus = Literal["FINISHED", "FAILED", "KILLED"]
logger = logging.getLogger(__name__)


class MLflowShipper:
    """Ships the journal in `run_dir` while the run goes on. Nothing in here raises into the caller or keeps it waiting.

    `params` are logged once per run; `tags` on every attempt; `dataset` has `name`, `source` and `digest`. A run
    directory that was shipped to the same store and experiment before continues its MLflow run.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        dataset: Mapping[str, str] | None = None,
        echo: Callable[[str], None],
    ) -> None:
        self.run_dir, self.uri, self.echo = run_dir, tracking_uri, echo
        state = _previous(run_dir) or ShippingState(uri=public_uri(tracking_uri), experiment=experiment, run_name="")
        state = dataclasses.replace(
            state.in_store(public_uri(tracking_uri), experiment),
            run_name=run_name, params=dict(params), tags=dict(tags), dataset=dataset, end=None, attempt=state.attempt + 1,
        )  # fmt: skip
        self._file = StateFile(run_dir, state)
        self._delivery = Delivery(tracking_uri, self._file, echo)
        self._stop, self._give_up = threading.Event(), threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="mlflow-shipper")

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once the server has told."""
        return self._file.state.run_id

    @property
    def url(self) -> str | None:
        """The page of the run, if the store is a server and the run is known."""
        return self._file.state.run_url

    def start(self) -> None:
        """Begin shipping. Returns at once."""
        self._remember()
        self._thread.start()

    def finish(self, status: EndStatus, artifacts: Sequence[Path] = (), grace_s: float = 10.0) -> str | None:
        """Ship the rest, attach the files that exist, set the end status; the run id, if known.

        Close the journal first. Takes at most about `grace_s` seconds; what is not done by then is left to `sync`. A run
        that ends before it was begun, while it waited for machines perhaps, is shipped now.
        """
        if self._give_up.is_set():
            return self.run_id
        paths = tuple(str(path.resolve()) for path in artifacts)
        self._remember(end=End(status=status, time_ms=round(time.time() * 1000), artifacts=paths))
        self._stop.set()
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join(grace_s)
        self._give_up.set()
        self._file.close()
        end = self._file.state.end
        if end is None or not end.delivered:
            self.echo(
                f"MLflow at {public_uri(self.uri)} has not got everything within {grace_s:g}s. Nothing is lost: "
                f"`python jobs/runs.py --sync` sends the rest from {self.run_dir / JOURNAL_NAME}"
            )
        return self.run_id

    def _remember(self, **changes: Any) -> None:
        try:
            self._file.update(**changes)
        except OSError as error:
            logger.warning("the state of MLflow shipping cannot be kept in %s: %s", self.run_dir, error)

    def _run(self) -> None:
        delay = PERIOD_S
        while not self._give_up.is_set():
            stopping = self._stop.is_set()
            try:
                self._delivery.deliver()
            except Exception as error:  # noqa: BLE001 - whatever MLflow, its database or the network raise: training goes on
                self._delivery.disconnect()
                self._note(error)
                delay = min(2 * delay, MAX_BACKOFF_S)
            else:
                if stopping:
                    return
                self._note(None)
                delay = PERIOD_S
            if stopping:
                self._give_up.wait(0.5)
            else:
                self._stop.wait(delay)

    def _note(self, error: Exception | None) -> None:
        """Say when an outage begins and when it is over."""
        if error is not None and not self._failing and not self._give_up.is_set():
            reason = (str(error).splitlines() or [""])[0][:200]
            self.echo(
                f"MLflow at {public_uri(self.uri)} does not take metrics ({type(error).__name__}: {reason}). "
                f"Training goes on; they wait in the journal"
            )
        if error is None and self._failing:
            self.echo(f"MLflow at {public_uri(self.uri)} is back and has every metric")
        self._failing = error is not None


def sync(
    run_dir: Path, *, tracking_uri: str | None = None, echo: Callable[[str], None], artifacts: Sequence[Path] = ()
) -> str | None:
    """Bring MLflow up to the journal of a run whose driver is gone, in the foreground; its MLflow run id.

    None if the run was not tracked. `tracking_uri` sends it to another store than before. A run whose driver left no
    end status ends as KILLED, with the files `artifacts`.

    Raises:
        RaychatError: the store cannot be reached or refuses.
    """
    state = ShippingState.load(run_dir)
    if state is None:
        return None
    uri = tracking_uri or openable(state.uri)
    state = state.in_store(public_uri(uri), state.experiment)
    journal = run_dir / JOURNAL_NAME
    size, time_s = (journal.stat().st_size, journal.stat().st_mtime) if journal.exists() else (0, time.time())
    if state.end is None:
        paths = tuple(str(path.resolve()) for path in artifacts)
        state = dataclasses.replace(state, end=End(status="KILLED", time_ms=round(time_s * 1000), artifacts=paths))
    if state.end and state.end.delivered and state.offset == size:
        return state.run_id
    delivery = Delivery(uri, StateFile(run_dir, state), echo)
    with failures_of(uri):
        delivery.deliver()
    return delivery.state.run_id


def adopt(parent: Path, run_dirs: Sequence[Path], *, tracking_uri: str | None = None) -> list[Path]:
    """Show runs under their search in MLflow, which had no name for it when they began; the directories of these.

    Raises:
        RaychatError: the store cannot be reached or refuses.
    """
    above = ShippingState.load(parent)
    adopted: list[Path] = []
    for run_dir in run_dirs:
        state = ShippingState.load(run_dir)
        if above is None or above.run_id is None or state is None or state.run_id is None:
            continue
        elsewhere = (state.uri, state.experiment) != (above.uri, above.experiment)
        if elsewhere or state.tags.get(PARENT_TAG) == above.run_id:
            continue
        uri = tracking_uri or openable(state.uri)
        with failures_of(uri):
            open_client(uri).set_tag(state.run_id, PARENT_TAG, above.run_id)
        dataclasses.replace(state, tags={**state.tags, PARENT_TAG: above.run_id}).save(run_dir)
        adopted.append(run_dir)
    return adopted


def reconcile(tracking_uri: str, experiment: str, echo: Callable[[str], None], *, dead: Collection[str] = ()) -> int:
    """End as KILLED the runs of an experiment whose process died without a word; how many there were.

    Those are the runs with the ids `dead`, and all that have not been heard of for five minutes.

    The next run in the experiment does the same when it starts.

    Raises:
        RaychatError: the store cannot be reached or refuses.
    """
    ended = 0
    with failures_of(tracking_uri):
        client = open_client(tracking_uri)
        found = client.get_experiment_by_name(experiment)
        while found and (gone := end_dead_runs(client, found.experiment_id, dead=dead)):
            ended += len(gone)
            for run_id in gone:
                echo(f"marked as KILLED: {run_id}")
    echo(f"{ended} dead runs in the experiment {experiment} of {public_uri(tracking_uri)}")
    return ended


def _previous(run_dir: Path) -> ShippingState | None:
    try:
        return ShippingState.load(run_dir)
    except (DataError, OSError) as error:
        logger.warning("%s", error)
        return None
