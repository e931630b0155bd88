"""Exports a model: writes it beside its place, reads it back, compares, and only then gives it its name."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from raychat.atomic import crc32, sync_folder, write_json
from raychat.data.tokenizer import TOKENIZER_FOLDER
from raychat.data.unpickle import PICKLE_FILE, unpickled
from raychat.errors import CheckpointError, ConfigError
from raychat.export.facts import training_facts
from raychat.export.huggingface import write_huggingface
from raychat.export.lineage import check_lineage, write_lineage
from raychat.export.source import Loaded, Source, find_source
from raychat.export.weights import plain_state
from raychat.model import GPT, GPTConfig
from raychat.progress import Progress
from raychat.training.exported import FACTS_FILE, FACTS_KEY

Format = Literal["lineage", "huggingface"]
CPU = torch.device("cpu")
PROBE_ROWS, PROBE_TOKENS = 2, 256
TOLERANCE = 1e-5  # of logits in float32
CHECKED = (".safetensors", ".pt", ".tiktoken")


@dataclass(frozen=True)
class Written:
    """An exported directory and the largest difference between its logits and those of the model it was made of."""

    folder: Path
    difference: float


def export(
    source: Source, folder: Path, formats: Sequence[Format], *, dtype: torch.dtype, echo: Callable[[str], None]
) -> list[Written]:
    """Write the model of `source` to `folder`, or to a folder below it for each of several formats.

    Each directory is whole or absent, and was read back before it got its name.

    Raises:
        ConfigError: `folder` holds something, or a format cannot describe the model.
        CheckpointError: the model cannot be read, or what was written is not the same model.
    """
    targets = {name: folder if len(formats) == 1 else folder / name for name in formats}
    _refuse_full(folder, list(targets.values()))
    loaded = source.load(CPU, torch.float32)
    if "lineage" in formats:
        check_lineage(loaded.model.config)
    facts = training_facts(source, loaded.model) | {"tokenizer_sha256": loaded.tokenizer.sha256}
    state = plain_state(loaded.model, dtype)
    probe = _probe(loaded)
    if dtype is not torch.float32:  # what the rounded weights give is what must come back
        loaded.model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    expected = _logits(loaded.model, probe)
    return [
        Written(target, _write_one(target, name, loaded, state, facts, (probe, expected), echo=echo))
        for name, target in targets.items()
    ]


def _write_one(
    target: Path,
    layout: Format,
    loaded: Loaded,
    state: dict[str, Tensor],
    facts: dict[str, Any],
    check: tuple[Tensor, Tensor],
    *,
    echo: Callable[[str], None],
) -> float:
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    dtype = next(iter(state.values())).dtype
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    shapes = loaded.model.config
    try:
        with Progress(f"exporting ({layout})", size * (2 if layout == "lineage" else 1) / 1e6, "MB", echo=echo) as done:
            given = (staging, state, shapes, loaded.tokenizer, facts)
            if layout == "lineage":
                write_lineage(*given, advance=lambda count: done.advance(count / 1e6))
            else:
                write_huggingface(*given, dtype=dtype, advance=lambda count: done.advance(count / 1e6))
        _record_checksums(staging, layout)
        difference = _read_back(staging, state, shapes, *check)
        _sync(staging)
        staging.chmod(0o755)  # mkdtemp keeps others out
        staging.replace(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def _refuse_full(folder: Path, targets: list[Path]) -> None:
    lowest = next(place for place in (folder, *folder.parents) if place.exists())
    if not lowest.is_dir():
        raise ConfigError(f"--output {folder}: {lowest} is a file, and nothing is written over. Give another folder.")
    for place in targets:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ConfigError(f"--output {place} is there and not empty: nothing is written over. Give another folder.")


def _probe(loaded: Loaded) -> Tensor:
    """Rows of token ids, the same for every model of this vocabulary."""
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, loaded.model.config.sequence_len)
    ids = torch.randint(loaded.tokenizer.vocab_size, (PROBE_ROWS, length), generator=generator)
    ids[:, 0] = loaded.tokenizer.bos_id
    return ids


@torch.no_grad()
def _logits(model: GPT, ids: Tensor) -> Tensor:
    return model(ids)


def _record_checksums(folder: Path, layout: Format) -> None:
    """Size and CRC-32 of the files that hold weights and tokenizer, into the file with the facts."""
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, crc32(path)]
        for path in sorted(folder.rglob("*"))
        if path.suffix in CHECKED
    }
    if layout == "huggingface":
        path = folder / FACTS_FILE
        write_json(path, json.loads(path.read_text()) | {"files": files})
        return
    [path] = folder.glob("meta_*.json")
    content = json.loads(path.read_text())
    write_json(path, content | {FACTS_KEY: content[FACTS_KEY] | {"files": files}})


def _read_back(folder: Path, state: dict[str, Tensor], shapes: GPTConfig, probe: Tensor, expected: Tensor) -> float:
    """Largest difference of logits between what was written and what should have been."""
    found = find_source(path=str(folder)).load(CPU, torch.float32)
    difference = float((_logits(found.model, probe) - expected).abs().max())
    if found.model.config != shapes:  # a window may be longer than the probe
        difference = math.inf
    for path in folder.glob("model_*.pt"):
        again = torch.load(path, weights_only=True, mmap=True)
        same = again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
        tokenizer = unpickled((folder / TOKENIZER_FOLDER / PICKLE_FILE).read_bytes(), PICKLE_FILE)
        difference = difference if same and tokenizer.sha256 == found.tokenizer.sha256 else math.inf
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"The export does not give the logits of the model: they differ by {difference:.3g}. Nothing was kept; this is a "
            "defect of raychat, or of the disk."
        )
    return difference


def _sync(folder: Path) -> None:
    """Have everything in `folder` on the disk, and readable, before it gets its name."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
            continue
        path.chmod(0o644)  # safetensors keeps others out
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)
