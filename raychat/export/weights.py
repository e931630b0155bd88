"""Weights as files that other programs read: safetensors, in shards where they are large."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from raychat.model import GPT

SHARD_BYTES = 5 * 10**9  # what Hugging Face's hub and readers take as one file without trouble


def plain_state(model: GPT, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter by its interop name, on the CPU, in `dtype`."""
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}


def write_safetensors(
    state: dict[str, Tensor], folder: Path, *, advance: Callable[[int], None], shard_bytes: int = SHARD_BYTES
) -> None:
    """`model.safetensors` in `folder`, or several files and their index, as transformers names them.

    `advance` is told the bytes of each file when it is written.
    """
    shards = _shards(state, shard_bytes)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        advance(sum(_bytes(state[name]) for name in names))
    if len(shards) > 1:
        total = sum(map(_bytes, state.values()))
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _shards(state: dict[str, Tensor], most: int) -> list[list[str]]:
    """Names in files of at most `most` bytes; a tensor that is larger has one of its own."""
    shards: list[list[str]] = []
    room = -math.inf
    for name, tensor in state.items():
        if _bytes(tensor) > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= _bytes(tensor)
    return shards


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
