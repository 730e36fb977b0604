"""Numbers as text with units; unknown ones are a dash."""

from __future__ import annotations

import math

from lora.sweep.grid import short_number

DASH = "–"


def loss_text(value: float | None, places: int = 4) -> str:
    """Return a loss in nats with `places` decimals; a diverged one in three digits."""
    if value is None or not _is_known(value):
        return DASH
    return f"{value:.{places}f}" if abs(value) < 1e4 else short(value, 3)


def signed_loss(value: float | None) -> str:
    """Return a difference of losses with its sign."""
    return DASH if not _is_known(value) else f"{value:+.4f}".replace("-", "−")


def short(value: float | None, digits: int = 6) -> str:
    """Return a number without needless digits: 3e-4, 16, 0.25."""
    if value is None or not _is_known(value):
        return DASH
    return short_number(float(f"{value:.{digits}g}"))


def count_text(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return DASH if not _is_known(value) else f"{value:,.0f}"


def parameters_text(value: float | None) -> str:
    """Return a number of parameters: 640, 305 k, 4.88 M."""
    if value is None or not _is_known(value):
        return DASH
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{figures(value / size)} {unit}"
    return f"{value:.0f}"


def figures(value: float | None, digits: int = 3) -> str:
    """Return a number to `digits` significant digits, never as a power of ten."""
    if value is None or not _is_known(value):
        return DASH
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 9)}f}"


def share_text(value: float | None) -> str:
    """Return a fraction of one in percent."""
    return DASH if value is None or not _is_known(value) else f"{figures(100 * value)} %"


def size_text(n_bytes: float | None) -> str:
    """Return a size with its unit, powers of ten."""
    if n_bytes is None or not _is_known(n_bytes):
        return DASH
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n_bytes) >= size:
            return f"{figures(n_bytes / size)} {unit}"
    return f"{n_bytes:.0f} B"


def time_text(seconds: float | None) -> str:
    """Return a span of time with its unit."""
    if seconds is None or not _is_known(seconds):
        return DASH
    if seconds >= 3600:
        return f"{figures(seconds / 3600)} h"
    return f"{figures(seconds / 60)} min" if seconds >= 300 else f"{figures(seconds)} s"


def times_text(value: float | None) -> str:
    """Return a ratio."""
    return DASH if not _is_known(value) else f"{value:.2f} ×"


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
