"""Measured against predicted losses, both on a log axis, with the line on which they are equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoquant_ray.report.charts.drawing import Frame, LogAxis, Tick, number_text

_NUM_TICKS = 6


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A predicted and a measured loss.

    Attributes:
        kind: ``solution``, or ``rival`` for others.
        title: Name and both losses in words.
        predicted: Nats per token.
        measured: Nats per token.
    """

    kind: str
    title: str
    predicted: float
    measured: float


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A pair in pixels, with the text of its tooltip."""

    kind: str
    x: float
    y: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Geometry of the drawing, in pixels.

    Attributes:
        summary: The drawing in a sentence.
        line: Where both losses are equal, as an SVG path.
        band: Where they differ by less than what is normal, as an SVG path.
        kinds: Kinds of the spots.
    """

    summary: str
    frame: Frame
    line: str
    band: str
    spots: list[Spot]
    kinds: list[str]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def scatter(pairs: Sequence[Pair], *, near: float) -> Scatter | None:
    """Draw the pairs whose losses are above 0 and finite; None where there are none.

    Args:
        pairs: In any order.
        near: Factor between the two losses that is normal.
    """
    shown = [p for p in pairs if 0 < p.predicted < math.inf and 0 < p.measured < math.inf]
    if not shown:
        return None
    axis = LogAxis.around([loss for pair in shown for loss in (pair.predicted, pair.measured)])
    frame = Frame(width=520, height=300)

    def place(predicted: float, measured: float) -> tuple[float, float]:
        shares = (min(1.0, max(0.0, axis.share(loss))) for loss in (predicted, measured))
        return frame.across(next(shares)), frame.down(next(shares))

    def path(*corners: tuple[float, float]) -> str:
        return "M" + "L".join(f"{x} {y}" for x, y in (place(*corner) for corner in corners))

    low, high = axis.low, axis.high
    corners = [(low, low * near), (high / near, high), (high, high), (high, high / near)]
    ratios = sorted(pair.measured / pair.predicted for pair in shown)
    ticks = axis.ticks(_NUM_TICKS)
    return Scatter(
        summary=f"{len(shown)} measured; measured over predicted from {ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}. In the band they differ by less than a factor of {near:g}.",
        frame=frame,
        line=path((low, low), (high, high)),
        band=path((low, low), *corners, (low * near, low)) + "Z",
        spots=[
            Spot(kind=pair.kind, x=x, y=y, title=pair.title)
            for pair in sorted(shown, key=lambda pair: pair.kind == "solution")
            for x, y in (place(pair.predicted, pair.measured),)
        ],
        kinds=list(dict.fromkeys(pair.kind for pair in shown)),
        x_ticks=[Tick(place=place(v, low)[0], label=number_text(v)) for v in ticks],
        y_ticks=[Tick(place=place(low, v)[1], label=number_text(v)) for v in ticks],
    )
