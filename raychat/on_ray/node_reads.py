"""What nodes read besides the run's own folders: CORE tasks, initial weights, a tokenizer. Noted down as the driver sees it.

What the driver itself does not see is left out here: its own checks refuse that, in words that fit. Nor is there anything
in a base directory that all nodes share, which is checked as a whole.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from raychat.config import Config
from raychat.data.prepare import run_begun, shared_store
from raychat.errors import ConfigError
from raychat.evaluation.core.archive import fetched_folder
from raychat.on_ray.node_probe import Read
from raychat.storage import Store
from raychat.training.examiner import CoreTasks

MOST_ENTRIES = 16  # enough to tell one folder from another


def reads_of(config: Config) -> list[Read]:
    """What every node that trains on `config` must be able to read. Asks object stores, in bounded time."""
    shared = None if shared_store(config) else config.base_dir
    return [read for read in _all(config, shared) if not (shared and Path(read.address).is_relative_to(shared))]


def _all(config: Config, shared: Path | None) -> Iterator[Read]:
    if (tasks := CoreTasks.of(config)) is not None:
        given = "--core-bundle" if config.eval.core_bundle else "the CORE tasks in"
        remedy = (
            "Every node reads the CORE tasks: give a --core-bundle that all have, such as the URL of the archive, or "
            "--core-metric-every -1."
        )
        if tasks.place.startswith(("http://", "https://")):
            if shared is None:  # else the driver fetches it, for all
                cached = fetched_folder(tasks.place, tasks.cache)
                yield Read(setting=given, address=tasks.place, cached=str(cached), remedy=remedy)
        elif "://" not in tasks.place:
            yield from _seen(given, tasks.place, remedy)
    if config.run.init_from and run_begun(config) is None:
        remedy = "Any node may be the one that reads them: give a folder that all share, or s3://... (gs://...)."
        yield from _seen("--init-from", config.run.init_from, remedy)
    if shared is not None and os.sep in config.data.tokenizer:
        remedy = "Every node reads the tokenizer: give a folder that all share."
        yield from _seen("--tokenizer", str(Path(config.data.tokenizer).expanduser().absolute()), remedy)


def _seen(setting: str, place: str, remedy: str) -> Iterator[Read]:
    """The folder or file `place`, as far as the driver sees it."""
    with suppress(OSError, ConfigError):
        store = Store.of(place)
        if store.is_local and store.path.is_file():
            parent = Store.of(store.path.parent)
            yield Read(
                setting=setting, address=parent.address, entries=((store.path.name, parent.size(store.path.name)),),
                remedy=remedy,
            )  # fmt: skip
        elif names := store.names():
            entries = tuple((name, store.size(name)) for name in names[:MOST_ENTRIES])
            yield Read(setting=setting, address=store.address, entries=entries, remedy=remedy)
