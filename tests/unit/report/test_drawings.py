"""Drawings of a report that need no script: their places are those of the numbers."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from autoquant_ray.report.charts.drawing import LogAxis
from autoquant_ray.report.charts.loss_shares import GroupLoss, loss_shares
from autoquant_ray.report.charts.scatter import Pair, scatter
from autoquant_ray.report.charts.sizes import size_bars


def test_running_total_counts_the_groups_of_four_fifths() -> None:
    shares = np.random.default_rng(0).dirichlet(np.full(200, 0.3))
    shares[:5] = 0
    shares /= shares.sum()
    losses = [GroupLoss(group=f"g{n}", format="f", share=s) for n, s in enumerate(shares)]
    made = loss_shares(losses)
    assert made is not None
    totals = np.cumsum(np.sort(shares)[::-1])
    number = int(np.argmax(totals >= 0.8)) + 1
    losing = int((shares > 0).sum())
    assert made.text.startswith(f"{number} of the {losing} groups that lose anything make 80%")
    assert [row[0] for row in made.rows] == [f"g{n}" for n in np.argsort(-shares)[:10]]
    assert [row[3] for row in made.rows] == [f"{total:.1%}" for total in totals[:10]]
    frame = made.frame
    x, y = made.mark
    assert x == pytest.approx(frame.left + number / losing * (frame.right - frame.left), abs=0.1)
    height = frame.base - frame.top
    assert (frame.base - y) / height == pytest.approx(totals[number - 1], abs=1e-3)
    places = [tuple(map(float, p.split())) for p in re.split("[ML]", made.path)[1:]]
    assert places[0] == (frame.left, frame.base)
    assert places[-1] == (frame.right, pytest.approx(frame.top, abs=0.1))
    assert made.mark in places


def test_curve_of_many_groups_is_short_and_of_one_is_none() -> None:
    many = [GroupLoss(group=f"g{n}", format="f", share=1 / 6144) for n in range(6144)]
    made = loss_shares(many)
    assert made is not None
    assert made.path.count("L") < 500
    assert loss_shares(many[:1]) is None
    assert loss_shares([GroupLoss(group="a", format="f", share=0.0)] * 3) is None


def pair(predicted: float, measured: float, kind: str = "rival") -> Pair:
    return Pair(kind=kind, title="t", predicted=predicted, measured=measured)


def test_equal_losses_lie_on_the_line_and_others_beside_it() -> None:
    made = scatter([pair(0.1, 0.1, "solution"), pair(0.02, 0.02), pair(0.05, 0.1)], near=1.5)
    assert made is not None
    (x1, y1), (x2, y2) = (
        (float(a), float(b)) for a, b in re.findall(r"([\d.]+) ([\d.]+)", made.line)
    )
    slope = (y2 - y1) / (x2 - x1)
    off = {(s.kind, round(s.y - (y1 + slope * (s.x - x1)), 0)) for s in made.spots}
    assert ("solution", 0) in off
    above = min(made.spots, key=lambda spot: spot.y - (y1 + slope * (spot.x - x1)))
    assert above.y < y1 + slope * (above.x - x1) - 20, "measured more than predicted: above"
    assert made.spots[-1].kind == "solution", "drawn last, so that nothing hides it"
    assert "measured over predicted from 1.00 to 2.00" in made.summary


def test_losses_that_no_log_axis_has_are_left_out() -> None:
    assert scatter([pair(0.0, 0.1), pair(0.1, math.inf), pair(0.1, 0.0)], near=1.5) is None
    made = scatter([pair(0.1, math.inf), pair(0.1, 0.2)], near=1.5)
    assert made is not None
    assert len(made.spots) == 1


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (0.06, 0.25), (1e-6, 3.0), (1e-12, 1e6)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    axis = LogAxis.around([low, high])
    ticks = axis.ticks(6)
    assert 1 <= len(ticks) <= 6
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    assert axis.share(axis.low) == 0
    assert axis.share(axis.high) == pytest.approx(1)


def test_bars_are_as_long_as_their_bytes() -> None:
    before, after = size_bars({"a": 100.0, "b": 300.0, "c": 0.0}, 1000.0, 450.0)
    assert [part.share for part in before.parts] == [1.0]
    assert [(part.format, part.start, part.share) for part in after.parts] == [
        ("a", 0.0, 0.1),
        ("b", 0.1, pytest.approx(0.3)),
        ("not searched", pytest.approx(0.4), pytest.approx(0.05)),
    ]
