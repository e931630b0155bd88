"""Corpora: which files hold the text, which of them validate, and how to read their documents.

A corpus is a directory, a file or a glob of parquet, jsonl or txt files, local or in an object store, or one of the two
that raychat provides: `embedded` and `climbmix`. Whatever is wrong with it becomes a DataError that names the file.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raychat.data import climbmix
from raychat.data.embedded import embedded_corpus
from raychat.data.files import explained, filesystem_of, kind, locate
from raychat.errors import ConfigError, DataError

PROVIDED = ("embedded", "climbmix")
EDGE_BYTES = 64 * 2**10
UNIT_BYTES = 64 * 2**20
SEPARATOR = b"<|endoftext|>"
# What gzip and zstd save on English text, roughly; only progress lines depend on it.
TEXT_PER_COMPRESSED_BYTE = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of a corpus."""

    path: str
    """local path or URI (s3://, gs://, file://)"""
    name: str
    """base name: what fingerprints use, so that a moved corpus is the same corpus"""
    size: int
    """bytes"""
    signature: str
    """sha256 over size, first and last 64 KiB: cheap, also remote"""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of a source that one task reads."""

    source: Source
    row_groups: tuple[int, int] | None
    """parquet row groups [first, stop); None for a whole jsonl or txt file"""
    text_bytes: int
    """estimate of the bytes of text, for progress"""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files to train on and those to validate on."""

    name: str
    """`embedded`, `climbmix`, or the name of the directory, safe as a file name"""
    train: tuple[Source, ...]
    val: tuple[Source, ...]
    text_column: str
    """parquet column or jsonl key that holds the text"""


def open_corpus(
    corpus: str,
    *,
    base_dir: Path,
    val_corpus: str | None = None,
    text_column: str = "text",
    num_data_shards: int | None = None,
    tokens_needed: int | None = None,
    echo: Callable[[str], None] = log.info,
) -> Corpus:
    """Find the files of `corpus` in name order; `embedded` and `climbmix` are made or fetched under `base_dir` first.

    The last file validates, unless `val_corpus` (in the same forms) is given. `num_data_shards` files are used, the
    validation file of `corpus` included. For `climbmix` without it, `tokens_needed` decides how many.

    Raises:
        DataError: files are missing, of mixed kinds, empty or unreadable, or too few.
        ConfigError: `num_data_shards` leaves nothing to train on.
        ValueError: `climbmix` with neither `num_data_shards` nor `tokens_needed`.
    """
    last_validates = val_corpus is None or corpus in PROVIDED
    if num_data_shards is not None and num_data_shards < (2 if last_validates else 1):
        raise ConfigError(
            f"--num-data-shards={num_data_shards} leaves no file of --corpus {corpus} to train on"
            f"{', since the last one validates' if last_validates else ''}. Use {2 if last_validates else 1} or more."
        )
    if corpus == "climbmix":
        if num_data_shards is None and tokens_needed is None:
            raise ValueError("climbmix needs num_data_shards or tokens_needed, to know how much to download")
        name, paths = corpus, _climbmix(base_dir, num_data_shards or climbmix.shards_needed(tokens_needed or 0), echo)
    else:
        name, paths = _embedded(base_dir, echo) if corpus == "embedded" else locate(corpus)
        paths = _first_shards(corpus, paths, num_data_shards, last_validates)
    train, val = _split(corpus, paths, val_corpus, base_dir, echo)
    sources = _sources([*train, *val])
    return Corpus(name=name, train=sources[: len(train)], val=sources[len(train) :], text_column=text_column)


def split_units(sources: Iterable[Source], *, text_column: str, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut parquet files into spans of row groups of some `unit_bytes` of text; other files are one unit each.

    Reads the footer of every parquet file and so finds what is no parquet, cut short, or without that column of text.
    """
    with ThreadPoolExecutor(8) as pool:  # footers of remote files are round trips
        units = pool.map(lambda source: _units_of(source, text_column, unit_bytes), sources)
        return [unit for units_of_source in units for unit in units_of_source]


def read_documents(unit: Unit, *, text_column: str) -> Iterator[str]:
    """The documents of `unit` in file order. Empty and null ones are left out.

    A jsonl line holds one object with the text under `text_column`. A txt file holds documents separated by lines
    `<|endoftext|>`; the line break before such a line, and the last one of the file, belong to no document.
    """
    form = kind(unit.source.name)
    if form == "parquet":
        documents = _read_parquet(unit, text_column)
    elif form == "jsonl":
        documents = _read_jsonl(unit.source, text_column)
    else:
        documents = _read_txt(unit.source)
    return (text for text in documents if text)


def iter_documents(sources: Iterable[Source], *, text_column: str) -> Iterator[str]:
    """The documents of several files one after another. Raises DataError at the end where there was none at all."""
    names, found = [], False
    for source in sources:
        names.append(source.path)
        for unit in split_units([source], text_column=text_column):
            for text in read_documents(unit, text_column=text_column):
                found = True
                yield text
    if not found:
        raise DataError(
            f"there is no text in {', '.join(names) or 'no files'}: every document is empty. Check --corpus and --text-column."
        )


def _climbmix(base_dir: Path, num_data_shards: int, echo: Callable[[str], None]) -> list[str]:
    folder = climbmix.fetch(base_dir, num_data_shards, echo=echo)
    return [str(folder / name) for name in climbmix.shard_names(num_data_shards)]


def _embedded(base_dir: Path, echo: Callable[[str], None]) -> tuple[str, list[str]]:
    return locate(str(embedded_corpus(base_dir, echo)))


def _first_shards(corpus: str, paths: list[str], num_data_shards: int | None, last_validates: bool) -> list[str]:
    if num_data_shards is None:
        return paths
    if num_data_shards > len(paths):
        raise DataError(
            f"--num-data-shards={num_data_shards} is more than the {len(paths)} files of --corpus {corpus}. "
            f"Use {len(paths)} or less, or leave it out to use them all."
        )
    return [*paths[: num_data_shards - 1], paths[-1]] if last_validates else paths[:num_data_shards]


def _split(
    corpus: str, paths: list[str], val_corpus: str | None, base_dir: Path, echo: Callable[[str], None]
) -> tuple[list[str], list[str]]:
    """The files to train on and to validate on."""
    if val_corpus is None:
        if len(paths) < 2:
            raise DataError(
                f"--corpus {corpus} is a single file, and a corpus needs one more to validate on. Give that as "
                "--val-corpus, or split the file in two: the last one in name order validates."
            )
        return paths[:-1], paths[-1:]
    if val_corpus == "climbmix":
        val = _climbmix(base_dir, 1, echo)
    elif val_corpus == "embedded":
        val = _embedded(base_dir, echo)[1][-1:]
    else:
        val = locate(val_corpus)[1]
    # What validates is never trained on; the last file of a corpus of ours is for validation, whoever uses it.
    apart = {*val, *(paths[-1:] if corpus in PROVIDED else [])}
    train = [path for path in paths if path not in apart]
    if not train:
        raise DataError(
            f"--val-corpus {val_corpus} takes every file of --corpus {corpus}: none is left to train on. "
            "Give other files to validate on, or leave it out: then the last file validates."
        )
    return train, val


def _sources(paths: list[str]) -> tuple[Source, ...]:
    with ThreadPoolExecutor(16) as pool:  # remote files are round trips
        return tuple(pool.map(_source, paths))


def _source(path: str) -> Source:
    with explained(path):
        filesystem, inner = filesystem_of(path)
        with filesystem.open_input_file(inner) as file:
            size = file.size()
            head = file.read(EDGE_BYTES)
            file.seek(max(0, size - EDGE_BYTES))
            tail = file.read()
    if not size:
        raise DataError(f"{path} is empty. Remove it from the corpus, or copy it again.")
    signature = hashlib.sha256(b"%d\n" % size + head + tail).hexdigest()
    return Source(path=path, name=inner.rsplit("/", 1)[-1], size=size, signature=signature)


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    with explained(path):
        filesystem, inner = filesystem_of(path)
        with filesystem.open_input_file(inner) as file:
            try:
                parquet = pq.ParquetFile(file, pre_buffer=True)
            except pa.ArrowInvalid as error:
                raise DataError(f"{path} is not a parquet file, or it was cut short: {error}. Copy it again.") from None
            yield parquet


def _units_of(source: Source, text_column: str, unit_bytes: int) -> list[Unit]:
    if kind(source.name) != "parquet":
        plain = source.name.endswith((".jsonl", ".txt"))
        return [
            Unit(source=source, row_groups=None, text_bytes=source.size * (1 if plain else TEXT_PER_COMPRESSED_BYTE))
        ]
    with _parquet(source.path) as parquet:
        _check_column(source.path, parquet.schema_arrow, text_column)
        metadata = parquet.metadata
    if not metadata.num_rows:
        raise DataError(f"{source.path} holds no documents. Remove it from the corpus.")
    paths = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)]
    column = paths.index(text_column)
    units, first, text = [], 0, 0
    for group in range(metadata.num_row_groups):
        text += metadata.row_group(group).column(column).total_uncompressed_size
        if text >= unit_bytes or group + 1 == metadata.num_row_groups:
            units.append(Unit(source=source, row_groups=(first, group + 1), text_bytes=text))
            first, text = group + 1, 0
    return units


def _check_column(path: str, schema: pa.Schema, text_column: str) -> None:
    if text_column not in schema.names:
        raise DataError(
            f"{path} has no column {text_column!r}. Its columns are {', '.join(schema.names)}: "
            "name the one that holds the text with --text-column."
        )
    type_ = schema.field(text_column).type
    content = type_.value_type if pa.types.is_dictionary(type_) else type_
    if not (pa.types.is_string(content) or pa.types.is_large_string(content) or pa.types.is_string_view(content)):
        raise DataError(f"column {text_column!r} of {path} holds {type_}, not text. Name another with --text-column.")


def _read_parquet(unit: Unit, text_column: str) -> Iterator[str | None]:
    first, stop = unit.row_groups or (0, 0)
    path = unit.source.path
    with _parquet(path) as parquet:
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(first))
        for batch in parquet.iter_batches(256, row_groups=range(first, stop), columns=[text_column]):
            column = batch.column(0)
            try:
                yield from column.to_pylist()
            except UnicodeDecodeError:
                bad = next(i for i, value in enumerate(column) if not _is_text(value))
                raise DataError(
                    f"{path}, row {row + bad} (from 0): not UTF-8 text. Convert the corpus to UTF-8."
                ) from None
            row += len(batch)


def _is_text(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """Numbered lines (from 1) of a file that may be compressed, with their line breaks, without a byte order mark."""
    with explained(source.path):
        filesystem, inner = filesystem_of(source.path)
        with io.BufferedReader(filesystem.open_input_stream(inner, compression="detect"), 2**20) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _decoded(source: Source, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source.path}, line {number}, byte {error.start + 1} of the line: not UTF-8 text. Convert the corpus to UTF-8."
        ) from None


def _read_txt(source: Source) -> Iterator[str]:
    document: list[str] = []
    for number, line in _lines(source):
        if line.rstrip(b"\r\n") == SEPARATOR:
            yield "".join(document).removesuffix("\n").removesuffix("\r")
            document = []
        else:
            document.append(_decoded(source, number, line))
    yield "".join(document).removesuffix("\n").removesuffix("\r")


def _read_jsonl(source: Source, text_column: str) -> Iterator[str | None]:
    for number, line in _lines(source):
        if line.isspace():
            continue
        where = f"{source.path}, line {number}"
        try:
            record = json.loads(_decoded(source, number, line))
        except ValueError as error:
            raise DataError(f"{where}: not a JSON object: {error}. Each line must be one whole object.") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: a JSON {type(record).__name__}, not an object with the text under a key.")
        if text_column not in record:
            raise DataError(
                f"{where}: no key {text_column!r}. The keys are {', '.join(record) or 'none'}: "
                "name the one that holds the text with --text-column."
            )
        yield _checked_text(record[text_column], where, text_column)


def _checked_text(text: object, where: str, text_column: str) -> str | None:
    if not (text is None or isinstance(text, str)):
        raise DataError(f"{where}: {text_column!r} holds a {type(text).__name__}, not a text.")
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: a lone surrogate (\\ud800 to \\udfff), which is not UTF-8 text.") from None
    return text
