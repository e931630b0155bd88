"""Checkpoints: whole or absent, verified when read, and free of the number of workers that wrote them.

    step_00000250/
      model.safetensors                      every parameter by its interop name
      optim-00000-of-00002.safetensors       what rank 0 owns of the optimizer state: "<parameter>/<state>"
      checkpoint.json                        the state of the loop, the data and the run
      MANIFEST.rank00000.json                size and CRC-32 of the files that rank 0 wrote, and which rows they hold

Ranks write into a hidden staging folder on a file system they share; rank 0 renames it when all have. No pickle.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raychat.atomic import crc32, sync_folder, write_json
from raychat.errors import CheckpointError
from raychat.model import GPT
from raychat.optim import MuonAdamW
from raychat.training.world import World

FORMAT = 1
META, MODEL = "checkpoint.json", "model.safetensors"
SPARE = 1.1  # free space asked for, over the size of what is written


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on storage. `meta` is the content of checkpoint.json."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return self.meta["step"]

    def load(self, model: GPT, optimizer: MuonAdamW | None = None) -> None:
        """Put the weights, and the part of the optimizer state that this rank owns, in place."""
        device = next(model.parameters()).device
        state = load_file(self.path / MODEL, device=str(device))
        own = model.state_dict()
        for name, tensor in own.items():  # a change of precision changes how embeddings are stored
            state[name] = state[name].to(tensor.dtype)
        model.load_state_dict(state, strict=True)
        if optimizer is not None:
            optimizer.step_count = self.meta["optimizer_steps"]
            optimizer.load_owned_state(_SliceReader(self.path).read)


def folder_name(step: int) -> str:
    """Name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def save(root: Path, model: GPT, optimizer: MuonAdamW, meta: dict[str, Any], world: World) -> Path:
    """Write the checkpoint of `meta["step"]` under `root`. Every rank calls this; `meta` is rank 0's.

    Raises:
        CheckpointError: on every rank when any of them could not write. Nothing is left behind.
    """
    final = root / folder_name(meta["step"])
    if world.broadcast(final.exists()):
        return final
    staging = root / f".{final.name}.tmp"
    problem = _attempt(lambda: _make_staging(staging, model, world)) if world.rank == 0 else None
    if problem := world.broadcast(problem):
        raise CheckpointError(f"no checkpoint at step {meta['step']}: {problem}")
    problems = world.gather(_attempt(lambda: _write_rank(staging, model, optimizer, meta, world)))
    if world.rank == 0 and not any(problems):
        problems = [_attempt(lambda: _commit(staging, final))]
    problems = world.broadcast([problem for problem in problems if problem])
    if problems:
        if world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"no checkpoint at step {meta['step']}: {problems[0]}")
    return final


def trusted(path: Path) -> Checkpoint:
    """The checkpoint at `path`, which the driver has just verified: ranks need not all read it twice."""
    return Checkpoint(path, read_meta(path))


def read_meta(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's checkpoint.json, without verifying the rest."""
    return json.loads((path / META).read_text())


def verify(path: Path) -> Checkpoint:
    """The checkpoint at `path` after reading every byte of it.

    Raises:
        CheckpointError: naming the first file that is missing, cut short or damaged.
    """
    try:
        manifests = [json.loads(file.read_text()) for file in sorted(path.glob("MANIFEST.rank*.json"))]
        meta = json.loads((path / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {meta.get('format')}, this version reads {FORMAT}")
    if not manifests or len(manifests) != manifests[0]["world_size"]:
        raise CheckpointError(f"{path} holds the manifests of {len(manifests)} ranks, not of all")
    for manifest in manifests:
        for name, (size, crc) in manifest["files"].items():
            file = path / name
            found = file.stat().st_size if file.exists() else None
            if found != size:
                raise CheckpointError(f"{file} has {found} bytes instead of {size}")
            if crc32(file) != crc:
                raise CheckpointError(f"{file} is damaged: its checksum is wrong")
    return Checkpoint(path, meta)


def steps(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`, newest first, verified or not."""
    found = (re.fullmatch(r"step_(\d{8})", path.name) for path in root.glob("step_*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest(root: Path, *, echo: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; those that do not are named and left where they are."""
    for step in steps(root):
        try:
            return verify(root / folder_name(step))
        except CheckpointError as error:
            echo(f"checkpoint skipped: {error}")
    return None


def prune(root: Path, keep_last: int) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and the best one by val_bpb; returns what was deleted."""
    ordered = steps(root)
    keep = set(ordered[:keep_last])
    best: tuple[float, int] | None = None
    for step in ordered:
        try:
            state = read_meta(root / folder_name(step))["state"]
            val_bpb = state["val_bpb"] if state["val_step"] == step else None  # else it is of an earlier step
        except (OSError, ValueError, KeyError):
            continue
        if val_bpb is not None and (best is None or val_bpb < best[0]):
            best = (val_bpb, step)
    if best:
        keep.add(best[1])
    gone = [root / folder_name(step) for step in ordered if step not in keep]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return gone


def set_aside_after(root: Path, step: int, name: str) -> list[int]:
    """Move checkpoints later than `step` to the folder `name`: nothing is deleted by going back. Returns their steps."""
    later = [found for found in steps(root) if found > step]
    for found in later:
        target = root / name / folder_name(found)
        target.parent.mkdir(exist_ok=True)
        (root / folder_name(found)).rename(target)
    return later


def estimated_bytes(num_params: int) -> int:
    """Size of a checkpoint in float32: weights and, for most of them, two moments."""
    return num_params * 12


class _SliceReader:
    """Rows of whole optimizer tensors, put together from the files of however many ranks wrote them."""

    def __init__(self, path: Path) -> None:
        self._pieces: dict[str, list[tuple[int, int, Path]]] = {}
        for manifest in path.glob("MANIFEST.rank*.json"):
            content = json.loads(manifest.read_text())
            for key, (first, stop) in content["slices"].items():
                self._pieces.setdefault(key, []).append((first, stop, path / content["optimizer_file"]))

    def read(self, key: str, first: int, stop: int) -> torch.Tensor:
        parts = []
        for lo, hi, file in sorted(self._pieces.get(key, [])):
            a, b = max(lo, first), min(hi, stop)
            if a < b:
                with safe_open(file, framework="pt") as tensors:
                    parts.append(tensors.get_slice(key)[a - lo : b - lo])
        rows = sum(len(part) for part in parts)
        if rows != stop - first:
            raise CheckpointError(f"optimizer state {key!r} has {rows} of the rows {first} to {stop}")
        return torch.cat(parts)


def _attempt(action: Callable[[], object]) -> str | None:
    """Why `action` failed for want of a disk, or None: ranks agree on an outcome instead of leaving each other."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - safetensors and the file system raise many kinds
        return f"{type(error).__name__}: {error}"
    return None


def _make_staging(staging: Path, model: GPT, world: World) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.parent.mkdir(parents=True, exist_ok=True)
    need = SPARE * estimated_bytes(sum(p.numel() for p in model.parameters()))
    free = shutil.disk_usage(staging.parent).free
    if free < need:
        raise OSError(f"{staging.parent} has {free / 1e9:.1f} GB free and a checkpoint needs {need / 1e9:.1f} GB")
    staging.mkdir()


def _write_rank(staging: Path, model: GPT, optimizer: MuonAdamW, meta: dict[str, Any], world: World) -> None:
    owned = optimizer.owned_state()
    optimizer_file = f"optim-{world.rank:05d}-of-{world.world_size:05d}.safetensors"
    save_file({key: tensor.contiguous().cpu() for key, (_, tensor) in owned.items()}, staging / optimizer_file)
    names = [optimizer_file]
    if world.rank == 0:
        weights = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(weights, staging / MODEL)
        write_json(staging / META, meta | {"format": FORMAT, "optimizer_steps": optimizer.step_count})
        names += [MODEL, META]
    files = {}
    for name in names:
        with (staging / name).open("rb") as file:
            os.fsync(file.fileno())
        files[name] = [(staging / name).stat().st_size, crc32(staging / name)]
    manifest = {
        "world_size": world.world_size,
        "files": files,
        "optimizer_file": optimizer_file,
        "slices": {key: [first, first + len(tensor)] for key, (first, tensor) in owned.items()},
    }
    write_json(staging / f"MANIFEST.rank{world.rank:05d}.json", manifest)


def _commit(staging: Path, final: Path) -> None:
    sync_folder(staging)
    staging.rename(final)
    sync_folder(final.parent)
