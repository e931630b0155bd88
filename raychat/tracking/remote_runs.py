"""Copies of runs that are kept in an object store, for reading: what `run_table` and `mlflow_shipper.sync` work on."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from raychat.errors import DataError
from raychat.storage import Store
from raychat.tracking.run_table import JOURNAL, last_records, last_turn
from raychat.tracking.segments import join_segments, read_segments, segment_names

FILES = ("config.json", "plan.json", "summary.json", "mlflow.json", "lease.json")
RUNS_AT_ONCE = 4


@contextmanager
def copied_runs(runs: Store, *, whole: bool) -> Iterator[list[Path]]:
    """Copies of the runs in the folder `runs`, by name, until the block ends.

    `whole` copies every journal whole; otherwise those of runs that have ended are their beginning and their end, which
    is enough for `read_run` and takes two requests instead of thousands.

    Raises:
        DataError: when the store cannot be read.
    """
    with TemporaryDirectory(prefix="raychat-runs-") as folder:
        try:
            copies = [(runs.child(tag), Path(folder, tag)) for tag in runs.names()]
            with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
                found = list(pool.map(lambda run_and_copy: _copy(*run_and_copy, whole=whole), copies))
        except OSError as error:
            raise DataError(f"The runs in {runs.uri} cannot be read: {error}") from error
        yield [copy for (_, copy), is_run in zip(copies, found, strict=True) if is_run]


def _copy(run: Store, target: Path, *, whole: bool) -> bool:
    """Copy a run; whether it is one."""
    there = set(run.names())
    segments = segment_names(run)
    if "config.json" not in there and not segments:
        return False
    target.mkdir()
    for name in FILES:
        if name in there:
            try:
                run.download(name, target / name)
            except FileNotFoundError:  # a lease that was given back just now
                continue
    if segments:
        _copy_journal(run, segments, target / JOURNAL, whole=whole)
    return True


def _copy_journal(run: Store, segments: list[str], journal: Path, *, whole: bool) -> None:
    if not whole:
        journal.write_bytes(b"".join(read_segments(run, sorted({segments[0], segments[-1]}))))
    if whole or (last_turn(journal) or {}).get("event") != "end":
        join_segments(run, journal)
    if written := [record["time"] for record in last_records(journal) if "time" in record]:
        os.utime(journal, (written[-1], written[-1]))  # not when it was copied
