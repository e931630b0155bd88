"""What a sweep over FLOPs budgets comes to, in a sentence: there is no baseline to beat in it."""

import dataclasses
from collections.abc import Collection, Sequence

from raychat.checks import require
from raychat.search.fits import ScalingFit
from raychat.search.iso_flops import IsoFlops
from raychat.search.report import words
from raychat.search.report.contents import Finding, Question
from raychat.search.spec import BASELINE, SearchSpec
from raychat.search.trial import Outcome, Trial

BUDGET = "target_flops"
SIZES = frozenset({"depth", "aspect_ratio", "head_dim", "num_kv_heads", "device_batch_size", BUDGET})
"""settings in which sweeps may differ whose runs make one law"""


def sweep_points(spec: SearchSpec, done: Sequence[tuple[Trial, Outcome]]) -> list[IsoFlops]:
    """The runs that a law can be made from; none of a search that has no FLOPs budgets."""
    if BUDGET not in spec.space:
        return []
    base = spec.base_config.flat()[BUDGET]
    return [
        IsoFlops(budget=trial.settings.get(BUDGET, base), parameters=o.parameters, tokens=o.tokens, loss=o.val_bpb)
        for trial, o in done
        if trial.role == "trial" and trial.rung == 1 and o.status == "finished"
        if o.parameters and o.tokens and o.val_bpb
    ]


def check_same_law(spec: SearchSpec, other: SearchSpec, data: Collection[str]) -> None:
    """Refuse to put runs together that differ in more than their size and budget, or have no budgets.

    `data` are the fingerprints of what the runs of both were trained on.

    Raises:
        ConfigError: naming the settings.
    """
    for one in (spec, other):
        require(BUDGET in one.space, f"Search {one.name} has no FLOPs budgets (--iso-flops): it adds nothing to a law.")
    require(
        len(data) <= 1,
        f"Searches {spec.name} and {other.name} make no law together: their data differ ({', '.join(sorted(data))}).",
    )
    compared = {f.name for name in ("model", "horizon", "batch", "optim") for f in _fields(spec, name)}
    compared |= {"dtype", "fp8", "eval_tokens"}
    one, two = spec.base_config.flat(), other.base_config.flat()
    unlike = sorted(name for name in compared - SIZES if one[name] != two[name])
    require(
        not unlike,
        f"Searches {spec.name} and {other.name} make no law together, their runs differ in more than size and budget: "
        + ", ".join(f"{name} {one[name]} and {two[name]}" for name in unlike)
        + ".",
    )


def sweep_verdict(fit: ScalingFit, spec: SearchSpec, done: Sequence[tuple[Trial, Outcome]]) -> Finding:
    """The laws that were found, or why there are none; its winner is the best model of the largest budget."""
    base = spec.base_config.flat()[BUDGET]
    ended = [(t, o.val_bpb) for t, o in done if t.role == "trial" and o.status == "finished" and o.val_bpb is not None]
    largest = max((t.settings.get(BUDGET, base) for t, _ in ended), default=base)
    best = min((item for item in ended if item[0].settings.get(BUDGET, base) == largest), key=_loss, default=None)
    winner = best[0].arm if best else BASELINE
    if fit.parameters is None or fit.tokens is None:
        return Finding(winner=winner, state="no result", sentence=f"No scaling law: {fit.refusal}.".replace("..", "."))
    n, d = fit.parameters.exponent, fit.tokens.exponent
    ratio = fit.tokens.at(largest) / fit.parameters.at(largest)
    sentence = (
        f"Compute-optimal parameters grow as C^{n:.2f} and tokens as C^{d:.2f}: {ratio:.3g} tokens per parameter at "
        f"{words.flops(largest)} FLOPs."
    )
    state = "measured range only" if fit.refusal else "finished"
    return Finding(winner=winner, state=state, sentence=sentence)


def sweep_questions(fit: ScalingFit, spec: SearchSpec, done: Sequence[tuple[Trial, Outcome]]) -> tuple[Question, ...]:
    """Budgets without an optimum, and what one more run of them costs."""
    base = spec.base_config.flat()[BUDGET]
    asked = []
    for optimum in fit.optima:
        if optimum.refusal:
            own = [o for t, o in done if t.settings.get(BUDGET, base) == optimum.budget and o.wall_s is not None]
            dearest = max(own, key=lambda o: o.wall_s or 0.0, default=None)
            asked.append(
                Question(
                    text=f"Which size is best for {words.flops(optimum.budget)} FLOPs? ({optimum.refusal})",
                    runs=1,
                    hours=dearest.wall_s / 3600 if dearest and dearest.wall_s is not None else None,
                    cost_usd=dearest.cost_usd if dearest else None,
                )
            )
    return tuple(asked)


def _loss(item: tuple[Trial, float]) -> float:
    return item[1]


def _fields(spec: SearchSpec, group: str) -> tuple[dataclasses.Field[object], ...]:
    return dataclasses.fields(getattr(spec.base_config, group))
