"""A crew: one TorchTrainer of a fixed size, from its start to its end.

Ray Train restarts the workers of a crew in place when some of them die; every restart asks the driver for its job
anew. Another size, or other machines, need another crew. Ray's own checkpoints are not used.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from typing import Any

import ray
import ray._private.state
from ray._raylet import PlacementGroupID
from ray.core.generated import gcs_pb2
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError  # the only sign of a lack of room
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raychat.on_ray import helpers
from raychat.on_ray.inbox import ControllerState, ControllerUp, Post, open_inbox
from raychat.on_ray.nodes import not_on
from raychat.on_ray.stream import RowsDataConfig
from raychat.on_ray.worker import train_worker
from raychat.storage import Store

END_S = 60.0
ANSWER_S = 60.0


class Crew:
    """Starts at once, in a thread. Has an inbox of its own, so that nothing meant for one crew reaches the next."""

    def __init__(self, *, workers: int, use_gpu: bool, name: str, storage: Store, avoid: list[str]) -> None:
        self.workers, self.use_gpu = workers, use_gpu
        self.inbox = inbox = open_inbox()
        self.controller: Any = None
        self._run_id = ""
        helpers.keep_here()
        self.error: str | None = None
        filesystem, path = storage.arrow()
        trainer = _Trainer(
            train_worker,
            train_loop_config={"inbox": inbox},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            # ray.train's names are those of its second version; the type checker sees the first.
            scaling_config=ScalingConfig(  # pyrefly: ignore[bad-argument-type]
                num_workers=workers,
                use_gpu=use_gpu,
                resources_per_worker=None if use_gpu else {"CPU": 1},
                label_selector=not_on(avoid),  # pyrefly: ignore[unexpected-keyword]
            ),
            run_config=RunConfig(  # pyrefly: ignore[bad-argument-type]
                name=name,
                storage_path=path,
                storage_filesystem=None if storage.is_local else filesystem,
                failure_config=FailureConfig(max_failures=-1),  # pyrefly: ignore[bad-argument-type]
                logging_config=LoggingConfig(log_level="ERROR"),  # pyrefly: ignore[unexpected-keyword]
                callbacks=[_Reporter(inbox)],  # pyrefly: ignore[bad-argument-type]
            ),
            datasets={"train": _no_dataset},
            dataset_config=RowsDataConfig(),
        )
        # In a thread of its own: in the main one, Ray would take Ctrl-C for itself and end the run without a save.
        self._thread = threading.Thread(target=self._fit, args=(trainer,), daemon=True, name="fit")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether Ray Train is at work on it."""
        return self._thread.is_alive()

    def read(self) -> Post:
        """What has come in since the last call; nothing when the machine is too busy to tell."""
        try:
            post: Post = ray.get(self.inbox.take.remote(), timeout=ANSWER_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
            return Post([], {})
        for message in post.messages:
            if isinstance(message, ControllerUp):
                self.controller, self._run_id = message.handle, message.run_id
        return post

    def join(self, seconds: float) -> None:
        """Wait for it to end by itself."""
        self._thread.join(seconds)

    def end(self) -> None:
        """End its workers and its controller now. The room they had stays taken until `remove_placement_groups`."""
        deadline = time.monotonic() + END_S
        with contextlib.suppress(ray.exceptions.RayError):
            while self.alive and self.controller is None and time.monotonic() < deadline:
                self.read()  # its controller is only just starting
                time.sleep(0.05)
            if self.alive and self.controller is not None:
                ray.kill(self.controller)
            self._thread.join(max(0.0, deadline - time.monotonic()))
            ray.kill(self.inbox)
        if self._run_id:
            helpers.withdraw(self._run_id)

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - of many kinds; all of them mean that this crew is no more
            self.error = last_line(error)


def remove_placement_groups(controllers: Iterable[Any]) -> None:
    """Free the room of controllers that were killed: Ray keeps it until the whole job ends.

    One of whose machines is lost would not only hold the room of the others, but be rescheduled without a pause. A
    controller can ask for more while it dies, so this is to be called again and again.
    """
    dead = {controller._actor_id.binary() for controller in controllers}
    if not dead:
        return
    accessor = ray._private.state.state._connect_and_get_accessor()
    for entry in accessor.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(entry)  # pyrefly: ignore[missing-attribute]
        if group.creator_actor_id in dead and group.state != group.REMOVED:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


class _Trainer(TorchTrainer):  # pyrefly: ignore[invalid-inheritance] # it sees two versions of it
    """Without the process by which Ray frees the room of a controller that dies: `remove_placement_groups` does that.

    It finds the cluster by itself: on a machine with several it asks another one, or none for 20 s. Every crew ended some
    10 s late there.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [one for one in made if not isinstance(one, PlacementGroupCleanerCallback)]


class _Reporter(ControllerCallback):
    """Runs inside Ray Train's controller and tells the inbox what becomes of the workers."""

    def __init__(self, inbox: Any) -> None:
        self._inbox = inbox

    def after_controller_start(self, train_run_context: Any) -> None:
        # Workers that wait for a dead peer would make every restart wait for them, half a minute by default.
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")
        self._inbox.put.remote(ControllerUp(ray.get_runtime_context().current_actor, train_run_context.run_id))

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if type(previous_state) is type(current_state):
            return
        error = getattr(current_state, "training_failed_error", None)
        cause = getattr(error, "controller_failure", error)
        told = ControllerState(
            current_state._state_type.state_name,
            None if error is None else last_line(error),
            waiting=isinstance(cause, WorkerGroupStartupTimeoutError),
        )
        self._inbox.put.remote(told)


def last_line(error: BaseException) -> str:
    """The line of a long traceback that says what happened."""
    failures: dict[int, BaseException] | None = getattr(error, "worker_failures", None)
    if failures:  # ranks that only lost their peers say nothing about the cause
        rank = min(failures, key=lambda rank: ("peer" in str(failures[rank]), rank))
        return f"rank {rank}: {last_line(failures[rank])}"
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, ray.exceptions.RayActorError):  # several lines on what may have been the cause
        return "its process died"
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _no_dataset() -> ray.data.Dataset:
    """Ray wants a dataset to configure; RowsDataConfig gives streams of its own instead."""
    return ray.data.range(1)
