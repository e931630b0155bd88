"""An MLflow server of the drill's own, that can be frozen; and whether it has all that the journal has."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from raychat.errors import RaychatError
from raychat.tracking.journal import read_journal
from raychat.tracking.mlflow_delivery import open_client
from raychat.tracking.shipping_state import ShippingState

START_S = 120.0


class TrackingServer:
    """MLflow's own server on a free port of this machine, its database in `folder`."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        folder.mkdir(parents=True, exist_ok=True)
        store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder)]
        with (folder / "server.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it starts processes, and they are frozen together
            )
        self._log = folder / "server.log"

    def wait(self) -> None:
        """Until it answers.

        Raises:
            RaychatError: it does not.
        """
        deadline = time.monotonic() + START_S
        while True:
            try:
                if requests.get(f"{self.uri}/health", timeout=5).ok:
                    return
            except requests.RequestException:
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RaychatError(f"The drill's MLflow server did not start: see {self._log}.")
            time.sleep(0.2)

    def freeze(self) -> None:
        """SIGSTOP: connections are taken and never answered."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        for number in (signal.SIGCONT, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
        self._process.wait()


def missing_points(run_dir: Path, uri: str) -> str | None:
    """What MLflow lacks of the losses in the journal, or has in another order; None when it has them all in order."""
    state = ShippingState.load(run_dir)
    if state is None or state.run_id is None:
        return "MLflow does not know the run"
    expected = [(r["step"], r["train/loss"]) for r in read_journal(run_dir / "metrics.jsonl") if "train/loss" in r]
    history = open_client(uri).get_metric_history(state.run_id, "train/loss")
    found = [(point.step, point.value) for point in history]
    if found == expected:
        return None
    if sorted(found) == sorted(expected):
        return "MLflow has the points of the loss in another order"
    return f"MLflow has {len(found)} points of the loss, the journal {len(expected)}"
