"""CORE written down plainly, to compare with: one option per forward pass, logits at every position, nothing shared.

It reads the bundle's files itself and knows nothing of `raychat.evaluation.core`.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from raychat.model import GPT


def verdicts(model: GPT, tokenizer: Any, folder: Path, cap: int, labels: list[str]) -> dict[str, list[bool]]:
    """Whether `model` gets each of the first `cap` items of every task in `labels` right."""
    entries = {entry["label"]: entry for entry in yaml.safe_load((folder / "core.yaml").read_text())["icl_tasks"]}
    return {label: _task(model, tokenizer, folder, entries[label], cap) for label in labels}


def _task(model: GPT, tokenizer: Any, folder: Path, entry: dict[str, Any], cap: int) -> list[bool]:
    lines = (folder / "eval_data" / entry["dataset_uri"]).read_text(encoding="utf-8").strip().split("\n")
    data = [json.loads(line) for line in lines]
    random.Random(1337).shuffle(data)
    data = data[:cap]
    kind, shots, delimiter = entry["icl_task_type"], entry["num_fewshot"][0], entry.get("continuation_delimiter", " ")
    found = []
    for index, item in enumerate(data):
        others = [i for i in range(len(data)) if i != index]
        examples = [data[i] for i in random.Random(1234 + index).sample(others, shots)]
        prompts = RENDER[kind](item, examples, delimiter)
        rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
        found.append(_right(model, kind, rows, item.get("gold", 0)))
    return found


def _multiple_choice(item: dict[str, Any], examples: list[dict[str, Any]], delimiter: str) -> list[str]:
    shown = "".join(f"{e['query']}{delimiter}{e['choices'][e['gold']]}\n\n" for e in examples)
    return [f"{shown}{item['query']}{delimiter}{choice}" for choice in item["choices"]]


def _schema(item: dict[str, Any], examples: list[dict[str, Any]], delimiter: str) -> list[str]:
    shown = "".join(f"{e['context_options'][e['gold']]}{delimiter}{e['continuation']}\n\n" for e in examples)
    return [f"{shown}{context}{delimiter}{item['continuation']}" for context in item["context_options"]]


def _language_modeling(item: dict[str, Any], examples: list[dict[str, Any]], delimiter: str) -> list[str]:
    """The prompt without and with the continuation."""
    shown = "".join(f"{e['context'].strip()}{delimiter}{e['continuation']}\n\n" for e in examples)
    prompt = f"{shown}{item['context'].strip()}{delimiter}"
    return [prompt.strip(), prompt + item["continuation"]]


RENDER = {"multiple_choice": _multiple_choice, "schema": _schema, "language_modeling": _language_modeling}


def _right(model: GPT, kind: str, rows: list[list[int]], gold: int) -> bool:
    if kind == "language_modeling":
        same = 0
        while same < len(rows[0]) and rows[0][same] == rows[1][same]:
            same += 1
        logits, ids = _logits(model, rows[1], same)
        return bool((logits.argmax(dim=-1) == ids).all())
    same, step = 0, (-1 if kind == "schema" else 1)
    while same < min(map(len, rows)) and len({row[::step][same] for row in rows}) == 1:
        same += 1
    starts = [len(row) - same for row in rows] if kind == "schema" else [same] * len(rows)
    losses = [F.cross_entropy(*_logits(model, row, start)).item() for row, start in zip(rows, starts, strict=True)]
    return losses.index(min(losses)) == gold


@torch.no_grad()
def _logits(model: GPT, row: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that predict the scored tokens, and these; a row that is too long keeps its end."""
    gone = max(0, len(row) - 10 * model.config.sequence_len)
    row, start = row[gone:], max(1, start - gone)
    return model(torch.tensor([row]))[0, start - 1 : -1], torch.tensor(row[start:])
