"""Sizes as people write them: "20GiB", "20G" (the same), "512 MiB", "1.5e9", 4096."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1}
for _i, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter + "B"] = 1000**_i
    _UNITS[_letter + "IB"] = 1024**_i
    _UNITS[_letter] = 1024**_i  # as docker and systemd have it
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(value: int | float | str, what: str = "size") -> int:
    """Returns a number of bytes.

    Raises:
        ValueError: `value` is not a non-negative number with an optional unit (KB, KiB or K, ... TB, TiB or T).
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        match = _PATTERN.fullmatch(str(value))
        if match is None:
            raise ValueError(f"{what}={value!r} is not a size; write a number of bytes or, for example, '20GiB'")
        number, unit = float(match[1]), match[2].upper()
    if unit not in _UNITS or not 0 <= number < float("inf"):
        raise ValueError(f"{what}={value!r} is not a size; units are {', '.join(u for u in _UNITS if u)}")
    return int(number * _UNITS[unit])


def format_size(nbytes: float) -> str:
    """Returns `nbytes` with at least three significant figures in a binary unit."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(nbytes) < 1024:
            break
        nbytes, unit = nbytes / 1024, larger
    return f"{nbytes:.0f} {unit}" if abs(nbytes) >= 999.5 else f"{nbytes:.3g} {unit}"
