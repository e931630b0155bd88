"""`summary.json`: how a run ended, flat but for its forecast. Values that do not apply are null, never invented."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from raychat.atomic import write_json
from raychat.errors import DataError

Status = Literal["finished", "failed", "stopped"]
NO_RETRY = "no retry: the same command would fail alike"
"""said at the end of a run whose `retry_helps` is false; what reads logs goes by it"""
DIVERGED = "The weights were not updated"
"""said in the error of a run whose loss or gradient was no number; what reads summaries goes by it"""


@dataclass(frozen=True, kw_only=True)
class Summary:
    status: Status
    """finished: reached num_iterations; stopped: told to stop before that; failed: anything else"""
    step: int | None = None
    """optimizer steps done"""
    num_iterations: int | None = None
    """optimizer steps planned"""
    rows_consumed: int | None = None
    """packed rows of the training data that the surviving steps used"""
    tokens: int | None = None
    """tokens that the surviving steps used"""
    val_bpb: float | None = None
    """last validation result, in bits per byte"""
    min_val_bpb: float | None = None
    """best validation result, in bits per byte"""
    core_metric: float | None = None
    """centred accuracy over the CORE tasks"""
    train_loss: float | None = None
    """mean loss of the last step, in nats per token"""
    total_training_time_s: float | None = None
    """seconds in steps, without the first 10 of each process"""
    wall_time_s: float | None = None
    """seconds in which a driver was at work, all attempts and the waits between them; not those between two drivers"""
    goodput: float | None = None
    """share of wall_time_s spent on steps that survived, 0 to 1"""
    restarts: int | None = None
    """times that the worker group or the driver was started again"""
    preemptions: int | None = None
    """of these, those because a machine was taken away with notice"""
    replayed_steps: int | None = None
    """steps that were run again after a restart or a rollback"""
    tok_per_sec: float | None = None
    """tokens per second, all devices"""
    mfu: float | None = None
    """percent of the peak FLOPS; null when the peak is unknown"""
    peak_memory_bytes: int | None = None
    """the largest of any device"""
    flops: float | None = None
    """floating-point operations of the surviving steps"""
    cost_usd: float | None = None
    """machines held, times their time, times the price; null without a price"""
    mlflow_run_id: str | None = None
    checkpoint: str | None = None
    """path or URI of the last checkpoint"""
    productive_s: float | None = None
    """of wall_time_s: steps that survived"""
    replayed_s: float | None = None
    """of wall_time_s: steps that were lost"""
    startup_s: float | None = None
    """of wall_time_s: from the begin of each attempt to its first step"""
    checkpoint_stall_s: float | None = None
    """of wall_time_s: training stood still for a save"""
    evaluation_s: float | None = None
    """of wall_time_s: evaluation"""
    waiting_s: float | None = None
    """of wall_time_s: waiting for machines"""
    other_s: float | None = None
    """of wall_time_s: the rest"""
    failed_saves: int | None = None
    """saves that failed and did not stop training"""
    rollbacks: int | None = None
    """times that training went back because the loss or the gradient was no number"""
    skipped_batches: int | None = None
    """global batches that were left out because of that"""
    error: str | None = None
    """why the run failed"""
    retry_helps: bool | None = None
    """of a run that failed: whether the same command may yet succeed; false when it would fail alike"""
    forecast: dict[str, Any] | None = None
    """what was expected when the run began, and what it came to: raychat.planning.hindsight.record"""

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"status must be one of {get_args(Status)}, not {self.status!r}")

    def write(self, path: Path) -> None:
        """Write to `path`, whole or not at all.

        Raises:
            ValueError: a value is NaN or infinite: neither is JSON, and neither is a result.
        """
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Summary":
        """The summary at `path`. Keys of newer versions are ignored, absent ones are None.

        Raises:
            DataError: the file is no summary.
            FileNotFoundError: there is none.
        """
        try:
            values = json.loads(path.read_bytes())
            known = {field.name for field in dataclasses.fields(cls)}
            return cls(**{name: value for name, value in values.items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is not the summary of a run ({error}): move it away; the next end of the run writes a new one"
            ) from error
