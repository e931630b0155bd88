"""The picture of a range test: the loss under rising rates, and between which to search."""

import math

from raychat.search.range_plot import highest_shown
from raychat.search.range_test import RangeTest
from raychat.search.report.axes import axis
from raychat.search.report.contents import ReportContents
from raychat.search.report.palette import Figure, Key
from raychat.search.report.pictures import thinned
from raychat.search.report.svg import Picture


def range_pictures(contents: ReportContents) -> list[Figure]:
    """Loss over the multiple of the rates, on a logarithmic axis; none where nothing can be drawn."""
    test = contents.range_test
    if test is None or sum(map(math.isfinite, test.smooth)) < 2:
        return []
    wide, narrow = (_picture(test, size) for size in ((920, 360), (430, 300)))
    keys = [Key("c-muted", "loss of each step", "line"), Key("c-0", "smoothed over a tenth of the steps", "line")]
    if test.found:
        keys.append(Key("noise", f"to search: {test.found.low:.3g} to {test.found.high:.3g}", "line"))
    given = ", ".join(f"{name.replace('_', '-')} {rate:g}" for name, rate in test.rates.items())
    note = f"At 1 the rates are those given: {given}. All rise by the same factor at each step."
    return [Figure(title="Loss under rising rates", svg=wide, narrow=narrow, keys=keys, note=note, wide=True)]


def _picture(test: RangeTest, size: tuple[int, int]) -> str:
    found, top = test.found, highest_shown(test)
    points = [(x, y) for x, y in zip(test.multipliers, test.losses, strict=True) if math.isfinite(y) and y <= top]
    smooth = [(x, y) for x, y in zip(test.multipliers, test.smooth, strict=True) if math.isfinite(y) and y <= top]
    picture = Picture(
        title="Loss under rising rates",
        summary=test.sentence,
        x=axis(test.multipliers, "multiple of all rates (logarithmic)", log=True, room=0.0),
        y=axis([y for _, y in points], "training loss (nats per token)"),
        name=f"lr-range-{size[0]}",
        width=size[0],
        height=size[1],
    )
    if found:
        low, high = (min(max(bound, picture.x.low), picture.x.high) for bound in (found.low, found.high))
        picture.band([(low, picture.y.low, picture.y.high), (high, picture.y.low, picture.y.high)], "noise")
    picture.line(thinned(points), "c-muted thin")
    picture.line(thinned(smooth), "c-0", test.sentence)
    if found and found.diverges is not None:
        picture.upright(found.diverges, "c-bad dashed")
    if found:
        loss = dict(smooth)[found.lowest]
        words = f"lowest at {found.lowest:.3g}"
        picture.dot(found.lowest, loss, "c-0", f"{words}: {loss:.4f}")
        over_it = loss + 0.14 * (picture.y.high - picture.y.low)  # below it is little room, and beside it the curve
        picture.label(found.lowest, over_it, words, "mark-label")
        if found.diverges is not None:
            picture.label(found.diverges, picture.y.high, test.end, "mark-label")
    return picture.render()
