"""Downloads that survive a bad network: resumed, retried, checked, and under their final name only when whole."""

import email.utils
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import requests

from raychat.errors import DataError
from raychat.progress import Progress
from raychat.uris import public_uri

# A chunk that a break leaves incomplete is lost, so chunks are small.
CHUNK_BYTES = 2**14
MAX_WAIT_S = 120.0
UNREACHABLE = (
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file to download."""

    url: str
    target: Path
    sha256: str | None = None
    """digest that the file must have, in hex; None takes the one the server names, if it names one"""


class _RetryError(Exception):
    """An attempt that failed for a reason which may pass."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _CancelledError(Exception):
    """Another download failed, so this one stops where it is."""


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    validate: Callable[[Path], None] | None = None,
    attempts: int = 6,
    backoff_s: float = 1.0,
    timeout_s: float = 60.0,
    progress: Callable[[int], None] | None = None,
    session: requests.Session | None = None,
    cancelled: threading.Event | None = None,
) -> None:
    """Download `url` to `target`; a file already there is taken as it is, a `.part` beside it is continued.

    Connection errors, time-outs, short answers, damaged files, 5xx and 429 are tried again, up to `attempts` times
    in a row without a new byte, after `backoff_s` seconds, doubled each time (or what Retry-After says, at most two
    minutes). `validate` looks at the finished file and raises DataError or ValueError if it is damaged. `progress` is
    told the bytes that arrived, less those that had to be thrown away. Processes that want the same file wait for the
    first of them. Setting `cancelled` stops it where it is, by an exception.

    Raises:
        DataError: the server refuses (4xx), the attempts are used up, or the disk cannot take the file.
    """
    cancelled, report = cancelled or threading.Event(), progress or (lambda count: None)
    if target.exists():
        return
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A session that was handed in stays open for its owner.
        with nullcontext(session) if session else requests.Session() as http, _locked(part) as file:
            if target.exists():  # a process that held the lock was quicker
                part.unlink(missing_ok=True)
                return
            transfer = _Transfer(url, file, http, timeout_s, report, cancelled)
            _try_repeatedly(transfer, attempts, backoff_s, lambda etag: _check(part, sha256 or etag, validate))
            os.fsync(file.fileno())
            part.replace(target)
    except OSError as error:
        raise DataError(
            f"{public_uri(url)} cannot be stored as {target}: {error}. Free disk space or choose another --base-dir; "
            "what has arrived is kept and continued."
        ) from None


def download_all(
    jobs: Sequence[Job],
    *,
    label: str = "download",
    parallel: int = 4,
    total_bytes: float | None = None,
    validate: Callable[[Path], None] | None = None,
    attempts: int = 6,
    backoff_s: float = 1.0,
    timeout_s: float = 60.0,
    echo: Callable[[str], None],
) -> None:
    """Download `jobs`, `parallel` at a time, with a line of progress every few seconds.

    `total_bytes` is an estimate for the progress. The first failure stops the others and is raised.
    """
    cancelled = threading.Event()
    with Progress(label, total_bytes, "bytes", echo=echo) as progress, ThreadPoolExecutor(parallel) as pool:
        futures = [
            pool.submit(
                download,
                job.url,
                job.target,
                sha256=job.sha256,
                validate=validate,
                attempts=attempts,
                backoff_s=backoff_s,
                timeout_s=timeout_s,
                progress=progress.advance,
                cancelled=cancelled,
            )
            for job in jobs
        ]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also when the user interrupts
            cancelled.set()
            pool.shutdown(wait=True, cancel_futures=True)
        failures = [error for future in futures if not future.cancelled() and (error := future.exception())]
        for error in sorted(failures, key=lambda error: isinstance(error, _CancelledError)):
            raise error


@dataclass(frozen=True)
class _Transfer:
    """What one attempt needs: where from, where to, whom to tell."""

    url: str
    file: BinaryIO
    http: requests.Session
    timeout_s: float
    report: Callable[[int], None]
    cancelled: threading.Event

    def size(self) -> int:
        """Bytes that are there."""
        return os.fstat(self.file.fileno()).st_size

    def start_over(self) -> None:
        """Throw away what is there."""
        self.report(-self.size())
        self.file.truncate(0)

    def attempt(self) -> str | None:
        """Fetch what is missing. The SHA-256 of the whole file in hex if the server names it.

        Raises _RetryError or DataError.
        """
        have = self.size()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with self.http.get(self.url, headers=headers, stream=True, timeout=self.timeout_s) as answer:
                total = self._agree(answer, have)
                if answer.status_code != 416:  # whose body is an error page, not the file
                    self._store(answer)
        except UNREACHABLE as error:
            raise _RetryError(f"{type(error).__name__}: {_told(self.url, error)}") from None
        except requests.RequestException as error:
            told = _told(self.url, error)
            raise DataError(f"{public_uri(self.url)} cannot be downloaded: {told}. Check the address.") from None
        finally:
            self.file.flush()
        size = self.size()
        if total is not None and size != total:
            if size > total:
                self.start_over()
            raise _RetryError(f"{size:,} of {total:,} bytes arrived")
        return _named_digest(answer)

    def _store(self, answer: requests.Response) -> None:
        for chunk in answer.iter_content(CHUNK_BYTES):
            if self.cancelled.is_set():
                raise _CancelledError
            self.file.write(chunk)
            self.report(len(chunk))

    def _agree(self, answer: requests.Response, have: int) -> int | None:
        """Bytes of the whole file as far as the server says, after bringing the part in line with its answer."""
        content_range = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if answer.status_code == 206:
            if not content_range or content_range[1] != str(have):
                self.start_over()
                raise _RetryError("the server continued at another place than asked")
            return int(content_range[2]) if content_range[2] != "*" else None
        if answer.status_code == 416 and content_range and content_range[2] == str(have):
            return have  # nothing is missing
        if answer.status_code == 416:
            self.start_over()
            raise _RetryError("the server has a shorter file than the part that was there")
        if answer.status_code == 200:
            self.start_over()
            length = answer.headers.get("Content-Length", "")
            return int(length) if length.isdigit() and "Content-Encoding" not in answer.headers else None
        if answer.status_code == 429 or answer.status_code >= 500:
            raise _RetryError(f"the server answered {answer.status_code}", _retry_after_s(answer))
        raise DataError(
            f"{public_uri(self.url)} cannot be downloaded: the server answered {answer.status_code} {answer.reason}. "
            "Check the address, and that it can be reached without signing in."
        )


def _told(url: str, error: Exception) -> str:
    """The message of `error` without the secrets of `url`, which it may quote whole or from the path on."""
    public, text = public_uri(url), str(error)
    for quoted, shown in ((url, public), (_from_path(url), _from_path(public))):
        text = text.replace(quoted, shown)
    return text


def _from_path(url: str) -> str:
    return urlsplit(url)._replace(scheme="", netloc="").geturl()


def _try_repeatedly(transfer: _Transfer, attempts: int, backoff_s: float, check: Callable[[str | None], None]) -> None:
    """Attempt until the file is whole and passes `check`."""
    transfer.report(transfer.size())
    failures, farthest, shown = 0, transfer.size(), public_uri(transfer.url)
    while True:
        try:
            digest = transfer.attempt()
            try:
                check(digest)
            except _RetryError:
                transfer.start_over()
                raise
            return
        except _RetryError as error:
            # A network that delivers a little before each break gets there in the end.
            failures = 1 if transfer.size() > farthest else failures + 1
            farthest = max(farthest, transfer.size())
            if failures >= attempts:
                raise DataError(
                    f"{shown} cannot be downloaded: {error} (attempt {failures} of {attempts}). "
                    "Check the network and start again: what has arrived is kept and continued."
                ) from None
            pause = max(error.wait_s, min(MAX_WAIT_S, backoff_s * 2 ** (failures - 1)))
            log.warning("%s: %s; attempt %d of %d in %.0f s", shown, error, failures + 1, attempts, pause)
            if transfer.cancelled.wait(pause):
                raise _CancelledError from None


def _check(part: Path, sha256: str | None, validate: Callable[[Path], None] | None) -> None:
    if sha256:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256.lower():
            raise _RetryError(f"damaged on the way: its SHA-256 is {found}, not {sha256}")
    if validate:
        try:
            validate(part)
        except (DataError, ValueError) as error:
            raise _RetryError(f"damaged on the way: {error}") from None


def _named_digest(answer: requests.Response) -> str | None:
    """The SHA-256 the server names. Hugging Face puts it on the redirect; the storage behind has tags of its own."""
    answers = [*answer.history, answer]
    tags = [tag for one in answers if (tag := one.headers.get("X-Linked-ETag"))] or [answers[0].headers.get("ETag", "")]
    found = re.fullmatch(r'"?([0-9a-fA-F]{64})"?', tags[0].strip())
    return found[1] if found else None


def _retry_after_s(answer: requests.Response) -> float:
    """Seconds that the server asks to wait (RFC 9110: a number or a date), at most MAX_WAIT_S."""
    value = answer.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return min(MAX_WAIT_S, float(value))
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except ValueError:
        return 0.0
    return max(0.0, min(MAX_WAIT_S, moment - time.time()))


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """`part` open for appending, by one process or thread at a time."""
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
