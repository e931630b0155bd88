"""List the runs of a base directory; bring MLflow up to date with them.

python jobs/runs.py [--base-dir DIR | --storage-path DIR] [--sync] [--reconcile] [--tracking-uri URI]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.tracking.mlflow_shipper import reconcile, sync
from raychat.tracking.run_table import default_base_dir, format_table, is_live, read_run, run_dirs
from raychat.tracking.shipping_state import ShippingState


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-dir", type=Path, default=default_base_dir(), help="default: %(default)s")
    parser.add_argument("--storage-path", type=Path, help="folder of the runs; default: <base-dir>/runs")
    parser.add_argument("--sync", action="store_true", help="send to MLflow what ended runs could not send")
    parser.add_argument("--reconcile", action="store_true", help="mark runs in MLflow whose process is dead as KILLED")
    parser.add_argument("--tracking-uri", help="MLflow store to use; default: the one each run was started with")
    args = parser.parse_args(argv)
    folder = args.storage_path or args.base_dir / "runs"
    runs = run_dirs(folder)
    if args.sync:
        send(runs, args.tracking_uri)
    if args.reconcile:
        states = [state for state in map(ShippingState.load, runs) if state]
        for uri in [args.tracking_uri] if args.tracking_uri else sorted({state.uri for state in states}):
            print(f"marked as KILLED: {' '.join(reconcile(uri)) or 'none'} ({uri})")
    if not (args.sync or args.reconcile):
        print(format_table([read_run(run) for run in runs]) if runs else f"no runs yet in {folder}")
    return 0


def send(runs: Sequence[Path], tracking_uri: str | None) -> None:
    for run in runs:
        if is_live(run):  # its own driver ships
            print(f"{run.name}: still running, left alone")
        elif run_id := sync(run, tracking_uri=tracking_uri, echo=print):
            print(f"{run.name}: MLflow has everything (run {run_id})")
        else:
            print(f"{run.name}: was not tracked")


if __name__ == "__main__":
    cli.run_job(main)
