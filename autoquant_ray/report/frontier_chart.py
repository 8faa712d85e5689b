"""The frontier of a report as a static SVG: predicted loss (log) against size.

Everything is laid out here, in pixels; the template only writes shapes. One shape per kind of
point, so that colour is not needed, and each has its numbers as a tooltip and in a table.

Drawn by hand, as the history page's charts are, because every solution has such a page: Plotly's
script alone is 4.8 MB, Bokeh's 1.3 MB on a canvas without text; Vega through vl-convert takes 0.4 s
and 84 MB installed, Matplotlib 0.3 s to import, in a ``solve`` that takes one second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autoquant_ray.report.site_charts import Tick

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 40, 46
_CHARACTER, _LINE = 7.0, 15.0
_MAX_DECADES = 5
_STEP = 5.0
_SMALLEST_BAR = 20.0
_TICK_WIDTH = 48
_LABELLED = ("plan", "knee", "uniform")

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point of the chart.

    Attributes:
        kind: ``curve``, ``knee``, ``plan``, ``uniform`` or ``measured``.
        name: What it is.
        bits: Average stored bits over the searched groups.
        num_bytes: Of the whole model.
        loss: Nats per token (imported: no unit).
        stderr: None where unknown.
    """

    kind: str
    name: str
    bits: float
    num_bytes: float
    loss: float
    stderr: float | None = None

    @property
    def title(self) -> str:
        """Its numbers in words."""
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        size = f"{self.num_bytes / 2**20:,.1f} MiB"
        return f"{self.name}: {self.loss:#.4g}{error} at {self.bits:.3f} bits, {size}"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point in pixels.

    Attributes:
        low: Where its error bar begins; None without one that is longer than the mark.
        high: Where it ends.
    """

    kind: str
    x: float
    y: float
    title: str
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Label:
    """A name beside a point."""

    x: float
    y: float
    anchor: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Geometry of the chart, all in pixels."""

    width: int
    height: int
    left: float
    right: float
    top: float
    base: float
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    size_ticks: list[Tick]
    line: str
    marks: list[Mark]
    labels: list[Label]


def draw_frontier(dots: Sequence[Dot], *, width: int, height: int) -> Drawing | None:
    """Lay the points out.

    Args:
        dots: In any order. What loses nothing has no place on a log axis and is left out, as is
            what loses less than a hundred-thousandth of the most, or breaks the model.
        width: Pixels.
        height: Pixels.

    Returns:
        None where fewer than two points of the curve can be shown.
    """
    shown = visible(dots)
    curve = sorted((d for d in shown if d.kind in ("curve", "knee")), key=lambda d: d.bits)
    if len(curve) < 2:
        return None
    low, high = _log_range(shown)
    first, last, step = _bits_range(shown, width)
    right, base = width - _RIGHT, height - _BOTTOM
    has_sizes = _is_growing(curve)
    top = _TOP if has_sizes else _RIGHT

    def x_of(bits: float) -> float:
        return round(_LEFT + (bits - first) / (last - first) * (right - _LEFT), 1)

    def y_of(loss: float) -> float:
        at = (math.log10(max(loss, 10**low)) - low) / (high - low)
        return round(base - at * (base - top), 1)

    marks = [_mark(dot, x_of(dot.bits), y_of) for dot in shown]
    num_steps = round((last - first) / step)
    x_ticks = [first + n * step for n in range(num_steps + 1)]
    return Drawing(
        width=width,
        height=height,
        left=_LEFT,
        right=right,
        top=top,
        base=base,
        y_ticks=[Tick(place=y_of(value), label=f"{value:g}") for value in _log_ticks(low, high)],
        x_ticks=[Tick(place=x_of(bits), label=f"{bits:g}") for bits in x_ticks],
        size_ticks=_size_ticks(curve, x_ticks, x_of) if has_sizes else [],
        line="M" + "L".join(f"{x_of(dot.bits)} {y_of(dot.loss)}" for dot in curve),
        marks=sorted(marks, key=lambda mark: _ORDER.index(mark.kind)),
        labels=_labels(
            list(zip(shown, marks, strict=True)),
            _along([(x_of(dot.bits), y_of(dot.loss)) for dot in curve]),
            (_LEFT, top, right, base),
        ),
    )


_ORDER = ("curve", "uniform", "knee", "plan", "measured")
"""What is drawn first; a ring around a star is still seen, a star on a ring hides it."""


def visible(dots: Sequence[Dot]) -> list[Dot]:
    """Points that have a place on the log axis."""
    losing = [dot for dot in dots if 0 < dot.loss < math.inf]
    most = max((dot.loss for dot in losing), default=0.0)
    return [dot for dot in losing if dot.loss >= most * 10.0**-_MAX_DECADES]


def _mark(dot: Dot, x: float, y_of: Callable[[float], float]) -> Mark:
    error = dot.stderr or 0.0
    low, high = y_of(dot.loss - error), y_of(dot.loss + error)
    has_bar = dot.kind in ("plan", "measured") and low - high > _SMALLEST_BAR
    return Mark(
        kind=dot.kind,
        x=x,
        y=y_of(dot.loss),
        title=dot.title,
        low=low if has_bar else None,
        high=high if has_bar else None,
    )


def _log_range(dots: Sequence[Dot]) -> tuple[float, float]:
    """Exponents of the ends of the axis, at 1, 2 or 5 times a power of ten."""
    low = math.log10(min(dot.loss for dot in dots)) - 0.03
    high = math.log10(max(dot.loss for dot in dots)) + 0.05
    marks = [
        e + math.log10(m)
        for e in range(math.floor(low) - 1, math.ceil(high) + 1)
        for m in _MANTISSAS
    ]
    return max(m for m in marks if m <= low), min(m for m in [*marks, high + 1] if m >= high)


_MANTISSAS = (1, 2, 5)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; 2 and 5 times them too where the axis is short."""
    mantissas = _MANTISSAS if high - low < 2.5 else (1,)
    values = [
        mantissa * 10.0**exponent
        for exponent in range(math.floor(low), math.ceil(high) + 1)
        for mantissa in mantissas
    ]
    return [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]


def _bits_range(dots: Sequence[Dot], width: int) -> tuple[float, float, float]:
    """Ends of the axis and the distance of its ticks, in bits."""
    low, high = min(dot.bits for dot in dots), max(dot.bits for dot in dots)
    room = (width - _LEFT - _RIGHT) / _TICK_WIDTH
    steps = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
    step = next((s for s in steps if (high - low) / s <= min(room, 13) - 1), 4.0)
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step
    return first, max(last, first + step), step


def _is_growing(curve: Sequence[Dot]) -> bool:
    """Whether more bits are more bytes; not so with a head that shares the embedding's."""
    return all(one.num_bytes < other.num_bytes for one, other in itertools.pairwise(curve))


def _size_ticks(
    curve: Sequence[Dot], bits: Sequence[float], x_of: Callable[[float], float]
) -> list[Tick]:
    """Sizes above the drawing, where the curve has that many bits."""
    places, sizes = [dot.bits for dot in curve], [dot.num_bytes for dot in curve]
    unit, name = (2**30, "GiB") if sizes[-1] >= 2**30 else (2**20, "MiB")
    inside = [b for b in bits if places[0] <= b <= places[-1]]
    every = 2 if len(bits) > 1 and (x_of(bits[1]) - x_of(bits[0])) < 1.6 * _TICK_WIDTH else 1
    ticks = []
    for at in inside[::every]:
        value = float(np.interp(at, places, sizes)) / unit
        decimals = 2 if value < 10 else 1 if value < 100 else 0
        ticks.append(Tick(place=x_of(at), label=f"{value:,.{decimals}f} {name}"))
    return ticks


def _along(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes along a line, which names must not cover."""
    boxes = []
    for (x, y), (to_x, to_y) in itertools.pairwise(corners):
        count = max(1, math.ceil(math.hypot(to_x - x, to_y - y) / _STEP))
        for n in range(count):
            at_x, at_y = x + (to_x - x) * n / count, y + (to_y - y) * n / count
            boxes.append((at_x - 2, at_y - 2, at_x + 2, at_y + 2))
    return boxes


def _labels(points: Sequence[tuple[Dot, Mark]], line: Sequence[Box], frame: Box) -> list[Label]:
    """Names beside points where there is room; the most important ones first."""
    taken = [*line, *_around(points)]
    labels = []
    for kind in _LABELLED:
        for dot, mark in points:
            placed = None if dot.kind != kind else _place(dot.name, mark, taken, frame)
            if placed is not None:
                label, box = placed
                taken.append(box)
                labels.append(label)
    return labels


def _around(points: Sequence[tuple[Dot, Mark]]) -> list[Box]:
    return [(m.x - 5, m.y - 5, m.x + 5, m.y + 5) for d, m in points if d.kind != "curve"]


def _place(text: str, mark: Mark, taken: Sequence[Box], frame: Box) -> tuple[Label, Box] | None:
    """The first free place around a point: right, left, above, below."""
    wide = _CHARACTER * len(text)
    candidates = (
        (mark.x + 10, mark.y + 4, "start", 0.0),
        (mark.x + 7, mark.y - 9, "start", 0.0),
        (mark.x - 10, mark.y + 4, "end", -wide),
        (mark.x, mark.y - 12, "middle", -wide / 2),
        (mark.x - 7, mark.y + 19, "end", -wide),
        (mark.x, mark.y + 21, "middle", -wide / 2),
    )
    for x, y, anchor, shift in candidates:
        box = (x + shift, y - _LINE + 3, x + shift + wide, y + 3)
        is_inside = (
            box[0] >= frame[0] and box[2] <= frame[2] and box[1] >= frame[1] and box[3] <= frame[3]
        )
        if is_inside and not any(_overlap(box, other) for other in taken):
            return Label(x=round(x, 1), y=round(y, 1), anchor=anchor, text=text), box
    return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
