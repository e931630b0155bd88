"""Pictures of what follows from the runs: effects of parameters, scaling laws, the hardware."""

import math
from collections.abc import Callable, Sequence

from raychat.search.effects import Effect
from raychat.search.fits import ScalingFit
from raychat.search.iso_flops import BudgetOptimum
from raychat.search.report import words
from raychat.search.report.axes import Axis, axis, decimals, linear_ticks
from raychat.search.report.contents import ReportContents
from raychat.search.report.palette import OWN_COLOURS, Figure, Key
from raychat.search.report.svg import DIGIT, Picture
from raychat.search.report.tables import Shape, hardware_shapes

ERRORS = 2.0
"""standard errors that a bar reaches to each side"""


def effect_pictures(contents: ReportContents) -> list[Figure]:
    """The difference that each value of each parameter makes, with its noise, one row for each."""
    effects = contents.effects
    if not effects:
        return []
    reach = [abs(e.difference) + ERRORS * (e.standard_error or 0.0) for e in effects]
    noise = contents.noise.sd if contents.noise and contents.noise.sd else 0.0
    # a bar that nothing is known of must not squeeze all others together
    span = max(*(min(r, 4 * abs(e.difference) or r) for r, e in zip(reach, effects, strict=True)), noise, 1e-5) * 110
    ticks = linear_ticks(-span, span, 4)
    x = Axis(
        label="change of the score (percent, less is better)", low=-span, high=span, ticks=ticks, show=decimals(ticks)
    )
    wide, narrow = (_effects(effects, x, noise, size) for size in (920, 420))
    against = {e.parameter.replace("_", "-"): e.against for e in effects}
    note = "Against " + ", ".join(f"{name} {value}" for name, value in against.items()) + ". "
    note += "Bars reach two standard errors to each side; gray: no more than the noise."
    keys = [Key("noise", "standard deviation of two equal runs", "line")] if noise else []
    return [Figure(title="Effect of each parameter", svg=wide, narrow=narrow, keys=keys, note=note, wide=True)]


def _effects(effects: Sequence[Effect], x: Axis, noise: float, width: float) -> str:
    names = [f"{e.parameter.replace('_', '-')} {e.value}" for e in effects]
    worst = max(effects, key=lambda e: abs(e.difference))
    picture = Picture(
        title="Effect of each parameter",
        summary=f"{len(effects)} comparisons; the largest: {worst.parameter} {worst.value} against {worst.against}, "
        f"{words.share(worst.difference)}.",
        x=x,
        y=Axis(label="", low=-0.6, high=len(effects) - 0.4, ticks=(), show=str),
        name=f"effects-{width:g}",
        width=width,
        height=70 + 26 * len(effects),
        y_ticks=False,
        left=min(width * 0.42, 24 + DIGIT * max(map(len, names))),
    )
    if noise:
        picture.band(
            [(-100 * noise, picture.y.low, picture.y.high), (100 * noise, picture.y.low, picture.y.high)], "noise"
        )
    picture.upright(0.0, "zero")
    for n, (effect, name) in enumerate(zip(effects, names, strict=True)):
        _effect(picture, effect, name, len(effects) - 1 - n)
    return picture.render()


def _effect(picture: Picture, effect: Effect, name: str, row: int) -> None:
    percent, span = 100 * effect.difference, picture.x.high
    error = 100 * ERRORS * (effect.standard_error or 0.0)
    sure = effect.standard_error is not None and abs(percent) > error
    style = ("c-good" if percent < 0 else "c-bad") if sure else "c-muted"
    pairs = words.plural(effect.runs, "pair" if effect.paired else "run")
    spread = "" if effect.standard_error is None else f" ± {error:.2g}%"
    tip = f"{name} against {effect.against}: {words.share(effect.difference)}{spread} ({pairs})"
    if error:
        picture.bar(row, max(percent - error, -span), min(percent + error, span), style, tip)
    picture.dot(max(-span, min(span, percent)), row, style, tip)
    picture.row_name(row, name)


def scaling_pictures(contents: ReportContents) -> list[Figure]:
    """The parabola of each FLOPs budget, and the laws through their lowest points."""
    fit = contents.fit
    if fit is None or not fit.optima:
        return []
    made = [_parabolas(fit)]
    if fit.parameters and fit.tokens:
        made.append(_laws(fit))
    return made


def _parabolas(fit: ScalingFit) -> Figure:
    points = [point for optimum in fit.optima for point in optimum.points]
    found = sum(not optimum.refusal for optimum in fit.optima)
    picture = Picture(
        title="Loss against size, for each FLOPs budget",
        summary=f"{words.plural(len(fit.optima), 'budget')}, of which {found} have a lowest point between their models.",
        x=axis([p.parameters for p in points], "parameters", show=words.count, log=True),
        y=axis([p.loss for p in points], "val_bpb (bits per byte)"),
        name="parabolas",
        height=320,
    )
    keys = []
    for n, optimum in enumerate(fit.optima):
        style = f"c-{n % OWN_COLOURS}"
        if optimum.curve is not None:
            picture.line([(x, _held(optimum.curve_at(x), picture.y)) for x in _between(optimum)], style + " thin")
        for point in optimum.points:
            tip = f"{point.budget:.3g} FLOPs, {words.count(point.parameters)} parameters: {point.loss:.4f}"
            picture.dot(point.parameters, point.loss, style, tip, radius=3.5)
        if optimum.parameters is not None and optimum.loss is not None:
            tip = f"lowest of {optimum.budget:.3g} FLOPs: {words.count(optimum.parameters)}, {optimum.loss:.4f}"
            picture.dot(optimum.parameters, optimum.loss, style + " hollow", tip, shape="diamond", radius=6)
        why = f" ({optimum.refusal.split(':')[0]})" if optimum.refusal else ""
        keys.append(Key(style, f"{words.flops(optimum.budget)} FLOPs{why}"))
    return Figure(title=picture.title, svg=picture.render(), keys=keys, note="Diamonds: the lowest point of a budget.")


def _held(value: float, along: Axis) -> float:
    return min(max(value, along.low), along.high)


def _between(optimum: BudgetOptimum) -> list[float]:
    low, high = (math.log(optimum.points[end].parameters) for end in (0, -1))
    return [math.exp(low + (high - low) * n / 30) for n in range(31)]


def _laws(fit: ScalingFit) -> Figure:
    able = [o for o in fit.optima if o.parameters is not None and o.tokens is not None]
    budgets = [o.budget for o in able]
    values = [v for o in able for v in (o.parameters, o.tokens) if v is not None]
    picture = Picture(
        title="Compute-optimal parameters and tokens",
        summary="; ".join(law_words(fit)),
        x=axis(budgets, "training compute (FLOPs)", show=words.flops, log=True, room=0.1),
        y=axis(values, "parameters, tokens", show=words.count, log=True),
        name="laws",
        height=320,
    )
    for law, style, pick in (
        (fit.parameters, "c-0", lambda o: o.parameters),
        (fit.tokens, "c-1", lambda o: o.tokens),
    ):
        if law is not None:
            ends = [min(budgets), max(budgets)]
            picture.line([(c, _held(law.at(c), picture.y)) for c in ends], style)
            for optimum in able:
                tip = f"{optimum.budget:.3g} FLOPs: {words.count(pick(optimum))}"
                picture.dot(optimum.budget, pick(optimum), style, tip)
    keys = [Key(f"c-{n}", text, "line") for n, text in enumerate(law_words(fit))]
    return Figure(title=picture.title, svg=picture.render(), keys=keys, note=fit.refusal)


def law_words(fit: ScalingFit) -> list[str]:
    """The laws with their intervals."""
    said = []
    for law, name in ((fit.parameters, "parameters"), (fit.tokens, "tokens")):
        if law is not None:
            found = law.exponent_interval
            interval = f" (95%: {found.low:.2f} to {found.high:.2f})" if found else ""
            said.append(f"{name} ~ C^{law.exponent:.2f}{interval}")
    return said


def hardware_pictures(contents: ReportContents) -> list[Figure]:
    """Device batch against MFU (throughput where the peak is not known), step time and memory, one line per depth."""
    shapes = [shape for shape in hardware_shapes(contents) if shape.batch is not None]
    if len(shapes) < 2:
        return []
    mfu = any(shape.mfu is not None for shape in shapes)
    wanted: list[tuple[str, str, Callable[[Shape], float | None], Callable[[float], str] | None]] = [
        ("MFU", "MFU (percent of peak)", lambda s: s.mfu, None)
        if mfu
        else ("Throughput", "tokens per second", lambda s: s.tok_per_sec, words.count),
        ("Step time", "step (milliseconds)", lambda s: None if s.step_s is None else s.step_s * 1e3, None),
        ("Memory", "peak memory (GB)", lambda s: None if s.memory is None else s.memory / 1e9, None),
    ]
    figures = [_by_batch(shapes, *what) for what in wanted]
    return [figure for figure in figures if figure is not None]


def _by_batch(
    shapes: Sequence[Shape],
    title: str,
    label: str,
    value: Callable[[Shape], float | None],
    show: Callable[[float], str] | None,
) -> Figure | None:
    found = [(shape, y) for shape in shapes if (y := value(shape)) is not None]
    if len(found) < 2:
        return None
    batches = sorted({shape.batch for shape in shapes if shape.batch is not None})
    columns = {batch: float(n) for n, batch in enumerate(batches)}
    picture = Picture(
        title=f"{title} by device batch",
        summary=", ".join(f"{shape.title} {y:.4g}" for shape, y in found[:12]),
        x=Axis(
            label="device batch (sequences)",
            low=-0.5,
            high=len(batches) - 0.5,
            ticks=tuple(columns.values()),
            show=lambda n: str(batches[round(n)]),
        ),
        y=axis([y for _, y in found], label, show=show, zero=True, room=0.12),
        name=f"hardware-{title.lower().replace(' ', '-')}",
        width=380,
        height=260,
    )
    depths = sorted({shape.depth for shape, _ in found}, key=lambda d: d or 0)
    keys = []
    for n, depth in enumerate(depths):
        style = f"c-{n % OWN_COLOURS}"
        line = [(columns[shape.batch or 0], y, shape) for shape, y in found if shape.depth == depth]
        if len(line) > 1:
            picture.line([(x, y) for x, y, _ in line], style + " thin")
        for x, y, shape in line:
            works = shape.status == "works"
            picture.dot(x, y, style, f"{shape.title}: {y:.4g} ({shape.status})", shape="circle" if works else "cross")
        keys.append(Key(style, "all depths" if depth is None else f"depth {depth}"))
    return Figure(title=picture.title, svg=picture.render(), keys=keys, third=True)
