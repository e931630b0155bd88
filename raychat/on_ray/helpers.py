"""Ray's own helpers, which outlive the job that first needs them: what they would cost a cluster that shrinks.

Both are made where they are first asked for. On a worker's node they would keep a machine that nobody works on, for ever;
and the coordinator is bound to its node, so that it would be lost with it.
"""

import contextlib
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.data._internal.stats import get_or_create_stats_actor

ANSWER_S = 10.0


def keep_here() -> None:
    """Have them on the node of this process, a head as a rule. Waits for nothing; what is elsewhere already stays there."""
    get_or_create_stats_actor()
    get_or_create_autoscaling_coordinator()


def withdraw(run_id: str) -> None:
    """Take back what a Ray Train controller asked the autoscaler for, when it was killed before it could do so itself.

    The request stands for 3 minutes otherwise: machines for workers that are no more, besides those of the next ones.
    """
    coordinator: Any = get_or_create_autoscaling_coordinator()
    with contextlib.suppress(ray.exceptions.RayError):  # then it passes by itself
        ray.get(coordinator.cancel_request.remote(f"train-{run_id}"), timeout=ANSWER_S)
