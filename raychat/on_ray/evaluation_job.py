"""One evaluation of a model on several workers of a Ray cluster: what `jobs/evaluate.py --num-workers` does."""

import time
from collections.abc import Callable

from raychat.checks import require
from raychat.config import Config
from raychat.errors import RaychatError
from raychat.export.evaluate import Request, evaluate_source
from raychat.on_ray import cluster as clusters
from raychat.on_ray.group import Group, GroupError
from raychat.on_ray.sizing import Patience
from raychat.training.evaluate_checkpoint import Findings

LOOK_S = 0.2
TELL_S = 30.0


class EvaluationFailedError(RaychatError):
    """A worker failed or died."""

    exit_code = 1


def evaluate_on_ray(request: Request, *, workers: int, address: str, echo: Callable[[str], None]) -> Findings:
    """Evaluate on so many workers of the cluster at `address` (empty: as training has it), on GPUs where it has some.

    Raises:
        ConfigError: there is no cluster at the address, or this machine has fewer GPUs.
        EvaluationFailedError: a worker failed.
    """
    with clusters.connect(Config.from_flat({"address": address, "num_workers": workers}), echo=echo) as cluster:
        use_gpu = request.device_type != "cpu" and cluster.gpus > 0
        require(
            not (use_gpu and cluster.started_here and workers > cluster.gpus),
            f"--num-workers {workers}: this machine has {cluster.gpus} GPUs, and each worker takes one. Use --num-workers "
            f"{cluster.gpus}, a cluster that has more (--address), or --device-type cpu.",
        )
        group = Group(workers, use_gpu=use_gpu)
        try:
            patience = Patience(TELL_S, first_s=TELL_S)
            while not group.is_room:
                if patience.due():
                    echo(
                        f"waiting for room for {workers} workers; the cluster has {cluster.cpus} CPUs, {cluster.gpus} GPUs"
                    )
                time.sleep(LOOK_S)
            group.start()
            group.begin(evaluate_source, request)
            patience = Patience(TELL_S, first_s=TELL_S)
            while (findings := group.answers()) is None:
                if patience.due():
                    echo(f"evaluating on {workers} workers, since {patience.waited_s:.0f}s")
                time.sleep(LOOK_S)
            return findings[0]
        except GroupError as error:
            raise EvaluationFailedError(
                f"The evaluation failed: {error}. --num-workers 1 runs it in this process, and shows what is wrong."
            ) from error
        finally:
            group.end()
