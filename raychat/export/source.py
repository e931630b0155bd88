"""Where a trained model comes from: a checkpoint of a run, or an exported directory; found cheaply, loaded on demand."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from raychat.config import Config
from raychat.data.tokenizer import Tokenizer
from raychat.data.unpickle import open_tokenizer
from raychat.errors import CheckpointError, ConfigError
from raychat.export.run_tokenizer import find_tokenizer
from raychat.model import GPT, GPTConfig
from raychat.model.attention import choose_backend
from raychat.storage import Store
from raychat.training import checkpoint
from raychat.training.build import gpt_config
from raychat.training.device import DTYPES, resolve
from raychat.training.evaluate_checkpoint import APART
from raychat.training.exported import Exported, open_export
from raychat.training.world import World
from raychat.uris import public_uri

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and its tokenizer."""

    model: GPT
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model that has been found and verified, but not loaded. It may be sent to other processes."""

    kind: Literal["checkpoint", "export"]
    place: str
    """path or URI, without credentials"""
    name: str
    """model tag, or name of the exported directory"""
    step: int | None
    run_dir: Path | None
    """of the run that made it, where that is on this machine"""
    meta: dict[str, Any] = field(repr=False)
    """content of checkpoint.json, or of the export's meta file"""
    address: str = field(repr=False)
    """what `Store.of` takes: with credentials, so never for messages or files"""
    tokenizer_address: str = field(repr=False)
    """folder of the tokenizer, as `address`"""

    @property
    def gpt_config(self) -> GPTConfig:
        """Shapes of the model."""
        if self.kind == "export":
            return self._exported().shapes
        return gpt_config(Config.from_flat(self.meta["config"]))

    @property
    def storage(self) -> Store | None:
        """The object store in which the run lies, and its token shards beside it; None for what lies on a disk."""
        place = Store.of(self.address)
        return None if place.is_local or self.kind == "export" else _parent(_parent(_parent(place)))

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> Loaded:
        """The model on `device` in the compute dtype `dtype` (None: the run's, else what suits the device).

        A checkpoint in an object store is downloaded to a temporary folder and its checksums are compared.

        Raises:
            CheckpointError: it is gone, damaged or does not suit its configuration.
            DataError: its tokenizer is gone or damaged.
        """
        dtype = dtype or self._dtype(device)
        with torch.device("meta"):
            model = GPT(self.gpt_config)
        model.set_compute_dtype(dtype)
        model.to_empty(device=device)
        model.attention_backend = choose_backend(device, dtype)[0]
        with _as_checkpoint_error(self.place):
            if self.kind == "export":
                self._exported().load(model)
            else:  # the temporary folder has the name of the rank: training here, and other processes, have their own
                checkpoint.trusted(self.address).load(model, world=World(rank=2 * APART + os.getpid()))
        return Loaded(model.eval(), open_tokenizer(Store.of(self.tokenizer_address)))

    def _exported(self) -> Exported:
        found = open_export(self.address, -1 if self.step is None else self.step)
        if found is None:
            raise CheckpointError(f"{self.place} is gone: there is no exported directory any more.")
        return found

    def _dtype(self, device: torch.device) -> torch.dtype:
        resolved = self.meta.get("resolved") or {}
        if resolved.get("dtype") in DTYPES:
            return DTYPES[resolved["dtype"]]
        return resolve(Config.from_flat({"device_type": device.type}), local_world_size=1).torch_dtype


def find_source(
    *,
    path: str = "",
    model_tag: str = "",
    step: int = -1,
    base_dir: str = "",
    storage_path: str = "",
    tokenizer: str = "",
) -> Source:
    """The model that was asked for, every byte of it verified.

    Args:
        path: folder or URI of a checkpoint, a run directory or an exported directory.
        model_tag: without `path`, the run below `storage_path` or `base_dir`; default: the one that saved last.
        step: of the checkpoint; -1: the newest that verifies.
        base_dir: as in training; also where the tokenizer is looked for.
        storage_path: where the runs are kept, as in training.
        tokenizer: its folder or name, where it is not found by itself.

    Raises:
        ConfigError: there is nothing of the kind.
        CheckpointError: what was asked for is damaged, or cannot be reached.
        DataError: its tokenizer is not found.
    """
    if path and model_tag:
        raise ConfigError(f"--path {public_uri(path)} and --model-tag {model_tag} both name a model: give one of them.")
    asked = _Asked(step=step, base_dir=base_dir, tokenizer=tokenizer)
    with _as_checkpoint_error(public_uri(path or storage_path or model_tag)):
        if path:
            return _at(Store.of(path), asked)
        config = Config.from_flat({"base_dir": base_dir, "storage_path": storage_path, "model_tag": model_tag})
        runs = Store.of(storage_path if "://" in storage_path else config.runs_dir)
        return _in_run(runs.child(model_tag) if model_tag else _latest_run(runs), asked)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    step: int
    base_dir: str
    tokenizer: str


def _at(place: Store, asked: _Asked) -> Source:
    if place.is_local and place.path.is_file():
        raise ConfigError(f"{place} is a file: give the folder that it is in.")
    names = place.names()
    if checkpoint.META in names or checkpoint.MARKER in names:
        found = checkpoint.verify(place)
        if asked.step not in (-1, found.step):
            raise ConfigError(
                f"--step {asked.step}: {place} is of step {found.step}. Leave --step out, or give the run."
            )
        folder = _parent(place)
        return _from_checkpoint(found, _parent(folder) if _name(folder) == "checkpoints" else None, asked)
    if "checkpoints" in names:
        return _in_run(place, asked)
    if _name(place) == "checkpoints" and checkpoint.steps(place):
        return _in_run(_parent(place), asked)
    if exported := open_export(place, asked.step):
        return _from_export(exported, asked)
    raise ConfigError(
        f"{place} "
        + ("is neither a checkpoint, nor a run directory, nor an exported directory" if names else "is not there")
        + ": give the folder of one, or --model-tag."
    )


def _in_run(run: Store, asked: _Asked) -> Source:
    root = run.child("checkpoints")
    there = checkpoint.steps(root)
    if not there:
        raise ConfigError(f"{run} holds no checkpoint{_others(_parent(run))}")
    if asked.step == -1:
        found = checkpoint.newest(root, echo=log.warning)
        if found is None:
            raise CheckpointError(
                f"None of the checkpoints in {root} is whole: {', '.join(map(str, there))} are damaged."
            )
    elif asked.step in there:
        found = checkpoint.verify(root.child(checkpoint.folder_name(asked.step)))
    else:
        raise ConfigError(f"--step {asked.step}: {root} holds the steps {', '.join(map(str, sorted(there)))}.")
    return _from_checkpoint(found, run, asked)


def _from_checkpoint(found: checkpoint.Checkpoint, run: Store | None, asked: _Asked) -> Source:
    return Source(
        kind="checkpoint",
        place=found.store.uri,
        name=_name(run) if run else Config.from_flat(found.meta["config"]).model_tag,
        step=found.step,
        run_dir=_run_dir(run, asked.base_dir) if run else None,
        meta=found.meta,
        address=found.store.address,
        tokenizer_address=find_tokenizer(run, found.meta, base_dir=asked.base_dir, given=asked.tokenizer),
    )


def _from_export(found: Exported, asked: _Asked) -> Source:
    found.verify()
    if asked.step not in (-1, found.step):
        raise ConfigError(f"--step {asked.step}: {found.store} is of step {found.step}. Leave --step out.")
    if asked.tokenizer:
        raise ConfigError(f"--tokenizer {asked.tokenizer}: {found.store} has its own. Leave --tokenizer out.")
    tokenizer = found.tokenizer()
    if tokenizer.vocab_size != found.shapes.vocab_size:
        raise CheckpointError(
            f"{found.store} has a model of {found.shapes.vocab_size:,} tokens and a tokenizer of "
            f"{tokenizer.vocab_size:,}: they do not belong together."
        )
    return Source(
        kind="export",
        place=found.store.uri,
        name=_name(found.store),
        step=found.step,
        run_dir=None,
        meta=found.facts or found.meta,
        address=found.store.address,
        tokenizer_address=found.tokenizer_folder().address,
    )


def _latest_run(runs: Store) -> Store:
    """The run in the folder `runs` whose newest checkpoint is the youngest."""
    found = {name: steps[0] for name in runs.names() if (steps := checkpoint.steps(runs.child(name, "checkpoints")))}
    if not found:
        raise ConfigError(
            f"{runs} holds no run with a checkpoint: train one with jobs/pretrain.py, or give --path, --base-dir or "
            "--storage-path."
        )
    ages = {
        name: _saved_at(runs.child(name, "checkpoints", checkpoint.folder_name(step))) for name, step in found.items()
    }
    return runs.child(max(ages, key=ages.__getitem__))


def _saved_at(folder: Store) -> int:
    """When a checkpoint was written, in nanoseconds of the store's clock."""
    fs, base = folder.arrow()
    infos = fs.get_file_info([f"{base}/{name}" for name in (checkpoint.MARKER, checkpoint.META)])
    return max(info.mtime_ns or 0 for info in infos)


def _run_dir(run: Store, base_dir: str) -> Path | None:
    """The run directory on this machine: that itself, or the copy that a driver here has kept."""
    if run.is_local:
        folder = run.path
    else:
        storage = _parent(run).address
        folder = Config.from_flat({"base_dir": base_dir, "storage_path": storage, "model_tag": _name(run)}).run_dir
    return folder if (folder / "config.json").exists() else None


def _others(runs: Store) -> str:
    names = [name for name in runs.names() if checkpoint.steps(runs.child(name, "checkpoints"))]
    if not names:
        return ": give --base-dir or --storage-path of the run, or --path."
    return f". Runs that do: {', '.join(names)} (--model-tag)."


def _name(store: Store) -> str:
    return store.address.partition("?")[0].rstrip("/").rpartition("/")[2]


def _parent(store: Store) -> Store:
    if store.is_local:
        return Store.of(store.path.parent)
    path, mark, query = store.address.partition("?")
    return Store.of(path.rstrip("/").rpartition("/")[0] + mark + query)


@contextmanager
def _as_checkpoint_error(place: str) -> Iterator[None]:
    """What the disk or the network refuses, as the mistake that it mostly is: a wrong place, or one that is gone."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{place or 'the newest run'} is gone, or was never whole: {error}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{place or 'the newest run'} cannot be read: {error}") from error
