"""Writes the lineage's layout: what other implementations of the same mathematics load.

Their tokenizer is a pickle, and is written for them alone: raychat reads its own files beside it.
"""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors.torch import save_file
from torch import Tensor

from raychat.data.tokenizer import TOKENIZER_FOLDER, Tokenizer
from raychat.data.unpickle import PICKLE_FILE
from raychat.errors import ConfigError
from raychat.model import GPTConfig
from raychat.training.exported import FACTS_KEY, LINEAGE_KEYS

LINEAGE_RATIO = 0.25
TOKEN_BYTES_FILE = "token_bytes.pt"


def check_lineage(shapes: GPTConfig) -> None:
    """Refuse a model that the layout cannot describe. Raises ConfigError."""
    short = "S" in shapes.window_pattern.upper()[: shapes.n_layer - 1]
    if short and shapes.short_window_ratio != LINEAGE_RATIO:
        raise ConfigError(
            f"This model has a short_window_ratio of {shapes.short_window_ratio}, and the lineage's layout knows no other than "
            f"{LINEAGE_RATIO}: its readers would compute something else. Use --format huggingface."
        )


def write_lineage(
    folder: Path,
    state: dict[str, Tensor],
    shapes: GPTConfig,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    *,
    advance: Callable[[int], None],
) -> None:
    """Write weights (twice: as a state dict, and as safetensors), description and tokenizer into `folder`.

    Raises:
        ConfigError: the layout cannot describe this model.
    """
    check_lineage(shapes)
    step = facts.get("step") or 0
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    torch.save(state, folder / f"model_{step:06d}.pt")
    advance(size)
    save_file(state, folder / f"model_{step:06d}.safetensors", metadata={"format": "pt"})
    advance(size)
    write_tokenizer(folder / TOKENIZER_FOLDER, tokenizer)
    meta = _training_meta(step, facts) | {
        "model_config": {key: getattr(shapes, key) for key in LINEAGE_KEYS},
        FACTS_KEY: facts,
    }
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2) + "\n")


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """raychat's two files, and the two that the lineage loads: the encoding, and the bytes of each token."""
    tokenizer.save(folder)
    encoding = tiktoken.Encoding(
        name="rustbpe",
        pat_str=tokenizer.pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(tokenizer.ranks)},
        special_tokens=tokenizer.special_tokens,
    )
    buffer = io.BytesIO()
    pickle.dump(encoding, buffer)
    (folder / PICKLE_FILE).write_bytes(buffer.getvalue())
    torch.save(torch.from_numpy(tokenizer.token_bytes), folder / TOKEN_BYTES_FILE)


def _training_meta(step: int, facts: dict[str, Any]) -> dict[str, Any]:
    """What the lineage's own checkpoints say besides, as far as it is known."""
    settings = facts.get("settings", {})
    return {
        "step": step,
        "val_bpb": facts.get("val_bpb"),
        "user_config": settings,
        "device_batch_size": settings.get("device_batch_size"),
        "max_seq_len": settings.get("max_seq_len"),
        "total_batch_size": settings.get("total_batch_size"),
    }
