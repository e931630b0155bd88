"""`--fresh`: what makes room for a run that begins anew under the name of an old one."""

from collections.abc import Callable

from raychat.config import Config
from raychat.storage import Store
from raychat.training.lease import Lease


def set_aside(config: Config, echo: Callable[[str], None]) -> None:
    """Rename an existing run, so that its name is free for a new one and nothing is lost.

    Raises:
        LeaseError: when a driver is at work in it.
    """
    chosen = config.run.storage_path
    runs, tag = Store.of(chosen if "://" in chosen else config.runs_dir), config.model_tag
    if not runs.exists(tag):
        return
    Lease(runs.child(tag)).refuse_if_held(echo)
    there, number = runs.names(), 1
    while f"{tag}.old-{number}" in there:
        number += 1
    kept = runs.child(f"{tag}.old-{number}")
    runs.move(tag, kept)
    echo(f"--fresh: the old run is kept in {kept.uri}")
