"""List the runs of a base directory or an object store; bring MLflow up to date with them.

python jobs/runs.py [--base-dir DIR | --storage-path DIR_OR_URI] [--sync] [--reconcile] [--tracking-uri URI]
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.tracking.mlflow_shipper import reconcile, sync
from raychat.tracking.run_table import default_base_dir, format_table, is_live, read_run, run_dirs
from raychat.tracking.shipping_state import FILE_NAME, ShippingState
from raychat.uris import public_uri


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-dir", type=Path, default=default_base_dir(), help="default: %(default)s")
    parser.add_argument("--storage-path", help="folder of the runs, or s3:// or gs://; default: <base-dir>/runs")
    parser.add_argument("--sync", action="store_true", help="send to MLflow what ended runs could not send")
    parser.add_argument("--reconcile", action="store_true", help="mark runs in MLflow whose process is dead as KILLED")
    parser.add_argument("--tracking-uri", help="MLflow store to use; default: the one each run was started with")
    args = parser.parse_args(argv)
    place = args.storage_path or str(args.base_dir / "runs")
    with runs_in(place, whole=args.sync) as runs:
        if args.sync:
            send(runs, args.tracking_uri, place)
        if args.reconcile:
            states = [state for state in map(ShippingState.load, runs) if state]
            for uri, experiment in sorted({(args.tracking_uri or state.uri, state.experiment) for state in states}):
                reconcile(uri, experiment, print)
        if not (args.sync or args.reconcile):
            print(format_table([read_run(run) for run in runs]) if runs else f"no runs yet in {public_uri(place)}")
    return 0


def runs_in(place: str, *, whole: bool) -> AbstractContextManager[list[Path]]:
    """The run directories in a folder, or copies of those in an object store."""
    if "://" not in place:
        return nullcontext(run_dirs(Path(place).expanduser()))
    from raychat.storage import Store  # pyarrow: the runs in a folder are listed without it
    from raychat.tracking.remote_runs import copied_runs

    return copied_runs(Store.of(place), whole=whole)


def send(runs: Sequence[Path], tracking_uri: str | None, place: str) -> None:
    for run in runs:
        if is_live(run):  # its own driver ships
            print(f"{run.name}: still running, left alone")
        elif run_id := sync(run, tracking_uri=tracking_uri, echo=print):
            keep_state(run, place)
            print(f"{run.name}: MLflow has everything (run {run_id})")
        else:
            print(f"{run.name}: was not tracked")


def keep_state(run: Path, place: str) -> None:
    """What a copy now knows about MLflow goes back to the run in the object store."""
    if "://" in place:
        from raychat.storage import Store

        Store.of(place).child(run.name).upload(FILE_NAME, run / FILE_NAME)


if __name__ == "__main__":
    cli.run_job(main)
