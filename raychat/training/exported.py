"""Reads exported directories: the lineage's layout, from whoever wrote it, and raychat's Hugging Face directories.

    lineage                                   Hugging Face
      model_000500.pt, .safetensors             model.safetensors, or shards and their index
      meta_000500.json                          config.json, raychat.json (what is known of the training)
      tokenizer/                                tokenizer/

Writing is `raychat.export`'s; reading is here, because training can begin with the weights of such a directory.
"""

import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from raychat.data.tokenizer import META_FILE, RANKS_FILE, TOKENIZER_FOLDER, Tokenizer
from raychat.data.unpickle import PICKLE_FILE, open_tokenizer
from raychat.errors import CheckpointError, ConfigError, DataError
from raychat.model import GPT, GPTConfig
from raychat.storage import Store

MODEL_TYPE = "raychat"
LINEAGE_KEYS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
FACTS_FILE, FACTS_KEY = "raychat.json", "raychat"
HF_CONFIG, HF_WEIGHTS, HF_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
COMPILED = "_orig_mod."  # torch.compile puts it before the names of a model that is saved compiled


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model in an exported directory, found but not loaded."""

    store: Store
    layout: Literal["lineage", "huggingface"]
    step: int | None
    shapes: GPTConfig
    meta: dict[str, Any] = field(repr=False)
    """content of the layout's own JSON file"""
    facts: dict[str, Any] = field(repr=False)
    """what raychat wrote down about the training; empty when another program wrote the directory"""
    weights: tuple[str, ...]
    """files that hold the parameters"""

    def verify(self) -> None:
        """Compare the files with the checksums that raychat recorded; nothing where another program wrote them.

        Raises:
            CheckpointError: naming the file that is missing or damaged.
        """
        for name, (size, crc) in self.facts.get("files", {}).items():
            if self.store.size(name) != size or self.store.crc32(name) != crc:
                raise CheckpointError(f"{self.store}/{name} is missing or damaged: export the model again.")

    def load(self, model: GPT) -> None:
        """Put the weights into `model`, in the dtypes and on the device that it has.

        Raises:
            CheckpointError: parameters are missing, too many or of another shape; they are named.
            OSError: an object store cannot be reached.
        """
        with self._at_hand() as folder:
            state: dict[str, Tensor] = {}
            for name in self.weights:
                state |= read_tensors(folder / name)
            fill(state, model, str(self.store))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to it. Raises DataError where there is none."""
        return open_tokenizer(self.tokenizer_folder())

    def tokenizer_folder(self) -> Store:
        """Its own, or that of a base directory of the lineage, which is beside the folder of all models."""
        own = self.store.child(TOKENIZER_FOLDER)
        places = [own]
        if self.store.is_local:
            places += [Store.of(self.store.path), Store.of(self.store.path.parents[1] / TOKENIZER_FOLDER)]
        for place in places:
            if place.exists(PICKLE_FILE) or (place.exists(META_FILE) and place.exists(RANKS_FILE)):
                return place
        raise DataError(
            f"{self.store} has no tokenizer: put {META_FILE} and {RANKS_FILE} of raychat, or the lineage's "
            f"{PICKLE_FILE}, into {own}."
        )

    @contextmanager
    def _at_hand(self) -> Iterator[Path]:
        if self.store.is_local:
            yield self.store.path
            return
        with tempfile.TemporaryDirectory(prefix="raychat-export-") as folder:
            for name in self.weights:
                self.store.download(name, Path(folder, name))
            yield Path(folder)


def open_export(place: Store | Path | str, step: int = -1) -> Exported | None:
    """The export in a folder or bucket; None when it is none. `step` chooses among several; -1: the last.

    Raises:
        CheckpointError: it is one, and cannot be used.
    """
    store = Store.of(place)
    names = set(store.names())
    try:
        if steps := sorted(int(match[1]) for name in names if (match := re.fullmatch(r"meta_(\d{6,})\.json", name))):
            return _lineage(store, names, steps, step)
        if HF_CONFIG in names:
            return _huggingface(store, names)
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{store} cannot be used: its description of the model is wrong ({error}).") from error
    return None


def _lineage(store: Store, names: set[str], steps: list[int], wanted: int) -> Exported:
    step = steps[-1] if wanted == -1 else wanted
    if step not in steps:
        raise CheckpointError(f"--step {wanted}: {store} holds the steps {', '.join(map(str, steps))}.")
    meta = json.loads(store.read_bytes(f"meta_{step:06d}.json"))
    given = meta["model_config"]
    if missing := [key for key in LINEAGE_KEYS if key not in given]:
        raise CheckpointError(
            f"meta_{step:06d}.json of {store} lacks {', '.join(missing)} in model_config: it is of an older model, "
            "which this version does not compute."
        )
    candidates = (f"model_{step:06d}.safetensors", f"model_{step:06d}.pt")
    weights = next((name for name in candidates if name in names), None)
    if weights is None:
        raise CheckpointError(f"{store} holds no weights of step {step}: {' or '.join(candidates)} is missing.")
    return Exported(
        store=store,
        layout="lineage",
        step=step,
        shapes=GPTConfig(**{key: given[key] for key in LINEAGE_KEYS}),
        meta=meta,
        facts=_facts(meta.get(FACTS_KEY)),
        weights=(weights,),
    )


def _huggingface(store: Store, names: set[str]) -> Exported | None:
    config = json.loads(store.read_bytes(HF_CONFIG))
    if config.get("model_type") != MODEL_TYPE:
        return None
    if HF_INDEX in names:
        weights = tuple(sorted(set(json.loads(store.read_bytes(HF_INDEX))["weight_map"].values())))
    else:
        weights = (HF_WEIGHTS,)
    if absent := [name for name in weights if name not in names]:
        raise CheckpointError(f"{store} lacks {', '.join(absent)}: export the model again.")
    facts = _facts(json.loads(store.read_bytes(FACTS_FILE)) if FACTS_FILE in names else None)
    return Exported(
        store=store,
        layout="huggingface",
        step=facts.get("step"),
        shapes=GPTConfig(**{key.name: config[key.name] for key in fields(GPTConfig)}),
        meta=config,
        facts=facts,
        weights=weights,
    )


def _facts(found: Any) -> dict[str, Any]:
    """What raychat wrote down, if anything. Raises TypeError where it is not of that form."""
    facts = {} if found is None else dict(found)
    files = facts.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(mark, list) and len(mark) == 2 for mark in files.values()):
        raise TypeError("its checksums are no pairs of a size and a CRC-32")
    return facts


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of one that torch.save wrote, of which nothing but tensors is taken.

    Raises:
        CheckpointError: it holds something else, or is damaged.
        OSError: it is not there.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Files in the older format of torch.save cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    # Whatever bytes may make of the two readers: they are no weights.
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as weights ({reason}): it is damaged, or another kind of file."
        ) from None
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds something else than a state dict of tensors.")
    return state


def fill(state: dict[str, Tensor], model: GPT, place: str) -> None:
    """Put `state`, in the interop names, into `model`; `place` is for messages.

    Raises:
        CheckpointError: it is of another model.
    """
    state = {name.removeprefix(COMPILED): tensor for name, tensor in state.items()}
    own = model.state_dict()
    wrong = [
        f"{what} {', '.join(found[:8])}" + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        for what, found in (
            ("lacks", sorted(own.keys() - state.keys())),
            ("has besides", sorted(state.keys() - own.keys())),
            (
                "has in another shape",
                [
                    f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
                    for name, tensor in own.items()
                    if name in state and state[name].shape != tensor.shape
                ],
            ),
        )
        if found
    ]
    if wrong:
        raise CheckpointError(f"{place} is not a model of this mathematics: it {'; it '.join(wrong)}.")
    model.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in own.items()}, strict=True)
