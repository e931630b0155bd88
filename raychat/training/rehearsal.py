"""`--dry-run-steps N`: a few real steps in a place of their own, and the plan with what they measured.

The run itself is not begun: its directory is not touched and MLflow is not told. Corpus, tokenizer and token shards are
made as for the run, and stay. Who trains, Ray's driver or this process, is handed the configuration of the short run.
"""

import contextlib
import json
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from raychat.atomic import write_json
from raychat.config import Config
from raychat.data.prepare import TokenData
from raychat.errors import RaychatError
from raychat.planning import format_plan, recipe
from raychat.planning.duration import Measured
from raychat.planning.hindsight import warm_up_s
from raychat.planning.limits import refuse_beyond_limits
from raychat.tracking.journal import read_events, read_journal
from raychat.tracking.summary import Summary
from raychat.training.forecasting import REHEARSALS, measurements, plan_on

EVAL_STEPS = 8  # an evaluation reads so many steps' worth of tokens: enough for a rate, in the time of some three steps
WARM_UP_SHARE = 4  # the first steps, one in so many, are left out of the step time
LEAST_SPREAD, MOST_SPREAD = 0.03, 0.5  # of step times: no machine keeps its pace better for hours
LEFT_OVER_S = 86400.0  # a folder of this age was left by a process that was killed


class RehearsalStoppedError(RaychatError):
    """The short run was told to stop before its end."""

    exit_code = 1


class Rehearsal:
    """A short run of `config`. In a `with` block: `stage`, train what that gives, `conclude`. Nothing of it is left."""

    def __init__(self, config: Config, *, on_ray: bool, echo: Callable[[str], None]) -> None:
        self.config, self.on_ray, self.echo = config, on_ray, echo
        self._folder = config.base_dir / REHEARSALS / f".{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._staged: tuple[Config, TokenData] | None = None

    def __enter__(self) -> "Rehearsal":
        for left in self._folder.parent.glob(".*-*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > LEFT_OVER_S:
                    shutil.rmtree(left)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds what was measured, now or before
            self._folder.parent.rmdir()

    def stage(self, data: TokenData) -> Config:
        """The configuration of the short run on the `data` of the run."""
        short = short_config(self.config, data, self._folder)
        self._staged = short, data
        self.echo(
            f"dry run: {recipe(short).num_iterations} real steps, a save and an evaluation; "
            f"the run in {self.config.run_dir} is not begun"
        )
        return short

    def tell(self, line: str) -> None:
        """Echo a line of the short run, unless it names a file that will be gone."""
        if str(self._folder) not in line:
            self.echo(line)

    def conclude(self) -> dict[str, Any]:
        """Print and keep the plan with what was measured; that plan.

        Raises:
            RehearsalStoppedError: the short run was stopped.
            ConfigError: the run will not fit `--max-hours` or `--budget-usd`.
        """
        if self._staged is None:
            raise ValueError("nothing was staged")
        short, data = self._staged
        journal, summary = short.run_dir / "metrics.jsonl", Summary.read(short.run_dir / "summary.json")
        if summary.status != "finished":
            raise RehearsalStoppedError("The short run was stopped before its end: there is nothing to plan with.")
        events = read_events(journal)
        measured = measure(summary, events, read_journal(journal), eval_tokens=eval_tokens(short, data))
        resolved = json.loads((short.run_dir / "config.json").read_bytes())["resolved"]
        start = [event for event in events if event["event"] == "start"][-1]
        ranks, nodes = start["world_size"], start["nodes"]
        plan = plan_on(self.config, data, resolved, ranks=ranks, nodes=nodes, measured=measured)
        kept = measurements(self.config, resolved, ranks=ranks, on_ray=self.on_ray)
        write_json(kept, plan)
        for line in (format_plan(plan), *describe(measured), f"written to {kept}"):
            self.echo(line)
        refuse_beyond_limits(plan, self.config)
        return plan


def steps_only(config: Config) -> Config:
    """`config` with the horizon of the short run, which is no longer than its own."""
    steps = min(config.run.dry_run_steps, recipe(config).num_iterations)
    return Config.from_flat({"num_iterations": steps}, base=config)


def short_config(config: Config, data: TokenData, folder: Path) -> Config:
    """The short run of `config` on `data`, kept in `folder`: the same in all that decides speed and memory.

    It makes a save while it trains, late, since writing it slows the steps that follow, and one at its end; it evaluates
    at its beginning and at its end.
    """
    config = steps_only(config)
    steps, batch = config.horizon.num_iterations, recipe(config).total_batch_size
    values: dict[str, Any] = {
        "storage_path": str(folder),
        "model_tag": config.model_tag,
        "run": "dummy",
        "fresh": False,
        "resume_from_step": -1,
        "dry_run_steps": -1,
        "stop_at": -1,
        "on_event": "",
        "log_every": 1,
        "eval_every": -1 if config.eval.eval_every == -1 else steps,
        "eval_tokens": min(config.eval.eval_tokens, EVAL_STEPS * batch),
        "eval_workers": 0,
        "core_metric_every": -1,
        "sample_every": -1,
        "save_every": max(1, min(steps - 1, (3 * steps + 3) // 4)),
        "max_hours": -1.0,
        "budget_usd": -1.0,
        "max_failures": 0,
        "tokenizer": str(data.tokenizer_dir),
        "packing": data.manifest.spec.packing,
    }
    if data.corpus.name == "climbmix":  # else the short horizon would decide how much of it there is
        values["num_data_shards"] = len(data.corpus.train) + 1
    return Config.from_flat(values, base=config)


def eval_tokens(config: Config, data: TokenData) -> int:
    """Tokens of one evaluation."""
    T = config.model.max_seq_len
    return min(data.manifest.rows("val"), config.eval.eval_tokens // T) * T


def measure(
    summary: Summary,
    events: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    *,
    eval_tokens: int,
) -> Measured:
    """What a short run found, from its journal; `eval_tokens` are those of one of its evaluations."""
    times = [record["train/dt"] for record in records if "train/dt" in record]
    timed = times[min(len(times) - 1, max(1, len(times) // WARM_UP_SHARE)) :]
    step_s = statistics.median(timed)
    evaluations = [record["val/time_s"] for record in records if record.get("val/time_s")]
    saves = [event for event in events if event["event"] == "checkpoint"]
    beside = [save for save in saves if not save["synchronous"]]
    startup = summary.startup_s
    return Measured(
        step_s=step_s,
        step_spread=_spread(timed, step_s),
        peak_memory_bytes=summary.peak_memory_bytes,
        save_s=saves[-1]["total_s"] if saves else None,
        save_stall_s=(beside or saves)[-1]["stall_s"] if saves else None,
        eval_tok_per_sec=eval_tokens / evaluations[-1] if evaluations else None,
        startup_s=None if startup is None else startup + warm_up_s(events, step_s),
    )


def describe(measured: Measured) -> list[str]:
    """What was measured, for the console."""
    facts = {
        "step": (measured.step_s, "{:.4g} s (median" + _pace(measured) + ")"),
        "memory": (measured.peak_memory_bytes and measured.peak_memory_bytes / 2**30, "{:.2f} GiB, the peak of a rank"),
        "save": (measured.save_s, "{:.3g} s" + _stall(measured)),
        "evaluation": (measured.eval_tok_per_sec, "{:,.0f} tok/s"),
        "start-up": (measured.startup_s, "{:.3g} s, slower first steps included"),
    }
    lines = [f"  {name:<11} {text.format(value)}" for name, (value, text) in facts.items() if value is not None]
    return ["measured", *lines]


def _pace(measured: Measured) -> str:
    spread = measured.step_spread
    if spread >= MOST_SPREAD:
        return f"; half of them differ by {spread:.0%} and more: the machine does something else too, and the forecast is rough"
    return f"; half of them within {spread:.0%}"


def _stall(measured: Measured) -> str:
    return "" if measured.save_stall_s is None else f"; training waits {measured.save_stall_s:.3g} s for one beside it"


def _spread(times: Sequence[float], step_s: float) -> float:
    """Distance of the quartiles as a share of the median, kept between bounds."""
    if len(times) < 2:
        return LEAST_SPREAD
    low, _, high = statistics.quantiles(times, n=4)
    return min(MOST_SPREAD, max(LEAST_SPREAD, (high - low) / step_s))
