"""The embedded corpus: text that every Python installation carries, so that a first run needs no download.

Sources of the standard library come first; licences, readmes, metadata and documentation of installed packages follow
up to 30 MB. Packages get upgraded, so the text is snapshot once, and the snapshot is the corpus.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raychat.errors import DataError

MAX_BYTES = 30 * 10**6
MIN_BYTES = 2 * 10**6
TRAIN_SHARDS = 8
VAL_SHARE = 0.05
ROW_GROUP_DOCS = 64
MIN_CHARS, CUT_CHARS, MAX_CHARS = 2_000, 6_000, 12_000
# Tests and demonstrations repeat themselves; the last two hold packages, not the standard library.
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages",
    "encodings",  # tables of characters, not text
}  # fmt: skip
DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|changes|changelog|history|news)\b.*|metadata", re.I
)
DOCUMENTATION_SUFFIXES = {"", ".md", ".rst", ".txt"}


def embedded_corpus(base_dir: Path, echo: Callable[[str], None]) -> Path:
    """The directory `base_dir/corpora/embedded` of parquet shards, made on the first call (a few seconds).

    `shard_00000.parquet` to `shard_00007.parquet` are for training, `shard_00008.parquet` (5% of the documents) for
    validation. Documents are 2,000 to 12,000 characters of one file where the file is that long, in an order that is
    random but depends on nothing but their names.

    Raises:
        DataError: this Python carries less than 2 MB of text.
    """
    folder = base_dir / "corpora" / "embedded"
    if folder.is_dir():
        return folder
    echo("embedded corpus: collecting the text of this Python installation")
    documents, size = collect()
    if size < MIN_BYTES:
        raise DataError(
            f"this Python installation carries only {size:,} bytes of text, too little for --corpus embedded. "
            "Give a directory of text with --corpus."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".embedded.", dir=folder.parent))
    try:
        _write_shards(documents, staging)
        staging.chmod(0o755)  # mkdtemp keeps others out; a shared base directory is read by all
        staging.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    echo(f"embedded corpus: {len(documents):,} documents, {size / 1e6:.1f} MB of text in {folder}")
    return folder


def collect(max_bytes: int = MAX_BYTES) -> tuple[list[str], int]:
    """Documents in the order of the corpus, no two equal, and their UTF-8 bytes together, at most `max_bytes`."""
    size, seen, documents = 0, set(), []
    for name, path in _files():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        for i, document in enumerate(cut(text)):
            content = document.encode()
            digest = hashlib.sha256(content).digest()
            if digest in seen:
                continue
            if size + len(content) > max_bytes:
                return _shuffled(documents), size
            seen.add(digest)
            size += len(content)
            documents.append((f"{name}#{i}", document))
    return _shuffled(documents), size


def cut(text: str) -> list[str]:
    """`text` cut at blank lines into documents of 2,000 to 12,000 characters; a shorter text is one document.

    Nothing is lost but white space between documents. A paragraph longer than a document is cut at line ends, a line
    longer than that anywhere.
    """
    documents, current = [], ""
    for piece in _paragraphs(text):
        if current and (len(current) >= CUT_CHARS or len(current) + len(piece) > MAX_CHARS):
            documents.append(current)
            current = ""
        current += piece
    if documents and len(current) < MIN_CHARS and len(documents[-1]) + len(current) <= MAX_CHARS:
        documents[-1] += current
    else:
        documents.append(current)
    return [stripped for document in documents if (stripped := document.strip())]


def _paragraphs(text: str) -> Iterator[str]:
    """Consecutive pieces of `text` of at most MAX_CHARS characters, cut behind blank lines where that can be."""
    for paragraph in re.split(r"(?<=\n\n)(?!\n)", text):
        if len(paragraph) <= MAX_CHARS:
            yield paragraph
            continue
        for line in paragraph.splitlines(keepends=True):
            yield from (line[start : start + MAX_CHARS] for start in range(0, len(line), MAX_CHARS))


def _shuffled(documents: list[tuple[str, str]]) -> list[str]:
    # By a hash of the name: the same text gives the same order everywhere, and any span of it is a fair sample.
    return [text for _, text in sorted(documents, key=lambda item: hashlib.sha256(item[0].encode()).digest())]


def _files() -> Iterator[tuple[str, Path]]:
    """Names that do not depend on where Python is installed, and the files: the standard library, then packages."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in stdlib.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(stdlib).parts)]
    for path in sorted([*modules, *stdlib.glob("LICENSE*")], key=lambda path: path.relative_to(stdlib).as_posix()):
        yield f"stdlib/{path.relative_to(stdlib).as_posix()}", path
    found = {}
    for package in importlib.metadata.distributions():
        for file in package.files or ():
            if DOCUMENTATION.fullmatch(file.name) and file.suffix.lower() in DOCUMENTATION_SUFFIXES:
                found[f"packages/{file.as_posix()}"] = Path(str(file.locate()))
    yield from sorted(found.items())


def _write_shards(documents: list[str], folder: Path) -> None:
    validation = max(1, round(len(documents) * VAL_SHARE))
    train = len(documents) - validation
    bounds = [*(train * i // TRAIN_SHARDS for i in range(TRAIN_SHARDS + 1)), len(documents)]
    for i, (first, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        table = pa.table({"text": pa.array(documents[first:stop], pa.string())})
        with (folder / f"shard_{i:05d}.parquet").open("wb") as file:
            pq.write_table(table, file, compression="zstd", row_group_size=ROW_GROUP_DOCS)
            file.flush()
            os.fsync(file.fileno())
