"""Which groups make the predicted loss: its running total, the groups that lose most first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoquant_ray.report.charts.drawing import Frame, Tick

MOST = 0.8
"""Share of the loss whose groups are counted."""
_NUM_NAMED = 10
_MAX_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class GroupLoss:
    """A group's part of the predicted loss.

    Attributes:
        format: The chosen one, as people read it.
        share: Of the predicted loss, 0 to 1.
    """

    group: str
    format: str
    share: float


@dataclass(frozen=True, kw_only=True)
class LossShares:
    """The curve, and its first groups.

    Attributes:
        text: How few groups make most of the loss.
        rows: (group, format, share of the loss, running total) of those that lose most.
        frame: The drawing's rectangle.
        path: The curve as an SVG path.
        mark: Place of the last of the groups that make most of the loss: x, y.
        x_ticks, y_ticks: Numbers of groups, and shares.
    """

    text: str
    rows: list[tuple[str, str, str, str]]
    frame: Frame
    path: str
    mark: tuple[float, float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def loss_shares(losses: Sequence[GroupLoss]) -> LossShares | None:
    """Draw the curve; None where fewer than two groups lose anything.

    Args:
        losses: All groups of the model.
    """
    losing = sorted((loss for loss in losses if loss.share > 0), key=lambda loss: -loss.share)
    if len(losing) < 2:
        return None
    totals = [0.0, *itertools.accumulate(loss.share for loss in losing)]
    number = next((n for n, total in enumerate(totals) if total >= MOST), len(losing))
    frame, num_groups = Frame(width=520, height=300), len(losing)
    every = max(1, math.ceil(num_groups / _MAX_POINTS))
    shown = sorted({*range(0, num_groups, every), number, num_groups})
    places = [(frame.across(n / num_groups), frame.down(min(totals[n], 1.0))) for n in shown]
    step = _round_step(num_groups / 5)
    return LossShares(
        text=f"{number} of the {num_groups} groups that lose anything make {MOST:.0%} of the "
        f"predicted loss. {losing[0].group} alone makes {losing[0].share:.1%}.",
        rows=[
            (loss.group, loss.format, f"{loss.share:.1%}", f"{total:.1%}")
            for loss, total in zip(losing[:_NUM_NAMED], totals[1:], strict=False)
        ],
        frame=frame,
        path="M" + "L".join(f"{x} {y}" for x, y in places),
        mark=places[shown.index(number)],
        x_ticks=[
            Tick(place=frame.across(n / num_groups), label=f"{n}")
            for n in range(0, num_groups + 1, step)
        ],
        y_ticks=[Tick(place=frame.down(n / 5), label=f"{n / 5:.0%}") for n in range(6)],
    )


def _round_step(rough: float) -> int:
    """The round number of groups next above."""
    power = int(10 ** max(0, math.floor(math.log10(rough))))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
