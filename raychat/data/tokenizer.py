"""The byte-level BPE tokenizer: trained by rustbpe, run by tiktoken, stored as two text files.

Ids: 256 single bytes, then the merges in the order they were learned, then the special tokens. `encode` never gives a
special token, whatever the text holds, so text from outside cannot forge one.
"""

import base64
import binascii
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from raychat.errors import ConfigError, DataError
from raychat.progress import Progress
from raychat.storage import Store

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# GPT-4's split pattern (tiktoken's cl100k_base) with at most two digits to a token, which suits small vocabularies.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
FORMAT = "raychat-tokenizer-1"
RANKS_FILE, META_FILE = "tokenizer.tiktoken", "tokenizer.json"
TOKENIZER_FOLDER = "tokenizer"
"""name of its directory in a run and in an export"""
# The regular expression engines give up on a run of white space of some 500,000 characters.
PIECE_CHARS = 100_000

log = logging.getLogger(__name__)


class Tokenizer:
    """A trained tokenizer. Other processes load it from its directory rather than receive it.

    Attributes:
        vocab_size: ids in use, special tokens included.
        bos_id: the id that every document starts with.
        special_tokens: their ids.
        ranks: the tokens but the special ones, in the order of their ids.
        pattern: the split pattern.
        token_bytes: int32 (vocab_size,), UTF-8 bytes that each id stands for; 0 for special tokens.
        sha256: digest of merges, pattern and special tokens: what fingerprints use.
    """

    def __init__(self, ranks: list[bytes], pattern: str, special_tokens: dict[str, int]) -> None:
        self.special_tokens, self.bos_id = special_tokens, special_tokens["<|bos|>"]
        self.vocab_size = len(ranks) + len(special_tokens)
        self.token_bytes = np.array([*map(len, ranks), *(0 for _ in special_tokens)], dtype=np.int32)
        self.sha256 = _digest(ranks, pattern, special_tokens)
        self.ranks, self.pattern = ranks, pattern
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        self._encoding = tiktoken.Encoding(
            name="raychat",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=special_tokens,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS; the names of special tokens in it are plain text."""
        return self.encode_numpy(text).tolist()

    def encode_numpy(self, text: str) -> np.ndarray:
        """As `encode`, as an array (n,) of uint16, or of uint32 where the vocabulary exceeds 65,536."""
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            # A lone surrogate has no UTF-8 form: it becomes the replacement character.
            return self.encode_numpy(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:
            if len(text) <= PIECE_CHARS:
                raise
            log.warning("a text of %d characters was too long for the split pattern: cut for encoding", len(text))
            return np.concatenate([self.encode_numpy(piece) for piece in _pieces(text)])
        return ids.astype(self._dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; special tokens give their names."""
        return self._encoding.decode_bytes([int(token) for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 (a cut character) become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, directory: Path | str) -> None:
        """Write both files to `directory`, whole or not at all. The same tokenizer there already is left as it is.

        Raises:
            DataError: `directory` holds a different tokenizer, or something else.
        """
        directory = Path(directory)
        if self._stands_in(directory):
            return
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            for name, content in self._files().items():
                _write(staging / name, content)
            staging.chmod(0o755)  # mkdtemp keeps others out; a shared base directory is read by all
            staging.replace(directory)
        except OSError:
            if not self._stands_in(directory):  # else another process was quicker
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def put(self, folder: Store) -> None:
        """Write both files to a folder or bucket, in the place of another tokenizer there.

        Raises:
            OSError: when the disk or the network fails; what is there then does not load, or is as it was.
        """
        if digest_in(folder) == self.sha256:
            return
        for name, content in self._files().items():
            folder.write_bytes(name, content)

    def _files(self) -> dict[str, bytes]:
        """Content by name; the file that names the digest comes last."""
        lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self.ranks))
        meta = {
            "format": FORMAT,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "vocab_size": self.vocab_size,
            "sha256": self.sha256,
        }
        return {RANKS_FILE: b"".join(lines), META_FILE: (json.dumps(meta, indent=2) + "\n").encode()}

    def _stands_in(self, directory: Path) -> bool:
        if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
            return False
        if Tokenizer.load(directory).sha256 != self.sha256:
            raise DataError(
                f"{directory} holds a different tokenizer, which token shards and runs may depend on; it is not "
                "overwritten. Choose another directory, or remove that one."
            )
        return True

    @classmethod
    def load(cls, place: Store | Path | str) -> "Tokenizer":
        """The tokenizer that `save` or `put` wrote to a folder, or to the folder of a bucket.

        Raises:
            DataError: there is none, its format is unknown, or its files are damaged.
        """
        directory = Store.of(place)
        try:
            meta = json.loads(directory.read_bytes(META_FILE))
            content = directory.read_bytes(RANKS_FILE)
        except (FileNotFoundError, NotADirectoryError):
            missing = META_FILE if directory.size(META_FILE) is None else RANKS_FILE
            raise DataError(
                f"there is no tokenizer in {directory} ({missing} is missing). "
                "Train one with jobs/train_tokenizer.py, or give the directory of one that exists."
            ) from None
        except (OSError, ValueError) as error:
            raise _damaged(directory, f"{META_FILE} cannot be read: {error}") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise _damaged(directory, f"{META_FILE} does not say format {FORMAT!r}")
        try:
            tokenizer = cls(_parse_ranks(content), meta["pattern"], meta["special_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(directory, str(error)) from None
        if tokenizer.vocab_size != meta.get("vocab_size") or tokenizer.sha256 != meta.get("sha256"):
            raise _damaged(
                directory, f"the files hold {tokenizer.vocab_size} tokens and do not match the digest in {META_FILE}"
            )
        return tokenizer


def byte_tokenizer() -> Tokenizer:
    """The tokenizer without merges: a token a byte."""
    specials = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    return Tokenizer([bytes([value]) for value in range(256)], SPLIT_PATTERN, specials)


def train_tokenizer(
    documents: Iterable[str],
    *,
    vocab_size: int = 32768,
    max_chars: int = 2_000_000_000,
    doc_cap: int = 10_000,
    echo: Callable[[str], None],
) -> Tokenizer:
    """Learn the merges from `documents`, each cut to `doc_cap` characters, until `max_chars` characters are seen.

    The same documents give the same tokenizer.

    Raises:
        ConfigError: `vocab_size` has no room for the 256 bytes and the special tokens, or a cap is below 1.
        DataError: no text, or too little of it for so many merges.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(
            f"--vocab-size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
            f"{smallest}. Use at least {smallest}; 32768 is the default."
        )
    if max_chars < 1 or doc_cap < 1:
        raise ConfigError(f"--tok-max-chars={max_chars} and --tok-doc-cap={doc_cap} must both be at least 1 character")
    trainer = rustbpe.Tokenizer()  # pyrefly: ignore[missing-attribute]  # a binary module without type stubs
    with Progress("tokenizer training", None, "characters", echo=echo) as progress:
        texts = _capped(documents, max_chars, doc_cap, progress)
        trainer.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    if not progress.done:
        raise DataError("there is no text to train a tokenizer on: every document is empty. Check --corpus.")
    ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])]
    reached = len(ranks) + len(SPECIAL_TOKENS)
    if reached < vocab_size:
        raise DataError(
            f"--vocab-size={vocab_size} cannot be reached: after {reached} tokens nothing is left to merge in the "
            f"{progress.done:,.0f} characters given. Use --vocab-size {reached} or less, or a larger corpus."
        )
    return Tokenizer(ranks, SPLIT_PATTERN, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})


def _capped(documents: Iterable[str], max_chars: int, doc_cap: int, progress: Progress) -> Iterator[str]:
    left = max_chars
    for document in documents:
        text = document[: min(doc_cap, left)]
        yield from _pieces(text)
        progress.advance(len(text))
        left -= len(text)
        if not left:
            return


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))


def _digest(ranks: list[bytes], pattern: str, special_tokens: dict[str, int]) -> str:
    content = [[token.hex() for token in ranks], pattern, sorted(special_tokens.items(), key=lambda item: item[1])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _parse_ranks(content: bytes) -> list[bytes]:
    """The tokens of a .tiktoken file in the order of their ranks. Raises ValueError on anything but ranks 0, 1, ..."""
    ranks = []
    for number, line in enumerate(content.splitlines()):
        try:
            token, rank = line.split()
            ranks.append(base64.b64decode(token, validate=True))
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number + 1} of {RANKS_FILE} is not a base64 token and its rank") from None
        if rank != b"%d" % number:
            raise ValueError(f"line {number + 1} of {RANKS_FILE} should have rank {number}")
    if len(set(ranks)) != len(ranks) or not {bytes([byte]) for byte in range(256)} <= set(ranks):
        raise ValueError(f"{RANKS_FILE} lacks some of the 256 bytes or holds a token twice")
    return ranks


def digest_in(folder: Store) -> str | None:
    """Digest that the tokenizer in `folder` says it has; None where there is none that can be read."""
    try:
        return json.loads(folder.read_bytes(META_FILE)).get("sha256")
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return None


def _damaged(directory: Store, what: str) -> DataError:
    return DataError(
        f"the tokenizer in {directory} cannot be used: {what}. Copy it again from where it is whole, or remove the "
        "directory and train it anew."
    )


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
