"""The CORE metric: 22 few-shot tasks, centred on guessing (DCLM, arXiv:2406.11794)."""

from raychat.evaluation.core.bundle import Bundle, load_bundle
from raychat.evaluation.core.evaluate import evaluate_core
from raychat.evaluation.core.results import CoreResult, ItemResult, TaskResult

__all__ = ["Bundle", "CoreResult", "ItemResult", "TaskResult", "evaluate_core", "load_bundle"]
