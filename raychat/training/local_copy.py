"""Files of a checkpoint where they can be opened: those in an object store are brought to the node for as long as needed."""

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raychat.errors import CheckpointError
from raychat.storage import Store
from raychat.training.world import World


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of: its manifests by name, and the folder of the files that they list."""

    files: Store
    manifests: dict[str, dict[str, Any]]


@contextmanager
def at_hand(store: Store, world: World, contents: Callable[[], Contents]) -> Iterator[Path]:
    """A local folder with the files of the checkpoint in `store`, for as long as the block lasts.

    The first rank of each node downloads for all ranks there: every rank of `world` calls this.

    Raises:
        OSError: on every rank, when one could not download it: there is no room, the network failed, it is damaged.
    """
    if store.is_local:
        yield store.path
        return
    folder = _folder(store, world)
    try:
        problems = world.gather(_download(store, folder, contents) if world.local_rank == 0 else None)
        if problem := next((problem for problem in problems if problem), None):
            raise OSError(problem)  # the driver has verified it: whatever it is, it may be over at the next attempt
        yield folder
        world.gather(None)  # the other ranks of this node read it too
    finally:
        if world.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _folder(store: Store, world: World) -> Path:
    """Where this node's copy goes: the same place in every attempt, so that what a kill has left is cleared by the next."""
    run = store.uri.rpartition("/step_")[0]
    whose = hashlib.sha256(f"{run} {os.getuid()} {socket.gethostname()}".encode()).hexdigest()[:12]
    first_rank = world.rank - world.local_rank  # nodes may share a machine; ranks of a node follow each other
    return Path(tempfile.gettempdir()) / f"raychat-{whose}-rank{first_rank}"


def _download(store: Store, folder: Path, contents: Callable[[], Contents]) -> str | None:
    """Bring the checkpoint to `folder`; why that failed, or None."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        found = contents()
        need = sum(size for manifest in found.manifests.values() for size, _ in manifest["files"].values())
        if (free := shutil.disk_usage(folder).free) < need:
            return (
                f"{store} has {need / 1e9:.3f} GB and {folder.parent} only {free / 1e9:.3f} GB free: make room there, or "
                "set TMPDIR to a folder that has it"
            )
        for own_name, manifest in found.manifests.items():
            (folder / own_name).write_text(json.dumps(manifest))
            for name, (_, crc) in manifest["files"].items():
                if found.files.download(name, folder / name) != crc:
                    return f"{found.files.child(name)} is damaged: its checksum is wrong"
    except (OSError, CheckpointError) as error:
        return f"{store} could not be brought to {folder}: {error}"
    return None
