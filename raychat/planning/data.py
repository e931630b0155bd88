"""Whether a corpus is enough for a run: tokens there against tokens needed, by what is on disk. Reads no text.

Exact where token shards have been prepared for these very settings and the files are as they were then; else an
estimate, which says what it rests on.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raychat.config import Config
from raychat.planning.devices import local_gpu
from raychat.planning.known_text import SAMPLE_SPREAD, Known, look
from raychat.planning.ranges import Range
from raychat.planning.scaling import Recipe
from raychat.planning.text import PACKINGS, Packing, auto_packing, packed_tokens


@dataclass(frozen=True, kw_only=True)
class DataForecast:
    """Data of a run. Tokens are those that are trained on: T of the T+1 in a row."""

    corpus: str
    """embedded, climbmix, or as given"""
    tokens_needed: int
    packing: Packing
    """what the run will use"""
    packing_reason: str
    tokens_by: dict[Packing, Range | None]
    """training tokens in one pass over the corpus with each packing; None where nothing is known of the text"""
    kept: dict[Packing, Range | None]
    """share of the corpus' tokens that each packing delivers; keep's added BOS can make it more than 1"""
    exact: bool
    """`tokens_there` was counted, and the corpus has not changed since"""
    source: str
    """what the figures rest on"""
    shards_there: int | None
    """training files; `--num-data-shards` counts the validation file as well"""
    shards_by: dict[str, Range | None]
    """training files for the run without repetition: before packing (`unpacked`), and with each packing"""
    chars_per_token: Range
    corpus_chars: float | None
    """expected characters of the training text: what has to be tokenized"""
    fingerprint: str | None
    """of the token shards that the run would use, where they are there"""
    tokenizer_ready: bool

    @property
    def tokens_there(self) -> Range | None:
        """Training tokens in one pass over the corpus, as it will be packed."""
        return self.tokens_by[self.packing]

    @property
    def epochs(self) -> Range | None:
        """Passes over the corpus that the run makes; up to 1 no token is seen twice."""
        there = self.tokens_there
        return there.under(self.tokens_needed) if there and there.low > 0 else None

    @property
    def shards_needed(self) -> Range | None:
        """Training files so that no token is seen twice, as they will be packed."""
        return self.shards_by[self.packing]

    @property
    def tokens_ready(self) -> bool:
        """Nothing is left to tokenize."""
        return self.fingerprint is not None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a range is [low, mid, high]."""

        def plain(value: Range | None) -> list[float] | None:
            return value.as_list() if value else None

        return {
            "corpus": self.corpus,
            "tokens_needed": self.tokens_needed,
            "tokens_there": plain(self.tokens_there),
            "exact": self.exact,
            "source": self.source,
            "epochs": plain(self.epochs),
            "packing": self.packing,
            "packing_reason": self.packing_reason,
            "kept": {name: plain(value) for name, value in self.kept.items()},
            "tokens_by": {name: plain(value) for name, value in self.tokens_by.items()},
            "shards_there": self.shards_there,
            "shards_needed": plain(self.shards_needed),
            "shards_by": {name: plain(value) for name, value in self.shards_by.items()},
            "chars_per_token": self.chars_per_token.as_list(),
            "corpus_chars": self.corpus_chars,
            "fingerprint": self.fingerprint,
            "tokens_ready": self.tokens_ready,
            "tokenizer_ready": self.tokenizer_ready,
        }


def forecast_data(config: Config, recipe: Recipe, *, with_gpus: bool | None = None) -> DataForecast:
    """Tokens needed and there, and what packing does to them. Reads directories and small files, never the text.

    `with_gpus` decides the default corpus, as it does for the run; None: what the plan is for, else this machine.
    """
    known = look(config, recipe.tokens, with_gpus=_plans_for_gpus(config) if with_gpus is None else with_gpus)
    chars, ratio = known.chars(), known.chars_per_token()
    unpacked, basis = _corpus_tokens(known, chars, ratio)
    kept: dict[Packing, Range | None] = {
        "best-fit": known.best_fit_kept(ratio) if unpacked else None,
        "keep": known.keep_kept() if unpacked else None,
    }
    tokens = {packing: _packed(known, packing, unpacked, kept[packing]) for packing in PACKINGS}
    packing, reason = _packing(config, known, recipe.tokens, tokens["best-fit"])
    used = known.counted(packing)
    if used:
        basis = f"token shards {used.fingerprint}" + ("" if known.compared(used) else ", files not compared")
    shards: dict[str, Range | None] = {"unpacked": unpacked, "best-fit": tokens["best-fit"], "keep": tokens["keep"]}
    return DataForecast(
        corpus=known.corpus,
        tokens_needed=recipe.tokens,
        packing=packing,
        packing_reason=reason,
        tokens_by=tokens,
        kept=kept,
        exact=used is not None,
        source=basis,
        shards_there=known.shards,
        shards_by={name: _files_for(recipe.tokens, total, known.shards) for name, total in shards.items()},
        chars_per_token=ratio,
        corpus_chars=chars.mid if chars else None,
        fingerprint=used.fingerprint if used else None,
        tokenizer_ready=_tokenizer_ready(config, known),
    )


def _plans_for_gpus(config: Config) -> bool:
    plan = config.plan
    return plan.gpu != "cpu" if plan.gpu or plan.machine else local_gpu() is not None


def _corpus_tokens(known: Known, chars: Range | None, ratio: Range) -> tuple[Range | None, str]:
    """Tokens of the training text before packing, and what that rests on."""
    if known.fresh:
        same = known.fresh[0]
        return Range.exactly(same.train.tokens_in), f"token shards {same.fingerprint} of the same text and tokenizer"
    then = sum(size for _, size, _ in known.stale[0].train_files) if known.stale else 0
    if known.files and then > 0:
        old = known.stale[0]
        tokens = Range.around(old.train.tokens_in * known.files.train_bytes / then, SAMPLE_SPREAD)
        return tokens, f"estimate: token shards {old.fingerprint}, made before the corpus changed, by size"
    if chars is None:
        return None, f"unknown: {known.basis}"
    tokens = Range(chars.low / ratio.high, chars.mid / ratio.mid, chars.high / ratio.low)
    return tokens, f"estimate: {known.basis}, {ratio.low:.1f} to {ratio.high:.1f} characters a token"


def _packed(known: Known, packing: Packing, corpus_tokens: Range | None, kept: Range | None) -> Range | None:
    """Training tokens of one pass over the corpus with `packing`."""
    if counted := known.counted(packing):
        return Range.exactly(counted.train.rows * counted.seq_len)
    return corpus_tokens.times(kept).scaled(packed_tokens(1.0, 1.0, known.seq_len)) if corpus_tokens and kept else None


def _packing(config: Config, known: Known, needed: int, best_fit: Range | None) -> tuple[Packing, str]:
    """What the run will use and why, by the rule of `prepare` on what is known of its sample."""
    if config.data.packing != "auto":
        return config.data.packing, "as given"
    for record in known.fresh:
        if record.fingerprint == known.run.get("data_fingerprint"):
            return record.packing, "the run began with it"
    sampled = known.sampled_share()
    if sampled:
        sample, share = sampled
        tokens = packed_tokens(sample.corpus_tokens, share, known.seq_len)
        choice = auto_packing(tokens, needed, sample.margin)
        return choice, f"best-fit delivers some {_count(tokens)} tokens by the first {sample.docs} documents"
    later = "decided by the first documents when the corpus is read"
    if best_fit is None:
        return "best-fit", later
    choice = auto_packing(best_fit.mid, needed, known.margin)
    return choice, f"best-fit may deliver {_count(best_fit.low)} to {_count(best_fit.high)} tokens; {later}"


def _count(tokens: float) -> str:
    return f"{tokens / 1e6:,.0f}M" if tokens >= 1e7 else f"{tokens:,.0f}"


def _files_for(needed: int, total: Range | None, files: int | None) -> Range | None:
    if total is None or not files or total.low <= 0:
        return None
    share = total.scaled(1 / files).under(needed)
    return Range(*(math.ceil(value) for value in share.as_list()))


def _tokenizer_ready(config: Config, known: Known) -> bool:
    chosen = config.data.tokenizer
    if chosen:
        folder = Path(chosen).expanduser() if os.sep in chosen else config.base_dir / "tokenizers" / chosen
        return (folder / "tokenizer.json").exists()
    # A record of a run does not say where its tokenizer is; the run had one.
    folders = [record.tokenizer_dir for record in known.fresh]
    return any(not folder or (Path(folder) / "tokenizer.json").exists() for folder in folders)
