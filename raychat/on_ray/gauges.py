"""What a run says of itself to Ray's metrics, for Prometheus and Grafana. docs/monitoring.md has units and queries.

Ray passes a gauge on once after it was set, every ten seconds, and forgets it twenty seconds later. So the driver sets
its gauges again and again, and those of a run that is over, or whose driver died, vanish by themselves.
"""

import logging
import time
from collections.abc import Mapping

from ray.util.metrics import Gauge

from raychat.training import outcome
from raychat.training.events import Metrics
from raychat.training.session import Session

REFRESH_S = 2.0
LABEL = "run"  # the model tag

METRICS = {
    "raychat_step": "Step that was logged last, counted from 0.",
    "raychat_total_steps": "Steps of the whole run.",
    "raychat_train_loss": "Training loss of that step, nats per token.",
    "raychat_val_bpb": "Newest validation loss, bits per byte.",
    "raychat_tokens_per_second": "Tokens trained per second by all workers; absent while none trains.",
    "raychat_mfu_percent": "Share of the devices' peak FLOP/s, percent; absent while no worker trains, and on CPUs.",
    "raychat_goodput_ratio": "Share of the wall time spent on steps that survived, 0 to 1.",
    "raychat_workers": "Workers that train at this moment.",
    "raychat_machines": "Machines that are held and paid for at this moment.",
    "raychat_cost_usd": "Dollars spent so far; absent without a price.",
    "raychat_cost_usd_per_hour": "Dollars per hour at this moment; absent without a price.",
    "raychat_budget_usd": "Dollars at which the run stops; absent without --budget-usd.",
    "raychat_restarts": "Attempts after the first one.",
    "raychat_preemptions": "Machines that were taken away.",
    "raychat_replayed_steps": "Steps that were lost and run again.",
    "raychat_skipped_batches": "Global batches left out because the loss or the gradient was no number.",
}
OF_A_STEP = {
    "train/loss": "raychat_train_loss",
    "train/tok_per_sec": "raychat_tokens_per_second",
    "train/mfu": "raychat_mfu_percent",
}
RATES = ("raychat_tokens_per_second", "raychat_mfu_percent")

logger = logging.getLogger(__name__)


class RunGauges:
    """The gauges of one run, in its driver. Nothing in here raises: what fails is warned of once, and then left."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._of_step: dict[str, float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._kept_at = float("-inf")
        self._broken = False

    def told(self, metrics: Metrics) -> None:
        """Take in what a step measured."""
        if "train/loss" in metrics.values:
            found = {name: metrics.values[key] for key, name in OF_A_STEP.items() if key in metrics.values}
            self._of_step = {"raychat_step": metrics.step, **found}
            self._set(self._of_step)

    def keep(self, *, workers: int) -> None:
        """Set all of them, every `REFRESH_S` however often it is called; `workers` train at this moment."""
        if time.monotonic() - self._kept_at >= REFRESH_S:
            self._keep(workers)

    def end(self) -> None:
        """Set all of them for the last time."""
        self._keep(0)

    def _keep(self, workers: int) -> None:
        self._kept_at = time.monotonic()
        if not workers:
            self._of_step = {name: value for name, value in self._of_step.items() if name not in RATES}
        try:
            values = of_run(self._session) | {"raychat_workers": workers} | self._of_step
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self._give_up(error)
        else:
            self._set(values)

    def _set(self, values: Mapping[str, float]) -> None:
        if self._broken:
            return
        try:
            for name, value in values.items():
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, METRICS[name], (LABEL,))
                self._gauges[name].set(value, {LABEL: self._session.config.model_tag})
        except Exception as error:  # noqa: BLE001 - whatever Ray raises: training goes on
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._broken:
            logger.warning("the run's metrics no longer reach Ray, training goes on: %r", error)
        self._broken = True


def of_run(session: Session) -> dict[str, float]:
    """The metrics that are the run's and not a step's, as far as they are known."""
    ledger, money, machines = session.ledger(), session.config.money, session.book.nodes
    known = {
        "raychat_total_steps": session.recipe.num_iterations,
        "raychat_val_bpb": session.journal.newest.get("val/bpb"),
        "raychat_goodput_ratio": ledger.goodput,
        "raychat_machines": machines,
        "raychat_cost_usd": ledger.cost_usd,
        "raychat_cost_usd_per_hour": None if ledger.cost_usd is None else money.price_per_hour * machines,
        "raychat_budget_usd": None if money.budget_usd == -1 else money.budget_usd,
        **{f"raychat_{name}": count for name, count in outcome.interruptions(session.events).items()},
    }
    return {name: value for name, value in known.items() if value is not None}
