"""The files of a local corpus by directory listing alone: what they are called and how large they are.

The same selection as raychat/data/files.py and corpus.py make, which load pyarrow and open every file.
"""

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from raychat.planning.ranges import Range
from raychat.planning.requests import FileMark
from raychat.planning.text import CLIMBMIX_SHARDS, COMPRESSED_TEXT, JSONL_TEXT, PARQUET_TEXT

_KIND = re.compile(r"\.(?:(parquet)|(jsonl|txt)(\.(?:gz|zst|bz2))?)$")


@dataclass(frozen=True)
class Files:
    """Files to train on and to validate on."""

    train: tuple[FileMark, ...]
    val: tuple[FileMark, ...]

    @property
    def train_bytes(self) -> int:
        """Bytes of the files to train on, as they lie there."""
        return sum(size for _, size, _ in self.train)


def local_files(corpus: str, val_corpus: str, num_files: int, base_dir: Path) -> Files | None:
    """The files of `corpus` (embedded, climbmix, or a local path), -1 for all of them.

    None where that cannot be seen from here: URIs, what is not there (yet), too few files.
    """
    provided = corpus in ("embedded", "climbmix")
    paths = _listed(corpus, num_files, base_dir)
    if num_files != -1 and len(paths) > num_files:
        paths = [*paths[: num_files - 1], paths[-1]] if provided or not val_corpus else paths[:num_files]
    val = _listed(val_corpus, 1, base_dir)[-1 if val_corpus in ("embedded", "climbmix") else 0 :] if val_corpus else []
    if not val_corpus:
        val = paths[-1:]
    apart = {*val, *(paths[-1:] if provided else ())}
    train = [path for path in paths if path not in apart]
    return Files(marks(train), marks(val)) if train and val else None


def marks(paths: Iterable[str]) -> tuple[FileMark, ...]:
    """Name, size and time of files; a URI has only its name (size and time -1)."""
    return tuple(_mark(path) for path in paths)


def text_chars(files: Iterable[FileMark]) -> Range:
    """Characters of text in files of these names and sizes; a byte is taken for a character, as in English."""
    return Range.total(_text_per_byte(name).scaled(max(0, size)) for name, size, _ in files)


def _mark(path: str) -> FileMark:
    if "://" in path:
        return path.rpartition("/")[2], -1, -1
    status = os.stat(path)
    return os.path.basename(path), status.st_size, status.st_mtime_ns


def _listed(corpus: str, num_files: int, base_dir: Path) -> list[str]:
    """Paths in the order in which a corpus has its files."""
    if "://" in corpus:
        return []
    if corpus == "climbmix":
        # The first ones and the last of all, whatever other runs have downloaded: one that is missing decides.
        names = [f"shard_{index:05d}.parquet" for index in (*range(num_files - 1), CLIMBMIX_SHARDS)]
        there = [str(base_dir / "corpora" / "climbmix" / name) for name in names]
        return there if all(map(os.path.exists, there)) else []
    where = os.path.abspath(base_dir / "corpora" / "embedded" if corpus == "embedded" else Path(corpus).expanduser())
    if os.path.isfile(where):
        return [where]
    found = glob.glob(f"{glob.escape(where)}/*" if os.path.isdir(where) else where)
    return sorted(path for path in found if _KIND.search(path) and os.path.isfile(path))


def _text_per_byte(name: str) -> Range:
    found = _KIND.search(name)
    if found is None or found[1]:
        return PARQUET_TEXT
    text = JSONL_TEXT if found[2] == "jsonl" else Range.exactly(1.0)
    return text.times(COMPRESSED_TEXT) if found[3] else text
