"""The verdict of a search in one sentence, from the ranking and the confirmation on fresh seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raychat.search.confirmation import MIN_SEEDS, Confirmation
from raychat.search.ranking import Place

NOTHING = "Nothing beat the baseline"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a team may decide from a search."""

    winner: str
    """arm to go on with: the confirmed winner, or the baseline"""
    state: Literal["confirmed", "baseline stays", "not confirmed", "no baseline", "no result"]
    """not confirmed: something leads beyond the noise, but on too few fresh seeds; no baseline: it has no result itself"""
    sentence: str


def verdict(
    places: Sequence[Place],
    confirmations: Sequence[Confirmation],
    *,
    baseline: str,
    baseline_title: str = "the baseline",
) -> Verdict:
    """Read `places` (best first) and `confirmations`. The baseline stays unless fresh seeds confirm another arm."""
    titles = {place.arm: place.title for place in places}
    able = [place for place in places if place.place is not None]
    better = [found for found in confirmations if found.finding == "better"]
    if better:
        best = min(better, key=lambda found: found.difference or 0.0)
        title = _capital(titles.get(best.arm, best.arm))
        sentence = f"{title} beats {baseline_title} by {_share(best.difference)} ({_test(best)})."
        return Verdict(winner=best.arm, state="confirmed", sentence=sentence)
    if not able:
        ends = sorted({place.reason.split(":")[0] for place in places if place.reason})
        detail = f" ({', '.join(ends)})" if ends else ""
        return Verdict(winner=baseline, state="no result", sentence=f"No configuration has a result{detail}.")
    rivals = [place for place in able if place.arm != baseline]
    if len(rivals) == len(able):
        why = next((f" ({place.reason})" for place in places if place.arm == baseline and place.reason), "")
        sentence = f"{_capital(rivals[0].title)} is best, but {baseline_title} has no result to compare it with{why}."
        return Verdict(winner=rivals[0].arm, state="no baseline", sentence=sentence)
    if not rivals:
        why = "no other configuration has a result"
        return Verdict(winner=baseline, state="baseline stays", sentence=f"{NOTHING}: {why}.")
    tried = {found.arm: found for found in confirmations}
    leader = next((place for place in rivals if place.arm in tried), rivals[0])
    return _unconfirmed(leader, tried.get(leader.arm), baseline, len(rivals))


def _unconfirmed(leader: Place, found: Confirmation | None, baseline: str, rivals: int) -> Verdict:
    if found is not None and found.finding in ("worse", "no difference", "failed"):
        return Verdict(winner=baseline, state="baseline stays", sentence=f"{NOTHING}: {leader.title} {_failed(found)}.")
    against = leader.against_baseline
    if against is None or against.difference is None:
        sentence = f"{_capital(leader.title)} leads, but shares no seed or rung with the baseline to compare them by."
        return Verdict(winner=baseline, state="not confirmed", sentence=sentence)
    leads = against.promotes or (against.relation == "unknown" and against.difference < 0)
    if leads:
        seeds = found.seeds if found is not None else 0
        noise = f"; {against.reason}" if against.relation == "unknown" else ""
        sentence = (
            f"{_capital(leader.title)} leads the baseline by {_share(against.difference)}, but there are not enough seeds to "
            f"confirm it: {seeds} fresh, {MIN_SEEDS} needed{noise}."
        )
        return Verdict(winner=baseline, state="not confirmed", sentence=sentence)
    best = f"the best of {rivals} others, {leader.title}," if rivals > 1 else leader.title
    sentence = f"{NOTHING}: {best} {_standing(leader)}."
    return Verdict(winner=baseline, state="baseline stays", sentence=sentence)


def _failed(found: Confirmation) -> str:
    if found.finding == "failed":
        return "failed on a fresh seed on which the baseline has a result"
    if found.finding == "worse":
        return f"is {_share(found.difference)} worse on fresh seeds ({_test(found)})"
    direction = "better" if (found.difference or 0.0) < 0 else "worse"
    return f"is {_share(found.difference)} {direction} on fresh seeds, which may be chance ({_test(found)})"


def _standing(leader: Place) -> str:
    against = leader.against_baseline
    if against is None or against.difference is None or against.units is None:
        return "is no better"
    direction = "better" if against.difference < 0 else "worse"
    units = f"{abs(against.units):.1f} paired standard deviations"
    bar = f", where {against.limit:.1f} are needed" if against.relation == "within noise" else ""
    return f"is {_share(against.difference)} {direction} ({units}{bar})"


def _test(found: Confirmation) -> str:
    p = found.p_corrected
    shown = "p < 0.001" if p is not None and p < 0.001 else f"p = {p:.2g}"
    return f"{shown} after correction for {_count(found.compared, 'configuration')}, {found.seeds} seeds each"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _share(difference: float | None) -> str:
    """A relative difference as a person reads it, without its sign: two digits of it."""
    percent = abs(difference or 0.0) * 100
    return f"{percent:.2g}%" if percent < 10 else f"{percent:.0f}%"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
