"""Pictures of what was found: cost against val_bpb, and how the runs went."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raychat.search.report import words
from raychat.search.report.axes import Axis, axis, money_axis
from raychat.search.report.contents import Curve, Point, ReportContents, ReportRun
from raychat.search.report.palette import MUTED, Figure, Key, arm_keys, arm_styles, arm_titles
from raychat.search.report.svg import Picture

CURVE_POINTS = 160
"""of a curve that are drawn: more than that a screen does not show"""


@dataclass(frozen=True)
class _Result:
    run: ReportRun
    spent: float
    val_bpb: float


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, loss) that no other one undercuts in both, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(set(points)):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def spending_picture(contents: ReportContents) -> list[Figure]:
    """val_bpb against dollars, or against time where nothing has a price; none with fewer than two results."""
    priced = contents.cost_usd is not None
    hours, unit = time_unit([run.outcome.wall_s or 0.0 for run in contents.runs if run.outcome])
    results = []
    for run in contents.runs:
        if run.outcome and run.outcome.val_bpb is not None and run.outcome.status == "finished":
            wall = None if run.outcome.wall_s is None else run.outcome.wall_s / hours
            spent = run.outcome.cost_usd if priced else wall
            if spent is not None and spent > 0:
                results.append(_Result(run, spent, run.outcome.val_bpb))
    if len(results) < 2:
        return []
    values = [r.spent for r in results]
    x = (
        money_axis(values, "cost of the run (dollars)", log=True)
        if priced
        else axis(values, f"wall time ({unit})", log=True)
    )
    y = axis([r.val_bpb for r in results], "val_bpb (bits per byte)", room=0.1)
    wide, narrow = (_spending(contents, results, x, y, size) for size in ((920, 380), (430, 330)))
    arms = {result.run.trial.arm for result in results}
    keys = [Key("front", "Pareto front: nothing is both cheaper and better", "line"), *arm_keys(contents, arms, "dot")]
    if any(result.run.trial.rung < 1 for result in results):
        keys.append(Key(MUTED, "hollow: a shorter run of a lower rung", "ring"))
    return [
        Figure(
            title=f"{'Cost' if priced else 'Time'} against val_bpb",
            svg=wide,
            narrow=narrow,
            keys=keys,
            wide=True,
            note="Lower left is better. Each mark is a finished run; its words show under the pointer.",
        )
    ]


def _spending(contents: ReportContents, results: Sequence[_Result], x: Axis, y: Axis, size: tuple[int, int]) -> str:
    styles, titles = arm_styles(contents), arm_titles(contents)
    front = pareto_front([(r.spent, r.val_bpb) for r in results])
    best = min(results, key=lambda r: r.val_bpb)
    picture = Picture(
        title="Cost against val_bpb" if x.label.startswith("cost") else "Time against val_bpb",
        summary=f"{words.plural(len(results), 'finished run')}; the lowest val_bpb is {words.bpb(best.val_bpb)} "
        f"({titles[best.run.trial.arm]}); {len(front)} on the Pareto front.",
        x=x,
        y=y,
        name=f"spending-{size[0]}",
        width=size[0],
        height=size[1],
    )
    stairs = [(front[0][0], y.high), *front, (x.high, front[-1][1])]
    picture.line(stairs, "front", stairs=True)
    own = (contents.winner, contents.baseline)
    for result in sorted(results, key=lambda r: (r.run.trial.arm in own, r.spent)):
        trial = result.run.trial
        tip = f"{titles[trial.arm]}, seed {trial.seed}: val_bpb {words.bpb(result.val_bpb)}, {x.show(result.spent)}"
        style = styles[trial.arm] + (" hollow" if trial.rung < 1 else "")
        is_winner = trial.arm == contents.winner
        shape = "diamond" if is_winner else "circle"
        picture.dot(result.spent, result.val_bpb, style, tip, shape=shape, radius=6 if is_winner else 4.5)
    named: set[str] = set()
    longest = {trial.arm: trial.rung for trial in sorted((r.run.trial for r in results), key=lambda t: t.rung)}
    for result in sorted(results, key=lambda r: _importance(r, front, own)):
        trial = result.run.trial
        if trial.rung < longest[trial.arm] or (trial.arm not in own and (result.spent, result.val_bpb) not in front):
            continue
        arm = result.run.trial.arm
        if arm not in named and picture.label(result.spent, result.val_bpb, titles[arm], "mark-label"):
            named.add(arm)
    return picture.render()


def _importance(
    result: _Result, front: Sequence[tuple[float, float]], own: Sequence[str]
) -> tuple[int, float, bool, float]:
    """Which mark gets its words first: the two that the verdict is about, then the front; full runs before shorter ones."""
    trial = result.run.trial
    return (
        own.index(trial.arm) if trial.arm in own else len(own),
        -trial.rung,
        (result.spent, result.val_bpb) not in front,
        result.val_bpb,
    )


def curve_pictures(contents: ReportContents) -> list[Figure]:
    """Training loss and val_bpb over tokens and over dollars (hours where nothing has a price)."""
    drawn = [curve for curve in contents.curves if len(curve.loss) > 1 or len(curve.val_bpb) > 1]
    if not drawn:
        return []
    priced = any(point.dollars is not None for curve in drawn for point in curve.loss or curve.val_bpb)
    hours = [point.hours for curve in drawn for point in (*curve.loss, *curve.val_bpb)]
    divisor, unit = time_unit([hour * 3600 for hour in hours])

    def over_tokens(values: Sequence[float]) -> Axis:
        return axis(values, "tokens", show=words.count, zero=True, room=0.03)

    def over_spending(values: Sequence[float]) -> Axis:
        made = money_axis if priced else axis
        return made(values, "dollars" if priced else f"wall time ({unit})", zero=True)

    def spent(point: Point) -> float | None:
        return point.dollars if priced else point.hours * 3600 / divisor

    over = "dollars" if priced else "time"
    figures = [
        _curves(contents, drawn, "loss", f"Training loss over {name}", value, make)
        for name, value, make in (("tokens", lambda p: p.tokens, over_tokens), (over, spent, over_spending))
    ] + [
        _curves(contents, drawn, "val_bpb", f"val_bpb over {name}", value, make)
        for name, value, make in (("tokens", lambda p: p.tokens, over_tokens), (over, spent, over_spending))
    ]
    return [figure for figure in figures if figure is not None]


def _curves(
    contents: ReportContents,
    curves: Sequence[Curve],
    what: str,
    title: str,
    value: Callable[[Point], float | None],
    make: Callable[[Sequence[float]], Axis],
) -> Figure | None:
    lines = []
    for curve in curves:
        points = [(value(p), p.value) for p in (curve.loss if what == "loss" else trained(curve.val_bpb))]
        kept = thinned([(x, y) for x, y in points if x is not None])
        if len(kept) > 1:
            lines.append((curve, kept))
    if not lines:
        return None
    styles, titles = arm_styles(contents), arm_titles(contents)
    label = "loss (nats per token)" if what == "loss" else "val_bpb (bits per byte)"
    ends = ", ".join(f"{curve.title} {points[-1][1]:.4g}" for curve, points in lines[:8])
    picture = Picture(
        title=title,
        summary=f"{words.plural(len(lines), 'run')}. At the end: {ends}.",
        x=make([x for _, points in lines for x, _ in points]),
        y=axis(_without_start([[y for _, y in points] for _, points in lines]), label),
        name=title.lower().replace(" ", "-").replace("_", "-"),
    )
    own = (contents.baseline, contents.winner)
    for curve, points in sorted(lines, key=lambda line: own.index(line[0].arm) if line[0].arm in own else -1):
        inside = [point for point in points if point[1] <= picture.y.high]
        dashed = " dashed" if curve.arm == contents.baseline != contents.winner else ""
        tip = f"{titles[curve.arm]} ({curve.tag}): {points[-1][1]:.4f} at the end"
        picture.line(inside, f"{styles[curve.arm]}{dashed}", tip)
        if len(points) <= 12:
            for x, y in inside:
                picture.dot(x, y, styles[curve.arm], f"{titles[curve.arm]}: {y:.4f}", radius=2.6)
    keys = arm_keys(contents, {curve.arm for curve, _ in lines}, "line") if len(lines) > 1 else []
    note = "Moving average over ten steps, about." if what == "loss" else ""
    return Figure(title=title, svg=picture.render(), keys=keys, note=note)


def trained(points: Sequence[Point]) -> Sequence[Point]:
    """Without the evaluation of the untrained model, which would flatten all others."""
    return [point for point in points if point.tokens > 0] if len(points) > 2 else points


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """About CURVE_POINTS of `points`, evenly spaced, the first and the last among them."""
    every = max(1, math.ceil(len(points) / CURVE_POINTS))
    return [*points[:-1:every], *points[-1:]]


def _without_start(lines: Sequence[Sequence[float]]) -> list[float]:
    """Values that the axis must hold: of long curves not the first twentieth, which would flatten all that follows."""
    return [y for line in lines for y in (line[len(line) // 20 :] if len(line) > 40 else line)]


def time_unit(seconds: Sequence[float]) -> tuple[float, str]:
    """Seconds in the unit that suits the longest of them, and its name."""
    longest = max(seconds, default=0.0)
    return (3600.0, "hours") if longest >= 5400 else (60.0, "minutes") if longest >= 120 else (1.0, "seconds")
