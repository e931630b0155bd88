"""`--dry-run-steps` on Ray: the run's data are prepared, and its driver trains the short run."""

import contextlib
from collections.abc import Callable
from typing import Any

from raychat.config import Config
from raychat.data.prepare import prepare
from raychat.on_ray import cluster as clusters
from raychat.on_ray import driver
from raychat.training import device
from raychat.training.rehearsal import Rehearsal, steps_only


def rehearse(config: Config, *, echo: Callable[[str], None]) -> dict[str, Any]:
    """The plan of `config` with what a short run of it measured on Ray.

    Raises:
        RaychatError: what the user gave cannot work, the short run failed or was stopped, or the run will not fit.
    """
    config = driver.with_absolute_paths(config)
    if clusters.address_of(config) == "local":  # before anything is prepared
        device.refuse_gpu_sized(steps_only(config), device.resolve(config, local_world_size=1))
    with contextlib.ExitStack() as stack:
        cluster = driver.LazyCluster(config, stack, echo)
        data = prepare(config, with_gpus=cluster.has_gpus(), maker=cluster.make_shards, echo=echo)
    with Rehearsal(config, on_ray=True, echo=echo) as trial:
        driver.run(trial.stage(data), echo=trial.tell)
        return trial.conclude()
