"""Static SVG charts of the history page: no script, one shape per state, so that colour is not
needed to read them.

Points stand at equal distances, in the order of the runs. A run without a number is a cross on the
base line, and the line has a gap there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoquant_ray.report.charts.drawing import Tick

HEIGHT = 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 16, 34
_NUM_TICKS = 4
_LABEL_WIDTH = 78
_MIN_SPAN = 0.04


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run in a chart.

    Attributes:
        label: Below the axis.
        value: None where the run has no such number.
        shown: The value as text, or why there is none.
        mark: ``good``, ``look`` (drift, quarantined) or ``bad`` (no result).
        measured: A value that stands beside the run's own, hollow; None where there is none.
    """

    label: str
    value: float | None
    shown: str
    mark: str
    measured: float | None = None


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point in pixels, with the text of its tooltip."""

    x: float
    y: float
    mark: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Geometry of one chart, all in pixels.

    Attributes:
        lines: Stretches of a polyline as SVG paths, broken where a value is missing.
        bar_width: 0 for a line chart.
    """

    width: int
    left: int
    right: int
    base: float
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    marks: list[Mark]
    lines: list[str]
    bar_width: float
    height: int = HEIGHT


def make_chart(points: Sequence[Point], *, width: int, is_share: bool) -> Chart:
    """Lay points out.

    Args:
        points: In order; at least one.
        width: Pixels.
        is_share: Values are shares, drawn as bars from zero; otherwise a line over their range.
    """
    shown = [value for p in points for value in (p.value, p.measured) if value is not None]
    low, high, step = _range(shown, is_share)
    base, right = HEIGHT - _BOTTOM, width - _RIGHT
    slot = (right - _LEFT) / len(points)

    def y_of(value: float) -> float:
        return round(base - (value - low) / (high - low) * (base - _TOP), 1)

    marks = [
        Mark(
            x=round(_LEFT + slot * (i + 0.5), 1),
            y=base if p.value is None else y_of(p.value),
            mark="bad" if p.value is None and p.mark != "none" else p.mark,
            title=f"{p.label}: {p.shown}",
        )
        for i, p in enumerate(points)
    ]
    num_ticks = round((high - low) / step)
    ticks = [low + i * step for i in range(num_ticks + 1)]
    return Chart(
        width=width,
        left=_LEFT,
        right=right,
        base=base,
        y_ticks=[Tick(place=y_of(v), label=_tick_label(v, step, is_share)) for v in ticks],
        x_ticks=_x_ticks(points, marks, right - _LEFT),
        marks=[
            *(m for m in marks if m.mark != "none"),
            *(
                Mark(
                    x=m.x,
                    y=y_of(p.measured),
                    mark="measured",
                    title=f"{p.label}: measured {p.measured:#.4g} nats",
                )
                for p, m in zip(points, marks, strict=True)
                if p.measured is not None
            ),
        ],
        lines=[] if is_share else _lines(points, marks),
        bar_width=round(max(2.0, min(slot * 0.6, 28)), 1) if is_share else 0,
    )


def _range(values: list[float], is_share: bool) -> tuple[float, float, float]:
    """Low end, high end and distance of ticks, round numbers around the values."""
    high = max(values, default=0.0)
    low = 0.0 if is_share else min(values, default=0.0)
    if is_share:
        high = max(high, 0.05)
    if low < high / 2:
        low = min(low, 0.0)
    elif high - low < _MIN_SPAN * high:  # what is below is nothing to look at
        low, high = low - _MIN_SPAN / 2 * high, high + _MIN_SPAN / 2 * high
    if high <= low:
        high = low + 1.0
    rough = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def _tick_label(value: float, step: float, is_share: bool) -> str:
    if is_share:
        return f"{value * 100:.{max(0, _decimals(step * 100))}f}%"
    return f"{value:.2e}" if 0 < step < 1e-5 else f"{value:.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    """Decimals that tell multiples of a step apart."""
    return next((n for n in range(7) if abs(round(step, n) - step) < step * 1e-6), 7)


def _x_ticks(points: Sequence[Point], marks: Sequence[Mark], width: float) -> list[Tick]:
    """Labels of the newest point and of as many before it as fit, none beyond the drawing."""
    every = max(1, math.ceil(_LABEL_WIDTH * len(points) / width))
    end = _LEFT + width + _RIGHT - _LABEL_WIDTH / 2
    ticks: list[Tick] = []
    for i in range(len(points) - 1, -1, -every):
        place = min(marks[i].x, end)
        if not ticks or ticks[-1].place - place >= _LABEL_WIDTH:
            ticks.append(Tick(place=round(place, 1), label=points[i].label))
    return ticks


def _lines(points: Sequence[Point], marks: Sequence[Mark]) -> list[str]:
    stretches: list[list[str]] = [[]]
    for point, mark in zip(points, marks, strict=True):
        if point.value is None:
            stretches.append([])
        else:
            stretches[-1].append(f"{mark.x} {mark.y}")
    return ["M" + "L".join(stretch) for stretch in stretches if len(stretch) > 1]
