"""Human sizes and durations ("8GiB", "500ms") to bytes and seconds, and back."""

from __future__ import annotations

import math
import re
from typing import Final

_SIZE_UNITS: Final = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_BINARY_UNITS: Final = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_DURATION_UNITS: Final = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_NUMBER_AND_UNIT: Final = re.compile(r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-zµ]*)\s*")


def parse_size(value: object) -> int:
    """Bytes of ``value``: a whole number of bytes, or text such as "8GiB", "1.5 MiB" or "64000".

    Raises ``ValueError`` saying what would work.
    """
    hint = "write a whole number of bytes, or a number with KiB, MiB, GiB or TiB, such as 8GiB"
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"a size cannot be negative; {hint}")
        return value
    if isinstance(value, float) and value.is_integer() and value >= 0:
        return int(value)
    match = _NUMBER_AND_UNIT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"not a size; {hint}")
    number, unit = match.groups()
    if unit.lower() in {"k", "m", "g", "t", "ki", "mi", "gi", "ti"}:
        letter = unit[0].upper()
        raise ValueError(f"{unit!r} is ambiguous; write {number}{letter}iB (binary) or {number}{letter}B (decimal)")
    scale = _SIZE_UNITS.get(unit.lower())
    if scale is None:
        raise ValueError(f"{unit!r} is not a unit of size; {hint}")
    nbytes = int(number) * scale if number.isdigit() else float(number) * scale
    if nbytes == math.inf or nbytes != int(nbytes):
        raise ValueError(f"not a whole number of bytes; {hint}")
    return int(nbytes)


def parse_duration(value: object) -> float:
    """Seconds of ``value``: a number of seconds, or text such as "10s", "500ms", "2min" or "1h".

    Raises ``ValueError`` saying what would work.
    """
    hint = "write a number of seconds, or a number with us, ms, s, min or h, such as 500ms or 10s"
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
        if not math.isfinite(seconds) or seconds < 0:
            raise ValueError(f"a duration must be finite and not negative; {hint}")
        return seconds
    match = _NUMBER_AND_UNIT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"not a duration; {hint}")
    number, unit = match.groups()
    scale = _DURATION_UNITS.get(unit.lower().replace("µ", "u"))
    if scale is None:
        raise ValueError(f"{unit!r} is not a unit of time; {hint}")
    # Dividing keeps 500ms exactly 0.5 and 100ms exactly 0.1; multiplying by 1e-3 does not always.
    return float(number) / (1 / scale) if scale < 1 else float(number) * scale


def format_size(nbytes: int) -> str:
    """``nbytes`` exactly, in the largest binary unit that divides it: parses back to the same number."""
    for unit, scale in _BINARY_UNITS:
        if nbytes and nbytes % scale == 0:
            return f"{nbytes // scale}{unit}"
    return str(nbytes)


def format_duration(seconds: float) -> str:
    """``seconds`` exactly, as text that parses back to the same number."""
    if seconds and seconds < 1:
        millis = f"{seconds * 1000:g}ms"
        if parse_duration(millis) == seconds:
            return millis
    return f"{seconds:g}s" if float(f"{seconds:g}") == seconds else f"{seconds!r}s"


def approximate_size(nbytes: float) -> str:
    """``nbytes`` for a person's eye: "3.7 GiB"."""
    for unit, scale in _BINARY_UNITS:
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"
