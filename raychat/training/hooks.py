"""`--on-event CMD`: the user's own command, run by the shell when a run has stopped, failed or finished."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from raychat.tracking.summary import Summary

TIMEOUT_S = 60.0
ERROR_CHARS = 2000  # of an error that the command is told: an environment has limits


def hook_variables(summary: Summary, run_dir: Path, *, model_tag: str, status_line: str) -> dict[str, str]:
    """What the command finds in its environment about the run that has ended."""
    return {
        "RAYCHAT_EVENT": summary.status,
        "RAYCHAT_RUN_DIR": str(run_dir),
        "RAYCHAT_MODEL_TAG": model_tag,
        "RAYCHAT_STATUS_LINE": status_line,
        "RAYCHAT_SUMMARY": str(run_dir / "summary.json"),
        "RAYCHAT_ERROR": (summary.error or "")[:ERROR_CHARS].replace("\0", ""),
    }


def run_hook(
    command: str, variables: Mapping[str, str], *, echo: Callable[[str], None], timeout_s: float = TIMEOUT_S
) -> bool:
    """Run `command` with `variables` added to the environment; True when it succeeded.

    What it prints goes to `echo` when it is done. A command that fails or takes longer than `timeout_s` is worth a
    warning and nothing more: the run has ended, whatever a message to somebody comes to. The command itself is not
    repeated in the warning, since it may hold an address that is secret.
    """
    # A file and not a pipe: what the command leaves in the background may keep a pipe open for ever.
    with _output_file() as output:
        problem = _run(command, dict(os.environ) | dict(variables), output.fileno(), timeout_s)
        output.seek(0)
        for line in output.read().decode(errors="replace").splitlines():
            echo(f"on-event: {line}")
    if problem:
        echo(f"warning: the command of --on-event {problem}")
    return problem is None


def _output_file() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError:  # the full disk that the command is to tell of, perhaps
        return open(os.devnull, "r+b")


def _run(command: str, environment: Mapping[str, str], output: int, timeout_s: float) -> str | None:
    """What went wrong, or None."""
    try:
        process = subprocess.Popen(
            command,
            shell=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # the latter: a null character in the command
        return f"could not be started: {error}"
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"took longer than {timeout_s:g}s and was ended"
    except BaseException:  # Ctrl-C: it must not outlive us
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return f"ended with exit code {code}" if code else None
