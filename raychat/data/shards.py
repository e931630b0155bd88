"""Token shards: rows of T+1 tokens, packed once per (corpus, tokenizer, T) and kept under their fingerprint.

One unit of the corpus becomes one Arrow IPC file of `tokens: FixedSizeList<uint16|uint32>[T+1]`, uncompressed, so that
it can be mapped into memory, or read by range where it lies in an object store. Its sidecar `shard-*.json` is written
last and is the record that the shard is whole; a shard with a sidecar is never made again. `manifest.json` lists them all.
"""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from raychat.atomic import crc32
from raychat.data.chunks import chunks_of
from raychat.data.corpus import Corpus, Source, Unit, read_documents, split_units
from raychat.data.order import CHUNK_ROWS
from raychat.data.pack import pack
from raychat.data.tokenizer import Tokenizer
from raychat.errors import DataError
from raychat.storage import Store

FORMAT = 1
MANIFEST = "manifest.json"
Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """All that decides the rows, besides the text."""

    tokenizer_sha256: str
    seq_len: int
    packing: Literal["best-fit", "keep"]
    text_column: str
    dtype: Literal["uint16", "uint32"]
    buffer_docs: int = 1000
    refill: int = 128
    chunk_rows: int = CHUNK_ROWS


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One unit of the corpus to be made into the shard number `index` of `split` in `folder`.

    `folder` and `tokenizer_dir` are paths or addresses of folders in an object store.
    """

    unit: Unit
    split: Split
    index: int
    spec: ShardSpec
    tokenizer_dir: str = field(repr=False)
    folder: str = field(repr=False)

    @property
    def name(self) -> str:
        """File name of the shard, without suffix."""
        return f"{self.split}-{self.index:06d}"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the sidecar of a shard says. `tokens_in` counts BOS; `bytes` and `crc32` are of the Arrow file."""

    file: str
    split: Split
    source: str
    rows: int
    docs: int
    tokens_in: int
    bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All shards of a fingerprint."""

    store: Store
    fingerprint: str
    spec: ShardSpec
    shards: tuple[ShardInfo, ...]

    def split(self, split: Split) -> tuple[ShardInfo, ...]:
        """Shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def rows(self, split: Split) -> int:
        """Rows of one split."""
        return sum(shard.rows for shard in self.split(split))

    @property
    def folder(self) -> Path:
        """Where they are, on a disk."""
        return self.store.path

    @property
    def row_len(self) -> int:
        """Tokens of a row: T + 1."""
        return self.spec.seq_len + 1


def fingerprint(spec: ShardSpec, corpus: Corpus) -> str:
    """16 hex digits that stand for the rows: the spec, and name, size and signature of every file. Paths do not count."""

    content = {
        "format": FORMAT,
        "spec": dataclasses.asdict(spec),
        "train": _listed(corpus.train),
        "val": _listed(corpus.val),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def shard_tasks(spec: ShardSpec, corpus: Corpus, tokenizer_dir: Path | str, folder: Path | Store) -> list[ShardTask]:
    """A task for every unit of the corpus, validation first."""
    target = Store.of(folder).address
    splits: tuple[tuple[Split, tuple[Source, ...]], ...] = (("val", corpus.val), ("train", corpus.train))
    return [
        ShardTask(unit=unit, split=split, index=i, spec=spec, tokenizer_dir=str(tokenizer_dir), folder=target)
        for split, sources in splits
        for i, unit in enumerate(split_units(sources, text_column=spec.text_column))
    ]


def finished(task: ShardTask) -> ShardInfo | None:
    """The shard of `task`, when it has been made and has its full size."""
    store = Store.of(task.folder)
    try:
        info = ShardInfo(**json.loads(store.read_bytes(f"{task.name}.json")))
        return info if store.size(info.file) == info.bytes else None
    except (OSError, ValueError, TypeError):
        return None


def make_shard(task: ShardTask) -> ShardInfo:
    """Read, tokenize, pack and write one shard; does nothing when it is there. Safe to run twice at once."""
    if done := finished(task):
        return done
    spec, store = task.spec, Store.of(task.folder)
    folder = store.path if store.is_local else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(task.tokenizer_dir, spec.tokenizer_sha256)
    counts = {"docs": 0, "tokens_in": 0}

    def documents() -> Iterator[np.ndarray]:
        for text in read_documents(task.unit, text_column=spec.text_column):
            tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode_numpy(text)]).astype(spec.dtype)
            counts["docs"] += 1
            counts["tokens_in"] += len(tokens)
            yield tokens

    packed = pack(
        documents(),
        spec.seq_len + 1,
        packing=spec.packing,
        bos_id=tokenizer.bos_id,
        buffer_docs=spec.buffer_docs,
        refill=spec.refill,
    )
    file = f"{task.name}.arrow"
    temporary = folder / f".{task.name}.tmp-{os.getpid()}"
    try:
        rows = _write_rows(temporary, packed, spec)
        info = ShardInfo(
            file=file,
            split=task.split,
            source=task.unit.source.name,
            rows=rows,
            bytes=temporary.stat().st_size,
            crc32=crc32(temporary),
            **counts,
        )
        if store.is_local:
            temporary.replace(folder / file)
        else:
            store.upload(file, temporary)
    finally:
        temporary.unlink(missing_ok=True)
    _write_json(store, f"{task.name}.json", dataclasses.asdict(info))
    return info


def write_manifest(
    place: Path | Store, fingerprint: str, spec: ShardSpec, shards: list[ShardInfo], corpus: Corpus
) -> Manifest:
    """Record that all shards of a fingerprint are there.

    Raises:
        DataError: when a split packs into no row at all.
    """
    for split in ("train", "val"):
        if not sum(shard.rows for shard in shards if shard.split == split):
            raise DataError(
                f"The {split} split of corpus {corpus.name!r} packs into no row of {spec.seq_len + 1} tokens: "
                "use more text or a shorter --max-seq-len."
            )
    shards = sorted(shards, key=lambda shard: shard.file)
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "spec": dataclasses.asdict(spec),
        "corpus": corpus.name,
        "train": _listed(corpus.train),
        "val": _listed(corpus.val),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    store = Store.of(place)
    _write_json(store, MANIFEST, content)
    return Manifest(store=store, fingerprint=fingerprint, spec=spec, shards=tuple(shards))


def read_manifest(place: Path | Store | str) -> Manifest | None:
    """The manifest in a folder or at an address, or None when there is none.

    Raises:
        DataError: when a shard that it lists is missing or has another size.
        OSError: the store does not answer.
    """
    store = Store.of(place)
    try:
        content = json.loads(store.read_bytes(MANIFEST))
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
        spec = ShardSpec(**content["spec"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{store}/{MANIFEST} is damaged ({error}): delete the folder, and the shards are made again."
        ) from error
    if content["format"] != FORMAT:
        raise DataError(
            f"{store}/{MANIFEST} has format {content['format']}, this version reads {FORMAT}: delete the folder."
        )
    sizes = _sizes(store)
    for shard in shards:
        size = sizes.get(shard.file)
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}"
            raise DataError(
                f"Token shard {store}/{shard.file} {found}: delete {store}/{MANIFEST}, and what is damaged is made again."
            )
    return Manifest(store=store, fingerprint=content["fingerprint"], spec=spec, shards=shards)


def read_corpus(place: Path | Store | str) -> Corpus | None:
    """The corpus whose shards are in a folder or at an address, with names in the place of paths.

    None where there is no manifest, or one of an earlier version, which does not tell.

    Raises:
        OSError: the store does not answer.
    """
    try:
        content = json.loads(Store.of(place).read_bytes(MANIFEST))
        train, val = (
            tuple(Source(path=name, name=name, size=size, signature=mark) for name, size, mark in content[split])
            for split in ("train", "val")
        )
        return Corpus(name=content["corpus"], train=train, val=val, text_column=content["spec"]["text_column"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def needed_manifest(place: Path | Store | str) -> Manifest:
    """The manifest in a folder or at an address, which was there when the driver looked.

    Raises:
        DataError: there is none, or as `read_manifest`.
        OSError: the store does not answer.
    """
    manifest = read_manifest(place)
    if manifest is None:
        raise DataError(
            f"{Store.of(place)} holds no token shards on this node: --base-dir must be a folder that all nodes share, or "
            "--storage-path a place in an object store (s3://, gs://), where token shards are then kept, too."
        )
    return manifest


def verify_shard(place: Path | Store, shard: ShardInfo) -> None:
    """Read every byte of a shard.

    Raises:
        DataError: when they are not those that were written.
    """
    store = Store.of(place)
    if store.crc32(shard.file) != shard.crc32:
        raise DataError(
            f"Token shard {store}/{shard.file} is damaged: its checksum is wrong. Delete it and {store}/{MANIFEST}, and run "
            "the same command: it is made again."
        )


class RowReader:
    """Rows of one split by their id, which counts over the shards in order. What is not asked for is not read."""

    def __init__(self, manifest: Manifest, split: Split) -> None:
        self.shards = manifest.split(split)
        self.row_len = manifest.row_len
        self.dtype = np.dtype(manifest.spec.dtype)
        self.num_rows = manifest.rows(split)
        self._chunk_rows = manifest.spec.chunk_rows
        self._starts = np.concatenate([[0], np.cumsum([shard.rows for shard in self.shards], dtype=np.int64)])
        files = [shard.file for shard in self.shards]
        mark = manifest.fingerprint
        self._chunks = chunks_of(manifest.store, files, name=mark, row_len=self.row_len, dtype=self.dtype)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The rows with these ids, (len(ids), T+1)."""
        out = np.empty((len(ids), self.row_len), self.dtype)
        if not len(ids):
            return out
        shard = np.searchsorted(self._starts, ids, side="right") - 1
        local = ids - self._starts[shard]
        keys = shard << 32 | local // self._chunk_rows
        order = np.argsort(keys, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)  # places in `out` that one chunk fills
        wanted = [divmod(int(keys[places[0]]), 1 << 32) for places in groups]
        self._chunks.prefetch(wanted)
        for (shard_number, chunk), places in zip(wanted, groups, strict=True):
            out[places] = self._chunks.chunk(shard_number, chunk)[local[places] % self._chunk_rows]
        return out


def _sizes(store: Store) -> dict[str, int]:
    """Bytes of each file, in one listing."""
    filesystem, base = store.arrow()
    entries = filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True))
    return {entry.base_name: entry.size for entry in entries if entry.is_file}


def _write_json(store: Store, name: str, value: dict[str, Any]) -> None:
    store.write_bytes(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def _write_rows(path: Path, rows: Iterator[np.ndarray], spec: ShardSpec) -> int:
    """Write `rows` as record batches of `chunk_rows`; returns how many there were."""
    kind = pa.list_(pa.from_numpy_dtype(np.dtype(spec.dtype)), spec.seq_len + 1)
    schema = pa.schema([pa.field("tokens", kind, nullable=False)])
    count, chunk = 0, []

    def flush(writer: pa.ipc.RecordBatchFileWriter) -> None:
        flat = pa.array(np.concatenate(chunk))
        writer.write_batch(pa.record_batch([pa.FixedSizeListArray.from_arrays(flat, type=kind)], schema=schema))
        chunk.clear()

    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        for row in rows:
            chunk.append(row)
            count += 1
            if len(chunk) == spec.chunk_rows:
                flush(writer)
        if chunk:
            flush(writer)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return count


@functools.lru_cache(maxsize=2)  # a task is short, and building the encoder is not
def _tokenizer(folder: str, sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    if tokenizer.sha256 != sha256:
        raise DataError(
            f"The tokenizer in {Store.of(folder)} changed while its corpus was being tokenized: start again."
        )
    return tokenizer


def _listed(sources: tuple[Source, ...]) -> list[list[Any]]:
    return [[source.name, source.size, source.signature] for source in sources]
