"""Chunks of token shards: record batches of some 256 rows, mapped from a folder or read by range from an object store.

What a node has read from an object store it keeps in its temporary folder, for all its processes: windows of the global
order touch a chunk again and again, and the next attempt begins where this one was. Nothing there is needed later.
"""

import contextlib
import logging
import os
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from raychat.errors import DataError
from raychat.storage import Store

PATIENCE_S = 300.0
"""that a store may be away before what waits for rows fails: longer than it takes to answer again, as a rule"""
RETRY_S = 5.0
AT_ONCE = 8  # requests: as many as there are lanes
MOST_BYTES = 4 * 2**30
"""kept by a node for one fingerprint; some 0.3 GB are in use at a time at T = 2048"""
KEEP_SHARE = 0.75  # of it, when it is cleared
LOOK_SHARE = 1 / 16  # of it: written between two looks

log = logging.getLogger(__name__)


class Chunks(ABC):
    """The chunks of some shards, by the number of the shard and of the chunk in it."""

    @abstractmethod
    def prefetch(self, keys: Sequence[tuple[int, int]]) -> None:
        """These are wanted next."""

    @abstractmethod
    def chunk(self, shard: int, chunk: int) -> np.ndarray:
        """Its rows, (rows, row_len), to be read only.

        Raises:
            DataError: the shard is gone or damaged.
            OSError: the store does not answer.
        """


def chunks_of(store: Store, files: Sequence[str], *, name: str, row_len: int, dtype: np.dtype) -> Chunks:
    """Those of the Arrow files `files` in `store`; `name` stands for their content, on any machine."""
    if store.is_local:
        return _Mapped(store.path, files, row_len)
    return RemoteChunks(store, files, name=name, row_len=row_len, dtype=dtype)


class _Mapped(Chunks):
    """Shards on a disk, mapped into memory when they are first asked for."""

    def __init__(self, folder: Path, files: Sequence[str], row_len: int) -> None:
        self._folder, self._files, self._row_len = folder, files, row_len
        self._open: dict[int, list[np.ndarray]] = {}

    def prefetch(self, keys: Sequence[tuple[int, int]]) -> None:
        """Nothing: the operating system reads what is looked at."""

    def chunk(self, shard: int, chunk: int) -> np.ndarray:
        if shard not in self._open:
            path = self._folder / self._files[shard]
            try:
                with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
                    batches = [_rows(file.get_batch(i), self._row_len) for i in range(file.num_record_batches)]
            except (OSError, pa.ArrowInvalid) as error:
                raise _unreadable(Store.of(self._folder), self._files[shard], error) from error
            self._open[shard] = batches
        return self._open[shard][chunk]


class RemoteChunks(Chunks):
    """Shards in an object store: a chunk costs a request the first time that a node wants it."""

    def __init__(self, store: Store, files: Sequence[str], *, name: str, row_len: int, dtype: np.dtype) -> None:
        self._store, self._files, self._row_len, self._dtype = store, files, row_len, dtype
        self._folder = own_folder() / name
        self._locks = [threading.Lock() for _ in files]
        self._open: dict[int, pa.ipc.RecordBatchFileReader] = {}
        self._written = 0

    def prefetch(self, keys: Sequence[tuple[int, int]]) -> None:
        missing = [key for key in keys if not self._path(*key).exists()]
        if len(missing) > 1:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda key: self._fetch(*key), missing))

    def chunk(self, shard: int, chunk: int) -> np.ndarray:
        try:
            return np.memmap(self._path(shard, chunk), self._dtype, mode="r").reshape(-1, self._row_len)
        except (OSError, ValueError):  # not there, cleared just now, or empty
            return self._fetch(shard, chunk)

    def _path(self, shard: int, chunk: int) -> Path:
        return self._folder / f"{Path(self._files[shard]).stem}-{chunk:06d}"

    def _fetch(self, shard: int, chunk: int) -> np.ndarray:
        """Read a chunk from the store, whatever it takes, and keep it."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                rows = self._read(shard, chunk)
                break
            except FileNotFoundError as error:
                raise _unreadable(self._store, self._files[shard], error) from error
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise
                log.warning("%s does not give its token shards (%s): trying again", self._store, error)
                time.sleep(RETRY_S)
        with contextlib.suppress(OSError):  # no room: it is read again when it is wanted again
            self._keep(self._path(shard, chunk), rows)
        return rows

    def _read(self, shard: int, chunk: int) -> np.ndarray:
        with self._locks[shard]:  # a reader is one thread's at a time
            try:
                if shard not in self._open:
                    filesystem, base = self._store.arrow()
                    self._open[shard] = pa.ipc.open_file(filesystem.open_input_file(f"{base}/{self._files[shard]}"))
                return _rows(self._open[shard].get_batch(chunk), self._row_len)
            except pa.ArrowInvalid as error:
                raise _unreadable(self._store, self._files[shard], error) from error
            except OSError:
                self._open.pop(shard, None)
                raise

    def _keep(self, path: Path, rows: np.ndarray) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                file.write(rows.tobytes())
                file.flush()
                os.fsync(file.fileno())  # a file of zeros after a power cut would be rows
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._written += rows.nbytes
        if self._written > MOST_BYTES * LOOK_SHARE:
            self._written = 0
            clear(self._folder, MOST_BYTES)


def own_folder() -> Path:
    """Where this user's processes on this node keep chunks."""
    folder = Path(tempfile.gettempdir()) / f"raychat-tokens-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # rows that somebody else wrote
        raise DataError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own.")
    return folder


def clear(folder: Path, most: int) -> None:
    """Delete the files that were written first when there are more than `most` bytes in `folder`."""
    found = []
    for entry in _entries(folder):
        with contextlib.suppress(OSError):  # another process was quicker
            facts = entry.stat()
            found.append((facts.st_mtime_ns, facts.st_size, entry.path))
    left = sum(size for _, size, _ in found)
    if left <= most:
        return
    for _, size, path in sorted(found):
        if left <= most * KEEP_SHARE:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
        left -= size


def _entries(folder: Path) -> Iterable["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        yield from entries


def _rows(batch: pa.RecordBatch, row_len: int) -> np.ndarray:
    return batch.column(0).flatten().to_numpy(zero_copy_only=True).reshape(-1, row_len)


def _unreadable(store: Store, file: str, error: Exception) -> DataError:
    return DataError(
        f"Token shard {store}/{file} cannot be read ({error}): delete it and {store}/manifest.json, and it is made again."
    )
