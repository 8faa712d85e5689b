"""Values of config fields as people write them: bytes, shares, ``auto`` or a number."""

from __future__ import annotations

import re
from typing import Literal

_BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTE_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_BYTES = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*$", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """Parse a byte count such as ``1500000``, ``2.5GiB`` or ``800MB``.

    Raises:
        ValueError: The text is not a positive byte count.
    """
    match = _BYTES.match(str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a byte count; write for example 2.5GiB or 800MB")
    number = round(float(match[1]) * _BYTE_UNITS[(match[2] or "").lower()])
    if number <= 0:
        raise ValueError(f"{value!r} must be more than 0 bytes")
    return number


def parse_share(value: float | str) -> float:
    """Parse a share such as ``0.01`` or ``1%``.

    Raises:
        ValueError: Not a number, or not between 0 and 1.
    """
    text = str(value).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{value!r} is not a share; write for example 0.01 or 1%") from None
    if not 0 < share < 1:
        raise ValueError(f"{value!r} must be above 0 and below 1, for example 0.01 or 1%")
    return share


def parse_gib(value: float | str) -> float | Literal["auto"]:
    """Parse ``auto`` or a number of GiB.

    Raises:
        ValueError: Neither, or below 0 or not finite.
    """
    if value == "auto":
        return "auto"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"{value!r} is neither 'auto' nor a number of GiB, 0 or more")
    return number


def parse_workers(value: int | str) -> int | Literal["auto"]:
    """Parse ``auto`` or a number of workers.

    Raises:
        ValueError: Neither, or below 1.
    """
    if value == "auto":
        return "auto"
    if not str(value).isdecimal():
        raise ValueError(f"{value!r} is neither 'auto' nor a number of workers")
    if int(value) < 1:
        raise ValueError(f"{value} must be at least 1")
    return int(value)
