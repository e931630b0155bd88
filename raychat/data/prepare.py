"""From a configuration to token shards: corpus, tokenizer, packing. Does whatever is missing and nothing twice."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    fingerprint,
    finished,
    make_shard,
    read_manifest,
    shard_tasks,
    write_manifest,
)
from raychat.data.tokenizer import Tokenizer, train_tokenizer
from raychat.errors import ConfigError, DataError
from raychat.planning import recipe
from raychat.progress import Progress

PACKING_SAMPLE_DOCS = 512
LEAST_KEPT_SHARE = 0.75  # below it, automatic packing keeps what best-fit would crop

# Makes the shards of tasks, in any order and anywhere.
Maker = Callable[[list[ShardTask]], Iterable[ShardInfo]]


@dataclass(frozen=True)
class TokenData:
    """What training reads: a tokenizer and the packed rows of a corpus."""

    corpus: Corpus
    tokenizer_dir: Path
    manifest: Manifest

    @property
    def corpus_files(self) -> int:
        """Files of the corpus in use, the validation one included, as `--num-data-shards` counts them."""
        return len(self.corpus.train) + len(self.corpus.val)


def make_in_process(tasks: list[ShardTask]) -> Iterator[ShardInfo]:
    """Make shards one after the other, here. The edge has a maker that spreads them over a cluster."""
    return map(make_shard, tasks)


def open_corpus(config: Config, *, with_gpus: bool, echo: Callable[[str], None]) -> Corpus:
    """The corpus of `config`: climbmix by default where there are GPUs, else embedded. Downloads what is missing."""
    data = config.data
    return corpora.open_corpus(
        data.corpus or ("climbmix" if with_gpus else "embedded"),
        base_dir=config.base_dir,
        val_corpus=data.val_corpus or None,
        text_column=data.text_column,
        num_data_shards=_files_wanted(config),
        tokens_needed=recipe(config).tokens,
        echo=echo,
    )


def _files_wanted(config: Config) -> int | None:
    """Files of the corpus to use: as asked, or as many as the run began with, or None for what the horizon needs.

    A run that goes on to a longer horizon stays with its data; a download of its own size would make it another corpus.
    """
    if config.data.num_data_shards != -1:
        return config.data.num_data_shards
    begun = config.run_dir / "config.json"
    if config.run.fresh or not any((config.run_dir / "checkpoints").glob("step_*")) or not begun.exists():
        return None
    content = json.loads(begun.read_text())
    same = content["config"]["corpus"] == config.data.corpus and not config.data.val_corpus
    return content.get("corpus_files") if same and config.data.corpus in ("", "climbmix") else None


def ensure_tokenizer(config: Config, corpus: Corpus, *, echo: Callable[[str], None]) -> Path:
    """Folder of the tokenizer: the one that `--tokenizer` names, or one trained on this corpus, once."""
    folder = tokenizer_folder(config, corpus)
    if not (folder / "tokenizer.json").exists():
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


def tokenizer_folder(config: Config, corpus: Corpus) -> Path:
    """Where the tokenizer of `config` is or will be. The default name stands for everything that decides it."""
    chosen = config.data.tokenizer
    if chosen:
        return Path(chosen).expanduser().absolute() if os.sep in chosen else config.base_dir / "tokenizers" / chosen
    content = {
        "train": [[source.name, source.size, source.signature] for source in corpus.train],
        "vocab_size": config.model.vocab_size,
        "max_chars": config.data.tok_max_chars,
        "doc_cap": config.data.tok_doc_cap,
        "text_column": corpus.text_column,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]", "-", corpus.name)
    return config.base_dir / "tokenizers" / f"{name}-{config.model.vocab_size}-{digest}"


def choose_packing(
    packing: str, corpus: Corpus, tokenizer: Tokenizer, seq_len: int, *, echo: Callable[[str], None]
) -> Literal["best-fit", "keep"]:
    """`packing`, with auto resolved from how much of the first documents best-fit would deliver."""
    if packing != "auto":
        return "best-fit" if packing == "best-fit" else "keep"
    documents = corpora.iter_documents(corpus.train, text_column=corpus.text_column)
    lengths = [1 + len(tokenizer.encode_numpy(text)) for text in itertools.islice(documents, PACKING_SAMPLE_DOCS)]
    share = kept_share(lengths, seq_len + 1)
    choice: Literal["best-fit", "keep"] = "best-fit" if share >= LEAST_KEPT_SHARE else "keep"
    echo(f"packing: {choice} (best-fit would deliver {share:.0%} of the tokens of the first {len(lengths)} documents)")
    return choice


def prepare(config: Config, *, with_gpus: bool, maker: Maker, echo: Callable[[str], None]) -> TokenData:
    """Corpus, tokenizer and token shards of `config`, made where they are missing.

    Raises:
        DataError: for a corpus or tokenizer that cannot be used.
    """
    check_writable(config.base_dir)
    corpus = open_corpus(config, with_gpus=with_gpus, echo=echo)
    tokenizer_dir = ensure_tokenizer(config, corpus, echo=echo)
    tokenizer = Tokenizer.load(tokenizer_dir)
    seq_len = config.model.max_seq_len
    spec = ShardSpec(
        tokenizer_sha256=tokenizer.sha256,
        seq_len=seq_len,
        packing=choose_packing(config.data.packing, corpus, tokenizer, seq_len, echo=echo),
        text_column=corpus.text_column,
        dtype="uint16" if tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1 else "uint32",
    )
    mark = fingerprint(spec, corpus)
    folder = config.base_dir / "tokens" / mark
    manifest = read_manifest(folder)
    if manifest is None:
        tasks = shard_tasks(spec, corpus, tokenizer_dir, folder)
        manifest = write_manifest(folder, mark, spec, _make(tasks, maker, echo), corpus)
    rows_per_batch = recipe(config).total_batch_size // seq_len
    Order([shard.rows for shard in manifest.split("train")], seed=config.run.seed, lanes=lanes_for(rows_per_batch))
    echo(
        f"tokens: {manifest.rows('train') * seq_len:,} for training in {manifest.rows('train'):,} rows, "
        f"{manifest.rows('val') * seq_len:,} for validation ({spec.packing}, fingerprint {mark})"
    )
    return TokenData(corpus, tokenizer_dir, manifest)


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
