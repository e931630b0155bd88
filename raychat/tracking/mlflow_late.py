"""Results that come after a run has ended, such as a later evaluation, for the MLflow run that it became."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from raychat.errors import RaychatError
from raychat.tracking.mlflow_delivery import add_to_run, failures_of
from raychat.tracking.shipping_state import ShippingState


def log_late(
    run_dir: Path,
    step: int,
    values: Mapping[str, float],
    files: Sequence[Path],
    *,
    folder: str,
    tracking_uri: str = "",
    echo: Callable[[str], None],
) -> bool:
    """Log `values` at `step`, and `files` into `folder`, to the MLflow run of the run in `run_dir`; whether that was done.

    A run that was never tracked, or a store that does not answer, is told and no error: the files are where they are.
    """
    try:
        state = ShippingState.load(run_dir)
        if state is None or state.run_id is None:
            echo(
                f"MLflow: {run_dir.name} was not tracked, or has not been sent (jobs/runs.py --sync): nothing is logged"
            )
            return False
        uri = tracking_uri or state.uri
        with failures_of(uri):
            add_to_run(
                uri, state.run_id, values, step=step, time_ms=round(time.time() * 1000), files=files, folder=folder
            )
    except (RaychatError, OSError) as error:
        echo(f"warning: {error}")
        return False
    echo(f"MLflow: logged to the run {state.run_name} ({state.run_id})")
    return True
