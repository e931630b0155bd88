"""What a report was made with: commit and versions. Runs that are older may have been made with others."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "ray", "mlflow", "numpy")


def versions() -> dict[str, str]:
    """Name -> version of what is installed; the commit where the code lies in a checkout."""
    found = {"raychat": _version("raychat"), "commit of this report": commit(), "Python": platform.python_version()}
    found["packages"] = ", ".join(f"{name} {text}" for name in PACKAGES if (text := _version(name)))
    return {name: text for name, text in found.items() if text}


def commit() -> str:
    """Commit of the checkout, with `-dirty` where files were changed; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
