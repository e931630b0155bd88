"""How far MLflow knows a run: `mlflow.json` in the run directory, beside the journal.

It holds what is needed to create the run, which one it became, the journal's byte offset up to which MLflow has every
point, and the end of the run while MLflow does not know it yet. So a run that never reached its server can be shipped
later, by another process, to another server.
"""

import dataclasses
import json
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raychat.atomic import write_text
from raychat.errors import DataError

FILE_NAME = "mlflow.json"
# How a run of ours ended, in MLflow's words.
MLFLOW_STATUS: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}


@dataclass(frozen=True, kw_only=True)
class End:
    status: str
    """FINISHED, FAILED or KILLED"""
    time_ms: int
    """unix time"""
    artifacts: Sequence[str] = ()
    """paths of the files to attach"""
    delivered: bool = False
    """MLflow has the status and the files"""


@dataclass(frozen=True, kw_only=True)
class ShippingState:
    uri: str
    """tracking URI, without a password"""
    experiment: str
    run_name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    dataset: Mapping[str, str] | None = None
    """name, source and digest"""
    attempt: int = 0
    """driver attempts that shipped"""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """tag by which a run is found whose creation was answered too late"""
    experiment_id: str | None = None
    run_id: str | None = None
    offset: int = 0
    """bytes of the journal that MLflow has"""
    end: End | None = None

    @classmethod
    def load(cls, run_dir: Path) -> "ShippingState | None":
        """The state in `run_dir`, or None if the run was never tracked.

        Raises:
            DataError: the file is damaged.
        """
        path = run_dir / FILE_NAME
        try:
            values = json.loads(path.read_bytes())
            end: dict[str, Any] | None = values.pop("end")
            return cls(**values, end=End(**end) if end else None)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path} is damaged ({error}): delete it, and the journal is shipped again as a new MLflow run"
            ) from error

    def save(self, run_dir: Path) -> None:
        """Write to `run_dir`, whole or not at all."""
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / FILE_NAME, json.dumps(dataclasses.asdict(self), indent=2, default=str))

    def in_store(self, uri: str, experiment: str) -> "ShippingState":
        """The state for shipping to this store: unchanged if it is the same one, else back at the beginning."""
        if (self.uri, self.experiment) == (uri, experiment):
            return self
        end = self.end and dataclasses.replace(self.end, delivered=False)
        return dataclasses.replace(self.from_beginning(), uri=uri, experiment=experiment, experiment_id=None, end=end)

    def from_beginning(self) -> "ShippingState":
        """The state for a new MLflow run that gets the whole journal."""
        return dataclasses.replace(self, key=uuid.uuid4().hex, run_id=None, offset=0)

    @property
    def run_url(self) -> str | None:
        """The page of the run, if the store is a server and the run is known."""
        if not self.uri.startswith("http") or self.run_id is None:
            return None
        return f"{self.uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"


class StateFile:
    """The state that two threads share: the one that ships and the one that ends the run."""

    def __init__(self, run_dir: Path, state: ShippingState) -> None:
        self.run_dir, self.state = run_dir, state
        self._lock = threading.Lock()
        self._closed = False

    def update(self, **changes: Any) -> None:
        """Change fields, in memory and on disk.

        Raises:
            RuntimeError: after `close`.
            OSError: the disk does not take it.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError(f"shipping of {self.run_dir} was given up")
            self.state = dataclasses.replace(self.state, **changes)
            self.state.save(self.run_dir)

    def close(self) -> None:
        """From now on the file belongs to somebody else: a thread that hangs in a dead server must not touch it."""
        with self._lock:
            self._closed = True
