"""Numbers and names as a reader sees them. GB are 1e9 bytes, MB 1e6."""

from __future__ import annotations

from reports.statistics import Ratio


def plain(text: str) -> str:
    """Without control characters: a name or message cannot move the cursor, colour the screen or break XML."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text.expandtabs(4).replace("\r\n", "\n"))


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1, 1e3, "ms")):
        if value < limit:
            return f"{_three(value * factor)} {unit}"
    return f"{_three(value)} s" if value < 1000 else f"{value:,.0f} s"


def size(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, factor, unit in ((1e3, 1, "B"), (1e6, 1e3, "kB"), (1e9, 1e6, "MB")):
        if value < limit:
            return f"{_three(value / factor)} {unit}" if factor > 1 else f"{value:.0f} B"
    return f"{_three(value / 1e9)} GB"


def parameters(value: float) -> str:
    """A count of parameters as model names have it: 600M, 8B."""
    factor, unit = next(((f, u) for f, u in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if value >= f), (1, ""))
    return f"{value / factor:.3g}{unit}"


def rate(value: float | None) -> str:
    """GB/s without the unit, which stands in the heading."""
    return "-" if value is None else _three(value)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.3g}%" if value < 0.1 else f"{value * 100:.0f}%"


def ratio(found: Ratio | None) -> str:
    """The ratio of medians with its interval: x1.20 [1.15, 1.26]."""
    if found is None or found.ratio is None:
        return "-"
    return f"x{found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}]"


def p_value(found: Ratio | None) -> str:
    if found is None or found.p is None:
        return "-"
    return "<0.001" if found.p < 0.001 else f"{found.p:.3f}"


def counted(count: int, noun: str, plural: str = "") -> str:
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def _three(value: float) -> str:
    """Three digits, never in exponent notation."""
    if value == 0 or value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.2g}"
