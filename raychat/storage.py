"""`Store`: a folder on a file system or in an object store, with the few operations that runs and checkpoints need.

Whatever is written is whole or absent. Calls end within bounded time: an object store that does not answer is an
OSError after some tens of seconds. URIs may hold credentials; `Store.uri` is what may be shown and written down.
"""

import os
import shutil
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from raychat.atomic import crc32, sync_folder
from raychat.errors import ConfigError
from raychat.uris import check_place, public_uri

BLOCK = 1 << 22  # bytes read or written at a time
CONNECT_S, SILENCE_S, ATTEMPTS = 5.0, 10.0, 3  # a call to an object store ends within about a minute
LARGEST_COPY = 5 * 10**9  # bytes that S3 copies by itself; larger objects pass through here
OPTIONS = {
    "s3": ("endpoint_override", "region", "scheme", "tls_ca_file_path"),
    "gs": ("endpoint_override", "scheme"),
}


@dataclass(frozen=True)
class Store(ABC):
    """A folder, made by `Store.of`. It need not exist: writing creates it. Cheap to make and to send to another process.

    Names may have several parts, as in "step_00000002/model.safetensors". Everything raises OSError when the disk or
    the network fails, FileNotFoundError where it is that.
    """

    address: str = field(repr=False)
    """what `Store.of` takes to make it again: with credentials, so never for messages or files"""

    @staticmethod
    def of(place: "Store | Path | str") -> "Store":
        """The store at a path or a URI `s3://bucket/path?endpoint_override=...&region=...` or `gs://bucket/path`.

        Credentials come from the environment, or from the URI as `s3://key:secret@bucket/path`.

        Raises:
            ConfigError: when it is a URI of another kind, without a bucket, or with an option that is not known.
        """
        if isinstance(place, Store):
            return place
        check_place(str(place))
        if "://" not in str(place):
            return _Folder(str(Path(place).expanduser().absolute()))
        _check_uri(str(place))
        return _Bucket(str(place))

    @property
    def uri(self) -> str:
        """Absolute path, or URI without credentials: for messages and files."""
        return public_uri(self.address)

    def __str__(self) -> str:
        return self.uri

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether it is a folder of a file system, with a `path`."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """Of a local folder. Raises ValueError for an object store."""

    @abstractmethod
    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """Arrow's file system, and the path of the folder in it."""

    @abstractmethod
    def child(self, *names: str) -> "Store":
        """The folder `names` within this one."""

    @abstractmethod
    def names(self) -> list[str]:
        """Entries directly in it, sorted; none when it is not there."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is no such file."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of this name."""

    @abstractmethod
    def blocks(self, name: str) -> Iterator[bytes]:
        """The content of a file, block by block."""

    @abstractmethod
    def write_blocks(self, name: str, blocks: Iterable[bytes | memoryview]) -> int:
        """Write a file from its pieces, whole or not at all; replaces what was there. Returns its CRC-32."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all in it. Nothing happens when it is not there."""

    @abstractmethod
    def move(self, name: str, target: "Store") -> None:
        """Make the file or folder `name` become `target` itself, which must not exist, in a store of the same kind."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where there is no limit."""

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; replaces what was there."""
        self.write_blocks(name, [data])

    def upload(self, name: str, source: Path) -> None:
        """Copy the local file `source` here, whole or not at all; replaces what was there."""
        with source.open("rb") as file:
            self.write_blocks(name, iter(lambda: file.read(BLOCK), b""))

    def read_bytes(self, name: str) -> bytes:
        """The content of a file."""
        return b"".join(self.blocks(name))

    def download(self, name: str, target: Path) -> int:
        """Copy a file to the local path `target`, whole or not at all. Returns the CRC-32 of what was read."""
        return _write_whole(target, self.blocks(name))

    def crc32(self, name: str) -> int:
        """CRC-32 of a file."""
        value = 0
        for block in self.blocks(name):
            value = zlib.crc32(block, value)
        return value

    def check_usable(self) -> None:
        """Write, read and delete a small file. Raises ConfigError, with what to do about it, when that fails."""
        name, data = f".raychat-check-{uuid.uuid4().hex}", b"raychat"
        try:
            self.write_bytes(name, data)
            found = self.read_bytes(name)
            self.delete(name)
        except OSError as error:
            raise ConfigError(f"{self.uri} cannot be used: {error}. {self._remedy()}") from error
        if found != data:
            raise ConfigError(f"{self.uri} cannot be used: it did not give back what was written. {self._remedy()}")

    @abstractmethod
    def _remedy(self) -> str:
        """What a user can do when it cannot be used."""


class _Folder(Store):
    @property
    def is_local(self) -> bool:
        return True

    @property
    def path(self) -> Path:
        return Path(self.address)

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        return pafs.LocalFileSystem(), self.address

    def child(self, *names: str) -> Store:
        return _Folder(str(self.path.joinpath(*names)))

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int | None:
        file = self.path / name
        try:
            return file.stat().st_size if file.is_file() else None
        except FileNotFoundError:  # deleted in between
            return None

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def blocks(self, name: str) -> Iterator[bytes]:
        with (self.path / name).open("rb") as file:
            while block := file.read(BLOCK):
                yield block

    def crc32(self, name: str) -> int:
        return crc32(self.path / name)

    def write_blocks(self, name: str, blocks: Iterable[bytes | memoryview]) -> int:
        return _write_whole(self.path / name, blocks)

    def delete(self, name: str) -> None:
        found = self.path / name
        try:
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found)
            else:
                found.unlink()
        except FileNotFoundError:
            return

    def move(self, name: str, target: Store) -> None:
        if target.path.exists():
            raise FileExistsError(f"{target.path} exists: {self.path / name} is not moved onto it")
        target.path.parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).rename(target.path)  # not shutil.move, which copies when that fails
        sync_folder(target.path.parent)

    def free_bytes(self) -> int | None:
        there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        return shutil.disk_usage(there).free

    def _remedy(self) -> str:
        return "Give a --storage-path or --base-dir that you may write to and that has space."


class _Bucket(Store):
    @property
    def is_local(self) -> bool:
        return False

    @property
    def path(self) -> Path:
        raise ValueError(f"{self.uri} is in an object store and has no path")

    def child(self, *names: str) -> Store:
        path, mark, query = self.address.partition("?")
        return _Bucket("/".join([path.rstrip("/"), *names]) + mark + query)

    def names(self) -> list[str]:
        fs, base = self.arrow()
        with _os_errors():
            entries = fs.get_file_info(pafs.FileSelector(base, allow_not_found=True))
        return sorted(entry.base_name for entry in entries)

    def size(self, name: str) -> int | None:
        info = self._info(name)
        return info.size if info.type == pafs.FileType.File else None

    def exists(self, name: str) -> bool:
        return self._info(name).type != pafs.FileType.NotFound

    def blocks(self, name: str) -> Iterator[bytes]:
        fs, base = self.arrow()
        with _os_errors(), fs.open_input_stream(f"{base}/{name}") as stream:
            while block := stream.read(BLOCK):
                yield block

    def write_blocks(self, name: str, blocks: Iterable[bytes | memoryview]) -> int:
        # Not by pyarrow's copy_files: in version 25 it does not report an upload that failed.
        fs, base = self.arrow()
        path, value = f"{base}/{name}".rstrip("/"), 0
        with _os_errors():
            stream = fs.open_output_stream(path)
            try:
                for block in blocks:
                    value = zlib.crc32(block, value)
                    stream.write(block)
            except BaseException:
                with suppress(OSError):
                    stream.close()  # there is no way to give up: this completes the object, unless the network failed
                    fs.delete_file(path)
                raise
            stream.close()
        return value

    def delete(self, name: str) -> None:
        fs, base = self.arrow()
        kind = self._info(name).type
        with _os_errors():
            if kind == pafs.FileType.File:
                fs.delete_file(f"{base}/{name}")
            elif kind == pafs.FileType.Directory:
                fs.delete_dir(f"{base}/{name}")

    def move(self, name: str, target: Store) -> None:
        if not isinstance(target, _Bucket):
            raise ValueError(f"{target} is not in an object store")
        (fs, base), (target_fs, target_base) = self.arrow(), target.arrow()
        if target.exists(""):
            raise FileExistsError(f"{target} exists: {self.uri}/{name} is not moved onto it")
        with _os_errors():
            info = fs.get_file_info(f"{base}/{name}")
            found = [info]
            if info.type == pafs.FileType.Directory:
                found = fs.get_file_info(pafs.FileSelector(info.path, recursive=True))
            for entry in found:
                tail = entry.path[len(info.path) :].lstrip("/")
                if entry.type == pafs.FileType.NotFound:
                    raise FileNotFoundError(f"{self.uri}/{name} is not there")
                if entry.type == pafs.FileType.File and fs is target_fs and entry.size < LARGEST_COPY:
                    fs.copy_file(entry.path, f"{target_base}/{tail}".rstrip("/"))
                elif entry.type == pafs.FileType.File:
                    target.write_blocks(tail, self.blocks(f"{name}/{tail}".rstrip("/")))
        self.delete(name)

    def free_bytes(self) -> int | None:
        return None

    def _info(self, name: str) -> pafs.FileInfo:
        fs, base = self.arrow()
        with _os_errors():
            return fs.get_file_info(f"{base}/{name}".rstrip("/"))

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        parts = urlsplit(self.address)
        bucket = parts.netloc.rpartition("@")[2]
        with _os_errors():
            return _connect(parts.scheme, parts.netloc, parts.query), bucket + unquote(parts.path.rstrip("/"))

    def _remedy(self) -> str:
        return (
            "Check that the bucket exists, that the credentials (the usual environment variables of the store, or in the "
            "URI) may read, write, list and delete in it, and the region and endpoint_override of the URI."
        )


def _check_uri(uri: str) -> None:
    parts, shown = urlsplit(uri), public_uri(uri)
    if parts.scheme not in OPTIONS:
        raise ConfigError(f"{shown} is no place that raychat can write to: give a folder, s3://... or gs://...")
    if not parts.netloc.rpartition("@")[2]:
        raise ConfigError(f"{shown} names no bucket: write {parts.scheme}://BUCKET/FOLDER")
    known = OPTIONS[parts.scheme]
    if unknown := sorted({key for key, _ in parse_qsl(parts.query, keep_blank_values=True)} - set(known)):
        raise ConfigError(f"{shown}: the option {unknown[0]} is not known. {parts.scheme}:// takes {', '.join(known)}.")


@lru_cache(maxsize=16)
def _connect(scheme: str, netloc: str, query: str) -> pafs.FileSystem:
    """A client of the object store: made once per process, because it holds connections."""
    options = dict(parse_qsl(query))
    user, _, secret = netloc.rpartition("@")[0].partition(":")
    if scheme == "gs":
        limit = timedelta(seconds=ATTEMPTS * SILENCE_S)
        return pafs.GcsFileSystem(anonymous=user == "anonymous", retry_time_limit=limit, **options)
    endpoint = options.pop("endpoint_override", None) or _environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    if endpoint:
        protocol, mark, options["endpoint_override"] = endpoint.rstrip("/").rpartition("://")
        options.setdefault("scheme", protocol if mark else "https")
    region = options.pop("region", None) or _environment("AWS_REGION", "AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else pafs.resolve_s3_region(netloc.rpartition("@")[2])
    if user:
        options |= {"access_key": unquote(user), "secret_key": unquote(secret)}
    return pafs.S3FileSystem(
        region=region,
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,  # also how long a transfer may stand still
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # small objects in one request
        **options,
    )


def _environment(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


@contextmanager
def _os_errors() -> Iterator[None]:
    """What pyarrow raises besides OSError, such as for a bucket name that cannot be, as OSError."""
    try:
        yield
    except pa.ArrowException as error:
        if isinstance(error, OSError):
            raise
        raise OSError(str(error)) from error


def _write_whole(target: Path, blocks: Iterable[bytes | memoryview]) -> int:
    """Write a local file whole or not at all; returns the CRC-32 of what was written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    value = 0
    try:
        with temporary.open("wb") as file:
            for block in blocks:
                file.write(block)
                value = zlib.crc32(block, value)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return value
