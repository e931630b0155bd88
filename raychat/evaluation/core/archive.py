"""A CORE bundle that comes as a zip or tar: fetched once, checked, and unpacked whole or not at all."""

import hashlib
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from raychat.atomic import sync_folder, write_text
from raychat.data.download import Job, download_all
from raychat.errors import ConfigError, DataError
from raychat.uris import public_uri


def unpacked(place: str, cache: Path, echo: Callable[[str], None]) -> Path:
    """The folder in `cache` that holds what is in the archive `place`, a path or an http(s) URL.

    Its SHA-256 is told and kept beside the folder as `<folder>.sha256`; `#sha256=HEX` at the end of a URL demands one.

    Raises:
        ConfigError: there is no such file, or the address is of a kind that cannot be fetched.
        DataError: the download fails, or the archive is damaged or holds what it must not.
    """
    scheme, fragment = urlsplit(place).scheme, urlsplit(place).fragment
    if "://" not in place:
        archive = Path(place).expanduser()
        if not archive.is_file():
            raise ConfigError(
                f"--core-bundle={place} does not exist. Give the folder of a CORE bundle, or the path or URL of its archive."
            )
        digest = _sha256(archive)
        folder = cache / f"{_stem(archive.name)}-{digest[:12]}"
        return folder if folder.is_dir() else _unpack(archive, folder, place, digest, echo)
    if scheme not in ("http", "https"):
        raise ConfigError(
            f"--core-bundle={public_uri(place)} cannot be fetched: only http:// and https:// can. Copy it to a folder."
        )
    wanted = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if fragment and not wanted:
        raise ConfigError(
            f"--core-bundle={public_uri(place)}: after # only sha256= and 64 hexadecimal digits can stand."
        )
    return _fetched(place, wanted and wanted[1].lower(), cache, echo)


def fetched_folder(place: str, cache: Path) -> Path:
    """Where in `cache` the archive at a URL is unpacked, or will be."""
    name = PurePosixPath(urlsplit(place).path).name or "bundle"
    return cache / f"{_stem(name)}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"


def _fetched(place: str, sha256: str | None, cache: Path, echo: Callable[[str], None]) -> Path:
    url, folder = place.partition("#")[0], fetched_folder(place, cache)
    if folder.is_dir():
        return folder
    archive = folder.with_name(folder.name + ".archive")
    download_all([Job(url=url, target=archive, sha256=sha256)], label="CORE bundle", echo=echo)
    try:
        return _unpack(archive, folder, public_uri(url), _sha256(archive), echo)
    finally:
        archive.unlink(missing_ok=True)


def _unpack(archive: Path, folder: Path, place: str, digest: str, echo: Callable[[str], None]) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in _members(archive, place):
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                shutil.copyfileobj(content, file)
                file.flush()
                os.fsync(file.fileno())
        staging.chmod(0o755)  # mkdtemp keeps others out; a shared base directory is read by all
        write_text(folder.with_name(folder.name + ".sha256"), f"{digest}  {place}\n")
        staging.replace(folder)
        sync_folder(folder.parent)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DataError(f"the CORE bundle {place} is damaged: {error}. Fetch it again.") from None
    except RuntimeError as error:  # what zipfile raises for a password, and for a compression it does not know
        raise DataError(f"the CORE bundle {place} cannot be unpacked: {error}. Pack it without a password.") from None
    except OSError as error:
        if not folder.is_dir():  # else another process was quicker
            raise DataError(f"the CORE bundle {place} cannot be unpacked to {folder}: {error}.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    echo(f"CORE bundle {place}: SHA-256 {digest}, unpacked to {folder}")
    return folder


def _members(archive: Path, place: str) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    """Name and content of each file of a zip or tar. Raises DataError on links, devices and paths that lead outside."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                mode = info.external_attr >> 16
                path = _safe(info.filename, place, plain=stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR))
                if not info.is_dir():
                    with opened.open(info) as content:
                        yield path, content
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            for member in opened:
                path = _safe(member.name, place, plain=member.isreg() or member.isdir())
                if (content := opened.extractfile(member)) is not None:
                    yield path, content
    else:
        raise DataError(
            f"{place} is neither a zip nor a tar. Check the address: a page with an error may have come instead."
        )


def _safe(name: str, place: str, *, plain: bool) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if not plain or path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"the CORE bundle {place} holds {name!r}: a link, a device or a path that leads outside. It is not unpacked."
        )
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stem(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(r"(\.tar)?\.[A-Za-z0-9]+$", "", name)).strip("-.") or "bundle"
