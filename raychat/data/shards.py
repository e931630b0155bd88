"""Token shards: rows of T+1 tokens, packed once per (corpus, tokenizer, T) and kept under their fingerprint.

One unit of the corpus becomes one Arrow IPC file of `tokens: FixedSizeList<uint16|uint32>[T+1]`, uncompressed, so that
it can be mapped into memory. Its sidecar `shard-*.json` is written last and is the record that the shard is whole; a
shard with a sidecar is never made again. `manifest.json` lists them all.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raychat.atomic import crc32, write_json
from raychat.data.corpus import Corpus, Source, Unit, read_documents, split_units
from raychat.data.order import CHUNK_ROWS
from raychat.data.pack import pack
from raychat.data.tokenizer import Tokenizer
from raychat.errors import DataError

FORMAT = 1
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
    """One unit of the corpus to be made into the shard number `index` of `split` in `folder`."""

    unit: Unit
    split: Split
    index: int
    spec: ShardSpec
    tokenizer_dir: str
    folder: str

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

    folder: Path
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
    def row_len(self) -> int:
        """Tokens of a row: T + 1."""
        return self.spec.seq_len + 1


def fingerprint(spec: ShardSpec, corpus: Corpus) -> str:
    """16 hex digits that stand for the rows: the spec, and name, size and signature of every file. Paths do not count."""

    def listed(sources: tuple[Source, ...]) -> list[list[Any]]:
        return [[source.name, source.size, source.signature] for source in sources]

    content = {
        "format": FORMAT,
        "spec": dataclasses.asdict(spec),
        "train": listed(corpus.train),
        "val": listed(corpus.val),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def shard_tasks(spec: ShardSpec, corpus: Corpus, tokenizer_dir: Path, folder: Path) -> list[ShardTask]:
    """A task for every unit of the corpus, validation first."""
    splits: tuple[tuple[Split, tuple[Source, ...]], ...] = (("val", corpus.val), ("train", corpus.train))
    return [
        ShardTask(unit=unit, split=split, index=i, spec=spec, tokenizer_dir=str(tokenizer_dir), folder=str(folder))
        for split, sources in splits
        for i, unit in enumerate(split_units(sources, text_column=spec.text_column))
    ]


def finished(task: ShardTask) -> ShardInfo | None:
    """The shard of `task`, when it has been made and has its full size."""
    try:
        info = ShardInfo(**json.loads((Path(task.folder) / f"{task.name}.json").read_text()))
        whole = (Path(task.folder) / info.file).stat().st_size == info.bytes
    except (OSError, ValueError, TypeError):
        return None
    return info if whole else None


def make_shard(task: ShardTask) -> ShardInfo:
    """Read, tokenize, pack and write one shard; does nothing when it is there. Safe to run twice at once."""
    if done := finished(task):
        return done
    spec, folder = task.spec, Path(task.folder)
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
    target = folder / f"{task.name}.arrow"
    temporary = folder / f".{task.name}.tmp-{os.getpid()}"
    try:
        rows = _write_rows(temporary, packed, spec)
        info = ShardInfo(
            file=target.name,
            split=task.split,
            source=task.unit.source.name,
            rows=rows,
            bytes=temporary.stat().st_size,
            crc32=crc32(temporary),
            **counts,
        )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(folder / f"{task.name}.json", dataclasses.asdict(info))
    return info


def write_manifest(
    folder: Path, fingerprint: str, spec: ShardSpec, shards: list[ShardInfo], corpus: Corpus
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
        "sources": [source.name for source in (*corpus.train, *corpus.val)],
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    write_json(folder / "manifest.json", content)
    return Manifest(folder=folder, fingerprint=fingerprint, spec=spec, shards=tuple(shards))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`, or None when there is none.

    Raises:
        DataError: when a shard that it lists is missing or has another size.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
        spec = ShardSpec(**content["spec"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): delete the folder, and the shards are made again.") from error
    if content["format"] != FORMAT:
        raise DataError(f"{path} has format {content['format']}, this version reads {FORMAT}: delete the folder.")
    for shard in shards:
        file = folder / shard.file
        size = file.stat().st_size if file.exists() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}"
            raise DataError(f"Token shard {file} {found}: delete {path}, and what is damaged is made again.")
    return Manifest(folder=folder, fingerprint=content["fingerprint"], spec=spec, shards=shards)


def verify_shard(folder: Path, shard: ShardInfo) -> None:
    """Read every byte of a shard.

    Raises:
        DataError: when they are not those that were written.
    """
    file = folder / shard.file
    if crc32(file) != shard.crc32:
        raise DataError(
            f"Token shard {file} is damaged: its checksum is wrong. Delete it and {folder / 'manifest.json'}, and run the "
            "same command: it is made again."
        )


class RowReader:
    """Rows of one split by their id, which counts over the shards in order. Shards are mapped, not loaded."""

    def __init__(self, manifest: Manifest, split: Split) -> None:
        self.shards = manifest.split(split)
        self.row_len = manifest.row_len
        self.dtype = np.dtype(manifest.spec.dtype)
        self.num_rows = manifest.rows(split)
        self._folder, self._chunk_rows = manifest.folder, manifest.spec.chunk_rows
        self._starts = np.concatenate([[0], np.cumsum([shard.rows for shard in self.shards], dtype=np.int64)])
        self._chunks: dict[int, list[np.ndarray]] = {}

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The rows with these ids, (len(ids), T+1)."""
        out = np.empty((len(ids), self.row_len), self.dtype)
        shard_of = np.searchsorted(self._starts, ids, side="right") - 1
        for place, (shard, row) in enumerate(zip(shard_of.tolist(), ids.tolist(), strict=True)):
            local = row - int(self._starts[shard])
            out[place] = self._shard(shard)[local // self._chunk_rows][local % self._chunk_rows]
        return out

    def _shard(self, index: int) -> list[np.ndarray]:
        if index not in self._chunks:
            path = self._folder / self.shards[index].file
            try:
                with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
                    batches = [file.get_batch(i).column(0) for i in range(file.num_record_batches)]
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(
                    f"Token shard {path} cannot be read ({error}): delete it and {self._folder / 'manifest.json'}, and it "
                    "is made again."
                ) from error
            self._chunks[index] = [
                column.flatten().to_numpy(zero_copy_only=True).reshape(-1, self.row_len) for column in batches
            ]
        return self._chunks[index]


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
    tokenizer = Tokenizer.load(Path(folder))
    if tokenizer.sha256 != sha256:
        raise DataError(f"The tokenizer in {folder} changed while its corpus was being tokenized: start again.")
    return tokenizer
