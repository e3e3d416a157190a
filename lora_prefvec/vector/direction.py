"""Directions: how much of each preference is wanted, as a unit vector or as an angle."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from lora_prefvec.errors import InputError
from lora_prefvec.vector.checks import finite

_ANGLE = re.compile(r"(?P<main>[^=,@]+),(?P<other>[^=,@]+)@(?P<degrees>[^=,@]+)")
_FIX = "Write helpful=0.97,concise=-0.26, or the angle from one to the other: helpful,concise@-15"


def parse_direction(text: str) -> dict[str, float]:
    """Reads `helpful=0.97,concise=-0.26`, or the same as an angle in degrees: `helpful,concise@-15`.

    >>> {axis: round(part, 2) for axis, part in parse_direction("helpful,concise@-15").items()}
    {'helpful': 0.97, 'concise': -0.26}

    Raises:
        InputError: it is written in neither way, names an axis twice, or points nowhere.
    """
    if match := _ANGLE.fullmatch(text):
        angle = math.radians(_number(match["degrees"], text))
        parts = [(match["main"], math.cos(angle)), (match["other"], math.sin(angle))]
    else:
        parts = []
        for part in text.split(","):
            axis, equals, value = part.partition("=")
            if not equals:
                raise InputError(f"{text!r} is no direction", _FIX)
            parts.append((axis, _number(value, text)))
    found = {axis.strip(): value for axis, value in parts}
    if len(found) < len(parts) or not all(found):
        raise InputError(f"the direction {text!r} has to name every axis once", _FIX)
    return unit(found)


def unit(direction: Mapping[str, float]) -> dict[str, float]:
    """The direction at length 1.

    Raises:
        InputError: a part is no finite number, or all of them are 0.
    """
    parts = {axis: finite(part) for axis, part in direction.items()}
    largest = max(map(abs, parts.values()), default=0.0)
    if largest == 0:
        raise InputError("a direction of length 0 points nowhere", "Give for example helpful=1.")
    length = math.hypot(*(part / largest for part in parts.values()))
    return {axis: part / largest / length for axis, part in parts.items()}


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{text.strip()!r} in the direction {whole!r} is no number", _FIX) from None
