"""Commands that make a run again, ready to paste."""

import shlex
from collections.abc import Mapping
from typing import Any

from raychat.cli import load_presets
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.search.space import spelled

OF_THE_PLACE = frozenset(
    (
        "base_dir", "storage_path", "address", "tracking_uri", "mlflow_parent", "on_event", "resume_from_step", "fresh",
        "force", "dry_run", "dry_run_steps", "allow_config_change",
    )
)  # fmt: skip
"""settings that say where and how it was run, not what was trained"""


def starting_point(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The preset of `settings` with its values, or no preset and the defaults, when it is not known any more."""
    preset = str(settings.get("preset") or "")
    try:
        return preset, load_presets(preset).flat()
    except ConfigError:
        return "", Config().flat()


def changed(settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (value of the preset or default, own value), where the two differ."""
    _, before = starting_point(settings)
    return {
        name: (before[name], value)
        for name, value in settings.items()
        if name in before and name not in OF_THE_PLACE | {"preset"} and value != before[name]
    }


def pretrain_command(settings: Mapping[str, Any], *, tag: str = "") -> str:
    """The command of jobs/pretrain.py for `settings` (flag names with underscores -> values); `tag` replaces theirs."""
    preset, _ = starting_point(settings)
    words = ["python", "jobs/pretrain.py"]
    words += [f"--preset={preset}"] if preset else []
    values = {name: value for name, (_, value) in changed(settings).items()}
    values = {"model_tag": tag} | {n: v for n, v in values.items() if n != "model_tag"} if tag else values
    return " ".join(shlex.quote(word) for word in words + [_flag(name, value) for name, value in values.items()])


def _flag(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={spelled(value)}"
