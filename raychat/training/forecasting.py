"""The forecast of a run: made once, when the machine it runs on is known, and held against what the run came to.

It is kept in `plan.json`; a run that is resumed keeps its first one. What `--dry-run-steps` measured on the same hardware
with the same settings goes into it.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from raychat.atomic import write_json
from raychat.config import Config
from raychat.data.prepare import TokenData
from raychat.errors import RaychatError
from raychat.planning import hindsight, make_plan, recipe
from raychat.planning.devices import device_peak, plan_name
from raychat.planning.duration import Measured
from raychat.planning.plan import MADE
from raychat.planning.prices import find_machine, load_prices
from raychat.planning.target import Target, local_memory
from raychat.tracking.summary import Summary

REHEARSALS = "rehearsals"
"""folder under the base directory: what short real runs measured"""


class Forecast:
    """The forecast of the run in `run_dir`. Whatever is wrong with it is worth a warning and no end of a run."""

    def __init__(
        self, config: Config, data: TokenData, run_dir: Path, *, on_ray: bool, echo: Callable[[str], None]
    ) -> None:
        self.config, self.data, self.on_ray, self.echo = config, data, on_ray, echo
        self.path = run_dir / "plan.json"
        self.plan: dict[str, Any] | None = _made(self.path, config)
        self._ranks, self._nodes = 1, 1

    def begin(self, *, world_size: int, nodes: int) -> None:
        """An attempt begins on so many ranks and machines."""
        self._ranks, self._nodes = world_size, nodes
        if self.plan is None:
            with contextlib.suppress(RaychatError):  # the machine that drives need not be one that could train
                self._write(make_plan(self.config))

    def found(self, resolved: Mapping[str, Any]) -> None:
        """The machine is known: `resolved` is what was chosen there. Makes the forecast, unless there is one."""
        short = self.path.is_relative_to(self.config.base_dir / REHEARSALS)  # which is measured, and not forecast
        if self.plan is not None or short or resolved.get("device_type") not in ("cuda", "cpu"):
            return
        try:
            self.plan = self._make(resolved)
        except (RaychatError, ArithmeticError, LookupError, ValueError) as error:
            self.echo(f"warning: there is no forecast of this run: {error}")
            return
        self._write(self.plan)

    def compare(self, summary: Summary, events: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
        """What `summary.json` says of the forecast; None when there was none. `events` are those of the journal."""
        if self.plan is None:
            return None
        step_s = recipe(self.config).total_batch_size / summary.tok_per_sec if summary.tok_per_sec else None
        try:
            return hindsight.record(
                self.plan, dataclasses.asdict(summary), warm_up_s=hindsight.warm_up_s(events, step_s)
            )
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # a file that somebody has edited
            self.echo(f"warning: {self.path} cannot be compared with the run: {error}")
            return None

    def _write(self, plan: Mapping[str, Any]) -> None:
        try:
            write_json(self.path, plan)
        except OSError as error:
            self.echo(f"warning: the plan cannot be written: {error}")

    def _make(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        place = measurements(self.config, resolved, ranks=self._ranks, on_ray=self.on_ray)
        return plan_on(
            self.config, self.data, resolved, ranks=self._ranks, nodes=self._nodes, measured=_measured(place)
        )


def plan_on(
    config: Config,
    data: TokenData,
    resolved: Mapping[str, Any],
    *,
    ranks: int,
    nodes: int,
    measured: Measured | None,
) -> dict[str, Any]:
    """The plan of `config` with its data, on the machine that training found, with what was measured there."""
    plan = make_plan(
        known_config(config, data, resolved),
        target=target_of(config, resolved, ranks=ranks, nodes=nodes),
        measured=measured,
    )
    made = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": resolved["hardware"],
        "workers": ranks,
        "machines": nodes,
    }
    return plan | {MADE: made}


def measurements(config: Config, resolved: Mapping[str, Any], *, ranks: int, on_ray: bool) -> Path:
    """Where what was measured is kept: a name for all that decides how fast a run is and what it needs."""
    content = {
        "model": dataclasses.asdict(config.model),
        "precision": dataclasses.asdict(config.precision),
        "batch": [_device_batch(config, resolved), recipe(config).total_batch_size],
        "save": config.save.save_mode,
        "machine": {name: resolved[name] for name in ("hardware", "dtype", "loss", "attention", "compile", "threads")},
        "ranks": ranks,
        "on_ray": on_ray,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return config.base_dir / REHEARSALS / f"d{config.model.depth}-{digest}.json"


def known_config(config: Config, data: TokenData, resolved: Mapping[str, Any]) -> Config:
    """`config` with what the machine and the data have decided in place of what it leaves open."""
    T = config.model.max_seq_len
    chosen = {
        "dtype": resolved["dtype"],
        "loss": resolved["loss"],
        "compile": "on" if resolved["compile"] else "off",
        "device_batch_size": _device_batch(config, resolved),
        "packing": data.manifest.spec.packing,
        "eval_tokens": max(T, min(config.eval.eval_tokens, data.manifest.rows("val") * T)),
    }
    return Config.from_flat(chosen, base=config)


def _device_batch(config: Config, resolved: Mapping[str, Any]) -> Any:
    """Sequences of a pass: those that training settled on, where that was left to it."""
    asked = config.batch.device_batch_size
    return resolved.get("device_batch_size") or asked if asked == "auto" else asked


def target_of(config: Config, resolved: Mapping[str, Any], *, ranks: int, nodes: int) -> Target:
    """The machine that training found, with the price of the one that `config` names."""
    on_gpu, named = resolved["device_type"] == "cuda", config.plan.machine
    peak = device_peak(resolved["device_name"]) if on_gpu else None
    return Target(
        device="cuda" if on_gpu else "cpu",
        gpu=(plan_name(resolved["device_name"]) or resolved["device_name"]) if on_gpu else "cpu",
        peak=peak,
        memory_bytes=(peak.memory_bytes if peak else None) if on_gpu else local_memory(),
        workers=ranks,
        machines=nodes,
        machine=find_machine(named, load_prices(config.plan.prices)) if named else None,
        cores=0 if on_gpu else resolved["threads"] * -(-ranks // nodes),
    )


def _made(path: Path, config: Config) -> dict[str, Any] | None:
    """The forecast that the run at `path` was begun with; None, too, for one of another model or batch.

    A run that ended before its first save may begin again with other settings.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        plan, now = json.loads(path.read_bytes()), recipe(config)
        made = plan["model"]["flops_per_token"], plan["batch"]["total_batch_size"]
        return plan if MADE in plan and made == (float(now.flops_per_token), now.total_batch_size) else None
    return None


def _measured(path: Path) -> Measured | None:
    """What a short real run has left at `path`, or None."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        return Measured(**json.loads(path.read_bytes())["measured"])
    return None
