# SPDX-License-Identifier: Apache-2.0
"""Sizes, times and rates as people write them in a configuration or on a command line. Pure."""

from __future__ import annotations

import math
import re
from decimal import Decimal

_SIZE_UNITS = {
    **{"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}
_TIME_UNITS_MS = {"ms": 1, "s": 1000, "min": 60_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_QUANTITY = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*")


def shown(value: object) -> str:
    """What somebody wrote, for an error: bounded, on one line."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def parse_size(value: object) -> int:
    """Bytes of `512MiB`, `10GB`, 4096. ValueError says what is expected."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        unit = _SIZE_UNITS.get(match[2].upper() or "B")
        if unit is not None:
            return int(Decimal(match[1]) * unit)
    raise ValueError(f"{shown(value)} is not a size; write for example 512MiB, 10GiB or a number of bytes")


def parse_time(value: object) -> float:
    """Seconds of `30s`, `2min`, `500ms`, 1.5. ValueError says what is expected."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 1 << 64 else math.inf if value > 0 else -math.inf  # a bound refuses it
    if isinstance(value, float) and not math.isnan(value):
        return value
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        unit = _TIME_UNITS_MS.get(match[2] or "s")
        if unit is not None:
            return float(Decimal(match[1]) * unit / 1000)
    raise ValueError(f"{shown(value)} is not a time; write for example 30s, 2min, 500ms or a number of seconds")


def parse_rate(value: object) -> int:
    """Bytes per second of `100MiB/s`. ValueError says what is expected."""
    try:
        return parse_size(value.strip().removesuffix("/s") if isinstance(value, str) else value)
    except ValueError:
        raise ValueError(f"{shown(value)} is not a rate; write for example 100MiB/s") from None
