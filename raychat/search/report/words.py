"""Figures as a person reads them. `-` is what is not known."""

from raychat.progress import format_duration

UNKNOWN = "-"


def bpb(value: float | None) -> str:
    """Bits per byte, four digits after the point."""
    return UNKNOWN if value is None else f"{value:.4f}"


def dollars(value: float | None) -> str:
    """Dollars, in cents; four digits below ten cents, where cents would say nothing."""
    if value is None:
        return UNKNOWN
    return f"${value:.4f}" if 0.00005 <= abs(value) < 0.1 else f"${value:,.2f}"


def duration(seconds: float | None) -> str:
    """As `42s`, `3m10s`, `2h05m`."""
    return UNKNOWN if seconds is None else format_duration(seconds)


def percent(value: float | None) -> str:
    """A percentage as it stands."""
    return UNKNOWN if value is None else f"{value:.0f}%" if value >= 10 else f"{value:.1f}%"


def share(value: float | None) -> str:
    """A share with its sign, in percent."""
    if value is None:
        return UNKNOWN
    size = abs(value) * 100
    if size >= 0.01:
        return f"{value * 100:+.1f}%" if size >= 10 else f"{value * 100:+.2f}%"
    return f"{value * 100:+.1g}%" if size else "0%"


def memory(size: float | None) -> str:
    """Bytes in GB of 10^9, as the documents count."""
    if size is None:
        return UNKNOWN
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def milliseconds(seconds: float | None) -> str:
    """Seconds in milliseconds."""
    return UNKNOWN if seconds is None else f"{seconds * 1e3:,.0f} ms"


def count(value: float | None) -> str:
    """A large number with a unit: `1.2M`."""
    if value is None:
        return UNKNOWN
    value = float(f"{value:.3g}")  # rounded first: 999.7 is 1K
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def flops(value: float) -> str:
    """As `3e18`."""
    return f"{value:.2g}".replace("e+", "e")


def plural(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
