"""How many workers a run may have and how many it can have now."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from raychat.config import Config
from raychat.on_ray.cluster import Cluster
from raychat.on_ray.nodes import NodeWatch, Requests
from raychat.planning import recipe

SETTLE_S = 5.0  # less room than there are machines must last so long to be believed: others may be leaving it
GROW_S = 60.0  # room for some of the missing workers, not all, must last so long before a run is interrupted for it


def wants_gpus(config: Config) -> bool:
    """Whether only GPUs will do, also those that an autoscaler has yet to add."""
    return config.precision.device_type == "cuda" or config.precision.fp8


def uses_gpus(config: Config, cluster: Cluster, starts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the workers are on GPUs. `starts` are those of the run before: it goes on as it was begun."""
    if wants_gpus(config):
        return True
    begun = bool(starts) and bool(starts[-1].get("use_gpu"))  # all GPU machines may be away at this moment
    return config.precision.device_type == "" and (begun or cluster.gpus > 0)


def worker_range(
    config: Config, cluster: Cluster, use_gpu: bool, starts: Sequence[Mapping[str, Any]]
) -> tuple[int, int]:
    """The most and the fewest workers that the run may have. `auto`: as many as there are GPUs, or were, and at least one."""
    wanted, fewest = config.cluster.num_workers, config.cluster.min_workers
    if wanted == "auto":
        before = starts[-1].get("workers_wanted", 1) if starts else 1
        sequences = recipe(config).total_batch_size // config.model.max_seq_len
        most = max(1, min(max(cluster.gpus, before), sequences)) if use_gpu else 1
        return most, min(most, max(1, fewest))
    return wanted, wanted if fewest == -1 else fewest


class Room:
    """Room for workers, found out by asking the cluster for it: others may be using what is there."""

    def __init__(self, watch: NodeWatch, use_gpu: bool, *, most: int, fewest: int) -> None:
        self.watch, self.most, self.fewest = watch, most, fewest
        self._requests = Requests(use_gpu)
        self._more: tuple[int, set[str]] = (0, set())

    def ask(self) -> None:
        """Ask for room for all workers, on machines that are there and stay."""
        self._requests.set(self.most, away_from=self.watch.avoid())

    def found(self) -> int | None:
        """Workers to begin with, or None while it is better to wait."""
        granted, since_s = self._requests.granted()
        if not self.watch.checked:
            return None
        if granted >= min(self.most, self.watch.slots()) >= self.fewest:
            return granted
        return granted if granted >= self.fewest and since_s >= SETTLE_S else None

    def ask_more(self, workers: int, away_from: set[str]) -> None:
        """Ask for room for so many more workers, not on these machines, where those at work are."""
        self._more = (workers, away_from)
        self._requests.set(workers, away_from=away_from | self.watch.unfit)

    def more(self) -> int:
        """How many more workers there has been room for, for long enough to interrupt a run."""
        workers, away_from = self._more
        self._requests.set(workers, away_from=away_from | self.watch.unfit)  # which may be others by now
        granted, since_s = self._requests.granted()
        if not self.watch.checked:
            return 0
        patience_s = SETTLE_S if granted == self._requests.asked else GROW_S
        return granted if since_s >= patience_s else 0

    def release(self) -> None:
        """Give back what was granted, and ask no more."""
        self._more = (0, set())
        self._requests.set(0)


class Patience:
    """Says when something that is waited for is worth another line."""

    def __init__(self, every_s: float, *, first_s: float = 0.0) -> None:
        self._since = time.monotonic()
        self._every_s, self._next_s = every_s, first_s

    @property
    def waited_s(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._since

    def due(self) -> bool:
        """Whether a line is due; then the next one is due after the interval."""
        if self.waited_s < self._next_s:
            return False
        self._next_s = self.waited_s + self._every_s
        return True
