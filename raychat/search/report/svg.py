"""Pictures as inline SVG: text stays text, and colours are names that the page's style gives a value, light or dark."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from raychat.search.report.axes import Axis

DIGIT = 6.4
"""width of a character of a tick, about; text is measured nowhere else"""
BOLD = 7.4
"""the same for the labels of marks"""
Anchor = Literal["start", "middle", "end"]
Spot = tuple[float, float]


@dataclass
class Picture:
    """A frame with axes into which marks are drawn, in the order of the calls."""

    title: str
    summary: str
    """what a reader who cannot see it must know"""
    x: Axis
    y: Axis
    name: str
    """unique in the page"""
    width: float = 420
    height: float = 290
    y_ticks: bool = True
    left: float = 0.0
    marks: list[str] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)
    """boxes that labels must keep off: x0, y0, x1, y1"""

    def __post_init__(self) -> None:
        shown = [self.y.show(tick) for tick in self.y.ticks] if self.y_ticks else []
        self.left = self.left or 32 + DIGIT * max(map(len, shown), default=0)
        self.top, self.right, self.bottom = 12.0, 16.0, 44.0

    def at(self, x: float, y: float) -> Spot:
        """Where a value lies in the picture."""
        across, up = self.width - self.left - self.right, self.height - self.top - self.bottom
        return self.left + across * self.x.place(x), self.top + up * (1 - self.y.place(y))

    def line(self, points: Sequence[Spot], style: str, tip: str = "", *, stairs: bool = False) -> None:
        """A line through values, sorted by x; `stairs`: level until the next point."""
        spots = [self.at(x, y) for x, y in points]
        if stairs:
            spots = [spot for a, b in zip(spots, spots[1:], strict=False) for spot in (a, (b[0], a[1]))] + spots[-1:]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        self.marks.append(f'<path class="line {style}" d="{path}">{_tip(tip)}</path>')

    def dot(self, x: float, y: float, style: str, tip: str = "", *, radius: float = 4.5, shape: str = "circle") -> None:
        """A mark at a value: circle, diamond or cross."""
        across, down = self.at(x, y)
        r = radius
        self.taken.append((across - r, down - r, across + r, down + r))
        if shape == "circle":
            mark = f'<circle class="dot {style}" cx="{across:.1f}" cy="{down:.1f}" r="{r:g}">{_tip(tip)}</circle>'
        else:
            r *= 1.15
            corners = {
                "diamond": f"M0 {-1.2 * r:.1f}L{1.2 * r:.1f} 0L0 {1.2 * r:.1f}L{-1.2 * r:.1f} 0Z",
                "cross": f"M{-r:.1f} {-r:.1f}L{r:.1f} {r:.1f}M{-r:.1f} {r:.1f}L{r:.1f} {-r:.1f}",
            }[shape]
            kind = "line" if shape == "cross" else "dot"
            move = f"translate({across:.1f} {down:.1f})"
            mark = f'<path class="{kind} {style}" d="{corners}" transform="{move}">{_tip(tip)}</path>'
        self.marks.append(mark)

    def bar(self, y: float, low: float, high: float, style: str, tip: str = "") -> None:
        """An error bar beside a mark: a level line with ends."""
        (x0, down), (x1, _) = self.at(low, y), self.at(high, y)
        ends = f"M{x0:.1f} {down:.1f}H{x1:.1f}M{x0:.1f} {down - 4:.1f}v8M{x1:.1f} {down - 4:.1f}v8"
        self.marks.append(f'<path class="line {style}" d="{ends}">{_tip(tip)}</path>')

    def band(self, points: Sequence[tuple[float, float, float]], style: str) -> None:
        """An area between (x, low, high)."""
        upper = [self.at(x, high) for x, _, high in points]
        lower = [self.at(x, low) for x, low, _ in reversed(points)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in upper + lower)
        self.marks.append(f'<path class="band {style}" d="M{path}Z"/>')

    def upright(self, x: float, style: str) -> None:
        """A line from top to bottom."""
        across, _ = self.at(x, self.y.low)
        self.marks.append(
            f'<path class="line {style}" d="M{across:.1f} {self.top:.1f}V{self.height - self.bottom:.1f}"/>'
        )

    def label(self, x: float, y: float, text: str, style: str = "") -> bool:
        """Write `text` beside a value where nothing lies yet; False when there is no such place."""
        across, down = self.at(x, y)
        wide = len(text) * BOLD
        below, level, above = down + 16, down + 4, down - 8
        places: list[tuple[float, float, Anchor]] = [  # below first: a front comes from above and leaves to the right
            (across - 7, below, "end"),
            (across, down + 18, "middle"),
            (across + 7, below, "start"),
            (across - 10, level, "end"),
            (across + 7, above, "start"),
            (across + 10, level, "start"),
            (across - 7, above, "end"),
        ]
        for left, base, anchor in places:
            x0 = left - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = (x0 - 3, base - 10, x0 + wide + 3, base + 3)
            if self._free(box):
                self.taken.append(box)
                self.marks.append(
                    f'<text class="{style}" x="{left:.1f}" y="{base:.1f}" {_anchor(anchor)}>{escape(text)}</text>'
                )
                return True
        return False

    def row_name(self, y: float, text: str, style: str = "") -> None:
        """The name of a row, left of the frame."""
        _, down = self.at(self.x.low, y)
        self.marks.append(
            f'<text class="{style}" x="{self.left - 10:.1f}" y="{down + 4:.1f}" {_anchor("end")}>{escape(text)}</text>'
        )

    def render(self) -> str:
        """The whole picture."""
        size = f'viewBox="0 0 {self.width:g} {self.height:g}"'
        head = f'<svg {size} role="img" aria-labelledby="{self.name}-t {self.name}-d">'
        names = f'<title id="{self.name}-t">{escape(self.title)}</title><desc id="{self.name}-d">{escape(self.summary)}</desc>'
        return head + names + self._frame() + "".join(self.marks) + "</svg>"

    def _free(self, box: tuple[float, float, float, float]) -> bool:
        x0, y0, x1, y1 = box
        if x0 < self.left + 2 or x1 > self.width - 2 or y0 < 2 or y1 > self.height - self.bottom - 2:
            return False
        return all(x1 < a or x0 > c or y1 < b or y0 > d for a, b, c, d in self.taken)

    def _frame(self) -> str:
        floor, end = self.height - self.bottom, self.width - self.right
        parts = []
        for tick in self._kept_ticks():
            across, _ = self.at(tick, self.y.low)
            parts.append(f'<path class="grid" d="M{across:.1f} {self.top:g}V{floor:g}"/>')
            parts.append(_text(across, floor + 17, self.x.show(tick), "middle"))
        for tick in self.y.ticks if self.y_ticks else ():
            _, down = self.at(self.x.low, tick)
            parts.append(f'<path class="grid" d="M{self.left:.1f} {down:.1f}H{end:g}"/>')
            parts.append(_text(self.left - 7, down + 4, self.y.show(tick), "end"))
        parts.append(f'<path class="axis" d="M{self.left:.1f} {floor:g}H{end:g}"/>')
        middle = (self.left + end) / 2
        parts.append(_text(middle, self.height - 8, self.x.label, "middle", "axis-label"))
        if self.y.label:
            half = (self.top + floor) / 2
            turned = f'transform="rotate(-90 13 {half:g})"'
            parts.append(
                f'<text class="axis-label" x="13" y="{half:g}" {_anchor("middle")} {turned}>{escape(self.y.label)}</text>'
            )
        return "".join(parts)

    def _kept_ticks(self) -> list[float]:
        """Ticks of the x axis whose words do not run into each other or out of the picture."""
        kept: list[float] = []
        last = -1e9
        for tick in self.x.ticks:
            across, _ = self.at(tick, self.y.low)
            half = len(self.x.show(tick)) * DIGIT / 2
            if across - half > last + 6 and across + half < self.width:
                kept.append(tick)
                last = across + half
        return kept


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _anchor(anchor: Anchor) -> str:
    return f'text-anchor="{anchor}"'


def _text(x: float, y: float, text: str, anchor: Anchor, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" {_anchor(anchor)}>{escape(text)}</text>'
