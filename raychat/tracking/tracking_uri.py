"""Which MLflow store a tracking URI means, judged by its form alone: no network, no disk, no MLflow."""

import os
import re
from pathlib import Path

from raychat.errors import ConfigError
from raychat.uris import place_of, public_uri

SQLITE = "sqlite:///"


def default_tracking_uri(base_dir: Path) -> str:
    """The database in the base directory; artifacts of experiments created there go to `mlartifacts` beside it."""
    return f"{SQLITE}{base_dir.expanduser().resolve() / 'mlflow.db'}"


def store_error(uri: str) -> ConfigError | None:
    """What is wrong with the form of a tracking URI, or None."""
    if re.match(r"(sqlite:///.|https?://.|(postgresql|mysql|mssql)(\+\w+)?://.|databricks)", uri):
        return None
    is_folder = uri.startswith("file:") or ":" not in uri
    return ConfigError(
        f"tracking URI {public_uri(uri)!r} cannot be used: "
        f"{'MLflow 3 no longer writes to a plain folder' if is_folder else 'MLflow has no such store'}. "
        f"Use a database, such as sqlite:////absolute/path/mlflow.db, or a server, such as http://127.0.0.1:5000"
    )


def openable(uri: str) -> str:
    """`uri`, which was written down without credentials, with those of MLFLOW_TRACKING_URI where that names the same store."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "")
    return named if named and place_of(named) == place_of(uri) else uri


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other store."""
    return Path(uri.removeprefix(SQLITE)).resolve() if uri.startswith(SQLITE) else None
