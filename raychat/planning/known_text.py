"""What is known of a run's text without reading it: its files by their sizes, and what was prepared from it before."""

from dataclasses import dataclass
from typing import Any, Literal

from raychat.config import Config
from raychat.planning.files import Files, local_files, text_chars
from raychat.planning.ranges import Range
from raychat.planning.requests import Prepared, Sample, begun, corpus_name, find_records, record_of_run, request_of
from raychat.planning.text import (
    CLIMBMIX_SHARD_CHARS,
    EMBEDDED_TRAIN_CHARS,
    EMBEDDED_TRAIN_SHARDS,
    EXACT_MARGIN,
    Packing,
    assumed_share,
    best_fit_share,
    chars_per_token,
    keep_share,
    margin_for,
)

SAMPLE_SPREAD = 0.05
"""How far what was measured on a part, or on files that changed since, may be off."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What there is to forecast from. Records are of the same text and tokenizer, with any T and packing."""

    corpus: str
    kind: Literal["climbmix", "embedded", "other"]
    seq_len: int
    vocab_size: int
    files: Files | None
    """None where they cannot be seen from here"""
    shards: int | None
    """training files; None where that is not known"""
    fresh: tuple[Prepared, ...]
    """records whose files are as they were"""
    stale: tuple[Prepared, ...]
    """records whose files have changed"""
    run: dict[str, Any]
    """config.json of the run that goes on; empty for one that begins"""

    @property
    def records(self) -> tuple[Prepared, ...]:
        """All records, the best ones first."""
        return (*self.fresh, *self.stale)

    @property
    def margin(self) -> float:
        """What `auto` will want beyond the run's tokens."""
        return margin_for(self.files.train[0][0]) if self.files else EXACT_MARGIN

    @property
    def basis(self) -> str:
        """What an estimate without records rests on."""
        if self.kind == "climbmix":
            return f"{self.shards:,} training files of {CLIMBMIX_SHARD_CHARS / 1e6:.0f}M characters"
        if self.files:
            return f"{self.files.train_bytes:,} bytes in {len(self.files.train):,} training files"
        return (
            "a corpus that is made when it is used"
            if self.kind == "embedded"
            else "no files that can be seen from here"
        )

    def compared(self, record: Prepared) -> bool:
        """Whether more is known of the files of a fresh record than that nothing speaks against it."""
        return self.kind == "climbmix" or (self.files is not None and bool(record.train_files))

    def counted(self, packing: Packing) -> Prepared | None:
        """The token shards with this packing and T, where they are there and the files as they were."""
        mine = (record for record in self.fresh if (record.packing, record.seq_len) == (packing, self.seq_len))
        return next(mine, None)

    def sample(self) -> Sample | None:
        """What is known of the documents as they are."""
        return next((record.sample for record in self.fresh if record.sample), None)

    def sampled_share(self) -> tuple[Sample, float] | None:
        """The sample, and the share of tokens that best-fit keeps of it at this T."""
        share = sample.best_fit_share.get(str(self.seq_len)) if (sample := self.sample()) else None
        return (sample, share) if sample and share is not None else None

    def chars(self) -> Range | None:
        """Characters of the training text."""
        if sample := self.sample():
            return Range.around(sample.corpus_chars, SAMPLE_SPREAD)
        if self.kind == "climbmix":
            return Range.exactly((self.shards or 0) * CLIMBMIX_SHARD_CHARS)
        if self.files:
            return text_chars(self.files.train)
        if self.kind == "embedded":
            return EMBEDDED_TRAIN_CHARS.scaled((self.shards or 0) / EMBEDDED_TRAIN_SHARDS)
        return None

    def chars_per_token(self) -> Range:
        """Characters that a token stands for."""
        if sample := self.sample():
            return Range.around(sample.chars / sample.tokens, SAMPLE_SPREAD)
        return chars_per_token(self.vocab_size)

    def best_fit_kept(self, ratio: Range) -> Range:
        """Share of the tokens that best-fit keeps: counted, sampled, by the mean document, or assumed."""
        if counted := self.counted("best-fit"):
            return Range.exactly(counted.kept)
        if sampled := self.sampled_share():
            share = Range.around(sampled[1], SAMPLE_SPREAD)
            return Range(share.low, share.mid, max(share.mid, min(1.0, share.high)))
        if self.records:
            train = self.records[0].train
            return best_fit_share(self.seq_len, Range.exactly(train.tokens_in / train.docs))
        return assumed_share(self.kind, self.seq_len, ratio)

    def keep_kept(self) -> Range:
        """Share of the tokens that keep delivers, which adds a BOS to each continuation."""
        counted = self.counted("keep")
        return Range.exactly(counted.kept) if counted else keep_share(self.seq_len)


def look(config: Config, tokens_needed: int, *, with_gpus: bool) -> Known:
    """Directories and small files; never the text."""
    run = begun(config)
    request = request_of(config, tokens_needed, run, with_gpus=with_gpus)
    corpus, num_files = corpus_name(config, with_gpus=with_gpus), request["num_data_shards"]
    kind: Literal["climbmix", "embedded", "other"] = "other"
    if corpus in ("climbmix", "embedded"):
        kind = "climbmix" if corpus == "climbmix" else "embedded"
    files = local_files(corpus, config.data.val_corpus, num_files, config.base_dir)
    records = find_records(config.base_dir, request)
    known_marks = {record.fingerprint for record in records}
    if run and (of_run := record_of_run(config, run)) and of_run.fingerprint not in known_marks:
        records.append(of_run)
    fresh = tuple(record for record in records if _unchanged(record, files, kind))
    return Known(
        corpus=request["corpus"],
        kind=kind,
        seq_len=config.model.max_seq_len,
        vocab_size=config.model.vocab_size,
        files=files,
        shards=_shards(kind, num_files, files, fresh),
        fresh=fresh,
        stale=tuple(record for record in records if record not in fresh),
        run=run or {},
    )


def _unchanged(record: Prepared, files: Files | None, kind: str) -> bool:
    """Whether the files are those of the record, as far as that can be seen: climbmix never changes, URIs may."""
    if kind == "climbmix" or not record.train_files:
        return True
    if files is None:
        return any(size < 0 for _, size, _ in (*record.train_files, *record.val_files))
    return (record.train_files, record.val_files) == (files.train, files.val)


def _shards(kind: str, num_files: int, files: Files | None, fresh: tuple[Prepared, ...]) -> int | None:
    if kind == "climbmix":
        return num_files - 1
    if files:
        return len(files.train)
    if kind == "embedded":
        return EMBEDDED_TRAIN_SHARDS if num_files == -1 else min(num_files - 1, EMBEDDED_TRAIN_SHARDS)
    return len(fresh[0].train_files) or None if fresh else None
