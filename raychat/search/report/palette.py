"""Which colour is whose: a configuration has the same one in every picture."""

from collections.abc import Sequence
from dataclasses import dataclass

from raychat.search.report.contents import ReportContents

OWN_COLOURS = 7
"""more configurations than that: only the final baseline and the one that all are compared with have a colour"""
MUTED = "c-muted"


@dataclass(frozen=True)
class Key:
    """A line of a legend."""

    style: str
    text: str
    mark: str = "dot"
    """dot, line, dashed, diamond or ring"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with its words."""

    title: str
    svg: str
    narrow: str = ""
    """the same, drawn for a narrow page; empty: one serves both"""
    keys: Sequence[Key] = ()
    note: str = ""
    wide: bool = False
    """takes the whole width of the page"""
    third: bool = False
    """three of them stand in a row"""


def arm_styles(contents: ReportContents) -> dict[str, str]:
    """Arm -> class of its colour. The final baseline has the first, what all are compared with the second."""
    arms = list(
        dict.fromkeys(run.trial.arm for run in contents.runs if run.outcome and run.outcome.val_bpb is not None)
    )
    arms += [curve.arm for curve in contents.curves if curve.arm not in arms]
    first = [arm for arm in dict.fromkeys((contents.winner, contents.baseline)) if arm in arms]
    others = [arm for arm in arms if arm not in first]
    few = len(arms) <= OWN_COLOURS
    colours = iter(f"c-{n}" for n in range(OWN_COLOURS))
    styles = {arm: next(colours) for arm in first}
    return styles | {arm: next(colours) if few else MUTED for arm in others}


def arm_titles(contents: ReportContents) -> dict[str, str]:
    """Arm -> how a legend names it."""
    titles = {curve.arm: curve.title for curve in contents.curves}
    titles |= {run.trial.arm: run.trial.title or "baseline" for run in reversed(contents.runs)}
    return titles


def arm_keys(contents: ReportContents, arms: set[str], mark: str) -> list[Key]:
    """The legend of those of `arms` that have a colour, and of the rest together."""
    styles, titles = arm_styles(contents), arm_titles(contents)
    shown = [arm for arm in styles if arm in arms]
    keys = [Key(styles[arm], _named(arm, titles[arm], contents), mark) for arm in shown if styles[arm] != MUTED]
    others = sum(styles[arm] == MUTED for arm in shown)
    return [*keys, Key(MUTED, f"{others} other configurations", mark)] if others else keys


def _named(arm: str, title: str, contents: ReportContents) -> str:
    if contents.kind == "search" and arm == contents.winner:
        return f"{title} (final baseline)"
    if contents.kind == "search" and arm == contents.baseline and title != "baseline":
        return f"{title} (baseline)"
    return title
