"""From a configuration to token shards: corpus, tokenizer, packing. Does whatever is missing and nothing twice."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raychat.config import Config
from raychat.data import corpus as corpora
from raychat.data.corpus import Corpus
from raychat.data.order import Order, lanes_for
from raychat.data.pack import kept_share
from raychat.data.shards import (
    Manifest,
    ShardInfo,
    ShardSpec,
    ShardTask,
    Split,
    fingerprint,
    finished,
    make_shard,
    read_corpus,
    read_manifest,
    shard_tasks,
    write_manifest,
)
from raychat.data.tokenizer import META_FILE, Tokenizer, digest_in, train_tokenizer
from raychat.errors import ConfigError, DataError
from raychat.planning import recipe
from raychat.planning.files import marks
from raychat.planning.requests import (
    Prepared,
    Sample,
    Totals,
    begun,
    corpus_name,
    files_wanted,
    request_of,
    same_data,
    write_record,
)
from raychat.planning.text import (
    PACKINGS,
    Packing,
    auto_packing,
    margin_for,
    packed_tokens,
)
from raychat.progress import Progress
from raychat.storage import Store

TOKENS, TOKENIZERS = "tokens", "tokenizers"  # folders: under the base directory, or beside the runs in an object store
PACKING_SAMPLE_DOCS = 512
SAMPLE_ROWS = 100
SIZED_FILES = 16  # files whose text is measured; in the rest there is as much per byte
PLANNED_SEQ_LENS = (256, 512, 1024, 2048, 4096, 8192)  # for which a plan can say what best-fit would keep

# Makes the shards of tasks, in any order and anywhere.
Maker = Callable[[list[ShardTask]], Iterable[ShardInfo]]


@dataclass(frozen=True)
class TokenData:
    """What training reads: a tokenizer and the packed rows of a corpus."""

    corpus: Corpus
    tokenizer_dir: Path
    """on this machine"""
    manifest: Manifest
    shared_tokenizer: str = field(default="", repr=False)
    """address of the tokenizer in the object store that the shards are in; empty: they are in a folder"""

    @property
    def tokenizer_address(self) -> str:
        """What `Tokenizer.load` takes on any node."""
        return self.shared_tokenizer or str(self.tokenizer_dir)

    @property
    def corpus_files(self) -> int:
        """Files of the corpus in use, the validation one included, as `--num-data-shards` counts them."""
        return len(self.corpus.train) + len(self.corpus.val)


def make_in_process(tasks: list[ShardTask]) -> Iterator[ShardInfo]:
    """Make shards one after the other, here. The edge has a maker that spreads them over a cluster."""
    return map(make_shard, tasks)


def open_corpus(config: Config, *, with_gpus: bool, echo: Callable[[str], None]) -> Corpus:
    """The corpus of `config`: climbmix by default where there are GPUs, else embedded. Downloads what is missing."""
    return _open_corpus(config, run_begun(config), with_gpus=with_gpus, echo=echo)


def _open_corpus(config: Config, run: dict[str, Any] | None, *, with_gpus: bool, echo: Callable[[str], None]) -> Corpus:
    data = config.data
    return corpora.open_corpus(
        corpus_name(config, with_gpus=with_gpus),
        base_dir=config.base_dir,
        val_corpus=data.val_corpus or None,
        text_column=data.text_column,
        num_data_shards=files_wanted(config, run),
        tokens_needed=recipe(config).tokens,
        echo=echo,
    )


def _known_corpus(config: Config, run: dict[str, Any] | None, *, echo: Callable[[str], None]) -> Corpus | None:
    """The corpus of a run that goes on in an object store, as it is written down beside the token shards there.

    Its files may be on a machine that is gone; of `climbmix`, all would be downloaded again.
    """
    store = shared_store(config)
    if store is None or run is None or not same_data(config, run):
        return None
    place = store.child(TOKENS, str(run.get("data_fingerprint")))
    found = read_corpus(place)
    if found is not None:
        echo(f"corpus {found.name}: as the run began with it, from its token shards in {place}")
    return found


def run_begun(config: Config) -> dict[str, Any] | None:
    """config.json of the run that `config` goes on with, wherever that is kept; None for one that begins."""
    if config.run.fresh:
        return None
    store = Store.of(config.run_uri)
    try:
        saved = any(name.startswith("step_") for name in store.child("checkpoints").names())
        return json.loads(store.read_bytes("config.json")) if saved and store.exists("config.json") else None
    except OSError:  # a store that cannot be reached is refused where the run is opened
        return begun(config)


def ensure_tokenizer(config: Config, corpus: Corpus, *, echo: Callable[[str], None]) -> Path:
    """Folder of the tokenizer: the one that `--tokenizer` names, or one trained on this corpus, once."""
    folder = tokenizer_folder(config, corpus)
    if not (folder / META_FILE).exists():
        _fetch_tokenizer(config, folder, echo=echo)
    if not (folder / META_FILE).exists():
        if config.data.tokenizer and os.sep in config.data.tokenizer:
            raise DataError(
                f"--tokenizer {config.data.tokenizer!r}: there is no tokenizer in {folder}. Correct the folder, or "
                "leave --tokenizer out, and one is trained on this corpus."
            )
        echo(f"training a tokenizer of {config.model.vocab_size:,} tokens on corpus {corpus.name}")
        trained = train_tokenizer(
            corpora.iter_documents(corpus.train, text_column=corpus.text_column),
            vocab_size=config.model.vocab_size,
            max_chars=config.data.tok_max_chars,
            doc_cap=config.data.tok_doc_cap,
            echo=echo,
        )
        trained.save(folder)
    found = Tokenizer.load(folder).vocab_size
    if found != config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer in {folder} has {found:,} tokens and --vocab-size is {config.model.vocab_size:,}: "
            f"give --vocab-size {found}, or another --tokenizer."
        )
    return folder


def shared_store(config: Config) -> Store | None:
    """The object store that all nodes read tokenizers and token shards from; None where the base directory is shared."""
    storage = config.run.storage_path
    return Store.of(storage) if "://" in storage else None


def _fetch_tokenizer(config: Config, folder: Path, *, echo: Callable[[str], None]) -> None:
    """Copy the tokenizer that belongs into `folder` from the object store, where one is used and has it."""
    store = shared_store(config)
    if store is None or folder.parent != config.base_dir / TOKENIZERS:
        return
    place = store.child(TOKENIZERS, folder.name)
    if place.exists(META_FILE):
        echo(f"tokenizer: from {place}")
        Tokenizer.load(place).save(folder)


def share_tokenizer(tokenizer: Tokenizer, folder: Path, store: Store) -> str:
    """Put `tokenizer`, which is in `folder`, where all nodes find it; its address. Another one of that name stays."""
    place = store.child(TOKENIZERS, folder.name)
    if digest_in(place) not in (None, tokenizer.sha256):
        place = store.child(TOKENIZERS, f"{folder.name}-{tokenizer.sha256[:8]}")
    tokenizer.put(place)
    return place.address


def tokenizer_folder(config: Config, corpus: Corpus) -> Path:
    """Where the tokenizer of `config` is or will be. The default name stands for everything that decides it."""
    chosen = config.data.tokenizer
    if chosen:
        return Path(chosen).expanduser().absolute() if os.sep in chosen else config.base_dir / TOKENIZERS / chosen
    content = {
        "train": [[source.name, source.size, source.signature] for source in corpus.train],
        "vocab_size": config.model.vocab_size,
        "max_chars": config.data.tok_max_chars,
        "doc_cap": config.data.tok_doc_cap,
        "text_column": corpus.text_column,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]", "-", corpus.name)
    return config.base_dir / TOKENIZERS / f"{name}-{config.model.vocab_size}-{digest}"


def packing_begun(
    config: Config, run: dict[str, Any] | None, fingerprints: dict[Packing, str], *, echo: Callable[[str], None]
) -> Packing | None:
    """The packing that `run` began with; `fingerprints` are those of the data with each packing."""
    for packing, mark in fingerprints.items():
        if run and mark == run.get("data_fingerprint"):
            echo(f"packing: {packing}, with which the run {config.run_dir} began")
            return packing
    return None


def choose_packing(config: Config, sample: Sample, *, echo: Callable[[str], None]) -> Packing:
    """What `--packing auto` is for a run that begins: best-fit if `sample` says that it outlasts the horizon."""
    seq_len, needed = config.model.max_seq_len, recipe(config).tokens
    share = sample.best_fit_share[str(seq_len)]
    delivered = packed_tokens(sample.corpus_tokens, share, seq_len)
    choice = auto_packing(delivered, needed, sample.margin)
    echo(
        f"packing: {choice} (best-fit would deliver some {delivered:,.0f} tokens, {share:.0%} of the corpus by its first "
        f"{sample.docs} documents; the run trains on {needed:,}, and best-fit must outlast it by {sample.margin:.0%})"
    )
    return choice


def sample_text(corpus: Corpus, tokenizer: Tokenizer, seq_len: int) -> Sample:
    """What the first documents of `corpus`, and the footers of its first files, say about all of it."""
    documents = corpora.iter_documents(corpus.train, text_column=corpus.text_column)
    texts = list(itertools.islice(documents, PACKING_SAMPLE_DOCS))
    lengths = [1 + len(tokenizer.encode_numpy(text)) for text in texts]
    sizes = corpora.split_units(corpus.train[:SIZED_FILES], text_column=corpus.text_column)
    text_per_byte = sum(unit.text_bytes for unit in sizes) / sum(source.size for source in corpus.train[:SIZED_FILES])
    chars_per_byte = sum(map(len, texts)) / sum(len(text.encode()) for text in texts)
    return Sample(
        docs=len(texts),
        chars=sum(map(len, texts)),
        tokens=sum(lengths),
        corpus_chars=text_per_byte * chars_per_byte * sum(source.size for source in corpus.train),
        margin=margin_for(corpus.train[0].name),
        best_fit_share={str(T): _share_of_many(lengths, T + 1) for T in sorted({*PLANNED_SEQ_LENS, seq_len})},
    )


def _share_of_many(lengths: list[int], row_len: int) -> float:
    """`kept_share` of many documents like these: a sample that fills only a few rows would read low."""
    more = len(lengths) == PACKING_SAMPLE_DOCS
    repeats = -(-SAMPLE_ROWS * row_len // sum(lengths)) if more else 1
    return kept_share(lengths * max(1, repeats), row_len)


def prepare(config: Config, *, with_gpus: bool, maker: Maker, echo: Callable[[str], None]) -> TokenData:
    """Corpus, tokenizer and token shards of `config`, made where they are missing.

    Where runs are kept in an object store, tokenizers and token shards are, too: all nodes read them from there.

    Raises:
        DataError: for a corpus or tokenizer that cannot be used.
        ConfigError: for a base directory or an object store that cannot be used.
    """
    check_writable(config.base_dir)
    run = run_begun(config)
    corpus = _known_corpus(config, run, echo=echo) or _open_corpus(config, run, with_gpus=with_gpus, echo=echo)
    tokenizer_dir = ensure_tokenizer(config, corpus, echo=echo)
    tokenizer = Tokenizer.load(tokenizer_dir)
    seq_len = config.model.max_seq_len
    specs = {packing: _spec(packing, corpus, tokenizer, seq_len) for packing in PACKINGS}
    fingerprints = {packing: fingerprint(spec, corpus) for packing, spec in specs.items()}
    store = shared_store(config)
    packing, sample = config.data.packing, None
    if packing == "auto":
        before = packing_begun(config, run, fingerprints, echo=echo)
        if before and store:  # the files of the corpus may not be here
            packing = before
        else:
            sample = sample_text(corpus, tokenizer, seq_len)
            packing = before or choose_packing(config, sample, echo=echo)
    spec, mark = specs[packing], fingerprints[packing]
    place = (store or Store.of(config.base_dir)).child(TOKENS, mark)
    shared = share_tokenizer(tokenizer, tokenizer_dir, store) if store else ""
    manifest = read_manifest(place)
    if manifest is None:
        tasks = shard_tasks(spec, corpus, shared or tokenizer_dir, place)
        manifest = write_manifest(place, mark, spec, _make(tasks, maker, echo), corpus)
    if place.is_local:
        request = request_of(config, recipe(config).tokens, run, with_gpus=with_gpus)
        write_record(place.path, request, _record(manifest, corpus, tokenizer_dir, sample))
    rows_per_batch = recipe(config).total_batch_size // seq_len
    Order([shard.rows for shard in manifest.split("train")], seed=config.run.seed, lanes=lanes_for(rows_per_batch))
    echo(
        f"tokens: {manifest.rows('train') * seq_len:,} for training in {manifest.rows('train'):,} rows, "
        f"{manifest.rows('val') * seq_len:,} for validation ({spec.packing}, fingerprint {mark})"
    )
    return TokenData(corpus, tokenizer_dir, manifest, shared)


def _spec(packing: Packing, corpus: Corpus, tokenizer: Tokenizer, seq_len: int) -> ShardSpec:
    return ShardSpec(
        tokenizer_sha256=tokenizer.sha256,
        seq_len=seq_len,
        packing=packing,
        text_column=corpus.text_column,
        dtype="uint16" if tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1 else "uint32",
    )


def _record(manifest: Manifest, corpus: Corpus, tokenizer_dir: Path, sample: Sample | None) -> Prepared:
    """What a plan wants to know of a manifest."""

    def totals(split: Split) -> Totals:
        shards = manifest.split(split)
        return Totals(
            rows=manifest.rows(split),
            docs=sum(shard.docs for shard in shards),
            tokens_in=sum(shard.tokens_in for shard in shards),
        )

    return Prepared(
        fingerprint=manifest.fingerprint,
        seq_len=manifest.spec.seq_len,
        packing=manifest.spec.packing,
        tokenizer_dir=str(tokenizer_dir),
        train=totals("train"),
        val=totals("val"),
        train_files=marks(source.path for source in corpus.train),
        val_files=marks(source.path for source in corpus.val),
        sample=sample,
    )


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before hours of work end there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written to ({error.strerror or error}): give a --base-dir or --storage-path that can be."
        ) from error


def _make(tasks: list[ShardTask], maker: Maker, echo: Callable[[str], None]) -> list[ShardInfo]:
    done = {task.name: finished(task) for task in tasks}
    missing = [task for task in tasks if done[task.name] is None]
    shards = [info for info in done.values() if info is not None]
    if shards:
        echo(f"tokenizing: {len(shards)} of {len(tasks)} shards are there already")
    if not missing:
        return shards
    size = {f"{task.name}.arrow": task.unit.text_bytes for task in missing}
    scale, unit = (1e6, "MB") if sum(size.values()) > 1e7 else (1e3, "kB")
    made = maker(missing)  # which may have to start a cluster: not part of the rate
    with Progress("tokenizing", sum(size.values()) / scale, unit, echo=echo) as progress:
        for info in made:
            shards.append(info)
            progress.advance(size[info.file] / scale)
    return shards
