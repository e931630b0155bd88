"""Tokenizers that other implementations of the lineage wrote: a pickled tiktoken encoding, read without running anything.

A pickle is a program. The reader here lets it do one thing: hold the three values that a tiktoken encoding is made of.
"""

import io
import pickle
from typing import Any

from raychat.data.tokenizer import META_FILE, Tokenizer
from raychat.errors import DataError
from raychat.storage import Store

PICKLE_FILE = "tokenizer.pkl"
FIELDS = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}


def open_tokenizer(folder: Store) -> Tokenizer:
    """The tokenizer in `folder`, of raychat's files or, where those are not, of a pickle of the lineage.

    Raises:
        DataError: there is none, or it is damaged, or the pickle holds something else.
    """
    if folder.exists(META_FILE) or not folder.exists(PICKLE_FILE):
        return Tokenizer.load(folder)
    return unpickled(folder.read_bytes(PICKLE_FILE), str(folder.child(PICKLE_FILE)))


def unpickled(content: bytes, name: str) -> Tokenizer:
    """The tokenizer of a pickled tiktoken encoding; `name` is for messages.

    Raises:
        DataError: it asks for anything but tiktoken's Encoding, or is no whole vocabulary.
    """
    try:
        ranks, pattern, special_tokens = _parts(_Reader(io.BytesIO(content)).load())
        return Tokenizer(ranks, pattern, special_tokens)
    # Whatever bytes may make of the unpickler: they are not what was asked for.
    except Exception as error:  # noqa: BLE001
        raise DataError(
            f"{name} is not used as a tokenizer: {error}. It must be a pickled tiktoken Encoding and nothing else, because "
            "a pickle can run any program."
        ) from None


class _Parts:
    """Stands for tiktoken's Encoding while a pickle is read, and keeps what it is given."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _Parts


def _parts(found: Any) -> tuple[list[bytes], str, dict[str, int]]:
    """Tokens in the order of their ranks, split pattern, special tokens. Raises ValueError for anything else."""
    state = found.state if type(found) is _Parts else None
    if not isinstance(state, dict) or any(type(state.get(name)) is not kind for name, kind in FIELDS.items()):
        raise ValueError("it holds no encoding with its own vocabulary")
    ranks, special_tokens = state["mergeable_ranks"], state["special_tokens"]
    if any(type(token) is not bytes for token in ranks) or any(type(token) is not str for token in special_tokens):
        raise ValueError("its tokens are not bytes, or its special tokens no text")
    ids = [*ranks.values(), *special_tokens.values()]
    if any(type(number) is not int for number in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"its {len(ids):,} ids are not 0 to {len(ids) - 1:,}")
    if sorted(ranks.values()) != list(range(len(ranks))) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise ValueError("its special tokens do not follow the others, or it lacks some of the 256 bytes")
    if "<|bos|>" not in special_tokens:
        raise ValueError("it has no <|bos|>, with which every document begins")
    return sorted(ranks, key=ranks.__getitem__), state["pat_str"], special_tokens
