"""Format numbers for people."""

from __future__ import annotations

import math

_PREFIXES = ["", "k", "M", "G", "T", "P", "E"]
MISSING = "\N{EN DASH}"
NOT_FINITE = "not finite"
"""What is shown of NaN and of infinity."""


def si(value: float | None, unit: str = "") -> str:
    """Format with three significant digits and a decimal prefix: `12.3 M`, `4.5 GFLOP`, `2.1 MB`, `300`."""
    if value is None or not math.isfinite(value):
        return MISSING if value is None else NOT_FINITE
    power = 0
    # 999.5 would round to 1000 of the smaller unit.
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if float(value).is_integer() or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    text = f"{value:.{digits}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"{text} {_PREFIXES[power]}{unit}".strip()


def decimal(value: float | None, digits: int = 2) -> str:
    """Format with a fixed number of decimals; None gives a dash."""
    if value is None or not math.isfinite(value):
        return MISSING if value is None else NOT_FINITE
    return f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Format a fraction as a percentage with one decimal; None gives a dash."""
    if value is None or not math.isfinite(value):
        return MISSING if value is None else NOT_FINITE
    return f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Format seconds as `6.5 s`, `4 min 05 s` or `2 h 03 min`; None gives a dash."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: `1 client`, `3 clients`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
