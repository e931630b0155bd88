"""Heads of clusters as `ray start` makes them, with ports and a folder of their own, and an end that leaves nothing."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raychat.on_ray.processes import children, is_running, kill_tree

RAY = Path(sys.executable).with_name("ray")
START_S = 120.0


@dataclass(frozen=True)
class Place:
    """Where a head will be: its ports, and the folder of its session."""

    folder: Path
    gcs_port: int
    dashboard_port: int
    agent_port: int

    @property
    def gcs(self) -> str:
        """The address that nodes and drivers connect to."""
        return f"127.0.0.1:{self.gcs_port}"

    @property
    def dashboard(self) -> str:
        """The address of its job server."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def output(self) -> Path:
        """What it says."""
        return self.folder / "output"


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """A place for a head, which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets lie there: the names of pytest's folders are too long
    try:
        yield Place(folder, *free_ports(3))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def started_head(
    at: Place, environment: Mapping[str, str], *, cwd: Path | None = None, **options: Any
) -> Iterator[subprocess.Popen]:
    """A head without GPUs that listens; `options` are those of `ray start`."""
    own = {
        "port": at.gcs_port,
        "dashboard_port": at.dashboard_port,
        "dashboard_agent_listen_port": at.agent_port,
        "node_ip_address": "127.0.0.1",
        "temp_dir": at.folder,
        "num_gpus": 0,
    }
    with at.output.open("w") as output:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--include-dashboard=true", *as_arguments(own | options)],
            cwd=cwd,
            env=dict(environment) | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_S
        while not (listens(at.dashboard_port) and listens(at.agent_port)):
            assert head.poll() is None, at.output.read_text()
            assert time.monotonic() < deadline, at.output.read_text()
            time.sleep(0.2)
        yield head
    finally:
        _end(head)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def listens(port: int) -> bool:
    """Whether something listens on a port of the loopback interface."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Settings as they are typed."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def _end(head: subprocess.Popen) -> None:
    """End the head and all that it started: fake nodes are processes below the autoscaler's, which outlive it."""
    below = children(head.pid)
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=30)
    if head.poll() is None:
        kill_tree(head.pid)
        head.wait()
    for pid in filter(is_running, below):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while left := [pid for pid in below if is_running(pid)]:
        assert time.monotonic() < deadline, f"processes {left} outlive their cluster"
        time.sleep(0.1)
