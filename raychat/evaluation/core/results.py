"""What an evaluation of CORE found, item by item, and as a JSON text that other implementations can be compared with."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from raychat.evaluation.core.bundle import Task

FORMAT = "raychat-core-1"


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """The verdict on one item."""

    index: int
    """place among the items of the task as they are evaluated, from 0; seeds the examples in front of it"""
    line: int
    """line of the task's data file, from 1"""
    correct: bool
    predicted: int | None
    """the chosen option; language modelling: 0 for the right continuation, None for anything else"""
    gold: int
    scores: tuple[float, ...]
    """mean loss of each option in nats; language modelling: least lead of a right token over all others, in logits"""
    close: bool = False
    """the scores were so close that rounding might have decided, and the item was computed again by itself"""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The verdicts on the items of one task, in their order."""

    label: str
    kind: str
    shots: int
    baseline: float
    items: tuple[ItemResult, ...]
    seconds: float
    """wall time, of the slowest rank"""

    @staticmethod
    def of(task: Task, items: list[ItemResult], seconds: float) -> "TaskResult":
        """The results of `task`, from items in any order."""
        ordered = tuple(sorted(items, key=lambda item: item.index))
        return TaskResult(
            label=task.label, kind=task.kind, shots=task.shots, baseline=task.baseline, items=ordered, seconds=seconds
        )

    @property
    def accuracy(self) -> float:
        """Share of the items that are right."""
        return sum(item.correct for item in self.items) / len(self.items)

    @property
    def centered(self) -> float:
        """Accuracy on a scale where guessing is 0 and all right is 1."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    def line(self) -> str:
        """The task in one line."""
        return (
            f"CORE {self.label:<34} accuracy {self.accuracy:.4f} | centred {self.centered:+.4f} | "
            f"{len(self.items):,} items in {self.seconds:.1f}s ({len(self.items) / max(self.seconds, 1e-9):,.1f}/s)"
        )


@dataclass(frozen=True)
class CoreResult:
    """All tasks by label, in the order of the bundle."""

    tasks: dict[str, TaskResult]

    @property
    def core_metric(self) -> float:
        """The mean of the centred accuracies."""
        return sum(task.centered for task in self.tasks.values()) / len(self.tasks)

    def metrics(self) -> dict[str, float]:
        """`core_metric` and `core/<task>`, the centred accuracies."""
        return {"core_metric": self.core_metric} | {
            f"core/{label}": task.centered for label, task in self.tasks.items()
        }

    def to_json(self) -> str:
        """Everything as JSON, one line per item. An infinite score, of an option with nothing to score, is null."""
        head = {
            "format": FORMAT,
            "core_metric": self.core_metric,
            "seconds": sum(task.seconds for task in self.tasks.values()),
        }
        tasks = ",\n".join(f"{json.dumps(label)}: {_task_json(task)}" for label, task in self.tasks.items())
        return json.dumps(head, indent=1)[:-2] + f',\n "tasks": {{\n{tasks}\n }}\n}}\n'


def _task_json(task: TaskResult) -> str:
    head = {
        "kind": task.kind,
        "shots": task.shots,
        "baseline": task.baseline,
        "accuracy": task.accuracy,
        "centered": task.centered,
        "seconds": task.seconds,
    }
    items = ",\n".join(json.dumps(_item(item), allow_nan=False) for item in task.items)
    return json.dumps(head)[:-1] + f', "items": [\n{items}\n]}}'


def _item(item: ItemResult) -> dict[str, Any]:
    scores = [float(f"{score:.7g}") if math.isfinite(score) else None for score in item.scores]
    return asdict(item) | {"scores": scores}
