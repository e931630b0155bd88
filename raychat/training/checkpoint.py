"""Checkpoints: whole or absent, verified when read, and free of the number of workers that wrote them.

    step_00000250/
      model.safetensors                      every parameter by its interop name
      optim-00000-of-00002.safetensors       what rank 0 owns of the optimizer state: "<parameter>/<state>"
      checkpoint.json                        the state of the loop, the data and the run
      MANIFEST.rank00000.json                size and CRC-32 of the files that rank 0 wrote, and which rows they hold
      COMMITTED.json                         size and CRC-32 of the manifests: written last (format 2)

On a file system the folder appears at once, by a rename. In an object store it grows file by file: without
COMMITTED.json it does not exist, and the other files lie in a folder of their own within it, whose name is new in each
save and stands in COMMITTED.json: whoever else writes there, only those count. No pickle. `saver.py` writes them.
"""

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from raychat.errors import CheckpointError
from raychat.model import GPT
from raychat.optim import MuonAdamW
from raychat.storage import Store
from raychat.training.local_copy import Contents, at_hand
from raychat.training.memory import explained
from raychat.training.world import World

FORMAT = 2
READABLE = (1, 2)
META, MODEL, MARKER = "checkpoint.json", "model.safetensors", "COMMITTED.json"
EVALUATED = "evaluated.json"  # beside the checkpoints: see elsewhere.py

Place = Store | Path | str

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on storage. `meta` is the content of checkpoint.json."""

    store: Store
    meta: dict[str, Any]

    @property
    def path(self) -> Path:
        """Its folder. Raises ValueError in an object store."""
        return self.store.path

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return self.meta["step"]

    def load(self, model: GPT, optimizer: MuonAdamW | None = None, world: World | None = None) -> None:
        """Put the weights, and the part of the optimizer state that this rank owns, in place.

        From an object store the first rank of each node downloads it, for all ranks there: every rank of `world` calls
        this. Without a world a rank downloads for itself.

        Raises:
            CheckpointError: when it does not suit the model.
            OutOfMemoryError: when it does not fit on the device beside the model.
            OSError: on every rank, when it could not be downloaded as it was saved.
        """
        device = next(model.parameters()).device
        with (
            at_hand(self.store, world or World(), self._contents) as folder,
            explained("loading the checkpoint", device),
        ):
            state = load_file(folder / MODEL, device=str(device))
            own = model.state_dict()
            for name, tensor in own.items():  # a change of precision changes how embeddings are stored
                state[name] = state[name].to(tensor.dtype)
            model.load_state_dict(state, strict=True)
            if optimizer is not None:
                optimizer.step_count = self.meta["optimizer_steps"]
                optimizer.load_owned_state(_SliceReader(folder).read)

    def _contents(self) -> Contents:
        return Contents(_files(self.store), _manifests(self.store, self.meta))


def folder_name(step: int) -> str:
    """Name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def manifest_name(rank: int) -> str:
    """Name of the manifest of `rank`."""
    return f"MANIFEST.rank{rank:05d}.json"


def optimizer_name(rank: int, world_size: int) -> str:
    """Name of the file with the optimizer state of `rank`."""
    return f"optim-{rank:05d}-of-{world_size:05d}.safetensors"


def identity(meta: dict[str, Any]) -> dict[str, Any]:
    """What tells the files of one checkpoint from those of another: its run, its step and how many ranks wrote it."""
    settings = json.dumps([meta.get("config"), meta.get("fingerprint")], sort_keys=True)
    tag = meta.get("config", {}).get("model_tag", "")
    run = f"{tag or 'run'}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    return {"run": run, "step": meta["step"], "attempt": meta.get("attempt")}


def trusted(place: Place) -> Checkpoint:
    """The checkpoint at `place`, which the driver has just verified: ranks need not all read it twice."""
    return Checkpoint(Store.of(place), read_meta(place))


def read_meta(place: Place) -> dict[str, Any]:
    """The content of a checkpoint's checkpoint.json, without verifying the rest.

    Raises:
        CheckpointError: when there is none, or it cannot be read.
    """
    return _parsed(_files(Store.of(place)), META)


def verify(place: Place) -> Checkpoint:
    """The checkpoint at `place` after reading every byte of it.

    Raises:
        CheckpointError: naming the first file that is missing, cut short, damaged or of another checkpoint.
        OSError: when an object store cannot be reached, which says nothing about the checkpoint.
    """
    store = Store.of(place)
    meta = read_meta(store)
    if not isinstance(meta, dict) or meta.get("format") not in READABLE:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise CheckpointError(f"{store} has format {found}, this version reads {' and '.join(map(str, READABLE))}")
    try:
        files = _files(store)
        for manifest in _manifests(store, meta).values():
            for name, entry in manifest["files"].items():
                _check_file(files, name, entry)
    except (KeyError, TypeError, AttributeError) as error:  # JSON that says something else than was written
        raise CheckpointError(f"{store} is damaged: {MARKER} or a manifest lacks {error}") from error
    return Checkpoint(store, meta)


def steps(root: Place) -> list[int]:
    """Steps of the checkpoints under `root`, newest first, verified or not."""
    store = Store.of(root)
    found = sorted(
        (int(match[1]) for name in store.names() if (match := re.fullmatch(r"step_(\d{8})", name))), reverse=True
    )
    return [step for step in found if store.is_local or store.exists(f"{folder_name(step)}/{MARKER}")]


def newest(root: Place, *, echo: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; those that do not are named and left where they are.

    Raises:
        OSError: when an object store cannot be reached: going back to an older checkpoint for that would be wrong.
    """
    store = Store.of(root)
    for step in steps(store):
        try:
            return verify(store.child(folder_name(step)))
        except CheckpointError as error:
            echo(f"checkpoint skipped: {error}")
    return None


def prune(root: Place, keep_last: int) -> list[int]:
    """Delete all but the newest `keep_last` checkpoints, the best one by val_bpb, and those that are yet to be evaluated.

    Returns the steps of those deleted.
    """
    store = Store.of(root)
    gone = _dispensable(store, keep_last, keep_owed=True)
    for step in gone:
        remove(store, step)
    return gone


def make_room(root: Place) -> bool:
    """Delete the oldest checkpoint that is neither the newest nor the best. False: there is none."""
    store = Store.of(root)
    gone = _dispensable(store, keep_last=1, keep_owed=False)
    if gone:
        remove(store, gone[-1])
    return bool(gone)


def remove(root: Place, step: int) -> None:
    """Delete the checkpoint of `step`. Interrupted, it leaves an orphan and not half a checkpoint."""
    store, name = Store.of(root), folder_name(step)
    if store.is_local:
        staging = f".{name}.{uuid.uuid4().hex}.tmp"
        (store.path / name).rename(store.path / staging)
        store.delete(staging)
    else:
        store.delete(f"{name}/{MARKER}")
        store.delete(name)


def stands(root: Place, whose: dict[str, Any]) -> bool:
    """Whether there is a good checkpoint of the step of `whose`, an `identity`: its own, or another attempt's that verifies.

    One that is neither is moved to a folder `damaged-...`, out of the way.
    """
    store, step = Store.of(root), whose["step"]
    if step not in steps(store):
        return False
    place = store.child(folder_name(step))
    try:
        found = identity(read_meta(place))
        if found == whose or (found["run"] == whose["run"] and verify(place)):
            return True
        logger.warning("%s belongs to %s, and is moved aside", place, _shown(found))
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        logger.warning("a checkpoint of another attempt is moved aside: %s", error)
    _move_aside(store, step, f"damaged-{whose['attempt']}")
    return False


def withdraw(root: Place, step: int, token: str) -> None:
    """Delete what a failed save has written in an object store, its marker first; nothing that another one wrote."""
    store = Store.of(root)
    place = store.child(folder_name(step))
    with suppress(CheckpointError):  # the marker is not there
        if _parsed(place, MARKER).get("folder") == token:
            place.delete(MARKER)
    place.delete(token)
    if not place.names():
        store.delete(folder_name(step))


def prune_orphans(root: Place) -> list[str]:
    """Delete what killed saves left: staging folders, and folders in an object store without a marker. Returns their names.

    For the holder of the run's lease only, while no save is in flight.
    """
    store = Store.of(root)
    orphans = [name for name in store.names() if re.fullmatch(r"\.step_\d{8}\..*tmp", name)]
    if not store.is_local:
        folders = [name for name in store.names() if re.fullmatch(r"step_\d{8}", name)]
        orphans += [name for name in folders if not store.exists(f"{name}/{MARKER}")]
    for name in orphans:
        store.delete(name)
    return orphans


def set_aside_after(root: Place, step: int, name: str) -> list[int]:
    """Move checkpoints later than `step` to the folder `name`: nothing is deleted by going back. Returns their steps."""
    store = Store.of(root)
    later = [found for found in steps(store) if found > step]
    for found in later:
        _move_aside(store, found, name)
    return later


def _move_aside(store: Store, step: int, name: str) -> None:
    target, number = f"{name}/{folder_name(step)}", 1
    while store.exists(target):  # an attempt that died before it was counted had the same name
        number += 1
        target = f"{name}/{folder_name(step)}.{number}"
    store.move(folder_name(step), store.child(*target.split("/")))


def estimated_bytes(num_params: int) -> int:
    """Size of a checkpoint in float32: weights and, for most of them, two moments."""
    return num_params * 12


def evaluated(root: Place) -> dict[int, float | None]:
    """Val_bpb by step of checkpoints that other workers evaluated, None where that gave no value. See elsewhere.py."""
    try:
        content = json.loads(Store.of(root).read_bytes(EVALUATED))
        return {int(step): bpb for step, bpb in content.items()}
    except (FileNotFoundError, ValueError, AttributeError):  # none yet; one that is damaged says nothing
        return {}


def _dispensable(store: Store, keep_last: int, *, keep_owed: bool) -> list[int]:
    """Steps that are neither among the newest nor the best, newest first; nor, `keep_owed`, owed an evaluation."""
    ordered, settled = steps(store), evaluated(store)
    measured: dict[int, float] = {}
    owed = set[int]()
    for step in reversed(ordered):  # the newest knows best: what it says may be of after going back
        with suppress(CheckpointError, KeyError, TypeError, AttributeError):
            state = read_meta(store.child(folder_name(step)))["state"]
            measured |= _measured(state)
            if keep_owed and state.get("owed") and step not in settled:
                owed.add(step)
    measured |= {step: bpb for step, bpb in settled.items() if bpb is not None}
    best = min((step for step in ordered if step in measured), key=measured.__getitem__, default=None)
    return [step for step in ordered[keep_last:] if step != best and step not in owed]


def _measured(state: dict[str, Any]) -> dict[int, float]:
    """Val_bpb by step, as far as a checkpoint says: of its own step or of earlier ones, saved before their evaluation."""
    said = ((state.get("val_step"), state.get("val_bpb")), (state.get("min_val_step"), state.get("min_val_bpb")))
    return {step: bpb for step, bpb in said if step is not None and bpb is not None}


def _files(store: Store) -> Store:
    """The folder of all files of a checkpoint but the marker: in an object store the one that the marker names."""
    if store.is_local:
        return store
    marker = _parsed(store, MARKER)
    folder = marker.get("folder") if isinstance(marker, dict) else None
    return store.child(folder) if folder else store  # none: the first ones of format 2


def _manifests(store: Store, meta: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifests of all ranks by file name, which belong together and to `meta`."""
    files = _files(store)
    if meta["format"] == 1:
        names = [name for name in files.names() if re.fullmatch(r"MANIFEST\.rank\d+\.json", name)]
    else:
        names = _committed(store, meta)
    manifests = {name: _parsed(files, name) for name in names}
    if len(manifests) not in {manifest["world_size"] for manifest in manifests.values()}:
        raise CheckpointError(f"{store} holds the manifests of {len(manifests)} ranks, not of all")
    return manifests


def _committed(store: Store, meta: dict[str, Any]) -> list[str]:
    """Names of the manifests in the marker, after a look at whose they are and whether they are as they were written."""
    marker, mine, files = _parsed(store, MARKER), identity(meta), _files(store)
    for name, entry in {MARKER: None, **marker["manifests"]}.items():
        content = marker if entry is None else _parsed(files, name)
        theirs = {key: content[key] for key in mine}
        if theirs != mine:
            raise CheckpointError(f"{store.child(name)} belongs to {_shown(theirs)}, and {META} to {_shown(mine)}")
        if entry is not None:
            _check_file(files, name, entry)
    return list(marker["manifests"])


def _shown(whose: dict[str, Any]) -> str:
    return f"step {whose['step']} of attempt {whose['attempt']} of {whose['run']}"


def _parsed(store: Store, name: str) -> Any:
    with _as_damage(store, name):
        return json.loads(store.read_bytes(name))


def _check_file(store: Store, name: str, entry: list[int]) -> None:
    size, crc = entry
    with _as_damage(store, name):
        found = store.size(name)
        if found != size:
            raise CheckpointError(f"{store.child(name)} has {found} bytes instead of {size}")
        if store.crc32(name) != crc:
            raise CheckpointError(f"{store.child(name)} is damaged: its checksum is wrong")


@contextmanager
def _as_damage(store: Store, name: str) -> Iterator[None]:
    """What shows that a file is not as it was written, as CheckpointError; a network that is down shows nothing."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{store.child(name)} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{store.child(name)} is damaged: {error}") from error
    except OSError as error:
        if not store.is_local:
            raise
        raise CheckpointError(f"{store.child(name)} cannot be read: {error}") from error


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
