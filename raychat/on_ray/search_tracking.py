"""A search as a run of MLflow, under which its trials are shown: how far it is, and its report at the end."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from raychat.search.book import Contents
from raychat.search.spec import SearchSpec
from raychat.tracking.journal import Journal
from raychat.tracking.mlflow_shipper import MLflowShipper

JOURNAL = "metrics.jsonl"
KNOWN_WITHIN_S = 20.0
"""for MLflow to name the run, before trials start that are to be shown under it"""
FINISH_S = 20.0


class SearchTracking:
    """Feeds the parent run from a journal in the search's directory, as any run is fed. Nothing waits for MLflow for long."""

    def __init__(self, folder: Path, spec: SearchSpec, *, tracking_uri: str, echo: Callable[[str], None]) -> None:
        self._journal, self._echo = Journal(folder / JOURNAL), echo
        self._shipper = MLflowShipper(
            folder,
            tracking_uri=tracking_uri,
            experiment=spec.base_config.run.experiment,
            run_name=spec.name,
            params=_params(spec),
            tags={"raychat.kind": "search", "raychat.run_dir": str(folder)},
            echo=echo,
        )
        self._shipper.start()

    def run_id(self) -> str:
        """The MLflow run; empty when it is not known in time: the trials are then shown beside it."""
        until = time.monotonic() + KNOWN_WITHIN_S
        while self._shipper.run_id is None and time.monotonic() < until:
            time.sleep(0.1)
        if self._shipper.run_id is None:
            self._echo("MLflow does not answer: the trials will not be shown under the search")
        return self._shipper.run_id or ""

    def log(self, contents: Contents) -> None:
        """How far the search is, one point for each outcome."""
        values = [o.val_bpb for t, o in contents.runs() if o.status == "finished" and o.val_bpb is not None]
        metrics = {"search/trials_done": float(len(contents.done)), "search/spent_usd": contents.spent_usd}
        self._journal.log(len(contents.done), metrics | ({"search/best_val_bpb": min(values)} if values else {}))

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"], files: Sequence[Path]) -> None:
        """The end, with the report."""
        self._journal.close()
        self._shipper.finish(status, files, FINISH_S)


def _params(spec: SearchSpec) -> dict[str, Any]:
    flat = spec.kept()
    tables = {f"{table}.{name}": value for table in ("base", "space") for name, value in flat.pop(table).items()}
    return flat | tables
