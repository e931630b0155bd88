"""List the searches and runs of a base directory, or the runs of an object store; bring MLflow up to date with them.

python jobs/runs.py [--base-dir DIR] [--storage-path DIR_OR_URI] [--sync] [--reconcile] [--tracking-uri URI]

A status of `interrupted` is that of a dead run or search: its process is gone without a word. With --storage-path alone
only the runs there are looked at.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.errors import RaychatError
from raychat.tracking.mlflow_shipper import adopt, reconcile, sync
from raychat.tracking.run_table import default_base_dir, format_table, is_live, read_run, run_dirs
from raychat.tracking.search_table import format_searches, read_search_row, search_dirs
from raychat.tracking.shipping_state import FILE_NAME, ShippingState
from raychat.tracking.tracking_uri import openable
from raychat.uris import check_place, public_uri


def main(argv: Sequence[str]) -> int:
    """List, or send and mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-dir", type=Path, help=f"default: {default_base_dir()}")
    parser.add_argument("--storage-path", help="folder of the runs, or s3:// or gs://; default: <base-dir>/runs")
    parser.add_argument(
        "--sync", action="store_true", help="send to MLflow what ended runs and searches could not send"
    )
    parser.add_argument("--reconcile", action="store_true", help="mark runs in MLflow whose process is dead as KILLED")
    parser.add_argument("--tracking-uri", help="MLflow store to use; default: the one each run was started with")
    args = parser.parse_args(argv)
    base_dir = (args.base_dir or default_base_dir()).expanduser()
    place = args.storage_path or str(base_dir / "runs")
    searches = [] if args.storage_path and not args.base_dir else search_dirs(base_dir)
    with runs_in(place, whole=args.sync) as runs:
        if args.sync:
            send(runs, args.tracking_uri, place)
            send_searches(searches, runs, args.tracking_uri, place)
        if args.reconcile:
            mark_dead([*searches, *runs], args.tracking_uri)
        if not (args.sync or args.reconcile):
            if searches:
                print(format_searches([read_search_row(folder) for folder in searches]) + "\n")
            print(format_table([read_run(run) for run in runs]) if runs else f"no runs yet in {public_uri(place)}")
    return 0


def runs_in(place: str, *, whole: bool) -> AbstractContextManager[list[Path]]:
    """The run directories in a folder, or copies of those in an object store."""
    check_place(place)
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


def send_searches(searches: Sequence[Path], runs: Sequence[Path], tracking_uri: str | None, place: str) -> None:
    """Searches with their reports; runs that began while MLflow had no name for their search get it now."""
    for folder in searches:
        row = read_search_row(folder)
        state = ShippingState.load(folder)
        if row.status == "running":
            print(f"search {row.name}: still running, left alone")
        elif state is None:
            print(f"search {row.name}: was not tracked")
        else:
            report = written_report(folder) if state.end is None else ()
            run_id = sync(folder, tracking_uri=tracking_uri, echo=print, artifacts=report)
            own = [run for run in runs if run.name in row.tags and not is_live(run)]
            for run in adopt(folder, own, tracking_uri=tracking_uri):
                keep_state(run, place)
            print(f"search {row.name}: MLflow has everything (run {run_id})")


def written_report(folder: Path) -> Sequence[Path]:
    """The report of a search whose process died before it could write the last one."""
    from raychat.search.report import write_report  # numpy and scipy: searches are listed without them
    from raychat.search.report.of_search import read_search

    try:
        return write_report(read_search(folder), folder)
    except RaychatError as error:
        print(f"search {folder.name}: its report cannot be written ({error})")
        return ()


def mark_dead(folders: Sequence[Path], tracking_uri: str | None) -> None:
    """End in MLflow what is dead: by its directory, or by its silence."""
    dead: dict[tuple[str, str], set[str]] = {}
    for folder in folders:
        if state := ShippingState.load(folder):
            known = dead.setdefault((tracking_uri or openable(state.uri), state.experiment), set())
            if state.run_id and state.end is None and not is_live(folder):
                known.add(state.run_id)
    for (uri, experiment), known in sorted(dead.items(), key=lambda found: found[0]):
        reconcile(uri, experiment, print, dead=known)


def keep_state(run: Path, place: str) -> None:
    """What a copy now knows about MLflow goes back to the run in the object store."""
    if "://" in place:
        from raychat.storage import Store

        Store.of(place).child(run.name).upload(FILE_NAME, run / FILE_NAME)


if __name__ == "__main__":
    cli.run_job(main)
