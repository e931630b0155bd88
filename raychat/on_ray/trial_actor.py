"""A trial as Ray Tune sees it: an actor without a CPU, on the machine of the search, that minds the trial's process."""

import json
import time
from pathlib import Path
from typing import Any

import ray
import ray._private.state
from ray import tune
from ray._raylet import JobID

from raychat.on_ray.trial_process import TrialEnd, TrialOrder, TrialProcess, peak_bytes

LOOK_S, REPORT_S = 0.1, 2.0
LAST_SAVE_S = 8.0  # Tune waits 10 s for an actor that it ends; a search that stops tells its trials before
STOP, ENVIRONMENT = "stop", "environment.json"


class TrialActor(tune.Trainable):
    """`config` holds `folder`, where the search has left the order and the environment, and `tag`."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the process."""
        folder = Path(config["folder"])
        self._stop_file = folder / STOP
        environment = json.loads((folder / ENVIRONMENT).read_bytes())
        self._process = TrialProcess(
            read_order(folder, config["tag"]), environment=environment, workers_bytes=workers_bytes
        )

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


def leave_order(folder: Path, order: TrialOrder) -> None:
    """Put an order where its actor finds it. The folder is private: commands may hold credentials."""
    values = vars(order) | {"command": list(order.command), "log": str(order.log), "folder": str(order.folder)}
    (folder / f"{order.tag}.json").write_text(json.dumps(values))


def read_order(folder: Path, tag: str) -> TrialOrder:
    """The order that was left for `tag`."""
    values = json.loads((folder / f"{tag}.json").read_bytes())
    values |= {"command": tuple(values["command"]), "log": Path(values["log"]), "folder": Path(values["folder"])}
    return TrialOrder(**values)


def workers_bytes(driver_pid: int) -> int:
    """The largest memory of a training worker of this machine that works for the driver with this process id.

    Workers elsewhere are not seen: what they used is in the summary of their run.
    """
    here = ray.util.get_node_ip_address()
    state = ray._private.state
    jobs = [
        job["JobID"]
        for job in state.jobs()
        if job["DriverPid"] == driver_pid and job["DriverIPAddress"] == here and not job["IsDead"]
    ]
    actors: list[Any] = [actor for job in jobs for actor in state.actors(job_id=JobID.from_hex(job)).values()]
    workers = [actor for actor in actors if "TrainWorker" in actor["ActorClassName"]]
    return peak_bytes([actor["Pid"] for actor in workers if actor["Address"]["IPAddress"] == here])
