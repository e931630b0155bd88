"""What a search has its trials run: their configurations, completed by where and with which data, as commands."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raychat.cli import load_presets
from raychat.config import Config
from raychat.on_ray.driver import with_absolute_paths
from raychat.on_ray.forking import fork
from raychat.on_ray.search_data import SharedData
from raychat.on_ray.steering import Echo
from raychat.on_ray.trial_process import TrialOrder
from raychat.search.spec import SearchSpec
from raychat.search.trial import Trial


@dataclass(kw_only=True)
class Orders:
    """Makes the configuration and the order of each trial."""

    spec: SearchSpec
    script: Path
    """jobs/pretrain.py"""
    logs: Path
    """folder for what trials say"""
    data: SharedData
    place: Mapping[str, Any]
    """flags that say where trials run and are tracked: address, tracking_uri, mlflow_parent"""
    trials: Mapping[str, Trial]
    """all that were proposed, for the trunks of forks"""
    echo: Echo

    def config(self, trial: Trial) -> Config:
        """The whole configuration of `trial`; prepares its data where they are missing.

        Raises:
            ConfigError, DataError: it cannot be.
        """
        config = self.spec.config(trial)
        config = Config.from_flat(self.data.settings(config) | dict(self.place), config)
        return with_absolute_paths(config)

    def order(self, trial: Trial, config: Config) -> TrialOrder:
        """The command of `trial`; a fork gets the checkpoint that it starts from.

        Raises:
            CheckpointError: the trunk of a fork has no good checkpoint.
        """
        if trial.fork_of:
            trunk = self.config(self.trials[trial.fork_of])
            fork(trunk, config, trial.fork_step, echo=self.echo)
        limit_gb = self.spec.memory_limit_gb
        return TrialOrder(
            tag=trial.tag,
            command=(sys.executable, str(self.script), *as_flags(config)),
            place=config.run_uri,
            log=self.logs / f"{trial.tag}.log",
            folder=Path.cwd(),
            memory_limit_bytes=-1 if limit_gb == -1 else round(limit_gb * 1e9),
        )


def as_flags(config: Config) -> list[str]:
    """Flags of jobs/pretrain.py that parse to `config`: its preset, and what differs from that."""
    preset = config.run.preset
    before = load_presets(preset).flat() if preset else Config().flat()
    flags = [f"--preset={preset}"] if preset else []
    for name, value in config.flat().items():
        flag = name.replace("_", "-")
        if name == "preset" or value == before[name]:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags
