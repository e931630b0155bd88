"""Writes a Hugging Face directory, which `transformers` loads with the code that lies in it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raychat.data.tokenizer import TOKENIZER_FOLDER, Tokenizer
from raychat.export.card import model_card
from raychat.export.tokenizer_json import tokenizer_json
from raychat.export.weights import write_safetensors
from raychat.model import GPTConfig
from raychat.training.exported import FACTS_FILE, HF_CONFIG, MODEL_TYPE

REMOTE_CODE = Path(__file__).parent / "remote_code"
CODE_FILES = ("configuration_raychat.py", "modeling_raychat.py")
BOS = "<|bos|>"


def write_huggingface(
    folder: Path,
    state: dict[str, Tensor],
    shapes: GPTConfig,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    *,
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    """Write weights, code, tokenizer, card and what is known of the training into `folder`."""
    write_safetensors(state, folder, advance=advance)
    for name in CODE_FILES:
        shutil.copyfile(REMOTE_CODE / name, folder / name)
    tokenizer.save(folder / TOKENIZER_FOLDER)
    # A document begins with BOS, so a BOS that the model writes is the end of one.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.bos_id)
    contents: dict[str, dict[str, Any]] = {
        HF_CONFIG: _config(shapes, dtype) | tokens,
        "generation_config.json": {"do_sample": True, "temperature": 1.0, "use_cache": False, **tokens},
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": BOS,
            "pad_token": BOS,
            "additional_special_tokens": [name for name in tokenizer.special_tokens if name != BOS],
            "clean_up_tokenization_spaces": False,
            "model_max_length": shapes.sequence_len,
            "padding_side": "left",
            "split_special_tokens": True,
        },
        FACTS_FILE: facts,
    }
    for name, content in contents.items():
        indent = None if name == "tokenizer.json" else 2
        (folder / name).write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(shapes, tokenizer, facts), encoding="utf-8")


def _config(shapes: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Shapes, and which classes of the directory's own code they are for."""
    return {
        "architectures": ["RaychatForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_raychat.RaychatConfig",
            "AutoModelForCausalLM": "modeling_raychat.RaychatForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        "use_cache": False,
        **dataclasses.asdict(shapes),
    }
