"""The tokenizer of a run that has been trained: the copy in its run directory, or the one that its data were made with.

Checkpoints hold no tokenizer. A run keeps a copy beside them (`tokenizer/`); runs of earlier versions do not, and their
tokenizer is known by the digest in the manifest of the token shards that the run was trained on.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from raychat.config import Config
from raychat.data.tokenizer import META_FILE, TOKENIZER_FOLDER, Tokenizer, digest_in
from raychat.errors import ConfigError, DataError
from raychat.storage import Store


def find_tokenizer(run: Store | None, meta: dict[str, Any], *, base_dir: str, given: str = "") -> str:
    """Address of the folder that holds the tokenizer of a checkpoint.

    Args:
        run: the run directory, where there is one.
        meta: content of the checkpoint's checkpoint.json.
        base_dir: where to look first; empty: only where the run kept its data, and in the default place.
        given: a folder, or a name below `tokenizers/`, to use instead of looking.

    Raises:
        ConfigError: when `given` is the tokenizer of another vocabulary.
        DataError: when it is not found, with what to give.
    """
    bases = list(dict.fromkeys(_base_dirs(run, meta, base_dir)))
    sha256 = meta.get("tokenizer_sha256") or _digest_of_data(bases, meta)
    if given:
        return _checked(given, bases, meta, sha256)
    copy = run.child(TOKENIZER_FOLDER) if run else None
    if copy and copy.exists(META_FILE) and sha256 in (None, digest_in(copy)):
        return copy.address
    for folder in _candidates(bases, meta):
        if sha256 is not None and digest_in(Store.of(folder)) == sha256:
            return str(folder)
    wanted = (
        f"with the digest {sha256[:12]}..." if sha256 else f"that the token shards {meta['fingerprint']} were made with"
    )
    looked = ", ".join(str(base / "tokenizers") for base in bases)
    raise DataError(
        f"The tokenizer of this model, the one {wanted}, is neither in its run directory nor in {looked}. Give the base "
        "directory that the run had as --base-dir, or the tokenizer's folder as --tokenizer."
    )


def _base_dirs(run: Store | None, meta: dict[str, Any], base_dir: str) -> Iterator[Path]:
    if base_dir:
        yield Path(base_dir).expanduser().absolute()
    recorded = meta.get("config", {}).get("base_dir")
    if recorded and os.path.isabs(recorded):
        yield Path(recorded)
    if run and run.is_local and run.path.parent.name == "runs":
        yield run.path.parents[1]
    yield Config().base_dir


def _digest_of_data(bases: list[Path], meta: dict[str, Any]) -> str | None:
    """Digest of the tokenizer that the token shards of the run were made with, where their manifest still is."""
    for base in bases:
        with suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads((base / "tokens" / meta["fingerprint"] / "manifest.json").read_text())
            return manifest["spec"]["tokenizer_sha256"]
    return None


def _candidates(bases: list[Path], meta: dict[str, Any]) -> Iterator[Path]:
    named = meta.get("config", {}).get("tokenizer", "")
    if os.sep in named:
        yield Path(named).expanduser().absolute()
    for base in bases:
        yield from sorted((base / "tokenizers").glob("*"))


def _checked(given: str, bases: list[Path], meta: dict[str, Any], sha256: str | None) -> str:
    places = [Path(given).expanduser().absolute(), *(base / "tokenizers" / given for base in bases)]
    folder = next((place for place in places if (place / META_FILE).exists()), places[0])
    tokenizer = Tokenizer.load(folder)
    vocab_size = meta["config"]["vocab_size"]
    if tokenizer.sha256 != (sha256 or tokenizer.sha256) or tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"--tokenizer {given}: the model was trained with another tokenizer ({vocab_size:,} tokens"
            + (f", digest {sha256[:12]}...)" if sha256 else ")")
            + f" than this one ({tokenizer.vocab_size:,} tokens, digest {tokenizer.sha256[:12]}...). Give the run's own, or "
            "leave --tokenizer out."
        )
    return str(folder)
