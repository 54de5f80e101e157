"""Kubernetes quantities, such as `500m`, `2Gi` or `1e3`, as exact numbers."""

from __future__ import annotations

import re
from fractions import Fraction

_QUANTITY = re.compile(r"([+-]?[0-9]+(?:\.[0-9]*)?|[+-]?\.[0-9]+)(?:[eE]([+-]?[0-9]+)|(m|k|[MGTPE]|[KMGTPE]i))?")
_SCALE: dict[str, Fraction] = {
    "m": Fraction(1, 1000),
    **{suffix: Fraction(1000**power) for power, suffix in enumerate("kMGTPE", start=1)},
    **{f"{suffix}i": Fraction(1024**power) for power, suffix in enumerate("KMGTPE", start=1)},
}


def quantity(text: str | int | float) -> Fraction:
    """The value of a quantity. Raises ValueError."""
    text = str(text)
    if text.isdecimal():
        return Fraction(int(text))
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity; accepted are for example 500m, 2, 1.5 and 4Gi")
    number, exponent, suffix = match.groups()
    return Fraction(number) * (Fraction(10) ** int(exponent) if exponent else _SCALE.get(suffix or "", Fraction(1)))
