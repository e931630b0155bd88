"""A trial as Ray Tune sees it: an actor without a CPU, on the machine of the search, that minds the trial's process.

Commands and environment may hold credentials. They go to it through the memory of the cluster, and touch no disk.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray._private.state
from ray import tune
from ray._raylet import JobID
from ray.experimental import internal_kv

from raychat.on_ray.trial_process import TrialEnd, TrialOrder, TrialProcess, peak_bytes

LOOK_S, REPORT_S = 0.1, 2.0
LAST_SAVE_S = 8.0  # Tune waits 10 s for an actor that it ends; a search that stops tells its trials before
STOP = "stop"
_NAMESPACE, _ENVIRONMENT = b"raychat", ".environment"


class TrialActor(tune.Trainable):
    """`config` holds `folder`, by which the search has left the order and the environment, and `tag`."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the process."""
        folder = Path(config["folder"])
        self._stop_file = folder / STOP
        order, environment = read_order(folder, config["tag"]), _read(folder, _ENVIRONMENT)
        self._process = TrialProcess(order, environment=environment, workers_bytes=workers_bytes)

    def step(self) -> dict[str, Any]:
        """Look after it for a while; how it ended once it has."""
        until = time.monotonic() + REPORT_S
        while time.monotonic() < until:
            if self._stop_file.exists():
                self._process.stop()
            end = self._process.poll()
            if end is not None:
                return {"done": True, "end": json.dumps(end.flat())}
            time.sleep(LOOK_S)
        return {"done": False}

    def cleanup(self) -> None:
        """Leave nothing behind."""
        self._process.end(LAST_SAVE_S)


def end_of(result: dict[str, Any] | None) -> TrialEnd | None:
    """How a trial ended, from what its actor last reported."""
    told = (result or {}).get("end")
    return TrialEnd(**json.loads(told)) if told else None


@contextlib.contextmanager
def orders_in_memory(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Actors of the search at work in `folder` find `environment`, and the orders left, for as long as the block runs."""
    internal_kv._internal_kv_del(_key(folder, ""), del_by_prefix=True, namespace=_NAMESPACE)  # of one that was killed
    _leave(folder, _ENVIRONMENT, dict(environment))
    try:
        yield
    finally:
        internal_kv._internal_kv_del(_key(folder, ""), del_by_prefix=True, namespace=_NAMESPACE)


def leave_order(folder: Path, order: TrialOrder) -> None:
    """Put an order where its actor finds it."""
    values = vars(order) | {"command": list(order.command), "log": str(order.log), "folder": str(order.folder)}
    _leave(folder, order.tag, values)


def read_order(folder: Path, tag: str) -> TrialOrder:
    """The order that was left for `tag`."""
    values = _read(folder, tag)
    values |= {"command": tuple(values["command"]), "log": Path(values["log"]), "folder": Path(values["folder"])}
    return TrialOrder(**values)


def _leave(folder: Path, name: str, values: dict[str, Any]) -> None:
    internal_kv._internal_kv_put(_key(folder, name), json.dumps(values).encode(), namespace=_NAMESPACE)


def _read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads(internal_kv._internal_kv_get(_key(folder, name), namespace=_NAMESPACE))


def _key(folder: Path, name: str) -> bytes:
    return f"search:{folder}/{name}".encode()


def workers_bytes(driver_pid: int) -> int:
    """The largest memory of a training worker of this machine that works for the driver with this process id.

    Workers elsewhere are not seen: what they used is in the summary of their run.
    """
    return peak_bytes(worker_pids(driver_pid))


def worker_pids(driver_pid: int) -> list[int]:
    """Process ids of the training workers of this machine that work for the driver with this process id."""
    here = ray.util.get_node_ip_address()
    state = ray._private.state
    jobs = [
        job["JobID"]
        for job in state.jobs()
        if job["DriverPid"] == driver_pid and job["DriverIPAddress"] == here and not job["IsDead"]
    ]
    actors: list[Any] = [actor for job in jobs for actor in state.actors(job_id=JobID.from_hex(job)).values()]
    workers = [actor for actor in actors if "TrainWorker" in actor["ActorClassName"]]
    return [actor["Pid"] for actor in workers if actor["Address"]["IPAddress"] == here]
