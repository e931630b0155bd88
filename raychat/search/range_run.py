"""A range test as a run: its settings, whether it is over, its curve from the journal, and what to search with.

The rates rise by a warm-up that lasts for the whole run: so it is a run like any other, that can be interrupted, goes on
exactly, and has a journal.
"""

import json
import math
from typing import Any

from raychat.checks import require
from raychat.config import Config
from raychat.optim.schedule import lr_multiplier
from raychat.planning import recipe
from raychat.search.range_test import RATES, RangeTest
from raychat.search.rate_range import MIN_POINTS
from raychat.search.report.command import pretrain_command
from raychat.search.spec_checks import OWN
from raychat.tracking.journal import read_journal
from raychat.tracking.run_table import JOURNAL, last_turn
from raychat.tracking.summary import DIVERGED, Summary
from raychat.training.changes import kind_of

SUFFIX = "-lr-range"


def range_config(config: Config, *, steps: int, least: float, most: float) -> Config:
    """The run of the test: `steps` steps in which the rates rise from `least` to `most` times those of `config`.

    Momentum stands at its full value from the first step on, so that only the rates change. Batch and weight decay are
    those of `config`: by the rules they depend on the model, not on the number of steps.

    Raises:
        ConfigError: too few steps, or rates that would not rise.
    """
    require(steps >= MIN_POINTS, f"--range-steps {steps}: a range test needs at least {MIN_POINTS}, 200 as a rule.")
    require(
        0 < least < most < math.inf,
        f"--range-least {least:g} and --range-most {most:g}: the rates rise from the one multiple of those given to the "
        "other, as from 0.01 to 10.",
    )
    values: dict[str, Any] = {name: getattr(config.optim, name) * most for name in RATES}
    values |= {
        "model_tag": f"{config.model_tag}{SUFFIX}",
        "run": "dummy",
        "num_iterations": steps,
        "total_batch_size": recipe(config).total_batch_size,
        "warmup_steps": -1,
        "warmup_ratio": 1.0,
        "warmup_from": least / most,
        "warmdown_ratio": 0.0,
        "final_lr_frac": 1.0,
        "muon_momentum_steps": 0,
        "on_bad_step": "stop",
        "eval_every": -1,
        "core_metric_every": -1,
        "sample_every": -1,
        "log_every": 1,
    }
    return Config.from_flat(values, config)


def is_over(test: Config) -> bool:
    """Whether the run of this test has come to its end before.

    Raises:
        ConfigError: it has, with other settings.
    """
    turn = last_turn(test.run_dir / JOURNAL)
    kept = test.run_dir / "summary.json"
    if test.run.fresh or turn is None or turn["event"] != "end" or not kept.exists():
        return False
    summary = Summary.read(kept)
    if summary.status != "finished" and DIVERGED not in (summary.error or ""):
        return False
    begun = Config.from_flat(json.loads((test.run_dir / "config.json").read_bytes())["config"]).flat()
    changed = [
        f"{name}: {begun[name]} -> {value}"
        for name, value in test.public().items()
        if kind_of(name) != "free" and begun[name] != value
    ]
    require(
        not changed,
        f"{test.run_dir} holds a range test with other settings ({'; '.join(changed)}). Add --fresh behind -- to make it "
        "again (the old one is kept under another name), or another --model-tag.",
    )
    return True


def recorded(config: Config, test: Config, *, least: float, most: float) -> RangeTest:
    """The curve in the journal of `test`, the range test of `config` from `least` to `most` times its rates."""
    records = [record for record in read_journal(test.run_dir / JOURNAL) if "train/loss" in record]
    multipliers = [most * record["train/lrm"] for record in records]
    losses = [math.nan if record["train/loss"] is None else record["train/loss"] for record in records]
    steps = test.horizon.num_iterations
    if len(records) < steps:  # it ended at the next one, which is not in the journal
        lrm = lr_multiplier(len(records), steps, steps, 0.0, 1.0, test.optim.warmup_from)
        multipliers.append(most * lrm)
        losses.append(math.nan)
    options = f"--range-steps={steps} --range-least={least:g} --range-most={most:g}"
    command = _search_command(f"--lr-range {options}", config.public())
    return RangeTest.of({name: getattr(config.optim, name) for name in RATES}, multipliers, losses, command=command)


def lines(config: Config, test: RangeTest) -> list[str]:
    """What was found, with the lines of a search file and the command of a search."""
    if test.found is None:
        return [test.sentence]
    base = {name: value for name, value in config.public().items() if name not in OWN}
    options = f"--name={config.model_tag}-rates --space='matrix_lr={test.values_of('matrix_lr')}'"
    return [test.sentence, "", *test.space, "", "or as a command:", _search_command(options, base), ""]


def _search_command(options: str, settings: dict[str, Any]) -> str:
    """The command of jobs/search.py with `settings` of its runs."""
    flags = pretrain_command(settings).split(maxsplit=2)[2:]
    return " ".join(["python jobs/search.py", options, *(["--", *flags] if flags else [])])
