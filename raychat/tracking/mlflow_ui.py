"""The MLflow pages of the runs in a base directory: `python -m raychat.tracking.mlflow_ui`, then open the printed URL."""

import argparse
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from raychat.errors import ConfigError, DataError, RaychatError
from raychat.tracking.run_table import default_base_dir, run_dirs
from raychat.tracking.shipping_state import ShippingState
from raychat.tracking.tracking_uri import default_tracking_uri, sqlite_path

# Measured on MLflow 3.17: with its job consumers and four workers the server takes 2.5 GB, without them 0.5 GB.
LIGHT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def main(argv: Sequence[str], echo: Callable[[str], None] = print) -> None:
    """Check, say where the pages will be, and become the server.

    Raises:
        RaychatError: there are no runs yet, or the port is taken.
    """
    parser = argparse.ArgumentParser(prog="python -m raychat.tracking.mlflow_ui", description=__doc__)
    parser.add_argument("--base-dir", type=Path, default=default_base_dir(), help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; default: %(default)s, this machine only")
    parser.add_argument("--port", type=int, default=5000, help="default: %(default)s")
    args = parser.parse_args(argv)

    uri = default_tracking_uri(args.base_dir)
    database = sqlite_path(uri)
    if database is None or not database.exists():
        raise DataError(f"no runs yet: {database} does not exist. Start one with `python jobs/pretrain.py`")
    if not _is_free(args.host, args.port):
        free = next(port for port in range(args.port + 1, 65536) if _is_free(args.host, port))
        raise ConfigError(f"--port {args.port} on {args.host} is taken by another program. Use --port {free}")
    echo(f"MLflow (ready in about half a minute; Ctrl-C ends it): {page_url(args.base_dir, args.host, args.port)}")
    sys.stdout.flush()  # the process is about to be replaced, with what it still holds
    command = server_command(uri, database.parent / "mlartifacts", args.host, args.port)
    os.execve(command[0], command, {**os.environ, **LIGHT})


def server_command(uri: str, artifacts: Path, host: str, port: int) -> list[str]:
    """The command line of a light MLflow server over one store."""
    return [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--artifacts-destination", str(artifacts),
        "--host", host, "--port", str(port), "--workers", "1",
    ]  # fmt: skip


def page_url(base_dir: Path, host: str, port: int) -> str:
    """The page with the curves of the experiment that was written to last."""
    uri = default_tracking_uri(base_dir)
    states = [
        ShippingState.load(path) for path in sorted(run_dirs(base_dir / "runs"), key=lambda path: path.stat().st_mtime)
    ]
    known = [state.experiment_id for state in states if state and state.uri == uri and state.experiment_id]
    root = f"http://{host}:{port}/#/experiments"
    return f"{root}/{known[-1]}/runs?workflowType=machine_learning&compareRunsMode=CHART" if known else root


def _is_free(host: str, port: int) -> bool:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
        return True


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RaychatError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
