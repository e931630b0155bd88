"""The report of a single run, from its directory."""

import time
from pathlib import Path

from raychat.errors import DataError
from raychat.search.range_test import FILE, RangeTest
from raychat.search.report import words
from raychat.search.report.command import changed, pretrain_command
from raychat.search.report.contents import Difference, Question, ReportContents, ReportRun
from raychat.search.report.run_files import RunFiles, curve_of, forecast_of, interruption_of, outcome_of, price_of
from raychat.search.report.versions import commit, versions
from raychat.search.trial import Outcome, Trial
from raychat.tracking.run_table import run_dirs

OPTIMAL_FROM = 0.9
"""share of the compute-optimal horizon from which on a run counts as long enough"""


def run_contents(run_dir: Path) -> ReportContents:
    """Read the run in `run_dir`: one that ended, was interrupted or is going on.

    Raises:
        DataError: there is no run in the folder, or a file of it is damaged.
    """
    if run_dir not in run_dirs(run_dir.parent):
        raise DataError(
            f"{run_dir} holds no run: it has neither config.json nor metrics.jsonl. Name the folder of a run."
        )
    files = RunFiles(run_dir)
    outcome, settings = outcome_of(files), files.settings
    tag = run_dir.name
    title = f"d{settings['depth']}" if settings.get("depth") else tag
    trial = Trial(number=1, tag=tag, title=title, settings={}, arm=title, seed=settings.get("seed", 0))
    curve, price = curve_of(files, title=title, arm=title), price_of(files)
    forecast = forecast_of(files, number=trial.number, title=title) if outcome else None
    test = RangeTest.read(run_dir / FILE)
    command = test.command if test else pretrain_command(settings, tag=tag) if settings else ""
    return ReportContents(
        name=tag,
        kind="run",
        made=now(),
        sentence=test.sentence if test else _sentence(title, files, outcome),
        state=outcome.status if outcome else "running" if files.live else "interrupted",
        command=command,
        winner=title,
        baseline=title,
        going_on=outcome is None and files.live,
        spec={name: value for name, value in settings.items() if value != ""},
        runs=(ReportRun(trial=trial, outcome=outcome, running=files.live),),
        curves=(curve,) if curve else (),
        range_test=test,
        forecasts=(forecast,) if forecast else (),
        ledger=files.ledger.accounts(),
        interruption=interruption_of([files]),
        differences=tuple(
            Difference(setting="--" + name.replace("_", "-"), base=_shown(before), values={title: _shown(value)})
            for name, (before, value) in changed(settings).items()
        ),
        prices=(price,) if price else (),
        questions=() if test else _questions(files, outcome),
        reproduce=reproduced(command, tag) if command else (),
        facts=facts_of([files]),
    )


def now() -> str:
    """The time of the report."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def facts_of(runs: list[RunFiles]) -> dict[str, str]:
    """Versions, hardware and data of `runs`."""
    hardware = [str(h) for files in runs if (h := (files.config.get("resolved") or {}).get("hardware"))]
    data = [str(d) for files in runs if (d := files.config.get("data_fingerprint"))]
    corpora = [str(files.settings.get("corpus") or "climbmix") for files in runs if files.settings]
    found = {
        "hardware": "; ".join(dict.fromkeys(hardware)),
        "corpus": ", ".join(dict.fromkeys(corpora)),
        "data fingerprint": ", ".join(dict.fromkeys(data)),
    }
    return versions() | {name: text for name, text in found.items() if text}


def reproduced(command: str, name: str) -> tuple[str, ...]:
    """The commands from the same code to the same report."""
    at = commit().removesuffix("-dirty")
    checkout = (f"git checkout {at}",) if at else ()
    return (*checkout, command, f"python jobs/report.py {name}")


def _sentence(title: str, files: RunFiles, outcome: Outcome | None) -> str:
    if outcome is None:
        steps = max((record["step"] + 1 for record in files.journal if "train/loss" in record), default=0)
        planned = (files.config.get("recipe") or {}).get("num_iterations")
        of = f" of {planned:,}" if planned else ""
        state = "is running" if files.live else "was interrupted; the same command goes on with it"
        return f"{title} {state}: {steps:,}{of} steps done."
    took = f" in {words.duration(outcome.wall_s)}" if outcome.wall_s is not None else ""
    paid = f" for {words.dollars(outcome.cost_usd)}" if outcome.cost_usd is not None else ""
    if outcome.status == "finished":
        reached = (
            f"val_bpb {words.bpb(outcome.val_bpb)}" if outcome.val_bpb is not None else "its end, without validation,"
        )
        return f"{title} reached {reached}{took}{paid}."
    why = f" ({outcome.reason})" if outcome.reason else ""
    last = f"; last val_bpb {words.bpb(outcome.val_bpb)}" if outcome.val_bpb is not None else ""
    return f"{title} {_verb(outcome.status)}{why}{took}{paid}{last}."


def _verb(status: str) -> str:
    return {"stopped early": "was stopped", "OOM": "ran out of memory", "failed": "failed"}.get(status, status)


def _questions(files: RunFiles, outcome: Outcome | None) -> tuple[Question, ...]:
    if outcome is None or outcome.status != "finished" or outcome.wall_s is None:
        return ()
    hours, cost = outcome.wall_s / 3600, outcome.cost_usd
    found = [
        Question(
            text="How much does val_bpb vary from seed to seed? (two more seeds)",
            runs=2,
            hours=2 * hours,
            cost_usd=None if cost is None else 2 * cost,
        )
    ]
    horizon = files.plan.get("horizon") or {}
    share = horizon.get("of_optimal")
    if share and share < OPTIMAL_FROM and horizon.get("optimal_iterations"):
        text = f"What does the compute-optimal horizon of {horizon['optimal_iterations']:,} iterations reach?"
        longer = 1 / share
        paid = None if cost is None else cost * longer
        found.append(Question(text=text, runs=1, hours=hours * longer, cost_usd=paid))
    return tuple(found)


def _shown(value: object) -> str:
    return "(none)" if value == "" else str(value)
