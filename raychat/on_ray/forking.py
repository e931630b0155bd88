"""Late forks: a run that begins with the checkpoint of another one."""

from collections.abc import Callable

from raychat.config import Config
from raychat.errors import CheckpointError
from raychat.storage import Store
from raychat.training import checkpoint

INCOMING = ".forking"


def fork(trunk: Config, sibling: Config, step: int, *, echo: Callable[[str], None]) -> None:
    """Give the run `sibling` the checkpoint of `step` of the run `trunk`, unless it has one already.

    Raises:
        CheckpointError: the trunk has no such checkpoint, or it is damaged.
        OSError: the storage cannot be read or written.
    """
    there = Store.of(sibling.run_uri).child("checkpoints")
    if checkpoint.steps(there):
        return
    name = checkpoint.folder_name(step)
    source = Store.of(trunk.run_uri).child("checkpoints", name)
    try:
        checkpoint.verify(source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{sibling.model_tag} cannot fork from step {step} of {trunk.model_tag}: {error}"
        ) from error
    if there.is_local:  # whole or absent: it appears by a rename
        there.delete(INCOMING)
        _copy(source, there.child(INCOMING))
        there.move(INCOMING, there.child(name))
    else:
        _copy(source, there.child(name))
    checkpoint.verify(there.child(name))
    echo(f"{sibling.model_tag} forks from step {step} of {trunk.model_tag}")


def _copy(source: Store, target: Store) -> None:
    """Copy all files of a checkpoint, its marker last: in an object store that makes it one."""
    files = sorted(_files(source), key=lambda name: (name == checkpoint.MARKER, name))
    for name in files:
        target.write_blocks(name, source.blocks(name))


def _files(store: Store, below: str = "") -> list[str]:
    found = []
    for name in store.child(*filter(None, below.split("/"))).names():
        path = f"{below}/{name}".lstrip("/")
        found += [path] if store.size(path) is not None else _files(store, path)
    return found
