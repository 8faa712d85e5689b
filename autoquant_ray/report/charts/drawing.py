"""Places of a drawing: values to pixels, on a linear or a log axis, with ticks at round numbers.

A template of the page makes SVG of them, which needs no script.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_MARGIN = 0.04
"""Room beyond the outermost values of a log axis, as a share of its length."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A labelled place on an axis, in pixels."""

    place: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The rectangle in which values are drawn, in pixels; y grows downwards."""

    width: int
    height: int
    left: int = 52
    top: int = 12
    right: int = field(init=False)
    base: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "right", self.width - 14)
        object.__setattr__(self, "base", self.height - 40)

    def across(self, share: float) -> float:
        """The place of a share of the horizontal axis, 0 to 1."""
        return round(self.left + share * (self.right - self.left), 1)

    def down(self, share: float) -> float:
        """The place of a share of the vertical axis, 0 to 1 from below."""
        return round(self.base - share * (self.base - self.top), 1)


@dataclass(frozen=True, kw_only=True)
class LogAxis:
    """An axis of logarithms.

    Attributes:
        low: Smallest value on the axis, above 0.
        high: Largest.
    """

    low: float
    high: float

    @classmethod
    def around(cls, values: list[float]) -> LogAxis:
        """An axis with all values, which are above 0, and some room beside them."""
        low, high = math.log10(min(values)), math.log10(max(values))
        margin = _MARGIN * (high - low) or 0.5
        return cls(low=10 ** (low - margin), high=10 ** (high + margin))

    def share(self, value: float) -> float:
        """Where a value is, 0 to 1 from low to high."""
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers on the axis, at most so many where a decade or more is shown."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
            values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            inside = [value for value in values if self.low <= value <= self.high]
            if len(inside) <= most:
                break
        every = math.ceil(len(inside) / most) if inside else 1
        return inside[::every]


def number_text(value: float) -> str:
    """A tick's number, in few characters."""
    return f"{value:.0e}".replace("e-0", "e-") if value < 1e-3 else f"{value:g}"
