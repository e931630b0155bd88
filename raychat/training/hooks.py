"""`--on-event CMD`: the user's own command, run by the shell when a run has stopped, failed or finished."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping

TIMEOUT_S = 60.0


def run_hook(
    command: str, variables: Mapping[str, str], *, echo: Callable[[str], None], timeout_s: float = TIMEOUT_S
) -> bool:
    """Run `command` with `variables` added to the environment; True when it succeeded.

    What it prints goes to `echo` when it is done. A command that fails or takes longer than `timeout_s` is worth a
    warning and nothing more: the run has ended, whatever a message to somebody comes to. The command itself is not
    repeated in the warning, since it may hold an address that is secret.
    """
    # A file and not a pipe: what the command leaves in the background may keep a pipe open for ever.
    with tempfile.TemporaryFile() as output:
        problem = _run(command, dict(os.environ) | dict(variables), output.fileno(), timeout_s)
        output.seek(0)
        for line in output.read().decode(errors="replace").splitlines():
            echo(f"on-event: {line}")
    if problem:
        echo(f"warning: the command of --on-event {problem}")
    return problem is None


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
