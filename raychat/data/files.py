"""Files of text, local or in an object store: finding them by directory, name or glob, and opening them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs as pafs

from raychat.errors import DataError

FORMS = ".parquet, .jsonl or .txt (the last two also .gz, .zst or .bz2)"


def kind(name: str) -> str | None:
    """`parquet`, `jsonl` or `txt` by the end of the name, compressed or not; None for anything else."""
    found = re.search(r"\.(?:(parquet)|(jsonl|txt)(?:\.(?:gz|zst|bz2))?)$", name)
    return found and (found[1] or found[2])


def locate(where: str) -> tuple[str, list[str]]:
    """A name for the corpus `where`, safe as a file name, and the paths or URIs of its files in name order.

    `where` is a directory (its files of text; other files and sub-directories are passed over), a file, or a glob.

    Raises:
        DataError: it does not exist, cannot be read, holds no file of text, or files of several kinds.
    """
    root, pattern = _split_glob(where)
    found: list[str] = []
    with explained(where):
        filesystem, inner = filesystem_of(root)
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.Directory:
            selector = pafs.FileSelector(inner, recursive="/" in pattern)
            found = [file.path for file in filesystem.get_file_info(selector) if file.is_file]
    folder = (urlsplit(root).netloc + urlsplit(root).path if "://" in root else root).rstrip("/")
    if info.type == pafs.FileType.NotFound:
        raise DataError(
            f"there is no {root}. Give as the corpus a directory, a file or a glob of {FORMS} files, or embedded or "
            "climbmix."
        )
    if info.type != pafs.FileType.Directory:
        if pattern or kind(root) is None:
            raise DataError(f"{where} is no text that can be read: the name of a file must end in {FORMS}.")
        return _safe_name(folder.rpartition("/")[0]), [root]
    names = sorted(path.removeprefix(inner.rstrip("/")).lstrip("/") for path in found)
    names = [name for name in names if kind(name) and _matches(name, pattern)]
    if not names:
        raise DataError(f"{where} holds no {FORMS} files. Give a directory, a file or a glob of such files.")
    if len(kinds := sorted({str(kind(name)) for name in names})) > 1:
        raise DataError(
            f"{where} mixes files of several kinds ({', '.join(kinds)}). Give a glob that selects one of them, such "
            f"as '{folder}/*.{kinds[0]}'."
        )
    return _safe_name(folder), [_join(root, name) for name in names]


def filesystem_of(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path inside it."""
    return pafs.FileSystem.from_uri(path) if "://" in path else (pafs.LocalFileSystem(), path)


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn what file systems and parsers raise about `path` into a DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"there is no {path}. Was it moved or deleted?") from None
    except PermissionError as error:
        raise DataError(f"{path} may not be read: {error}. Change its permissions or your credentials.") from None
    except (OSError, pa.ArrowException, ImportError) as error:
        if "://" in path:
            raise DataError(
                f"{path} cannot be read: {error}. Check the URI (s3://, gs:// or file://, special characters "
                "percent-encoded), the credentials and the network."
            ) from None
        raise DataError(f"{path} cannot be read, it may be damaged or cut short: {error}. Copy it again.") from None


def _split_glob(where: str) -> tuple[str, str]:
    """The directory or file without wildcards, and the pattern below it ("" for none). Local paths become absolute."""
    if "://" in where:
        parts = urlsplit(where)
        fixed, pattern = _fixed_part(parts.path, "*[")  # a question mark starts a URI's query
        return urlunsplit(parts._replace(path=fixed)), pattern
    path = os.path.abspath(Path(where).expanduser())
    return (path, "") if os.path.exists(path) else _fixed_part(path, "*[?")


def _fixed_part(path: str, wildcards: str) -> tuple[str, str]:
    names = path.split("/")
    wild = next((i for i, name in enumerate(names) if set(wildcards) & set(name)), None)
    return (path, "") if wild is None else ("/".join(names[:wild]) or "/", "/".join(names[wild:]))


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    if parts[-1].startswith("."):
        return False
    return not pattern or (len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns)))


def _join(root: str, name: str) -> str:
    if "://" not in root:
        return f"{root.rstrip('/')}/{name}"
    parts = urlsplit(root)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def _safe_name(folder: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.rpartition("/")[2]).strip("-.") or "corpus"
