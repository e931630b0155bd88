"""What is assumed of text that nobody has read yet, each figure with its basis, and the rule of `--packing auto`.

`raychat/data/climbmix.py` and `raychat/data/prepare.py` use the same figures and the same rule.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from raychat.planning.ranges import Range

Packing = Literal["best-fit", "keep"]
PACKINGS: tuple[Packing, ...] = ("best-fit", "keep")

CLIMBMIX_SHARDS = 6542
"""Training files; one more validates."""
CLIMBMIX_SHARD_CHARS = 250e6
EMBEDDED_TRAIN_SHARDS = 8
EMBEDDED_TRAIN_CHARS = Range(1.9e6, 13.5e6, 28.5e6)
"""95% of 2 to 30 MB, the limits of the embedded corpus; a Python with this project's dependencies carries 14 MB."""

# Characters per token by vocabulary, of BPE trained on 34 MB of English books, news and proposals, held by 303 of its
# documents; from these to larger vocabularies the curve is continued.
CHARS_PER_TOKEN = {256: 1.0, 512: 2.0, 2048: 3.0, 8192: 3.9, 32768: 4.5, 131072: 4.9}
# What web text has been seen to do with 32,768 tokens: 3.5 to 5.0 characters a token.
WEB_SPREAD = (3.5 / 4.5, 5.0 / 4.5)

# Characters of a mean document, where only the kind of corpus is known.
DOCUMENT_CHARS = {
    "climbmix": Range(2700, 3500, 4500),
    "embedded": Range(5000, 5400, 6500),
    "other": Range(1000, 3500, 8000),
}
# Share of tokens that best-fit keeps, by T over the mean document's tokens: simulated with lognormal documents
# (sigma 0.5 to 1.5) and 1,000 to choose from; English books at 0.17 to 3.2 and web text at 2.6 lie inside.
BEST_FIT_SHARE = {
    0.0625: Range(0.045, 0.06, 0.07),
    0.125: Range(0.09, 0.13, 0.14),
    0.25: Range(0.17, 0.24, 0.26),
    0.5: Range(0.27, 0.40, 0.49),
    1.0: Range(0.51, 0.65, 0.77),
    2.0: Range(0.70, 0.83, 0.93),
    4.0: Range(0.75, 0.91, 0.98),
    8.0: Range(0.88, 0.97, 0.995),
    16.0: Range(0.91, 0.99, 1.0),
}
# Measured on web text at T=2048, vocabulary 32,768.
CLIMBMIX_SHARE_2048 = Range(0.86, 0.87, 0.89)
PARQUET_TEXT = Range(1.5, 2.8, 3.5)
"""Bytes of text per byte of a parquet file, compressed as usual (zstd: 2.5 to 3.2)."""
JSONL_TEXT = Range(0.7, 0.95, 1.0)
COMPRESSED_TEXT = Range(2.2, 3.0, 4.0)
"""Bytes of a text per byte of its gzip, zstd or bzip2."""

EXACT_MARGIN = 0.05
"""What `auto` wants of best-fit beyond the run's tokens: an estimate from 512 documents is some percent off."""
SIZE_MARGIN = 0.3
"""The same where the bytes of text are an estimate as well: jsonl (keys and quotes), and files compressed whole."""


def margin_for(file: str) -> float:
    """The margin of a corpus of files of this name."""
    return EXACT_MARGIN if file.endswith((".parquet", ".txt")) else SIZE_MARGIN


def chars_per_token(vocab_size: int) -> Range:
    """Characters a token of English text stands for; code and other languages reach fewer."""
    mid = _between({math.log2(size): value for size, value in CHARS_PER_TOKEN.items()}, math.log2(vocab_size))
    return Range(mid * WEB_SPREAD[0], mid, mid * WEB_SPREAD[1])


def best_fit_share(seq_len: int, document_tokens: Range) -> Range:
    """Share of tokens that best-fit packing keeps of documents of this mean length."""

    def at(tokens: float, part: Literal["low", "mid", "high"]) -> float:
        return _between(
            {math.log2(r): getattr(s, part) for r, s in BEST_FIT_SHARE.items()}, math.log2(seq_len / tokens)
        )

    return Range(at(document_tokens.high, "low"), at(document_tokens.mid, "mid"), at(document_tokens.low, "high"))


def assumed_share(kind: str, seq_len: int, tokens: Range) -> Range:
    """Share that best-fit keeps of a corpus of this kind, `tokens` being characters per token."""
    if kind == "climbmix" and seq_len == 2048:
        return CLIMBMIX_SHARE_2048
    chars = DOCUMENT_CHARS[kind]
    return best_fit_share(seq_len, Range(chars.low / tokens.high, chars.mid / tokens.mid, chars.high / tokens.low))


def keep_share(seq_len: int) -> Range:
    """Share of tokens that keep delivers: less the last row of each shard, and at most one more BOS in each row."""
    return Range(0.995, 1.0, 1 + 1 / seq_len)


def climbmix_files(tokens_needed: int) -> int:
    """Files of climbmix for `tokens_needed` packed training tokens without repetition, the validation file included.

    Reckoned with the most characters that a token was seen to stand for, so that it does not fall short. At most all
    there are; a longer run repeats them.
    """
    per_file = CLIMBMIX_SHARD_CHARS / (CHARS_PER_TOKEN[32768] * WEB_SPREAD[1]) * CLIMBMIX_SHARE_2048.mid
    return min(CLIMBMIX_SHARDS, max(1, math.ceil(tokens_needed / per_file))) + 1


def packed_tokens(corpus_tokens: float, share: float, seq_len: int) -> float:
    """Tokens to train on in the rows that hold `share` of a corpus: T of the T+1 tokens of a row are targets."""
    return corpus_tokens * share * seq_len / (seq_len + 1)


def auto_packing(best_fit_tokens: float, tokens_needed: int, margin: float) -> Packing:
    """best-fit when it delivers more than the run trains on, by `margin`; else keep, which loses nothing."""
    return "best-fit" if best_fit_tokens * (1 - margin) >= tokens_needed else "keep"


def _between(points: Mapping[float, float], x: float) -> float:
    """Linear between `points`, which are in order, and constant outside."""
    first, last = min(points), max(points)
    if x <= first:
        return points[first]
    for left, right in pairwise(points):
        if x <= right:
            return points[left] + (points[right] - points[left]) * (x - left) / (right - left)
    return points[last]
