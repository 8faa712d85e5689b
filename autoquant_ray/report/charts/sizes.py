"""Bytes of the whole model before and after, as bars of the formats that they are in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoquant_ray.allocate.options import UNQUANTIZED_BITS
from autoquant_ray.report.charts.frontier_chart import size_text

REST = "not searched"
"""What holds matrices of no group, as embeddings and norms."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a bar.

    Attributes:
        format: A format, or ``REST``.
        start: Where it begins, as a share of the longer bar.
        share: Its length.
        title: Format and bytes in words.
    """

    format: str
    start: float
    share: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """The whole model, once."""

    name: str
    size: str
    parts: list[Part]


def size_bars(stored: Mapping[str, float], before: float, after: float) -> list[Bar]:
    """Bars of the model in 16 bits and as the solution has it.

    Args:
        stored: Format -> bytes in the solution, in the order of the bar.
        before: Bytes of the whole model in 16 bits.
        after: Bytes of the whole model in the solution.
    """
    sizes = {name: num_bytes for name, num_bytes in stored.items() if num_bytes > 0}
    rest = after - math.fsum(sizes.values())
    longest = max(before, after)
    parts, start = [], 0.0
    for name, num_bytes in [*sizes.items(), *([(REST, rest)] if rest > 0 else [])]:
        share = num_bytes / longest
        title = f"{name}: {size_text(num_bytes)}"
        parts.append(Part(format=name, start=start, share=share, title=title))
        start += share
    whole = Part(format="", start=0.0, share=before / longest, title=size_text(before))
    return [
        Bar(name=f"In {UNQUANTIZED_BITS} bits", size=size_text(before), parts=[whole]),
        Bar(name="This solution", size=size_text(after), parts=parts),
    ]
