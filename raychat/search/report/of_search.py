"""The report of a search, from its specification, its trials and the directories of their runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raychat.search.book import SPEC, read_book
from raychat.search.confirmation import confirm
from raychat.search.effects import Run, effects
from raychat.search.fits import fit_scaling
from raychat.search.iso_flops import IsoFlops
from raychat.search.pairing import Noise
from raychat.search.ranking import Objective, Place, baseline_noise, ranking
from raychat.search.report import words
from raychat.search.report.command import pretrain_command
from raychat.search.report.contents import Curve, Difference, Finding, Forecast, Price, ReportContents, ReportRun
from raychat.search.report.of_run import facts_of, now, reproduced
from raychat.search.report.questions import open_questions
from raychat.search.report.run_files import RunFiles, curve_of, forecast_of, interruption_of, price_of
from raychat.search.report.sweep import check_same_law, sweep_points, sweep_questions, sweep_verdict
from raychat.search.spec import BASELINE, SearchSpec
from raychat.search.trial import Outcome, Trial
from raychat.search.verdict import verdict
from raychat.tracking.run_table import is_live

DERIVED = ("num_iterations", "total_batch_size", "lr_scale", "weight_decay")
"""of a run's recipe: what the rules made of its settings"""

Found = Sequence[tuple[Trial, Outcome | None]]


def read_search(folder: Path, others: Sequence[Path] = ()) -> ReportContents:
    """The search in `folder` by its book: one that ended, was interrupted or is going on.

    The runs of `others` are fitted together with its own: more models for the budgets of a sweep.

    Raises:
        ConfigError, CheckpointError: there is none, its book is damaged, or `others` do not belong to it.
    """
    spec, book = read_book(folder)
    points: list[IsoFlops] = []
    for other in others:
        its_spec, its_book = read_book(other)
        data = _data(spec.base_config.runs_dir, book.done) | _data(its_spec.base_config.runs_dir, its_book.done)
        check_same_law(spec, its_spec, data)
        points += sweep_points(its_spec, [(its_book.trials[tag], outcome) for tag, outcome in its_book.done.items()])
    trials = [(trial, book.done.get(tag)) for tag, trial in book.trials.items()]
    return search_contents(spec, trials, spec.base_config.runs_dir, going_on=is_live(folder), points=points)


def _data(runs_dir: Path, tags: Iterable[str]) -> set[str]:
    """Fingerprints of the data of these runs, as far as their directories are there."""
    return {str(found) for tag in tags if (found := RunFiles(runs_dir / tag).config.get("data_fingerprint"))}


def search_contents(
    spec: SearchSpec, trials: Found, runs_dir: Path, *, going_on: bool = False, points: Sequence[IsoFlops] = ()
) -> ReportContents:
    """What `trials` came to; an outcome of None is still to come. `runs_dir` holds their run directories, by tag.

    Runs whose directory is gone are in the table and not in the pictures of curves. `points` are runs of other sweeps.
    """
    done = [(trial, outcome) for trial, outcome in trials if outcome is not None]
    files = {trial.tag: found for trial, _ in trials if (found := RunFiles(runs_dir / trial.tag)).journal}
    titles = {trial.arm: trial.title for trial, _ in trials}
    noise = baseline_noise(done, spec.objective, baseline=BASELINE)
    places = ranking(done, spec.objective, baseline=BASELINE, noise=noise)
    own = sweep_points(spec, done)
    fit = fit_scaling([*own, *points]) if own else None
    found = sweep_verdict(fit, spec, done) if fit else _verdict(done, places, spec.objective)
    winner = _winner_settings(trials, found.winner)
    made = pretrain_command(spec.base_config.public() | dict(winner), tag=f"{spec.name}-baseline")
    runs = tuple(_report_run(spec, trial, outcome, files.get(trial.tag)) for trial, outcome in trials)
    return ReportContents(
        name=spec.name,
        kind="search",
        made=now(),
        sentence=f"So far: {found.sentence}" if going_on else found.sentence,
        state="going on" if going_on else found.state,
        command=made,
        winner=found.winner,
        baseline=BASELINE,
        going_on=going_on,
        objective=spec.objective.kind,
        spec=spec.kept(),
        runs=runs,
        places=() if fit else tuple(places),
        noise=None if fit else noise,
        curves=_curves(done, files),
        effects=() if fit else _effects(done, spec, noise),
        fit=fit,
        forecasts=_forecasts(done, files),
        ledger=_ledger(list(files.values())),
        interruption=interruption_of(list(files.values())),
        differences=_differences(spec, trials, files, titles),
        prices=_prices(list(files.values())),
        questions=sweep_questions(fit, spec, done) if fit else open_questions(spec, trials, places, noise, found),
        reproduce=reproduced(f"python jobs/search.py {SPEC}", spec.name),
        facts=facts_of(list(files.values())) | {"seeds": ", ".join(map(str, spec.seeds))},
        notes=_notes(trials, going_on),
    )


def _verdict(done: Sequence[tuple[Trial, Outcome]], places: Sequence[Place], objective: Objective) -> Finding:
    fresh: dict[str, dict[int, float | None]] = {}
    for trial, outcome in done:
        if trial.role == "confirmation":
            fresh.setdefault(trial.arm, {})[trial.seed] = objective.score(outcome)
    rivals = {arm: scores for arm, scores in fresh.items() if arm != BASELINE}
    compared = sum(place.place is not None and place.arm != BASELINE for place in places)
    confirmations = confirm(rivals, fresh.get(BASELINE, {}), compared=compared)
    made = verdict(places, confirmations, baseline=BASELINE)
    return Finding(winner=made.winner, state=made.state, sentence=made.sentence)


def _winner_settings(trials: Found, arm: str) -> Mapping[str, Any]:
    own = [
        trial.settings for trial, _ in trials if trial.arm == arm and trial.role in ("trial", "confirmation", "fork")
    ]
    return {name: value for name, value in own[0].items() if name != "perturbation"} if own else {}


def _curves(done: Sequence[tuple[Trial, Outcome]], files: Mapping[str, RunFiles]) -> tuple[Curve, ...]:
    """One curve per configuration: of its first seed, at the highest rung that it has."""
    best: dict[str, tuple[Trial, Outcome]] = {}
    for trial, outcome in done:
        if trial.tag in files and trial.role in ("trial", "fork"):
            held = best.get(trial.arm)
            if held is None or trial.rung > held[0].rung:
                best[trial.arm] = trial, outcome
    made = [curve_of(files[trial.tag], title=trial.title, arm=trial.arm) for trial, _ in best.values()]
    return tuple(curve for curve in made if curve is not None)


def _effects(done: Sequence[tuple[Trial, Outcome]], spec: SearchSpec, noise: Noise) -> tuple[Any, ...]:
    """At the highest rung alone at which two configurations finished: shorter runs have another score."""
    by_rung: dict[float, list[Run]] = {}
    for trial, outcome in done:
        score = spec.objective.score(outcome)
        if score is not None and trial.role in ("trial", "fork"):
            by_rung.setdefault(trial.rung, []).append(Run(settings=trial.settings, seed=trial.seed, score=score))
    for rung in sorted(by_rung, reverse=True):
        found = effects(by_rung[rung], base=spec.base_config.flat(), noise_sd=noise.sd)
        if found:
            return tuple(found)
    return ()


def _report_run(spec: SearchSpec, trial: Trial, outcome: Outcome | None, files: RunFiles | None) -> ReportRun:
    """With the shape that it ran in among its facts."""
    if outcome is None:
        return ReportRun(trial=trial, running=files is not None and files.live)
    base = spec.base_config.flat()
    shape = {name: base[name] for name in ("depth", "device_batch_size")}
    facts = shape | dict(outcome.facts) | {name: v for name, v in trial.settings.items() if name in shape}
    return ReportRun(trial=trial, outcome=replace(outcome, facts=facts))


def _forecasts(done: Sequence[tuple[Trial, Outcome]], files: Mapping[str, RunFiles]) -> tuple[Forecast, ...]:
    made = [forecast_of(files[t.tag], number=t.number, title=t.title or "baseline") for t, _ in done if t.tag in files]
    return tuple(forecast for forecast in made if forecast)


def _ledger(files: Sequence[RunFiles]) -> dict[str, float]:
    books = [found.ledger.accounts() for found in files]
    return {account: sum(book[account] for book in books) for account in books[0]} if books else {}


def _prices(files: Sequence[RunFiles]) -> tuple[Price, ...]:
    return tuple(dict.fromkeys(price for found in files if (price := price_of(found))))


def _differences(
    spec: SearchSpec, trials: Found, files: Mapping[str, RunFiles], titles: Mapping[str, str]
) -> tuple[Difference, ...]:
    """Settings that differ from the base, and what the rules made of them, at the full horizon."""
    base, rows = spec.base_config.flat(), {}
    derived: dict[str, dict[str, Any]] = {}
    for trial, _ in trials:
        for name, value in trial.settings.items():
            if name != "perturbation" and base.get(name) != value:
                rows.setdefault(name, {})[titles[trial.arm]] = str(value)
        if trial.tag in files and trial.rung == 1:
            derived[trial.arm] = files[trial.tag].config.get("recipe") or {}
    found = [Difference(setting=f"--{n.replace('_', '-')}", base=str(base.get(n)), values=v) for n, v in rows.items()]
    own = derived.get(BASELINE, {})
    for name in DERIVED:
        other = {titles[arm]: _digits(r[name]) for arm, r in derived.items() if name in r and r[name] != own.get(name)}
        if name in own and other:
            label = f"{name.replace('_', ' ')} (by the rules)"
            found.append(Difference(setting=label, base=_digits(own[name]), values=other))
    return tuple(found)


def _digits(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _notes(trials: Found, going_on: bool) -> tuple[str, ...]:
    notes, done = [], [(trial, outcome) for trial, outcome in trials if outcome is not None]
    if len(done) < len(trials) and not going_on:
        left = words.plural(len(trials) - len(done), "run")
        notes.append(f"The search was interrupted: {left} without a result. jobs/search.py --resume goes on with it.")
    if any(trial.role == "fork" for trial, _ in done):
        notes.append("Forks start from one checkpoint of a common trunk: cost and time of a fork are those after it.")
    if any(trial.rung < 1 for trial, _ in done):
        notes.append("Rungs below 1 are complete shorter runs with their own schedule, not prefixes of longer ones.")
    if any(o.core_metric is not None for _, o in done):
        notes.append("CORE is reported and not optimised: its noise is about 1%.")
    return tuple(notes)
